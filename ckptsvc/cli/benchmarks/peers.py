"""The systems that ckptsvc is compared with, each used as its documentation says, each synced to the device.

A peer that does not sync what it writes gets the sync added in `finish`; the loop is not held up by that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from ckptsvc.cli.benchmarks.state import Tree, local, tensors


class Peer:
    """What the peers have in common: a folder for each save, of which the last one is kept.

    Args:
        tree: the state.
        directory: a folder of its own on a file system that all ranks reach.
    """

    name = ""
    needs: tuple[str, ...] = ()

    def __init__(self, tree: Tree, directory: Path) -> None:
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._tree, self._directory, self._saves = tree, directory, 0
        self._dicts = as_dicts(tree)
        self._directory.mkdir(parents=True, exist_ok=True)

    @property
    def _folder(self) -> Path:
        return self._directory / f"save-{self._saves}"

    def save(self) -> None:
        """See System."""
        self._saves += 1
        self._folder.mkdir(exist_ok=True)
        self._write(self._folder)

    def before_update(self) -> None:
        """See System."""

    def finish(self) -> None:
        """See System."""
        self._complete()
        for path in self._own_files():
            _sync(path)
        _sync(self._folder)

    def discard_older(self) -> None:
        """See System."""
        if self._rank == 0:
            for path in self._directory.iterdir():
                if path != self._folder:
                    shutil.rmtree(path, ignore_errors=True)

    def load(self) -> None:
        """See System."""
        self._read(self._folder)

    def files(self) -> Sequence[Path]:
        """See System."""
        return sorted(path for path in self._folder.rglob("*") if path.is_file())

    def processes(self) -> Sequence[int]:
        """See System."""
        return []

    def close(self) -> None:
        """See System."""

    def _own_files(self) -> Sequence[Path]:
        return self.files() if self._rank == 0 else []

    def _write(self, folder: Path) -> None:
        raise NotImplementedError

    def _complete(self) -> None:
        """Wait for what goes on in the background."""

    def _read(self, folder: Path) -> None:
        raise NotImplementedError


class Dcp(Peer):
    """torch.distributed.checkpoint, `save` and `load`."""

    name = "dcp"
    needs = ("torch",)

    def _write(self, folder: Path) -> None:
        state_dict_saver.save(self._dicts, checkpoint_id=folder)

    def _read(self, folder: Path) -> None:
        state_dict_loader.load(self._dicts, checkpoint_id=folder)


class DcpAsync(Dcp):
    """torch.distributed.checkpoint, `async_save` with its defaults."""

    name = "dcp_async"
    _pending: Any = None

    def _write(self, folder: Path) -> None:
        self._pending = state_dict_saver.async_save(self._dicts, checkpoint_id=folder, **self._options())

    def _options(self) -> dict[str, Any]:
        return {}

    def _complete(self) -> None:
        pending = getattr(self._pending, "upload_completion", self._pending)
        pending.result()


class DcpAsyncTuned(DcpAsync):
    """`async_save` with a staging buffer in shared memory that is kept from save to save."""

    name = "dcp_async_tuned"
    _stager: Any = None

    def _options(self) -> dict[str, Any]:
        if self._stager is None:
            from torch.distributed.checkpoint import staging

            # Pinned memory, and staging in a stream, want an accelerator.
            options = staging.StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
            self._stager = staging.DefaultStager(options)
        return {"async_stager": self._stager}

    def close(self) -> None:
        """See System."""
        if self._stager is not None:
            self._stager.close()
        self._stager = self._pending = None


class PerRankFile(Peer):
    """A peer that knows nothing of ranks: each writes what it holds to a file of its own."""

    suffix = ""

    @property
    def _path(self) -> Path:
        return self._folder / f"rank{self._rank}{self.suffix}"

    def _own_files(self) -> Sequence[Path]:
        return [self._path]

    def _fill(self, loaded: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors(self._tree):
                local(tensor).copy_(loaded[name])


class TorchSave(PerRankFile):
    """`torch.save` and `torch.load(weights_only=True)`, then a copy into the live state."""

    name = "torch_save"
    needs = ("torch",)
    suffix = ".pt"

    def _write(self, folder: Path) -> None:
        torch.save({name: local(t) for name, t in tensors(self._tree)}, self._path)

    def _read(self, folder: Path) -> None:
        self._fill(torch.load(self._path, weights_only=True))


class Safetensors(PerRankFile):
    """`safetensors.torch.save_file` and `load_file`, then a copy into the live state."""

    name = "safetensors"
    needs = ("safetensors",)
    suffix = ".safetensors"

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: local(t) for name, t in tensors(self._tree)}, self._path)

    def _read(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self._fill(load_file(self._path))


class Torchsnapshot(Peer):
    """`torchsnapshot.Snapshot.take` and `restore`."""

    name = "torchsnapshot"
    needs = ("torchsnapshot",)

    def _write(self, folder: Path) -> None:
        self._library.Snapshot.take(str(folder / "snapshot"), self._app_state())

    def _read(self, folder: Path) -> None:
        self._library.Snapshot(str(folder / "snapshot")).restore(self._app_state())

    def _app_state(self) -> dict[str, Any]:
        return {key: self._library.StateDict(**value) for key, value in self._dicts.items()}

    @property
    def _library(self) -> Any:
        return importlib.import_module("torchsnapshot")  # by name: it has no types and is seldom there


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Dcp, DcpAsync, DcpAsyncTuned, TorchSave, Safetensors, Torchsnapshot)
}


def missing(name: str) -> str:
    """Why a peer cannot run here, or ""."""
    absent = [module for module in PEERS[name].needs if importlib.util.find_spec(module) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""


def as_dicts(tree: Tree) -> dict[str, Any]:
    """The tree with modules as their state dicts, as peers want it."""
    return {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in tree.items()}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
