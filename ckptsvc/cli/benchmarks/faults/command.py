"""`ckptsvc bench faults`: a small job is hurt in every way of the fault matrix, with real processes, and watched.

kind -> a fresh job (World) -> steps -> the fault -> its log, its incidents -> Outcome -> the table
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from ckptsvc.cli.benchmarks.faults import memory
from ckptsvc.cli.benchmarks.faults.etcd import EtcdCluster
from ckptsvc.cli.benchmarks.faults.hosts import Hosts
from ckptsvc.cli.benchmarks.faults.kinds import FROZEN, KINDS, Blame, Kind, Need
from ckptsvc.cli.benchmarks.faults.outcome import Outcome, Row, Scene, judge
from ckptsvc.cli.benchmarks.faults.table import show
from ckptsvc.cli.benchmarks.faults.world import NODES, FaultBenchFailed, TorchrunWorld, World
from ckptsvc.cli.benchmarks.machine import facts, load
from ckptsvc.cli.terminal import Screen, emit, note
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import parse_duration

LOOK_EVERY = 0.05
"""Seconds between two looks at what a job has written."""

PEERS = ("torchrun",)


@click.command()
@click.option("--kinds", default="", metavar="NAME,...",
    help=f"Kinds of faults: {', '.join(kind.name for kind in KINDS)}. [default: all]")  # fmt: skip
@click.option("--repeat", type=click.IntRange(1, 100), default=1, show_default=True, help="Runs of each kind.")
@click.option("--peer", type=click.Choice(PEERS), help="The same beside it, where it has an answer.")
@click.option("--peer-timeout", type=click.FloatRange(0), default=0, metavar="SECONDS",
    help="Of the peer's collectives. [default: torch's, half an hour]")  # fmt: skip
@click.option("--confirm", default="10s", show_default=True,
    help="The setting health.confirm; see `ckptsvc/config.py` for what it is by default.")  # fmt: skip
@click.option("--etcd", type=click.Path(exists=True, dir_okay=False, executable=True), metavar="BIN",
    help="The etcd to use. [default: in PATH]")  # fmt: skip
@click.option("--json", "as_document", is_flag=True, help="One JSON document.")
def command(
    kinds: str, repeat: int, peer: str | None, peer_timeout: float, confirm: str, etcd: str | None, as_document: bool
) -> int:
    """Hurt a small job in every way, and measure what becomes of it.

    Three nodes with a Gloo rank each, every run a fresh job: hosts of their own where network namespaces are permitted
    (root), else all on this one. Times are in seconds from the fault on.

    \b
    seen         until an incident names who it was (or a log says so)
    named        the right rank and node, or nobody where nobody is to blame
    new process  until the first process of the next attempt was started
    next step    until the next step; where the job goes on, its longest pause
    lost         steps that were done twice
    runs         those in which all was as it should be, of all

    \b
    Exit status: 0; 3 in some runs, not all was as it should be.
    JSON: {"facts", "hosts", "confirm", "rows": [{"kind", "what", "missing",
      "bars", "met", "runs": [{"seen", "named", "process", "step", "lost",
      "source", "sentence", "problem"}], "torchrun": [{...}]}]}
    """  # noqa: D301  \b is click's
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the benchmark needs PyTorch, which is not installed", hint="pip install ckptsvc[torch]")
    wanted = _wanted(kinds)
    parse_duration(confirm)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # processes and hosts go first
    about = facts(tempfile.gettempdir())
    with Bench({"CKPTSVC_HEALTH_CONFIRM": confirm}, etcd or shutil.which("etcd"), peer_timeout) as bench:
        rows = [bench.row(kind, repeat, peer is not None) for kind in wanted]
        separate = bench.hosts is not None
    about["load"] = f"{about['load']} before, {load()} after"
    if as_document:
        emit({"facts": about, "hosts": separate, "confirm": confirm, "rows": [row.document() for row in rows]})
    else:
        show(Screen(), about, rows, separate=separate, confirm=confirm)
    return 0 if all(not o.problem for row in rows for o in row.outcomes) else 3


def _wanted(names: str) -> Sequence[Kind]:
    by_name = {kind.name: kind for kind in KINDS}
    given = list(dict.fromkeys(name for name in names.split(",") if name)) or list(by_name)
    for name in given:
        if name not in by_name:
            raise ConfigError(f"--kinds {name} is not known", hint=f"known: {', '.join(by_name)}")
    return [by_name[name] for name in given]


@dataclass
class Bench:
    """A context manager; holds the hosts that all jobs are run on, one after the other.

    Attributes:
        settings: variables of all processes.
        etcd: path of the program; None: there is none.
        peer_timeout: of the peer's collectives, in seconds; 0: torch's default.
        hosts: None where they are not permitted.
    """

    settings: dict[str, str]
    etcd: str | None = None
    peer_timeout: float = 0.0
    hosts: Hosts | None = None

    def __enter__(self) -> Bench:
        try:
            self.hosts = Hosts(NODES)
        except (PermissionError, FileNotFoundError) as error:
            note(f"all nodes are on this host: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        if self.hosts is not None:
            self.hosts.close()

    def row(self, kind: Kind, repeat: int, peer: bool) -> Row:
        """All runs of a kind."""
        missing = self.missing(kind)
        if missing:
            return Row(kind, missing)
        outcomes, peers = [], []
        for number in range(1, repeat + 1):
            note(f"{kind.name}, run {number} of {repeat}")
            outcomes.append(self.run(kind))
            if peer and kind.peer:
                note(f"{kind.name}, torchrun, run {number} of {repeat}")
                peers.append(self.run_peer(kind))
        return Row(kind, "", tuple(outcomes), tuple(peers))

    def missing(self, kind: Kind) -> str:
        """What this machine has not that a kind needs; "" if it has all."""
        there = {
            Need.HOSTS: self.hosts is not None,
            Need.MEMORY: memory.is_permitted(),
            Need.ETCD: self.etcd is not None,
        }
        return "" if kind.needs is None or there[kind.needs] else f"needs {kind.needs.value}"

    def run(self, kind: Kind) -> Outcome:
        """One job, one fault."""
        with contextlib.ExitStack() as stack:
            if kind.needs is Need.ETCD:
                assert self.etcd is not None
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptsvc-etcd-")))
                etcd = stack.enter_context(EtcdCluster(self.etcd, folder))
                world = World(None, self.settings, etcd=etcd)  # the members are on this host
            else:
                world = World(self.hosts, self.settings, evaluates=kind.evaluates, wrong_clock=kind.wrong_clock)
            return _watched(kind, stack.enter_context(self._mended(world)))

    def run_peer(self, kind: Kind) -> Outcome:
        """The same under torchrun, which names nobody."""
        plain = replace(kind, blame=Blame.NOBODY, says="", commits=False)
        with self._mended(TorchrunWorld(self.hosts, self.settings, timeout=self.peer_timeout)) as world:
            outcome = _watched(plain, world)
        outcome.named = None
        if outcome.problem == "no steps":
            outcome.problem = f"not within {kind.seconds:g} s"
        return outcome

    @contextlib.contextmanager
    def _mended(self, world: World) -> Iterator[World]:
        """A job, and hosts that are whole again for the next one."""
        try:
            with world:
                yield world
        finally:
            if self.hosts is not None:
                self.hosts.mend_all()


def _watched(kind: Kind, world: World) -> Outcome:
    """Let the job get going, do it, and watch."""
    try:
        world.wait(lambda: _is_going(world, kind), f"{kind.history} steps of every rank")
        at = kind.cause(world)
    except FaultBenchFailed as error:
        note(f"{error.what}\n{error.hint}")
        return Outcome(problem=error.what)
    except OSError as error:
        return Outcome(problem=f"could not be done: {error}")
    undo, said = kind.undo, None
    while True:
        time.sleep(LOOK_EVERY)
        now = time.monotonic()
        world.look()
        if said is None and kind.says and _says(kind.says, world, at):
            said = now
        if undo is not None and now > at + FROZEN:
            with contextlib.suppress(ProcessLookupError):
                undo(world)
            undo = None
        outcome = judge(kind, Scene(at, now, world.events, world.incidents, said))
        if now > at + kind.seconds or (kind.restart and not outcome.problem):
            return outcome


def _is_going(world: World, kind: Kind) -> bool:
    return len({e["rank"] for e in world.events if e["event"] == "step" and e["step"] >= kind.history}) == NODES


def _says(text: str, world: World, at: float) -> bool:
    if text == "skipped":
        return any(e["skipped"] for e in world.events if e["event"] == "step" and e["monotonic"] > at)
    return world.said(text)
