"""What `ckptsvc demo` does: start agents, train the control and the run, kill a rank, resume elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ckptsvc.cli.demonstration import facts
from ckptsvc.cli.demonstration.facts import Check, Facts, Incident, Run, Save
from ckptsvc.cli.demonstration.processes import Child, Children, DemoFailed, Events, wait_until
from ckptsvc.cli.demonstration.report import seconds, size
from ckptsvc.cli.demonstration.story import Story
from ckptsvc.config import private_directory, runtime_dir
from ckptsvc.format.commit import COMMIT, EPOCHS
from ckptsvc.pipeline.catalog import list_refs, read_commit
from ckptsvc.settings import ArenaSettings
from ckptsvc.storage import Store, connect
from ckptsvc.telemetry import Event

STEPS = 48
EVERY = 6
KILL_AFTER = 33
KILLED_RANK = 3
BRANCH_FROM = 24
BRANCH_TO = 36
"""In steps: the training, the time between checkpoints, when the rank is killed, what the branches train."""

PATIENCE = 240.0
"""Seconds that one phase may take before the demo gives up."""

FSDP = "FSDP2, 4 ranks"
BRANCHES = (("fsdp", 3, "FSDP2, 3 ranks"), ("fsdp2x2tp", 4, "FSDP2 x TP, 2 x 2 ranks"))
NODES = ("node-0", "node-1")


class Demo:
    """One demo in one directory: `store/`, `branch-*/`, `logs/` and the training logs `*.jsonl`."""

    def __init__(self, directory: Path, story: Story, machine: Mapping[str, str]) -> None:
        self._machine = machine
        self._directory = directory
        self._story = story
        self._store = directory / "store"
        self._logs = directory / "logs"
        self._logs.mkdir()
        # Paths of unix sockets are short, arenas are in memory: neither lives in `directory`.
        self._sockets = private_directory(runtime_dir(os.environ) / f"demo-{os.getpid()}")
        self._arenas = Path(ArenaSettings().dir) / f"ckptsvc-demo-{os.getpid()}"
        self._coordinator = f"127.0.0.1:{_free_port()}"
        self._phases: list[tuple[str, float]] = []
        self._children: Children

    def run(self) -> Facts:
        """All of it.

        Raises:
            DemoFailed: something ended or did not happen in time.
        """
        self._arenas.mkdir(mode=0o700)
        try:
            with Children(self._logs, _environ(self._sockets, self._arenas)) as self._children:
                with self._phase("starting two agents"):
                    agents = [self._start_agent(number) for number in range(len(NODES))]
                    wait_until(self._agents_answer, "the agents to start", 30.0, agents)
                with self._phase("the control"):
                    control = self._control()
                with self._phase("the run, a kill and a restart"):
                    run, incident = self._interrupted()
                with self._phase("the last saves"):
                    saves, unfinished = self._saves(run)
                branches = []
                for layout, ranks, title in BRANCHES:
                    with self._phase(f"resuming as {title}"):
                        branches.append(self._branch(layout, ranks, title))
        finally:
            for left in (self._sockets, self._arenas):
                shutil.rmtree(left, ignore_errors=True)
        due = tuple(range(EVERY, STEPS + 1, EVERY))
        checks: list[Check] = [
            facts.check_comeback(incident, run),
            *facts.check_run(run, control, STEPS),
        ]
        for branch in branches:
            checks += facts.check_branch(branch, control, BRANCH_FROM, BRANCH_TO)
        checks += facts.check_saves(saves, due, unfinished)
        return Facts(
            runs=(control, run, *branches),
            incidents=(incident,),
            saves=tuple(saves),
            checks=tuple(checks),
            machine=self._machine,
            phases=tuple(self._phases),
            due=due,
            finished=time.time(),
        )

    @contextmanager
    def _phase(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases.append((what, time.monotonic() - began))

    # ---- the parts

    def _start_agent(self, number: int) -> Child:
        node = NODES[number]
        arguments = ["--name", node, "--dir", str(self._sockets / f"node-{node}"), "--json-log"]
        arguments += ["--metrics-listen", "off", "--linger", "10min"]
        if number == 0:
            arguments += ["--listen", self._coordinator]
        return self._children.start(f"agent-{node}", [*_ckptsvc("agent"), *arguments], service=True)

    def _agents_answer(self) -> bool:
        return all((self._sockets / f"node-{node}" / "ready").exists() for node in NODES)

    def _control(self) -> Run:
        """The training without interruption and without checkpoints."""
        self._story.say(f"control: {STEPS} steps with {FSDP}, no checkpoints, nothing interrupts it", "bold")
        log = self._log("control")
        train = _training(log, "--no-ckpt", "--layout", "fsdp", "--digest-every", str(EVERY))
        child = self._children.start("control", [*_one_node(4), *train])
        self._follow("control", log, [child], STEPS)
        return self._read(log, "control", FSDP, "control")

    def _interrupted(self) -> tuple[Run, Incident]:
        """The same training on two nodes with a checkpoint every `EVERY` steps; a rank is killed."""
        every = f"a checkpoint every {EVERY} steps"
        self._story.say(f"the run: the same with {every}, on two nodes with 2 ranks each", "bold")
        log = self._log("run")
        train = _training(log, "--store", self._store.as_uri(), "--layout", "fsdp", "--every", str(EVERY))
        train += ["--digest-every", str(STEPS)]
        launchers = []
        for number, node in enumerate(NODES):
            flags = ["--nnodes", "2", "--node-rank", str(number), "--node", node, "--nproc-per-node", "2"]
            flags += ["--rdzv-id", f"demo-{os.getpid()}", "--coordinator", self._coordinator]
            flags += ["--max-restarts", "3", *train]
            launchers.append(self._children.start(f"run-{node}", [*_ckptsvc("run"), *flags]))
        killer = Killer(self._story)
        self._follow("the run", log, launchers, STEPS, killer.see)
        run = self._read(log, "the run", FSDP, "run")
        return run, killer.report(run, Events(self._logs / f"agent-{NODES[1]}.log"))

    def _saves(self, run: Run) -> tuple[list[Save], list[str]]:
        """See `read_saves`."""
        _wait_for_commit(self._store, STEPS)
        saves, unfinished = read_saves(connect(self._store.as_uri()), run)
        self._story.say(f"{len(saves)} checkpoints are committed, {size(saves[0].nbytes)} each")
        return saves, unfinished

    def _branch(self, layout: str, ranks: int, title: str) -> Run:
        """A copy of the run as it was at step `BRANCH_FROM` goes on at another layout."""
        self._story.say(f"resume at step {BRANCH_FROM} as {title}", "bold")
        log, store = self._log(f"branch-{layout}"), self._directory / f"branch-{layout}"
        copy_run(self._store, store, BRANCH_FROM)
        train = _training(log, "--store", store.as_uri(), "--layout", layout, "--every", str(EVERY))
        child = self._children.start(f"branch-{layout}", [*_one_node(ranks), *train, "--stop-at", str(BRANCH_TO)])
        self._follow(title, log, [child], BRANCH_TO)
        _wait_for_commit(store, BRANCH_TO)
        return self._read(log, "resumed", title, "branch")

    # ---- logs

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def _read(self, log: Path, label: str, layout: str, role: facts.Role) -> Run:
        with open(log, encoding="utf-8") as lines:
            return Run.from_log(lines, label, layout, role)

    def _follow(
        self,
        title: str,
        log: Path,
        launchers: list[Child],
        total: int,
        see: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        """Waits until all launchers have ended with status 0, showing progress, and each event to `see`."""
        events = Events(log)
        with self._story.steps(title, total) as progress:

            def look() -> bool:
                ended = all(child.status == 0 for child in launchers)
                for event in events.new():
                    if event["event"] == "step":
                        progress(event["step"])
                    see(event)
                return ended

            wait_until(look, f"{title} to end", PATIENCE, launchers)


class Killer:
    """Watches the log of the run, kills a rank in mid-training, and writes down what follows."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._pid = 0
        self._killed = 0.0
        self._starts: dict[int, tuple[int, str]] = {}
        self._stepping: float | None = None

    def see(self, event: Mapping[str, Any]) -> None:
        """Takes the events of the training log as they come."""
        first = event["attempt"] == 1
        if event["event"] == "start":
            if first and event["rank"] == KILLED_RANK:
                self._pid = event["pid"]
            if not first:
                self._back(event)
        elif event["event"] == "step" and first and event["step"] == KILL_AFTER:
            self._kill()
        elif event["event"] == "step" and not first and self._stepping is None:
            self._stepping = event["time"]
            self._story.say(f"step {event['step']} is done, {seconds(self._stepping - self._killed)} after the kill")

    def _kill(self) -> None:
        if not self._pid:  # kill(0) would be for ourselves
            raise DemoFailed(f"rank {KILLED_RANK} never said that it had started")
        self._killed = time.time()
        os.kill(self._pid, signal.SIGKILL)
        self._story.say(f"step {KILL_AFTER}: SIGKILL to rank {KILLED_RANK} (process {self._pid})", "bold red")

    def _back(self, event: Mapping[str, Any]) -> None:
        self._starts[event["rank"]] = (event["steps_done"], event["source"] or "nothing")
        if len(self._starts) == 1:
            took = seconds(event["time"] - self._killed)
            where = f"step {event['steps_done']}, read from {self._starts[event['rank']][1]}"
            self._story.say(f"the ranks are back at {where}, {took} after the kill")

    def report(self, run: Run, agent: Events) -> Incident:
        """The incident, from the log of the run and that of the agent of the killed rank's node.

        Raises:
            DemoFailed: nobody was killed.
        """
        if not self._killed:
            raise DemoFailed(f"step {KILL_AFTER} of the first attempt was never seen")
        known = (
            datetime.fromisoformat(event["ts"]).timestamp()
            for event in agent.new()
            if event.get("event") == Event.RANK_DIED and event.get("rank") == KILLED_RANK
        )
        return Incident(
            rank=KILLED_RANK,
            pid=self._pid,
            node=NODES[1],
            step=max(step.step for step in run.attempts[1]),
            killed=self._killed,
            known=next((at for at in known if at >= self._killed), None),
            stepping=self._stepping,
            resumed_from=max((done for done, _ in self._starts.values()), default=None),
            source=" and ".join(sorted({source for _, source in self._starts.values()})),
        )


