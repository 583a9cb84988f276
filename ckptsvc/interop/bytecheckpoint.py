"""Checkpoints of ByteCheckpoint 0.0.2, read: DCP directories whose entries are the bytes of tensors.

    latest_checkpointed_iteration.txt
    global_step_<n>/model/.metadata, __<rank>_0.distcp            names are those of the model
    global_step_<n>/optimizer/.metadata, ...                      state.<fqn>.<slot>, and param_groups as one list
    global_step_<n>/extra_state/extra_state_rank_<rank>.pt

Of the extra states that of rank 0 is taken. Options are those of `interop.dcp.read`, and `step=N`, which is the newest
without it. Directories without ByteCheckpoint's mark are read as plain DCP of that arrangement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptsvc.errors import ConfigError, NotFound
from ckptsvc.interop.dcp.metadata import Chunk, Directory, Place, Tensor, has_metadata, read_directory
from ckptsvc.interop.dcp.state import State
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Foreign, Note
from ckptsvc.interop.plain import Plain
from ckptsvc.interop.torch_format.file import read_torch

LATEST = "latest_checkpointed_iteration.txt"

_STEP = re.compile(r"global_step_(\d{1,18})")
_EXTRA = re.compile(r"extra_state_rank_(\d{1,9})\.pt")


def detect(files: Files) -> bool:
    """Whether there is a model's directory of it, here or in the folder of a step."""
    if getattr(files, "only", ""):
        return False
    return _is_checkpoint(files, "") or any(_is_checkpoint(files, f"{name}/") for name in _steps(files).values())


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no such checkpoint.
        CkptsvcError: as `interop.dcp.read.read`.
    """
    prefix, step = _prefix(files, options.get("step"))
    state = State(files, origin, {name: value for name, value in options.items() if name != "step"})
    for part, key in (("model", {"model": ""}), ("optimizer", {"optimizer": ""})):
        if has_metadata(files.children(prefix + part)):
            directory = read_directory(files, f"{prefix}{part}/")
            state.add(_raw(directory) if "bytecheckpoint_version" in directory.extra else directory, **key)
    foreign = state.done()
    foreign.step = step
    _add_extra(foreign, prefix)
    return foreign


def _prefix(files: Files, wanted: str | None) -> tuple[str, int]:
    """The folder of the checkpoint and its step."""
    steps = _steps(files)
    if not steps:
        named = _STEP.search(files.url.rstrip("/").rsplit("/", 1)[-1])
        return "", int(named[1]) if named else 0
    try:
        latest = int(wanted if wanted is not None else files.read(LATEST, 100))
    except NotFound:
        latest = max(steps)
    except ValueError:
        raise ConfigError(f"step={wanted!r}, or {LATEST}, is no number") from None
    if latest not in steps:
        raise NotFound(f"{files.url} has no step {latest}", hint=f"it has {', '.join(map(str, sorted(steps)[-10:]))}")
    return f"{steps[latest]}/", latest


def _steps(files: Files) -> dict[int, str]:
    found = ((_STEP.fullmatch(name), name) for name in files.children())
    return {int(match[1]): name for match, name in found if match}


def _is_checkpoint(files: Files, prefix: str) -> bool:
    return has_metadata(files.children(f"{prefix}model"))


def _raw(directory: Directory) -> Directory:
    """The directory with entries that are data."""

    def raw(place: Place) -> Place:
        return place._replace(raw=True)

    tensors = {
        name: Tensor(tensor.dtype, tensor.shape, [Chunk(chunk.box, raw(chunk.place)) for chunk in tensor.chunks])
        for name, tensor in directory.tensors.items()
    }
    return Directory(tensors, directory.values, directory.paths, directory.extra)


def _add_extra(foreign: Foreign, prefix: str) -> None:
    """The plain values of rank 0, under "extra_state"; tensors in them become tensors of the checkpoint."""
    found = sorted(
        int(m[1]) for name in foreign.files.children(f"{prefix}extra_state") if (m := _EXTRA.fullmatch(name))
    )
    if not found:
        return
    key = f"{prefix}extra_state/extra_state_rank_{found[0]}.pt"
    plain = Plain(foreign)
    foreign.plain["extra_state"] = plain.value(read_torch(foreign.files, key).root, "extra_state")
    plain.note()
    if len(found) > 1:
        foreign.notes.append(
            Note("lost", f"the extra states of {len(found) - 1} ranks; that of rank {found[0]} is kept")
        )
    foreign.seal()
