"""`ckptsvc bench rebuild`: how fast what a lost node held is made of the others' parity, beside memcpy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np

from ckptsvc.agent.tiers.transfer import MAX_STREAMS
from ckptsvc.cli.benchmarks.machine import available_memory, facts, load
from ckptsvc.cli.benchmarks.table import Value
from ckptsvc.cli.terminal import Screen, emit, progress, size
from ckptsvc.errors import InvalidInput
from ckptsvc.format.checksum import EXTENT, extent_digests
from ckptsvc.pipeline.parity import Bytes, Stripes, Sum
from ckptsvc.quantities import parse_size

BAR = 0.5
"""What is to be reached: bytes rebuilt, of those that memcpy copies in the same time with as many threads."""


class Case(NamedTuple):
    """So many nodes of a group are lost, and the parity makes up for so many losses."""

    nodes: int
    losses: int
    lost: int

    @property
    def what(self) -> str:
        """In words."""
        return f"{'xor' if self.losses == 1 else 'rs'}, {self.lost} of {self.nodes} lost"

    @property
    def read(self) -> int:
        """Bytes that are read for each that is rebuilt."""
        return self.nodes - self.losses


CASES = (Case(2, 1, 1), Case(4, 1, 1), Case(8, 1, 1), Case(4, 2, 1), Case(4, 2, 2), Case(8, 2, 2))
ARENAS = max(case.read for case in CASES) + 1


class Sample(NamedTuple):
    """Seconds of one repetition, and of a memcpy of as many bytes just before."""

    seconds: float
    memcpy: float


@click.command()
@click.option("--size", "nbytes", default="128MiB", show_default=True, help="Of the lost arena; whole MiB are taken.")
@click.option("--threads", type=click.IntRange(1, 256), help="Only with so many. [default: 1, and as many as a rebuild"
    " takes here]")  # fmt: skip
@click.option("--repeat", type=click.IntRange(1, 100), default=5, show_default=True,
    help="Repetitions, after one to warm up.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(nbytes: str, threads: int | None, repeat: int, as_json: bool) -> None:
    """Measure how fast the memory of a lost node is rebuilt from parity (tiers.partner), beside memcpy.

    The sums alone, from memory to memory, with the checksums of what is rebuilt: what the processor and its memory
    allow, without any network. memcpy of as many bytes, by as many threads, goes before each repetition. A byte is
    touched when it is read or written: for one that memcpy copies, two are; for one of four lost with "xor", four are.

    \b
    JSON: {"facts", "bytes", "bar", "rows": [{"what", "threads", "rate",
      "of_memcpy", "touched"}]}
    rate: {"median", "low", "high"} of what is rebuilt, in MiB/s; of_memcpy
    likewise, of memcpy's; touched: the same counting all that is touched.
    """  # noqa: D301  \b is click's
    extents = -(-parse_size(nbytes) // EXTENT)
    if not extents or (ARENAS + 1) * extents * EXTENT > available_memory():
        raise InvalidInput(f"--size {nbytes}: there must be {ARENAS + 1} times as much memory")
    counts = [threads] if threads else sorted({1, min(os.cpu_count() or 1, MAX_STREAMS)})
    about = facts(os.getcwd())
    found = measure(extents, counts, repeat)
    about["load"] = f"{about['load']} before, {load()} after"
    rows = [_row(case, count, samples, extents * EXTENT) for (case, count), samples in found.items()]
    if as_json:
        emit({"facts": about, "bytes": extents * EXTENT, "bar": BAR, "rows": [msgspec.to_builtins(r) for r in rows]})
    else:
        _show(Screen(), about, rows, extents * EXTENT)


def measure(extents: int, counts: Sequence[int], repeat: int) -> dict[tuple[Case, int], list[Sample]]:
    """Samples of all cases, with each of these numbers of threads; they take turns."""
    arenas = [np.full(extents * EXTENT, number, np.uint8) for number in range(ARENAS)]  # their pages are there then
    found: dict[tuple[Case, int], list[Sample]] = {(case, count): [] for count in counts for case in CASES}
    with ThreadPoolExecutor(max(counts)) as pool, progress("measuring", (repeat + 1) * len(found)) as advance:
        for repetition in range(repeat + 1):
            for (case, count), samples in found.items():
                copied = _timed(pool, count, partial(_copy, arenas))
                rebuilt = _timed(pool, count, partial(rebuild, case, arenas))
                if repetition:
                    samples.append(Sample(rebuilt, copied))
                advance(1)
    return found


def _timed(pool: ThreadPoolExecutor, count: int, work: Callable[[int, int], None]) -> float:
    """Seconds in which so many threads do each its part."""
    began = time.perf_counter()
    for _ in pool.map(work, range(count), [count] * count):
        pass
    return time.perf_counter() - began


def _copy(arenas: Sequence[Bytes], number: int, of: int) -> None:
    source, target = arenas[0], arenas[-1]
    part = slice(len(source) * number // of, len(source) * (number + 1) // of)
    np.copyto(target[part], source[part])


def rebuild(case: Case, arenas: Sequence[Bytes], number: int, of: int) -> None:
    """One thread's part of what the first node of a group held, into the last arena, as the courier does it."""
    result = arenas[-1]
    stripes = Stripes(case.nodes, case.losses, len(result) // EXTENT)
    sums = Sum(stripes.prime, EXTENT)
    for stripe in stripes.stripes_with(0):
        recipe = stripes.recipe(stripe, 0, range(case.lost))
        factors = [*recipe.lines.values(), *recipe.nodes.values()]
        first, chunk = stripes.first(0, stripe), stripes.chunk
        for extent in range(first + chunk * number // of, first + chunk * (number + 1) // of):
            part = slice(extent * EXTENT, (extent + 1) * EXTENT)
            total = result[part]
            if len(total):  # the last chunk may have room for more
                terms = [(arena[part], factor) for arena, factor in zip(arenas[: case.read], factors, strict=True)]
                sums.put(total, terms, recipe.divisor)
                extent_digests(total.data, EXTENT)


class Row(msgspec.Struct, frozen=True):
    """One line of the table: see `command`."""

    what: str
    threads: int
    rate: Value
    of_memcpy: Value
    touched: Value


def _row(case: Case, threads: int, samples: Sequence[Sample], nbytes: int) -> Row:
    ratios = [sample.memcpy / sample.seconds for sample in samples]
    rates = [nbytes / 2**20 / sample.seconds for sample in samples]
    touched = [ratio * (case.read + 1) / 2 for ratio in ratios]
    return Row(case.what, threads, Value.of(rates), Value.of(ratios), Value.of(touched))


def _show(screen: Screen, about: dict[str, Any], rows: Sequence[Row], nbytes: int) -> None:
    for name, fact in about.items():
        screen.line(f"{screen.paint(name.ljust(12), 'head')}{fact}")
    screen.line(f"{screen.paint('lost'.ljust(12), 'head')}an arena of {size(nbytes)}")
    screen.line()
    cells = [
        (
            row.what,
            str(row.threads),
            f"{row.rate.median:,.0f}",
            f"{row.of_memcpy.median:.2f} ({row.of_memcpy.low:.2f} - {row.of_memcpy.high:.2f})",
            f"{row.touched.median:.2f}",
        )
        for row in rows
    ]
    header = ("REBUILT", "THREADS", "MiB/s", "OF MEMCPY", "TOUCHED, OF MEMCPY")
    screen.table(header, cells, right=header[1:])
    screen.line()
    screen.line(f"medians (minimum - maximum); the goal is {BAR:g} of memcpy with as many threads")
