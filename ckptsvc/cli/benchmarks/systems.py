"""What is measured: one interface for ckptsvc and for the systems it is compared with, and ckptsvc behind it."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.optim import Optimizer

import ckptsvc
from ckptsvc.cli.benchmarks.spec import OVERLAPPED
from ckptsvc.cli.benchmarks.state import Tree
from ckptsvc.client.group import the_group
from ckptsvc.client.reading import newest
from ckptsvc.client.restore import restore, store_image
from ckptsvc.client.state import StateTree
from ckptsvc.errors import SaveFailed
from ckptsvc.pipeline.retain import expire
from ckptsvc.pipeline.retention import Policy
from ckptsvc.storage import connect


class System(Protocol):
    """Something that saves and restores a state tree. All ranks call its methods together."""

    name: str

    def save(self) -> None:
        """Save; returns when the training loop could go on."""

    def before_update(self) -> None:
        """Called in the training loop when the state is about to change."""

    def finish(self) -> None:
        """Wait until what was saved is complete and synced to the device."""

    def discard_older(self) -> None:
        """Remove all saves but the newest; not part of what is measured."""

    def load(self) -> None:
        """Bring the newest save back into the live state."""

    def files(self) -> Sequence[Path]:
        """The files that `load` reads; empty where they are not known."""

    def processes(self) -> Sequence[int]:
        """Processes, besides this one and those it has started, that work for it."""

    def close(self) -> None:
        """Let go of everything; what was saved stays."""


class Ckptsvc:
    """ckptsvc, through its own two calls.

    Args:
        tree: the state.
        store: URL of a run of its own.
        agent: process id of the agent.
        overlap: copy beside the training, up to the next step of the optimizer that is in the tree.
    """

    name = "ckptsvc"

    def __init__(self, tree: Tree, store: str, agent: int, *, overlap: bool = False) -> None:
        self._store, self._agent = store, agent
        self._optimizers = [value for value in tree.values() if isinstance(value, Optimizer)] if overlap else []
        self._run = ckptsvc.attach(tree, store=store, every="off", keep=0, resume=False, overlap=overlap)
        if overlap:
            self.name = OVERLAPPED

    def save(self) -> None:
        """See System."""
        self._run.step()
        if not self._run.save():
            raise SaveFailed("the snapshot was not taken; the agent's log says why")

    def before_update(self) -> None:
        """See System."""
        for optimizer in self._optimizers:
            optimizer.step()  # without gradients: only what is hooked to it

    def finish(self) -> None:
        """See System."""
        self._run.wait()

    def discard_older(self) -> None:
        """See System. The agent would do it after each commit (`keep=1`); no peer does."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        store = connect(self._store)
        try:
            expire(store, Policy(last=1))
        finally:
            store.close()

    def load(self) -> None:
        """See System; from memory, if the agent still has it."""
        self._run.restore()

    @property
    def restored_from(self) -> str:
        """Where the last `load` found the checkpoint: "memory" or "store"."""
        return self._run.restored_from or "nothing"

    def files(self) -> Sequence[Path]:
        """See System."""
        return shard_files(self._store)

    def processes(self) -> Sequence[int]:
        """See System."""
        return [self._agent]

    def close(self) -> None:
        """See System."""
        self._run.close()


class FromStore:
    """ckptsvc's restore from a store, without an agent and its memory.

    Args:
        tree: the state to fill.
        store: URL of a run that has a checkpoint.
    """

    def __init__(self, tree: Mapping[str, Any], store: str) -> None:
        self._store, self._group = store, the_group()
        self._state = StateTree(tree, self._group.rank, self._group.size)

    def load(self) -> None:
        """From opening the store to a state that can go on."""
        store = connect(self._store)
        try:
            restore(store_image(newest(store)), self._state, self._group)
        finally:
            store.close()


def shard_files(store: str) -> list[Path]:
    """The shards of the newest checkpoint of a run on a file system; none elsewhere."""
    root = store.removeprefix("file://")
    if root == store:
        return []
    commits = sorted(glob.glob(f"{glob.escape(root)}/step-*/COMMIT"))
    return sorted(Path(os.path.dirname(commits[-1])).glob("r*.safetensors")) if commits else []
