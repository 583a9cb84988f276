"""What a conversion is asked for, and the checkpoints it reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput, NoCheckpoint
from ckptsvc.format.checksum import digest128
from ckptsvc.format.commit import CommitRecord
from ckptsvc.interop.conversion.average import Averaged
from ckptsvc.interop.conversion.native import NativeLogical
from ckptsvc.interop.conversion.select import renaming, select
from ckptsvc.interop.conversion.target import PARTIAL, RECORDS
from ckptsvc.interop.files import Files, open_files
from ckptsvc.interop.formats import NATIVE, open_foreign, split_address
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.naming.families import Family, family, read_family
from ckptsvc.interop.naming.layouts import translate
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.storage import canonical
from ckptsvc.storage.opening import open_store

_DEPTH, _MOST_FILES = 5, 1_000_000  # of a source, when it is fingerprinted


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for; the same request resumes a conversion.

    Attributes:
        sources: addresses (see interop.formats); several only to be averaged.
        target: address.
        from_options, options: of the formats.
        only, drop_optimizer, rename: see interop.conversion.select; rules as in `renaming`.
        dtype: of the weights, "" leaves it.
        average: 0 for none; otherwise the mean of so many newest checkpoints of the source, or of all sources.
        to: the parallel layout of the target, as geometry.parallel reads it; "" for none.
        names: the side of the family's name map that the tensors are given, as "hf" or "megatron"; "" leaves them.
        family: of models, or the file of one of the user's own (see interop.naming.families); "" is found out.
        variables: sizes that the family's rules speak of and the checkpoint does not say.
    """

    sources: tuple[str, ...]
    target: str
    from_options: dict[str, str] = {}
    options: dict[str, str] = {}
    only: tuple[str, ...] = ()
    drop_optimizer: bool = False
    rename: tuple[str, ...] = ()
    dtype: str = ""
    average: int = 0
    to: str = ""
    names: str = ""
    family: str = ""
    variables: dict[str, int] = {}


_File = tuple[str, int, int]
"""Name, size in bytes and time of the last write in nanoseconds (0 where the store does not tell)."""


class _SourceFiles(NamedTuple):
    """What the files of a source were when it was opened; `target` does not count among them."""

    place: str
    target: str
    files: list[_File]


class Sources:
    """The opened sources of a request.

    Attributes:
        logical: all of them as one checkpoint, with what was selected.
        identity: digest of what they are.
    """

    def __init__(self, logical: Logical, identity: str, files: Sequence[_SourceFiles] = ()) -> None:
        """`files` are those of the sources whose bytes do not verify themselves."""
        self.logical, self.identity = logical, identity
        self._files = files

    def check_unchanged(self) -> None:
        """See that no file of a source was written, removed or added since they were opened.

        Raises:
            Damaged: one was: what was read may be of several states of it.
        """
        for place, target, before in self._files:
            changed = set(before) ^ set(_fingerprint(open_files(place), target))
            if changed:
                name = min(changed)[0]
                raise Damaged(
                    f"{name} in {place} has changed while it was read: what was made would be a mixture",
                    hint="when nobody writes there any more, begin again with --restart",
                )


def open_sources(request: Request, opened: Sequence[Logical] = ()) -> Sources:
    """Open what a request reads.

    Args:
        request: see `Request`.
        opened: checkpoints to take instead of its sources (declared ones, for a plan).

    Raises:
        CkptsvcError: as the formats raise; InvalidInput for what does not go together.
    """
    if not opened:
        if request.average > 1 and len(request.sources) == 1:
            opened = _newest(request.sources[0], request.average)
        else:
            opened = [open_foreign(address, request.from_options) for address in request.sources]
    try:
        files = [_files_of(one, request.target) for one in opened]
        identity = digest128("\n".join(map(_identity, opened, files)).encode())
        logical: Logical = Averaged(opened) if request.average else opened[0]
        native = target_format(request.target) == NATIVE
        if not native or request.only or request.rename or request.drop_optimizer:
            logical = select(
                logical, only=request.only, drop_optimizer=request.drop_optimizer, rename=renaming(request.rename),
                own=native,
            )  # fmt: skip
        if request.names:
            model, given = model_of(request.family), request.variables
            logical = translate(logical, to=request.names, model=model, given=given)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return Sources(logical, identity, [each for each in files if each is not None])


def model_of(name: str) -> Family | None:
    """A family that ships, or one in a file of the user's own; None for "".

    Raises:
        InvalidInput, NotFound: there is none, or the file is not one.
    """
    if not name:
        return None
    return read_family(name) if name.endswith(".toml") or "/" in name else family(name)


def target_format(address: str) -> str:
    """The format that an address of a target names; our own where it names none."""
    return split_address(address)[0] or NATIVE


def _newest(address: str, count: int) -> list[Logical]:
    """The newest checkpoints of a run of our own, of different steps."""
    name, place = split_address(address)
    if name not in ("", NATIVE):
        raise InvalidInput(f"{address}: only a run of ckptsvc has several checkpoints", hint="name them all instead")
    store = open_store(place)
    seen: set[int] = set()
    found: list[Logical] = []
    for ref, commit in find(store):
        if len(found) < count and ref.step not in seen:
            if not isinstance(commit, CommitRecord):
                raise commit
            seen.add(ref.step)
            found.append(NativeLogical(open_checkpoint(store, ref, commit)))
    if len(found) < count:
        raise NoCheckpoint(f"{store.url} has {len(found)} checkpoints; the mean of {count} is wanted")
    return found


def _own_identity(logical: Logical) -> str:
    """What a source says that it is: one whose bytes verify themselves does."""
    return f"{getattr(logical, 'identity', '')}"


def _files_of(logical: Logical, target: str) -> _SourceFiles | None:
    """The files that a source is told by; None for one that says itself what it is."""
    if _own_identity(logical):
        return None
    name, place = split_address(logical.origin)
    if not name:
        return None
    return _SourceFiles(place, target, _fingerprint(open_files(place), target))


def _identity(logical: Logical, files: _SourceFiles | None) -> str:
    """What tells a source from another, also from itself rewritten."""
    known = _own_identity(logical)
    if known:
        return known
    metas = [logical.meta(name) for name in logical.names()]
    name = split_address(logical.origin)[0]
    return digest128(
        msgspec.json.encode([name, logical.step, metas, dict(logical.aliases), files.files if files else []])
    )


def _fingerprint(files: Files, target: str) -> list[_File]:
    """Name, size and time (where there is one) of every file; the target's and those under way do not count."""
    found: list[_File] = []
    only = getattr(files, "only", "")  # a file that was named; others beside it do not matter
    root = Path(files.url).parent if only else Path(files.url)
    skipped = canonical(split_address(target)[1]).removeprefix("file://")
    waiting = [] if only else [("", 0)]
    if only:
        found.append((only, files.size(only), os.stat(root / only).st_mtime_ns))
    while waiting and len(found) < _MOST_FILES:
        folder, depth = waiting.pop()
        for name in files.children(folder):
            key = f"{folder}/{name}" if folder else name
            try:
                size = files.size(key)
            except CkptsvcError:  # a folder
                own = name.endswith((PARTIAL, RECORDS)) or f"{root / key}" == skipped
                if depth < _DEPTH and not own:
                    waiting.append((key, depth + 1))
                continue
            found.append((key, size, os.stat(root / key).st_mtime_ns if root.is_dir() else 0))
    files.close()
    return sorted(found)