def read_saves(store: Store, run: Run) -> tuple[list[Save], list[str]]:
    """The committed checkpoints of a run by step, and the names of the folders that hold no commit record."""
    saves, unfinished = [], []
    for ref in sorted(list_refs(store), key=lambda ref: ref.step):
        commit = read_commit(store, ref)
        if commit is None:
            unfinished.append(ref.name)
            continue
        committed = {entry.key: entry.modified for entry in store.list(ref.name)}[f"{ref.name}/{COMMIT}"]
        seen = [step for step in run.steps if (step.step, step.attempt) == (commit.step, commit.attempt)]
        # None where rank 0 was stopped between the snapshot and its line in the log.
        blocked = seen[0].blocked if seen else None
        durable = max(committed - (seen[0].at - seen[0].blocked), 0.0) if seen else None
        saves.append(Save(ref.step, ref.epoch, commit.bytes, commit.shards, blocked, durable))
    return saves, unfinished


def _wait_for_commit(directory: Path, step: int) -> None:
    """The last snapshot of a job is written after its ranks have gone."""
    store = connect(directory.as_uri())

    def committed() -> bool:
        return any(ref.step == step and read_commit(store, ref) for ref in list_refs(store))

    wait_until(committed, f"step {step} to be committed in {directory}", 60.0)


