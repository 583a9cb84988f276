"""`ckptsvc.open`: what a run holds, to look at and to load from. Nothing is written; torch comes with the first tensor.

run = ckptsvc.open("file:///scratch/run7")
run.latest.step, run.latest.metrics
state = run[1200].load(only="model/*")
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ckptsvc.config import load
from ckptsvc.errors import CkptsvcError, NoCheckpoint, StoreError
from ckptsvc.format.commit import CommitRecord
from ckptsvc.html import view
from ckptsvc.pipeline.catalog import Ref, find, open_checkpoint
from ckptsvc.pipeline.pins import pinned
from ckptsvc.pipeline.retain import judge
from ckptsvc.pipeline.retention import policy_of
from ckptsvc.quantities import duration, size, when
from ckptsvc.storage import Store
from ckptsvc.storage.opening import open_apart

SHOWN = 20
"""Checkpoints that a notebook shows, the newest."""


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A committed checkpoint.

    Attributes:
        name: its folder.
        step: of the training.
        epoch: which attempt of the run saved it; a higher one is later.
        created: when it was committed; None where its record cannot be used.
        bytes: of all shards.
        world_size: ranks that saved it.
        job: that saved it.
        metrics: values that the training gave with it.
        pinned: it is not deleted, whatever retention says.
        stays: why retention keeps it, by the settings of this process; empty: the next save may delete it.
        refers: names of checkpoints whose files it needs.
        problem: why it cannot be used; "" where it can.
    """

    name: str
    step: int
    epoch: int
    created: datetime | None = None
    bytes: int = 0
    world_size: int = 0
    job: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False
    stays: tuple[str, ...] = ()
    refers: tuple[str, ...] = ()
    problem: str = ""
    _store: Store | None = field(default=None, repr=False, compare=False)

    def load(self, only: str | Sequence[str] | None = None, rank: int = 0) -> dict[str, Any]:
        """Its state as one nested dict, every tensor whole and on the CPU; arguments as for `ckptsvc.load`.

        Raises:
            NoCheckpoint: it has been deleted meanwhile.
            Damaged, IncompatibleVersion: it cannot be used.
            StoreError: the store cannot be read.
        """
        from ckptsvc.client.reading import read_tree

        assert self._store is not None
        return read_tree(open_checkpoint(self._store, Ref(self.epoch, self.step)), only, rank)

    def _repr_html_(self) -> str:
        facts = [("step", f"{self.step:,}"), ("size", size(self.bytes)), ("ranks", f"{self.world_size:,}"),
            ("committed", _ago(self.created))]  # fmt: skip
        facts += [(name, f"{value:.6g}") for name, value in sorted(self.metrics.items())]
        return view(self.name, self.job, facts, note=self.problem or "; ".join(self.stays))


class Run:
    """The checkpoints of a run, newest first: iterate over it, or ask for a step with `run[step]`.

    The store is read anew each time. Close it, or use it in a `with` block.
    """

    def __init__(self, store: Store, *, owned: bool = True) -> None:
        self._store, self._owned = store, owned

    @property
    def url(self) -> str:
        """Where it is."""
        return self._store.url

    @property
    def checkpoints(self) -> list[SavedStep]:
        """All that are committed, newest (highest epoch, then step) first.

        Raises:
            StoreError: the store cannot be read.
        """
        found, pins = find(self._store), pinned(self._store)
        try:
            kept = judge(self._store, found, policy_of(load(os.environ)), time.time()).kept
        except StoreError:  # it may refer to any of them
            kept = {ref: ["nothing is deleted while a record cannot be read"] for ref, _ in found}
        return [self._saved(ref, commit, ref in pins, tuple(kept.get(ref, ()))) for ref, commit in found]

    @property
    def latest(self) -> SavedStep:
        """The newest that can be used.

        Raises:
            NoCheckpoint: there is none.
            StoreError: the store cannot be read.
        """
        for each in self.checkpoints:
            if not each.problem:
                return each
        raise NoCheckpoint(f"{self.url} has no committed checkpoint", hint="`ckptsvc ls --all` shows all there is")

    @property
    def steps(self) -> list[int]:
        """The steps there are, ascending."""
        return sorted({each.step for each in self.checkpoints})

    def __getitem__(self, step: int) -> SavedStep:
        """The newest checkpoint of a step; NoCheckpoint where there is none."""
        for each in self.checkpoints:
            if each.step == step:
                return each
        raise NoCheckpoint(f"{self.url} has no committed checkpoint of step {step}", hint="`steps` lists them")

    def __iter__(self) -> Iterator[SavedStep]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __repr__(self) -> str:
        try:
            steps = self.steps
        except CkptsvcError as error:
            return f"<ckptsvc run {self.url}: {error}>"
        newest = f", newest step {steps[-1]:,}" if steps else ""
        return f"<ckptsvc run {self.url}: {len(steps):,} {'step' if len(steps) == 1 else 'steps'}{newest}>"

    def _repr_html_(self) -> str:
        try:
            found = self.checkpoints
        except CkptsvcError as error:
            return view("Run", self.url, [], note=str(error))
        facts = [("checkpoints", f"{len(found):,}"), ("bytes", size(sum(each.bytes for each in found)))]
        if found:
            facts += [("newest step", f"{found[0].step:,}"), ("committed", _ago(found[0].created))]
        facts += [("pinned", f"{sum(each.pinned for each in found):,}")]
        rows = [
            [
                f"{each.step:,}", _ago(each.created), size(each.bytes), f"{each.world_size:,}",
                " ".join(f"{name}={value:.6g}" for name, value in sorted(each.metrics.items())),
                each.problem or "; ".join(each.stays) or "the next save may delete it",
            ]
            for each in found[:SHOWN]
        ]  # fmt: skip
        more = f"{len(found) - SHOWN:,} older ones are not shown." if len(found) > SHOWN else ""
        columns = (">step", "committed", ">size", ">ranks", "metrics", "stays because")
        return view("Run", self.url, facts, columns, rows, more)

    def close(self) -> None:
        """Let go of the store."""
        if self._owned:
            self._store.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _saved(self, ref: Ref, commit: CommitRecord | CkptsvcError, pin: bool, stays: tuple[str, ...]) -> SavedStep:
        if not isinstance(commit, CommitRecord):
            return SavedStep(ref.name, ref.step, ref.epoch, pinned=pin, problem=str(commit), _store=self._store)
        return SavedStep(
            ref.name, ref.step, ref.epoch, when(commit.created), commit.bytes, commit.world_size, commit.job,
            commit.values, pin, stays, tuple(commit.refers), _store=self._store,
        )  # fmt: skip


def open(store: str | Store, options: Mapping[str, Any] | None = None) -> Run:  # noqa: A001  ckptsvc.open
    """Look at what a run holds.

    Args:
        store: its URL or path, or a connected store (which stays open when the run is closed).
        options: for the store's driver.

    Raises:
        ConfigError: there is no such kind of store, or a setting is wrong.
        StoreError: it cannot be reached.
    """
    return Run(open_apart(store, options)) if isinstance(store, str) else Run(store, owned=False)


def _ago(created: datetime | None) -> str:
    return "not known" if created is None else f"{duration((datetime.now(UTC) - created).total_seconds())} ago"
