"""The workloads as one rank runs them: save, small, overlap, restore.

Systems and raw limits take turns within a repetition, so that the machine's moods fall on all alike. The first
repetition warms up and is kept apart.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from ckptsvc.cli.benchmarks.limits import Scratch, cold_reads, direct_write
from ckptsvc.cli.benchmarks.machine import cpu_seconds, evict
from ckptsvc.cli.benchmarks.peers import PEERS, missing
from ckptsvc.cli.benchmarks.spec import Results, Sample, Spec
from ckptsvc.cli.benchmarks.state import Tree, is_intact, large_state, local_bytes, small_state, trained_state, wipe
from ckptsvc.cli.benchmarks.systems import Ckptsvc, FromStore, System, shard_files
from ckptsvc.errors import Damaged

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

_MATRIX = 384  # four products of this size take a few milliseconds on one core


def save(spec: Spec, progress: Progress) -> Results:
    """Seconds blocked, seconds until durable and CPU seconds of a save, beside memcpy and a raw write of the bytes."""
    tree = small_state(spec.tensors) if spec.workload == "small" else large_state(spec.nbytes)
    results = Results(nbytes=local_bytes(tree))
    scratch = Scratch(results.nbytes)

    def limits(repetition: int) -> None:
        barrier()
        results.add("memcpy", repetition, {"seconds": scratch.memcpy()})
        if spec.directory:
            barrier()  # all ranks write at once, as they do when they save
            seconds, results.notes["direct write"] = direct_write(_folder(spec, f"raw-{rank()}"), scratch)
            results.add("direct write", repetition, {"seconds": seconds})

    _take_turns(spec, results, _systems(spec, tree, results), measure_save, progress, limits)
    return results


def measure_save(system: System) -> Sample:
    """One save with nothing beside it."""
    gc.collect()
    barrier()
    processes = [os.getpid(), *(system.processes() if rank() == 0 else ())]
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
        self._a, self._b = torch.rand(2, _MATRIX, _MATRIX)
        self._c = torch.empty(_MATRIX, _MATRIX)

    def until(self, stop: Callable[[], bool]) -> tuple[int, float]:
        """Iterate until `stop()`; returns (iterations, seconds)."""
        count, began = 0, time.perf_counter()
        while not stop():
            for _ in range(4):
                torch.mm(self._a, self._b, out=self._c)
            count += 1
        return count, time.perf_counter() - began

    def for_seconds(self, seconds: float) -> tuple[int, float]:
        """Iterate for so long; returns (iterations, seconds)."""
        end = time.perf_counter() + seconds
        return self.until(lambda: time.perf_counter() >= end)


def overlap(spec: Spec, progress: Progress) -> Results:
    """What a save costs a training loop that goes on beside it, and what one that is overlapped costs."""
    tree = large_state(spec.nbytes)
    results = Results(nbytes=local_bytes(tree))
    scratch = Scratch(results.nbytes)
    torch.set_num_threads(1)
    loop = ComputeLoop()
    systems = _systems(spec, tree, results)
    beside = f"{spec.store.rstrip('/')}-overlap"
    systems.insert(1, Ckptsvc(trained_state(spec.nbytes), beside, spec.agent, overlap=True))

    def limits(repetition: int) -> None:
        barrier()
        results.add("memcpy", repetition, {"seconds": scratch.memcpy()})

    _take_turns(spec, results, systems, lambda system: measure_overlap(system, loop, spec.base), progress, limits)
    return results


def measure_overlap(system: System, loop: ComputeLoop, base: float) -> Sample:
    """One save with the compute loop beside it.

    Args:
        system: what saves.
        loop: the training.
        base: seconds for which the loop runs alone, before and after, to know its own speed; also from the save to
            the next change of the state: one training step.

    Returns:
        blocked: seconds of the call, and of waiting before the state changes; durable: seconds until all is synced;
        slowdown: how much longer an iteration takes between these two, 0.05 for 5 %; lost: seconds the loop lost.
    """
    gc.collect()
    barrier()
    loop.for_seconds(base / 4)
    before, alone = loop.for_seconds(base)
    began = time.perf_counter()
    system.save()
    blocked = time.perf_counter() - began
    with _Background(system.finish) as finishing:
        count, beside = loop.until(lambda: finishing.ended.is_set() or time.perf_counter() - began > blocked + base)
        waiting = time.perf_counter()
        system.before_update()
        blocked += time.perf_counter() - waiting
        more, longer = loop.until(finishing.ended.is_set)
        count, beside = count + more, beside + longer
        total = time.perf_counter() - began
    barrier()
    after, alone_again = loop.for_seconds(base)
    iteration = (alone + alone_again) / (before + after)
    slowdown = beside / (count * iteration) - 1 if count else 0.0
    return {"blocked": blocked, "durable": total, "slowdown": slowdown, "lost": total - count * iteration}


class _Background:
    """Runs something in a thread; leaving the context raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.ended = threading.Event()
        self._failure: BaseException | None = None
        self._work, self._thread = work, threading.Thread(target=self._run, name="bench-finish")

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  it is raised again in the thread that waits
            self._failure = error
        self.ended.set()

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._failure:
            raise self._failure


