"""`ckptsvc bench`: what saving and restoring cost here, beside the raw limits of the machine and other systems."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import msgspec

from ckptsvc.cli.benchmarks import launch
from ckptsvc.cli.benchmarks.machine import available_memory, facts, load
from ckptsvc.cli.benchmarks.report import show
from ckptsvc.cli.benchmarks.spec import Results, Spec
from ckptsvc.cli.benchmarks.table import Row, as_json, rows_of
from ckptsvc.cli.terminal import Screen, emit, progress
from ckptsvc.errors import ConfigError
from ckptsvc.storage import canonical, connect

WORKLOADS = ("save", "restore", "reshard", "small", "overlap")
PEERS = ("dcp", "dcp_async", "dcp_async_tuned", "torch_save", "safetensors", "torchsnapshot")

RESHARD_RANKS = 4
RESHARD_SHARE = 8
"""The reshard workload counts bytes and takes this part of the size asked for."""

_COPIES = 5
"""Copies of the state in memory at the same time: live, two arenas, the raw limits' one and a half."""

_STAGED = 2
"""Copies that a peer makes that saves in the background."""


OTHERS = {
    "control": "ckptsvc.cli.benchmarks.control.command",
    "faults": "ckptsvc.cli.benchmarks.faults.command",
    "rebuild": "ckptsvc.cli.benchmarks.rebuild",
    "store": "ckptsvc.cli.benchmarks.store.command",
}
"""Benchmarks with options of their own."""


class _Bench(click.Command):
    """`ckptsvc bench faults` and the like, by themselves."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of whichever benchmark is meant."""
        if not args or args[0] not in OTHERS:
            return super().make_context(info_name, args, parent, **extra)
        other: click.Command = importlib.import_module(OTHERS[args[0]]).command
        return other.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


@click.command(cls=_Bench)
@click.argument("workload", type=click.Choice([*WORKLOADS, "all"]), default="all")
@click.option("--ranks", type=click.IntRange(1, 64), help="Ranks on this node. [default: 1; for reshard 4]")
@click.option("--gib", type=click.FloatRange(0.001), default=1.0, show_default=True,
    help="Size of the state over all ranks.")  # fmt: skip
@click.option("--tensors", type=click.IntRange(1), default=20_000, show_default=True, help="Tensors of `small`.")
@click.option("--store", default=".", show_default=True,
    help="Directory or URL; what is made in it is removed again.")  # fmt: skip
@click.option("--vs", default="", metavar="NAME,...", help=f"Systems to compare with: {', '.join(PEERS)}.")
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True,
    help="Repetitions, after one to warm up.")  # fmt: skip
