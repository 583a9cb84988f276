"""The workloads as one rank runs them: save, small, overlap, restore. What is measured is returned as samples.

A sample is one repetition: numbers by name, seconds and bytes. Systems and raw limits take turns within a repetition, so
that the machine's moods fall on all alike. The first repetition warms up and is kept apart.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptsvc.cli.bench_limits import Scratch, cold_reads, direct_write
from ckptsvc.cli.bench_machine import cpu_seconds, evict
from ckptsvc.cli.bench_peers import PEERS, missing
from ckptsvc.cli.bench_state import Tree, is_intact, large_state, local_bytes, small_state, wipe
from ckptsvc.cli.bench_systems import Ckptsvc, FromStore, System, shard_files
from ckptsvc.errors import Damaged

Sample = dict[str, float]

BASE_SECONDS = 0.4
"""How long the compute loop runs alone, before and after each save, to know its own speed."""

_MATRIX = 384  # a few milliseconds for one product on one core


class Results:
    """What one rank has measured."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.warm_up: dict[str, Sample] = {}
        self.unavailable: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.nbytes = 0

    def add(self, name: str, repetition: int, sample: Sample) -> None:
        """One repetition of a system or a limit; number 0 is the warm-up."""
        if repetition == 0:
            self.warm_up[name] = sample
        else:
            self.samples.setdefault(name, []).append(sample)


def run(spec: dict[str, Any]) -> Results:
    """Run the workload that `spec` names (see bench_ranks)."""
    workloads: dict[str, Callable[[dict[str, Any], Tree, Results], None]] = {
        "save": _save,
        "small": _save,
        "overlap": _overlap,
        "restore": _restore,
    }
    results = Results()
    torch.manual_seed(0)
    tree = small_state(spec["tensors"]) if spec["workload"] == "small" else large_state(spec["bytes"])
    results.nbytes = local_bytes(tree)
    workloads[spec["workload"]](spec, tree, results)
    return results


# ---- save ------------------------------------------------------------------------------------------------------------


def _save(spec: dict[str, Any], tree: Tree, results: Results) -> None:
    scratch = Scratch(results.nbytes)
    for repetition, system in _turns(spec, tree, results, lambda n: _limits(n, spec, scratch, results)):
        results.add(system.name, repetition, measure_save(system))


def _limits(repetition: int, spec: dict[str, Any], scratch: Scratch, results: Results) -> None:
    barrier()
    results.add("memcpy", repetition, {"seconds": scratch.memcpy()})
    barrier()
    if spec["directory"]:
        # All ranks write at once, as they do when they save.
        directory = Path(spec["directory"], f"raw-{_rank()}")
        directory.mkdir(exist_ok=True)
        barrier()
        seconds, how = direct_write(directory, scratch)
        results.add("direct write", repetition, {"seconds": seconds})
        results.notes["direct write"] = how


def measure_save(system: System) -> Sample:
    """One save with nothing beside it: seconds blocked, seconds until durable, CPU seconds."""
    gc.collect()
    barrier()
    processes = [os.getpid(), *(system.processes() if _rank() == 0 else ())]
    used, began = cpu_seconds(processes), time.perf_counter()
    system.save()
    blocked = time.perf_counter() - began
    system.finish()
    durable = time.perf_counter() - began
    barrier()
    return {"blocked": blocked, "durable": durable, "cpu": cpu_seconds(processes) - used}


# ---- overlap ---------------------------------------------------------------------------------------------------------


class ComputeLoop:
    """Stands for training: matrix products on one thread."""

    def __init__(self) -> None:
        self._a = torch.rand(_MATRIX, _MATRIX)
        self._b = torch.rand(_MATRIX, _MATRIX)
        self._c = torch.empty(_MATRIX, _MATRIX)

    def iterate(self) -> None:
        """One step."""
        for _ in range(4):
            torch.mm(self._a, self._b, out=self._c)

    def until(self, stop: Callable[[], bool]) -> tuple[int, float]:
        """Iterate until `stop()`; returns (iterations, seconds)."""
        count, began = 0, time.perf_counter()
        while not stop():
            self.iterate()
            count += 1
        return count, time.perf_counter() - began

    def for_seconds(self, seconds: float) -> tuple[int, float]:
        """Iterate for so long; returns (iterations, seconds)."""
        end = time.perf_counter() + seconds
        return self.until(lambda: time.perf_counter() >= end)


def _overlap(spec: dict[str, Any], tree: Tree, results: Results) -> None:
    torch.set_num_threads(1)
    loop = ComputeLoop()
    for repetition, system in _turns(spec, tree, results):
        results.add(system.name, repetition, measure_overlap(system, loop, spec.get("base", BASE_SECONDS)))


