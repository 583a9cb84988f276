"""Tied weights in checkpoints that store a tensor under each of its names and do not say that they are one.

Equal bytes alone prove nothing: two tensors may have started equal, or be zero. Two names are taken for one tensor only
if all of this is so: one is called like an output projection and the other like a token embedding; type and shape are
the same; the optimizer has state for one of them at most, as it has for one name of a tied tensor only; and every byte
is equal. That no job trains them apart afterwards is still a guess, which is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from ckptsvc.errors import InvalidInput
from ckptsvc.geometry.box import Box, cut
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import DTYPES

STRETCH = 64 << 20
"""Bytes of each of two tensors that are compared at a time."""

_OUTPUT = re.compile(r"[./](?:lm_head|output|output_layer|embed_out|unembed\w*|head|classifier)\.weight$")
_EMBEDDING = re.compile(
    r"[./](?:wte|tok\w*_emb\w*|embed_tokens|word_embeddings?|embed_in|shared|token_embedding\w*|embedding)\.weight$"
)


def tie(foreign: Foreign, said: str | None) -> None:
    """Make one tensor of names that are one.

    Args:
        foreign: a sealed checkpoint; it must be sealed again.
        said: what the user says: "kept=other,...", "no" for none, or None to find them.

    Raises:
        InvalidInput: the user says of two tensors that they are one, and they are not equal.
        Damaged, StoreError: a tensor cannot be read.
    """
    if said == "no":
        return
    if said is not None:
        for kept, other in _said(said):
            if kept not in foreign or other not in foreign or not equal(foreign, kept, other):
                raise InvalidInput(f"{foreign.origin}: tied={said!r}, but {kept} and {other} are not equal")
            alias(foreign, kept, other)
        return
    trained = {name.removeprefix(STATE).rsplit("/", 1)[0] for name in foreign.names() if name.startswith(STATE)}
    for kept, other in list(_candidates(foreign, trained)):
        if other in foreign.names() and equal(foreign, kept, other):
            alias(foreign, kept, other)
            why = "equal, and only one of them has optimizer state" if trained else "equal; there is no optimizer state"
            foreign.notes.append(
                Note("warning", f"{other} is taken as another name of {kept}: they are {why}; tied=no keeps them apart")
            )


def alias(foreign: Foreign, kept: str, other: str) -> None:
    """From now on `other` is a name of `kept`."""
    foreign.drop(other)
    foreign.aliases[other] = kept


def equal(foreign: Foreign, one: str, other: str) -> bool:
    """Whether two tensors are equal, byte for byte; they are read in stretches of `STRETCH`."""
    meta, second = foreign.meta(one), foreign.meta(other)
    if meta[1:] != second[1:]:
        return False
    for box in cut(Box.full(meta.shape), STRETCH // DTYPES[meta.dtype].itemsize):
        wants = [Want(name, meta.dtype, meta.shape, box) for name in (one, other)]
        left, right = read_arrays(foreign, foreign.source, wants)
        if not np.array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)):
            return False
    return True


def _said(said: str) -> Iterator[tuple[str, str]]:
    for pair in said.split(","):
        kept, sign, other = pair.partition("=")
        if not sign or not kept or not other:
            raise InvalidInput(f"tied={said!r} is not NAME=NAME,...")
        yield MODEL + kept, MODEL + other


def _candidates(foreign: Foreign, trained: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs that may be one; the first has the optimizer's state, if there is any."""
    names = [name for name in foreign.names() if name.startswith(MODEL)]
    outputs = [name for name in names if _OUTPUT.search(name)]
    embeddings = [name for name in names if _EMBEDDING.search(name)]
    for output in outputs:
        for embedding in embeddings:
            has = [name.removeprefix(MODEL) in trained for name in (embedding, output)]
            if foreign.meta(output)[1:] == foreign.meta(embedding)[1:] and not all(has):
                yield (output, embedding) if has[1] else (embedding, output)