@click.option("--json", "as_document", is_flag=True, help="One JSON document.")
def command(
    workload: str, ranks: int | None, gib: float, tensors: int, store: str, vs: str, repeat: int, as_document: bool
) -> None:
    """Measure saving and restoring here, beside the raw limits and other systems.

    \b
    save     seconds the loop is blocked, seconds until durable, CPU seconds
    restore  from the store with a cold cache; from memory after the trainer was killed
    reshard  bytes read over bytes needed, from one layout to another
    small    as save, for 20,000 tensors of 4 to 64 KiB, against torch's dcp.save
    overlap  slowdown of a compute loop beside a save, training time lost in all
    faults   what becomes of a job that is hurt; with options of its own: ckptsvc bench faults --help
    control  cost and speed of a job's coordinator; with options of its own: ckptsvc bench control --help
    store    a store's driver beside the raw limit and other clients: ckptsvc bench store --help
    rebuild  the memory of a lost node from parity, beside memcpy: ckptsvc bench rebuild --help

    Limits (memcpy, direct write, cold read), ckptsvc and the systems given with --vs take turns, so that the moods of a
    shared machine fall on all alike. Medians are shown with minimum and maximum. A bar that is not met does not fail
    the command.

    \b
    JSON: {"facts", "command", "rows": [{"workload", "what", "unit", "ours": {"median", "low", "high"}, "against",
      "limit", "ratio", "faster", "bar", "met", "peers": {NAME: {...}}, "missing"}], "warm_up", "unavailable", "notes"}
    """  # noqa: D301  \b is click's
    peers = tuple(dict.fromkeys(name for name in vs.split(",") if name))
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"--vs {unknown[0]} is not known", hint=f"known: {', '.join(PEERS)}")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the benchmark needs PyTorch, which is not installed", hint="pip install ckptsvc[torch]")
    nbytes = int(gib * 2**30)
    if workload != "reshard":
        _check_memory(nbytes, peers)
    signal.signal(signal.SIGTERM, _terminated)
    bench = Bench(canonical(store), nbytes, tensors, repeat, peers, ranks)
    about = facts(bench.directory or os.getcwd())
    findings = bench.run(WORKLOADS if workload == "all" else (workload,))
    about["load"] = f"{about['load']} before, {load()} after"
    if as_document:
        emit({"facts": about, "command": _spelled(workload, ranks, gib, store, vs, repeat), **findings.document()})
    else:
        show(Screen(), about, findings.rows, findings.unavailable, findings.notes, findings.warm_up)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends the benchmark as Ctrl-C does: ranks, agent and files go first."""
    sys.exit(128 + number)


@dataclass
class Findings:
    """What all workloads together have found."""

    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    warm_up: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def add(self, workload: str, results: Sequence[Results]) -> None:
        """Take in what the ranks of a workload have measured."""
        self.rows += rows_of(workload, results)
        self.warm_up[workload] = results[0].warm_up
        for one in results:
            self.unavailable |= {f"{workload}: {name}": why for name, why in one.unavailable.items()}
            self.notes |= one.notes

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "rows": as_json(self.rows),
            "warm_up": self.warm_up,
            "unavailable": self.unavailable,
            "notes": self.notes,
        }


class Bench:
    """One call of the command.

    Args:
        store: URL; a run is made below it.
        nbytes: size of the state.
        tensors: number of tensors of `small`.
        repeat: repetitions.
        peers: systems to compare with.
        ranks: as given; None is the workload's own default.
    """

    def __init__(
        self, store: str, nbytes: int, tensors: int, repeat: int, peers: tuple[str, ...], ranks: int | None
    ) -> None:
        if store.startswith("memory:"):
            raise ConfigError("memory:// is not shared between processes", hint="take a directory, also one on a tmpfs")
        self._root = f"{store.rstrip('/')}/ckptsvc-bench-{secrets.token_hex(4)}"
        self._nbytes, self._tensors, self._repeat = nbytes, tensors, repeat
        self._peers, self._ranks = peers, ranks

    @property
    def directory(self) -> str:
        """The directory that the store is in; "" where it is in none."""
        return self._root.removeprefix("file://").rpartition("/")[0] if self._root.startswith("file://") else ""

    def run(self, workloads: Sequence[str]) -> Findings:
        """Measure; leaves nothing behind."""
        findings = Findings()
        try:
            with launch.agent() as (sockets, pid):
                for workload in workloads:
                    findings.add(workload, self._measure(workload, sockets, pid))
                    self._clean()
        finally:
            self._clean()
        return findings

    def _measure(self, workload: str, sockets: Path, pid: int) -> list[Results]:
        ranks = self._ranks or (RESHARD_RANKS if workload == "reshard" else 1)
        spec = Spec(
            workload=workload,
            nbytes=self._nbytes // RESHARD_SHARE if workload == "reshard" else self._nbytes,
            tensors=self._tensors,
            repeat=self._repeat,
            peers=("dcp", *(p for p in self._peers if p != "dcp")) if workload == "small" else self._peers,
            store=f"{self._root}/run-{workload}",
            directory=f"{self._root}/beside".removeprefix("file://") if self.directory else "",
            agent=pid,
            stored=ranks + 2,
        )
        job = launch.Job(sockets, ranks)
        label = f"{workload}, {ranks} rank{'s' if ranks > 1 else ''}"
        with progress(label, spec.nbytes) as advance:
            done = 0

            def moved(share: float) -> None:
                nonlocal done
                advance(int(share * spec.nbytes) - done)
                done = int(share * spec.nbytes)

            if workload == "restore":
                job.run_and_kill(msgspec.structs.replace(spec, workload="stage"), lambda share: None)
            return job.run(spec, moved)

    def _clean(self) -> None:
        if self.directory:
            shutil.rmtree(self._root.removeprefix("file://"), ignore_errors=True)
            return
        store = connect(self._root)
        for entry in list(store.list()):
            store.delete(entry.key)
        store.close()


def _check_memory(nbytes: int, peers: Sequence[str]) -> None:
    copies = _COPIES + _STAGED * sum("async" in name for name in peers)
    needed, there = copies * nbytes, available_memory()
    if needed > there:
        raise ConfigError(
            f"{nbytes / 2**30:g} GiB of state need about {needed / 2**30:.0f} GiB of memory to be measured; there are"
            f" {there / 2**30:.1f}",
            hint=f"pass --gib {there / copies / 2**30:.1g}",
        )


def _spelled(workload: str, ranks: int | None, gib: float, store: str, vs: str, repeat: int) -> str:
    words = ["ckptsvc bench", workload, *([f"--ranks {ranks}"] if ranks else []), f"--gib {gib:g}"]
    words += [f"--store {store}", *([f"--vs {vs}"] if vs else []), f"--repeat {repeat}"]
    return " ".join(words)
