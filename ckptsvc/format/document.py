"""The document of plain values: how it names things, and how it and the tensors become one nested dict again.

The document of a rank mirrors its state tree and says everything that is not a tensor. A tensor of a module
or of an optimizer is not mentioned: its logical name already is its path. Where a name could not tell what
stood there (an index of a list or a key, a tensor or an array) a `TensorRef` or an `ArrayRef` stands in its
place.

Beside the keys of the state tree it has three of its own, which begin with "@": RANK, WORLD_SIZE and RNG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format.objects import TensorRef, register_codec

RANK = "@rank"
"""The rank that wrote the document. Names of its own tensors begin with "@rank/<r>/"."""

WORLD_SIZE = "@world_size"
"""The number of ranks when it was written."""

RNG = "@rng"
"""The random number generators of that rank (written by `ckptsvc.client.rng`)."""


class ArrayRef(msgspec.Struct, frozen=True):
    """Stands in a document where a numpy array was that is stored as a tensor.

    Attributes:
        name: the logical tensor's name.
    """

    name: str


def _array_ref(name: Any) -> ArrayRef:
    if not isinstance(name, str):
        raise InvalidInput(f"the name of an array is {name!r}")
    return ArrayRef(name)


register_codec(ArrayRef, "ckptsvc.array", lambda ref: ref.name, _array_ref)


def join(path: str, *keys: object) -> str:
    """The JSON pointer (RFC 6901, without the leading slash) of what stands at `keys` under `path`."""
    tail = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return f"{path}/{tail}" if path else tail


def split(name: str) -> list[str]:
    """The keys of a JSON pointer without leading slash; the opposite of `join`."""
    return [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]


def own_name(rank: int, name: str) -> str:
    """The name of a tensor that belongs to one rank alone."""
    return f"@rank/{rank}/{name}"


def replace_refs(plain: Any, fetch: Callable[[TensorRef | ArrayRef], Any]) -> Any:
    """The same tree with what `fetch` gives in the place of every reference; containers are made anew."""
    kind = type(plain)
    if kind is dict:
        return {key: replace_refs(value, fetch) for key, value in plain.items()}
    if kind is list:
        return [replace_refs(value, fetch) for value in plain]
    if kind is tuple:
        return tuple(replace_refs(value, fetch) for value in plain)
    if isinstance(plain, TensorRef | ArrayRef):
        return fetch(plain)
    if isinstance(plain, dict):  # OrderedDict, defaultdict and Counter have an order or a factory to keep
        copied = plain.copy()
        for key, value in plain.items():
            copied[key] = replace_refs(value, fetch)
        return copied
    return plain


def references(plain: Any) -> Iterable[TensorRef | ArrayRef]:
    """Every reference in a tree, in its order."""
    if isinstance(plain, TensorRef | ArrayRef):
        yield plain
    elif isinstance(plain, dict):
        for value in plain.values():
            yield from references(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from references(value)


def assemble(document: Mapping[str, Any], tensors: Mapping[str, Any], as_array: Callable[[Any], Any]) -> dict[str, Any]:
    """The state tree as one nested dict of plain values and tensors, with no live object to go by.

    Args:
        document: a rank's document.
        tensors: name -> value, for all logical tensors that are wanted, aliases among them. A reference to
            one that is missing becomes None; names that begin with "@" appear only where something refers to
            them.
        as_array: makes a numpy array of such a value.

    Raises:
        Damaged: a tensor's name leads through a value of the document that is not a container.
    """
    placed: set[str] = set()

    def fetch(ref: TensorRef | ArrayRef) -> Any:
        placed.add(ref.name)
        value = tensors.get(ref.name)
        return as_array(value) if value is not None and isinstance(ref, ArrayRef) else value

    tree: dict[str, Any] = {
        key: replace_refs(value, fetch) for key, value in document.items() if not key.startswith("@")
    }
    for name, value in tensors.items():
        if name in placed or name.startswith("@"):
            continue
        *path, last = split(name)
        node: Any = tree
        for key in path:
            node = _step(node, key, name)
        if not isinstance(node, dict):
            raise Damaged(f"the tensor /{name} has no place in the document of plain values")
        node.setdefault(last, value)
    return tree


def _step(node: Any, key: str, name: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, {})
    if isinstance(node, list | tuple) and key.isascii() and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    raise Damaged(f"the tensor /{name} has no place in the document of plain values")