# ---- restore ---------------------------------------------------------------------------------------------------------


def stage(spec: Spec, progress: Progress) -> Results:
    """The trainer that saves and is then killed, so that `restore` finds its snapshot in memory and in the store."""
    system = Ckptsvc(large_state(spec.nbytes), spec.store, spec.agent)
    system.save()
    system.finish()
    return Results()


def restore(spec: Spec, progress: Progress) -> Results:
    """Seconds to restore from memory, beside memcpy; cold from the store, beside the fastest raw read of the shards."""
    tree = large_state(spec.nbytes)
    results = Results(nbytes=local_bytes(tree))
    shards = shard_files(spec.store)
    memory, store = Ckptsvc(tree, spec.store, spec.agent), FromStore(tree, spec.store)
    copied = Scratch(results.nbytes)
    read = Scratch(max((path.stat().st_size for path in shards), default=1)) if rank() == 0 else None
    peers = [p for p in _peers(spec, tree, results) if _guarded(results, p, lambda p=p: _save_once(p))]  # type: ignore[misc]

    def ours(repetition: int) -> None:
        barrier()
        results.add("memcpy", repetition, {"seconds": copied.memcpy()})
        results.add("from memory", repetition, _timed_load(tree, memory.load))
        if memory.restored_from != "memory":
            raise Damaged(f"the snapshot in memory was not used: restored from {memory.restored_from}")
        if read and shards:
            ways, results.notes["cold read"] = cold_reads(shards, read)
            results.add("cold read", repetition, ways)
        _evict(shards)
        results.add("from store", repetition, _timed_load(tree, store.load))

    def load(peer: System) -> Sample:
        _evict(peer.files())
        return _timed_load(tree, peer.load)

    _take_turns(spec, results, peers, load, progress, ours)
    memory.close()
    return results


def _save_once(peer: System) -> None:
    peer.save()
    peer.finish()


def _evict(paths: Sequence[Path]) -> None:
    barrier()
    if rank() == 0:
        evict(paths)


def _timed_load(tree: Tree, load: Callable[[], None]) -> Sample:
    wipe(tree)
    gc.collect()
    barrier()
    began = time.perf_counter()
    load()
    seconds = time.perf_counter() - began
    if not is_intact(tree):
        raise Damaged("what was restored is not what was saved")
    return {"seconds": seconds}


# ---- taking turns ----------------------------------------------------------------------------------------------------


def _systems(spec: Spec, tree: Tree, results: Results) -> list[System]:
    return [Ckptsvc(tree, spec.store, spec.agent), *_peers(spec, tree, results)]


def _peers(spec: Spec, tree: Tree, results: Results) -> list[System]:
    found: list[System] = []
    for name in spec.peers:
        why = missing(name) or ("" if spec.directory else "it writes to a directory, which the store is not")
        if why:
            results.drop(name, why)
        else:
            found.append(PEERS[name](tree, _folder(spec, name)))
    return found


def _take_turns(
    spec: Spec,
    results: Results,
    systems: list[System],
    measure: Callable[[System], Sample],
    progress: Progress,
    first: Callable[[int], None] = lambda repetition: None,
) -> None:
    """Measure every system once a repetition, `first` before them; a peer that fails drops out. Closes them."""
    for repetition in range(spec.repeat + 1):
        first(repetition)
        for system in list(systems):

            def turn(system: System = system, repetition: int = repetition) -> None:
                results.add(system.name, repetition, measure(system))
                barrier()
                system.discard_older()

            if not _guarded(results, system, turn):
                systems.remove(system)
        progress((repetition + 1) / (spec.repeat + 1))
    for system in systems:
        system.close()


def _guarded(results: Results, system: System, action: Callable[[], None]) -> bool:
    """Do it. Whatever a peer raises is its result; what ckptsvc raises ends the benchmark."""
    try:
        action()
    except Exception as error:
        if isinstance(system, Ckptsvc):
            raise
        results.drop(system.name, f"failed: {type(error).__name__}: {str(error)[:200]}")
    else:
        return True
    # What failed for want of memory or descriptors must not keep what it has.
    with suppress(Exception):
        system.close()
    gc.collect()
    return False


def _folder(spec: Spec, name: str) -> Path:
    folder = Path(spec.directory, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0
