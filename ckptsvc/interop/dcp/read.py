"""Checkpoints of torch.distributed.checkpoint (DCP), read.

Also directories that are DCP inside: Lightning's and Fabric's sharded checkpoints (`meta.pt` beside `.metadata`),
accelerate's (`pytorch_model_fsdp_0/` and `optimizer_0/`), and shards of `HuggingFaceStorageWriter`. Options:

    model=KEY        the key of the model in the saved state; without it "model" or "state_dict", else the names that
                     stand under no key
    optimizer=KEY    the key of the optimizer; without it "optim", "optimizer", or what looks like one
    names=FILE       names of the parameters, where the optimizer has numbers (see `interop.torch_format.numbered`)
    tied=NAME=NAME   the second name is another name of the first tensor; several with commas; "no": there are none;
                     without it see `interop.naming.tied`
    unreadable=skip  leave out values of types that are not on the list of what may be built, instead of refusing

Other keys are kept under their own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.dcp import safetensors as dcp_safetensors
from ckptsvc.interop.dcp.metadata import Directory, has_metadata, read_directory
from ckptsvc.interop.dcp.state import State
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Foreign, Note
from ckptsvc.interop.plain import Plain
from ckptsvc.interop.torch_format.file import read_torch

ACCELERATE = re.compile(r"(?:pytorch_model_fsdp|optimizer)_0")
LIGHTNING = "meta.pt"

STEPS = ("step", "global_step", "iteration")
NAMED_STEP = re.compile(r"(?:step|iter|checkpoint)[-_=]?(\d{1,18})/*$")


def detect(files: Files) -> bool:
    """Whether there is DCP's metadata, or a directory of accelerate's or shards that have it."""
    if getattr(files, "only", ""):  # a file that lies beside a checkpoint is none
        return False
    return bool(_prefixes(files)) or dcp_safetensors.is_shards(files)


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no metadata: the checkpoint was never completed.
        ConfigError: an option is not known.
        InvalidInput: the metadata or a value names a class that is not on the list, or data was transformed in a way
            that is not known.
        Damaged, LayoutError: files are missing or contradict each other.
    """
    state = State(files, origin, options)
    for prefix in _prefixes(files) or [""]:
        state.add(_directory(files, prefix))
    foreign = state.done()
    names = files.children()
    if LIGHTNING in names:
        _add_lightning(foreign, skip=options.get("unreadable") == "skip")
    beside = [name for name in names if name.endswith((".bin", ".pkl"))]
    if beside:
        foreign.notes.append(Note("lost", f"what lies beside the checkpoint: {', '.join(beside[:5])}"))
    foreign.step = step_of(foreign.plain, origin)
    return foreign


def _prefixes(files: Files) -> list[str]:
    names = files.children()
    if has_metadata(names):
        return [""]
    return [f"{name}/" for name in names if ACCELERATE.fullmatch(name) and has_metadata(files.children(name))]


def _directory(files: Files, prefix: str) -> Directory:
    if not has_metadata(files.children(prefix.rstrip("/"))) and dcp_safetensors.is_shards(files, prefix):
        return dcp_safetensors.read_shards(files, prefix)
    directory = read_directory(files, prefix)
    if dcp_safetensors.in_safetensors(directory):
        return dcp_safetensors.looked_up(files, directory)
    return directory


def _add_lightning(foreign: Foreign, *, skip: bool) -> None:
    """What Lightning and Fabric keep beside the DCP files; tensors in it become tensors of the checkpoint."""
    try:
        root = read_torch(foreign.files, LIGHTNING).root
    except InvalidInput as error:
        if not skip:
            raise
        foreign.notes.append(Note("lost", error.what))
        return
    if not isinstance(root, dict):
        raise Damaged(f"{foreign.origin}: {LIGHTNING} has no dict in it")

    plain = Plain(foreign)
    for name, value in plain.value(root, "").items():
        foreign.plain.setdefault(str(name), value)
    plain.note()
    foreign.seal()


def step_of(document: Mapping[str, Any], origin: str) -> int:
    """The training step, by the names that jobs give it in their plain values, or by the directory's; 0 if not said."""
    for tree in (document, *(value for value in document.values() if isinstance(value, dict))):
        for name in STEPS:
            if type(tree.get(name)) is int and tree[name] >= 0:
                return int(tree[name])
    named = NAMED_STEP.search(origin)
    return int(named[1]) if named else 0