def copy_run(store: Path, target: Path, step: int) -> None:
    """Copies a run as it was when it committed `step`: that checkpoint, nothing newer, and the epochs.

    Raises:
        DemoFailed: there is no such checkpoint.
    """
    source = connect(store.as_uri())
    found = [ref for ref in list_refs(source) if ref.step == step and read_commit(source, ref)]
    source.close()
    if not found:
        raise DemoFailed(f"{store} has no checkpoint of step {step}")
    shutil.copytree(store / found[0].name, target / found[0].name)
    shutil.copytree(store / EPOCHS, target / EPOCHS)


def _ckptsvc(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "ckptsvc.cli.main", name]


def _one_node(ranks: int) -> list[str]:
    return [*_ckptsvc("run"), "--standalone", "--node", NODES[0], "--nproc-per-node", str(ranks)]


def _training(log: Path, *flags: str) -> list[str]:
    return ["-m", "ckptsvc.cli.demonstration.train", "--log-file", str(log), "--steps", str(STEPS), *flags]


def _environ(sockets: Path, arenas: Path) -> dict[str, str]:
    """The environment of all processes: no settings of the user's, no ranks of an outer launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPTSVC_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    places = {"CKPTSVC_AGENT_SOCKET_DIR": str(sockets), "CKPTSVC_ARENA_DIR": str(arenas)}
    # Who fails here is no bad node for the user's next job.
    places["CKPTSVC_LAUNCH_STATE"] = str(sockets / "state")
    return kept | places | {"CKPTSVC_SAVE_KEEP": "0", "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
