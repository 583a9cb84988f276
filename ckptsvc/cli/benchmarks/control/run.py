"""What `ckptsvc bench control` does, in order, and what it has found."""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ckptsvc.agent.watching.watch import LOOK_EVERY
from ckptsvc.cli.benchmarks.control.agents import EXTENT, NBYTES, Agent, Fleet
from ckptsvc.cli.benchmarks.control.service import Service
from ckptsvc.cli.terminal import note
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import checkpoint_name, shard_name
from ckptsvc.format.shard import Entry
from ckptsvc.geometry.box import Box
from ckptsvc.settings import HealthSettings
from ckptsvc.types import TensorMeta

SPARES = 4
"""Further nodes, one of which takes the place of a node that is lost."""

PATIENCE = 300.0
"""Seconds after which something counts as stuck."""

SETTLE = 0.5
"""Seconds between two looks whether the coordinator has become quiet, before the next thing is measured."""

QUIET = 0.8
"""Cores that it may use then."""

FAULTS = ("rank", "node", "cut", "frozen")

TENSORS = 16
"""Tensors of the checkpoint; every rank holds a part of each."""

NODE_LOSS, RANK_DEATH, HANG, CORE = 3.0, 1.0, 5.0, 1.0
"""What is to be reached: seconds until a lost node, a dead and a frozen rank are known; cores in the steady state."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measure.

    Attributes:
        values: all that were measured.
        bar: what it should not exceed; None where there is none.
    """

    what: str
    unit: str
    values: list[float]
    bar: float | None = None

    @property
    def median(self) -> float:
        """Of all values."""
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """The 99th percentile: the largest of up to a hundred."""
        return sorted(self.values)[math.ceil(0.99 * len(self.values)) - 1]

    @property
    def met(self) -> bool | None:
        """Whether the 99th percentile is within the bar."""
        return None if self.bar is None else self.p99 <= self.bar

    def texts(self) -> tuple[str, str, str, str]:
        """Median, 99th percentile, number and bar, for people."""
        many = len(self.values) > 1
        bar = "" if self.bar is None else f"<= {self.bar:g}"
        return (_text(self.median), _text(self.p99) if many else "", str(len(self.values)) if many else "", bar)

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {"what": self.what, "unit": self.unit, "median": self.median, "p99": self.p99,
            "times": len(self.values), "bar": self.bar, "met": self.met}  # fmt: skip