def measure_overlap(system: System, loop: ComputeLoop, base_seconds: float = BASE_SECONDS) -> Sample:
    """One save with the compute loop beside it.

    Returns:
        blocked: seconds of the call; durable: seconds until all is synced; slowdown: how much longer an iteration takes
        between the two, 0.05 for 5 %; lost: seconds the loop lost in all.
    """
    gc.collect()
    barrier()
    loop.for_seconds(base_seconds / 4)
    before, alone = loop.for_seconds(base_seconds)
    durable = threading.Event()

    def finish() -> None:
        try:
            system.finish()
        except BaseException as error:  # noqa: BLE001  handed to the thread that measures
            failure.append(error)
        durable.set()

    failure: list[BaseException] = []
    began = time.perf_counter()
    system.save()
    blocked = time.perf_counter() - began
    waiting = threading.Thread(target=finish, name="bench-finish")
    waiting.start()
    count, beside = loop.until(durable.is_set)
    total = time.perf_counter() - began
    waiting.join()
    if failure:
        raise failure[0]
    barrier()
    after, alone_again = loop.for_seconds(base_seconds)
    iteration = (alone + alone_again) / (before + after)
    return {
        "blocked": blocked,
        "durable": total,
        "slowdown": max(beside / (count * iteration) - 1, 0.0) if count else 0.0,
        "lost": total - count * iteration,
    }


# ---- restore ---------------------------------------------------------------------------------------------------------


def _restore(spec: dict[str, Any], tree: Tree, results: Results) -> None:
    """The trainer that saved was killed before this process began; its agent has the snapshot."""
    scratch = Scratch(max((path.stat().st_size for path in shard_files(spec["store"])), default=results.nbytes))
    scratch.nbytes = results.nbytes
    ours = Ckptsvc(tree, spec["store"], spec["agent"])
    cold = FromStore(tree, spec["store"])
    peers = _peers(spec, tree, results)
    for peer in list(peers):
        if not _guarded(results, peer, lambda p=peer: (p.save(), p.finish())):  # type: ignore[misc]
            peers.remove(peer)
    for repetition in range(spec["repeat"] + 1):
        barrier()
        results.add("memcpy", repetition, {"seconds": scratch.memcpy()})
        _timed_load(results, "memory", repetition, tree, ours.load)
        if ours.restored_from != "memory":
            raise Damaged(f"the snapshot in memory was not used: restored from {ours.restored_from}")
        shards = shard_files(spec["store"])
        if _rank() == 0 and shards:
            ways, results.notes["cold"] = cold_reads(shards, scratch)
            results.add("cold read", repetition, ways)
        barrier()
        _evict(shards)
        _timed_load(results, "store", repetition, tree, cold.load)
        for peer in list(peers):
            _evict(peer.files())
            if not _guarded(results, peer, lambda p=peer: _timed_load(results, p.name, repetition, tree, p.load)):  # type: ignore[misc]  # noqa: B023
                peers.remove(peer)
    for system in (ours, *peers):
        system.close()


def _evict(paths: Sequence[Path]) -> None:
    if _rank() == 0:
        evict(paths)


def _timed_load(results: Results, name: str, repetition: int, tree: Tree, load: Callable[[], None]) -> None:
    wipe(tree)
    gc.collect()
    barrier()
    began = time.perf_counter()
    load()
    seconds = time.perf_counter() - began
    if not is_intact(tree):
        raise Damaged(f"{name}: what was restored is not what was saved")
    results.add(name, repetition, {"seconds": seconds})


def stage_and_stay(spec: dict[str, Any]) -> None:
    """The trainer of the restore workload that is going to be killed: save, and wait until it is committed."""
    system = Ckptsvc(large_state(spec["bytes"]), spec["store"], spec["agent"])
    system.save()
    system.finish()


# ---- taking turns ----------------------------------------------------------------------------------------------------


def _turns(
    spec: dict[str, Any], tree: Tree, results: Results, first: Callable[[int], None] = lambda _: None
) -> Any:
    """Yield (repetition, system): every system once a repetition, `first` before them; failing peers drop out."""
    systems: list[System] = [Ckptsvc(tree, spec["store"], spec["agent"]), *_peers(spec, tree, results)]
    for repetition in range(spec["repeat"] + 1):
        first(repetition)
        for system in list(systems):
            yield repetition, system
            system.discard_older()
            barrier()
    for system in systems:
        system.close()


def _peers(spec: dict[str, Any], tree: Tree, results: Results) -> list[System]:
    found: list[System] = []
    for name in spec["peers"]:
        why = missing(name) or ("" if spec["directory"] else "it writes to a directory, and the store is none")
        if why:
            results.unavailable[name] = why
        else:
            found.append(PEERS[name](tree, Path(spec["directory"], name)))
    return found


def _guarded(results: Results, system: System, action: Callable[[], object]) -> bool:
    """Do it; a peer that fails is reported and drops out. The same on every rank: failures of peers are not rank-wise."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  whatever a peer raises is its result
        results.unavailable[system.name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        results.samples.pop(system.name, None)
        return False
    return True


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