def _text(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


@dataclass(slots=True)
class Control:
    """One run of the benchmark.

    Args:
        agents, ranks: nodes of the job, and ranks of each.
        kills: times that each fault is tried.
        seconds: for which the steady state is watched.
        share: agents on one connection.
        faults: which ones.

    Attributes:
        rows, notes: what was found.
    """

    agents: int
    ranks: int
    kills: int
    seconds: float
    share: int = 1
    faults: tuple[str, ...] = FAULTS
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _service: Service = field(init=False)
    _fleet: Fleet = field(init=False)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"control: {self.agents:,} agents of {self.ranks} ranks, {self.agents * self.ranks:,} ranks in all"

    async def run(self) -> None:
        """Do everything; leaves nothing behind."""
        with Service.started() as self._service:
            service = self._service
            self._fleet = Fleet(service.address, service.secret, self.agents, self.ranks, service.store, self.share)
            try:
                await self._join()
                await self._watch()
                await self._commit()
                await self._faults()
                await self._new_coordinator()
            finally:
                await self._fleet.close()
        self._explain()

    def _explain(self) -> None:
        self.notes.append(
            "agents are simulated in one process, with a call each"
            + (f", {self.share} of them on a connection: there are too few file descriptors for one each"
               if self.share > 1 else " on a connection of its own")
        )  # fmt: skip
        self.notes.append(
            "a rank that is told to start registers after 0.3 to 0.5 s, one that is told to end takes 0.02 to 0.3 s,"
            " an examination 0.3 s"
        )

        self.notes.append(f"the longest pause of the process that simulates them: {self._fleet.pause:.2f} s")

    def _add(self, what: str, unit: str, values: list[float], bar: float | None = None) -> None:
        self.rows.append(Row(what, unit, values, bar))

    # ---- what is measured --------------------------------------------------------------------------------------------

    async def _join(self) -> None:
        note(f"{self.title}: joining")
        began, used = time.monotonic(), self._service.cpu()
        doors = range(min(2 * self.kills + SPARES, self.agents // 2)) if self.share == 1 else ()
        self._fleet.join(SPARES, doors)
        started = await self._fleet.wait("start", self._all, PATIENCE)
        self._add("all agents have joined, and been told to start", "s", [max(started.values()) - began])
        took, moved = await self._attached(max(started.values()))
        self._add("from then until every rank knows whom it shares with", "s", [took])
        self._add("CPU of the coordinator for both", "s", [self._service.cpu() - used])
        self._add("bytes sent to the agents for both", "MB", [moved / 1e6])

    async def _attached(self, since: float) -> tuple[float, int]:
        """Wait until all ranks of the attempt are attached; seconds, and bytes sent down in all."""
        await self._fleet.wait("epoch_allotted", self._all, PATIENCE)
        held = await self._fleet.wait("holders", self._all, PATIENCE)
        return max(held.values()) - since, self._fleet.traffic[1]

    def _all(self, seen: dict[int, float]) -> bool:
        """Whether all nodes of the attempt are among them."""
        return len(seen) >= self.agents and sum(number in seen for number in self._running()) >= self.agents

    def _running(self) -> list[int]:
        agents = self._fleet.agents
        running = [agent.number for agent in agents if agent.runs]
        return running if len(running) == self.agents else [agent.number for agent in agents]

    async def _watch(self) -> None:
        note("the steady state")
        await self._quiet()
        began, used, own = time.monotonic(), self._service.cpu(), time.process_time()
        traffic, reports = self._fleet.traffic, self._fleet.reports
        await asyncio.sleep(self.seconds)
        seconds = time.monotonic() - began
        up, down = (b - a for a, b in zip(traffic, self._fleet.traffic, strict=True))
        self._add("steady state: coordinator", "cores", [(self._service.cpu() - used) / seconds], CORE)
        self._add("steady state: the simulated agents", "cores", [(time.process_time() - own) / seconds])
        self._add("steady state: memory of the coordinator", "MiB", [self._service.memory() / 2**20])
        self._add("steady state: to the coordinator", "kB/s", [up / seconds / 1e3])
        self._add("steady state: from the coordinator", "kB/s", [down / seconds / 1e3])
        self._add("steady state: messages to the coordinator", "1/s", [(self._fleet.reports - reports) / seconds])

    async def _commit(self) -> None:
        note("a commit")
        fleet, world, step = self._fleet, self.agents * self.ranks, 100
        epoch = max(agent.epoch for agent in fleet.agents)
        folder = Path(self._service.store.removeprefix("file://"), checkpoint_name(step, epoch))
        token = secrets.token_hex(4)
        await _make_shards(folder, [shard_name(rank, token) for rank in range(world)])
        columns = _columns(world)
        last = next(agent for agent in fleet.agents if agent.runs)
        began, used = time.monotonic(), self._service.cpu()
        fleet.seen.clear()
        await fleet.save(step, lambda rank: shard_name(rank, token), columns, last.ranks.start)
        staged = await fleet.wait("snapshot_complete", self._all, PATIENCE)
        await self._quiet()
        self._add("save: until all know that it is whole in memory", "s", [max(staged.values()) - began])
        self._add("save: CPU of the coordinator before the commit", "s", [self._service.cpu() - used])
        used, began = self._service.cpu(children=True), time.monotonic()
        fleet.finish_save(last, step, shard_name(last.ranks.start, token), columns(last.ranks.start))
        ended = await fleet.wait("save_ended", self._all, PATIENCE)
        self._add("commit: from the last shard until the first agent hears", "s", [min(ended.values()) - began])
        self._add("commit: until the last agent hears", "s", [max(ended.values()) - began])
        self._add("commit: CPU, with that of its writer", "s", [self._service.cpu(children=True) - used])
        if fleet.failed:
            self.notes.append(f"the save failed: {fleet.failed}")

    async def _quiet(self) -> None:
        """Wait until the coordinator has taken in what was sent."""
        used = self._service.cpu()
        while True:
            await asyncio.sleep(SETTLE)
            now = self._service.cpu()
            if not self._fleet.waiting and now - used < QUIET * SETTLE:
                return
            used = now

    async def _faults(self) -> None:
        fleet = self._fleet
        plain = [agent for agent in fleet.agents if agent.bell is None]
        doors = [agent for agent in fleet.agents if agent.bell is not None]
        for name, what, do, among, kind, bar in (
            ("rank", "a rank is killed", fleet.kill_rank, plain, "stop", RANK_DEATH),
            ("node", "a node ends", fleet.cut, doors, "stop", NODE_LOSS),
            ("cut", "a node is cut off", fleet.silence, doors, "stop", NODE_LOSS),
            ("frozen", "a rank is frozen", self._freeze, plain, "kill", HANG),
        ):
            if name not in self.faults:
                continue
            note(what)
            found = []
            for _ in range(self.kills):
                candidates = [agent for agent in among if agent.runs]
                if candidates:
                    victim = random.choice(candidates)
                    among.remove(victim)  # a node that fails again and again is not taken any more
                    found.append(await self._fault(do, victim, kind))
            if not found:
                continue
            self._add(f"{what}: until that is known", "s", [known for known, _, _, _ in found], bar)
            self._add(f"{what}: until all agents are told to stop", "s", [stopped for _, stopped, _, _ in found])
            self._add(f"{what}: until all are told to start again", "s", [started for _, _, started, _ in found])
            self._add(f"{what}: CPU of the coordinator until it is known", "s", [used for _, _, _, used in found])

    def _freeze(self, agent: Agent) -> None:
        self._fleet.freeze_rank(agent, HealthSettings().floor, LOOK_EVERY)

    async def _fault(self, do: Callable[[Agent], None], victim: Agent, kind: str) -> tuple[float, float, float, float]:
        """Seconds until it is known, until the last agent has been told to stop, and to start; CPU until known."""
        fleet = self._fleet
        await self._quiet()
        fleet.seen.clear()
        running = sum(agent.runs for agent in fleet.agents)
        began, used = time.monotonic(), self._service.cpu()
        do(victim)
        known = min((await fleet.wait(kind, bool, PATIENCE)).values()) - began
        used = self._service.cpu() - used
        there = running - victim.lost
        stopped = await fleet.wait("stop", lambda seen: len(seen) >= there, PATIENCE)
        stopped_in = max(stopped.values()) - began
        started = max((await fleet.wait("start", lambda seen: len(seen) >= self.agents, PATIENCE)).values())
        await self._attached(started)
        if victim.lost:
            fleet.replace(victim)
        return known, stopped_in, started - began, used

    async def _new_coordinator(self) -> None:
        note("another coordinator")
        await self._quiet()
        self._fleet.seen.clear()
        self._service.kill()
        began = time.monotonic()
        await asyncio.to_thread(self._service.start)
        up = time.monotonic()
        await self._fleet.wait("epoch_allotted", self._all, PATIENCE)
        back = max((await self._fleet.wait("holders", self._all, PATIENCE)).values())
        self._add("coordinator killed: until the next one serves", "s", [up - began])
        self._add("coordinator killed: from then until all agents are back", "s", [back - up])
        self._add("coordinator killed: CPU of the next one", "s", [self._service.cpu()])


async def _make_shards(folder: Path, names: list[str]) -> None:
    """Empty files: the commit looks whether they are there. Another process makes them: pings want answers here."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    process = await asyncio.create_subprocess_exec("xargs", "touch", cwd=folder, stdin=asyncio.subprocess.PIPE)
    await process.communicate("\n".join(names).encode())


def _columns(world: int) -> Callable[[int], bytes]:
    """What a rank's worker reports of its shard: rows of `TENSORS` tensors that the whole job shares."""
    rows = NBYTES // 2 // TENSORS // 4
    entries = [
        Entry(TensorMeta(f"model.layers.{n}.weight", "float32", (world, rows)), Box((0, 0), (1, rows)),
            EXTENT + n * rows * 4, rows * 4)
        for n in range(TENSORS)
    ]  # fmt: skip
    base = Columns.from_entries(entries, EXTENT + TENSORS * rows * 4, "bench")

    def of(rank: int) -> bytes:
        geometry = base.geometry.copy()
        geometry[0::4] = np.int64(rank)
        return msgspec.structs.replace(base, geometry=geometry).encode()

    return of
