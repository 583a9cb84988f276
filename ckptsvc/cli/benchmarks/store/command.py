"""`ckptsvc bench store`: a store's driver beside the raw limit of its server or device, and beside other clients."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import msgspec

from ckptsvc.cli import address
from ckptsvc.cli.benchmarks.machine import available_memory, facts, load
from ckptsvc.cli.benchmarks.store.systems import OTHERS, RAW, systems
from ckptsvc.cli.benchmarks.store.worker import Task
from ckptsvc.cli.benchmarks.table import Value
from ckptsvc.cli.store_probe.load import FOLDER, clear, connect_as_set
from ckptsvc.cli.terminal import Screen, emit, progress, size
from ckptsvc.errors import CkptsvcError, ConfigError, InvalidInput, StoreUnavailable
from ckptsvc.quantities import parse_duration, parse_size

MiB = 1 << 20
BARS = {"raw": 0.9, "cpu": 0.35, "memory": 64.0}
"""What is to be reached: of the raw limit at least, CPU seconds for a GiB written and MiB beyond the object at most."""

WORDS = ("write", "read")


@click.command()
@click.argument("store")
@click.option("--size", "nbytes", default="256MiB", show_default=True, help="Of the object that is written and read.")
@click.option("--connections", type=click.IntRange(1, 256), default=8, show_default=True, help="Of the raw clients.")
@click.option("--vs", default=",".join(OTHERS), show_default=True, metavar="NAME,...", help='Others, or "".')
@click.option("--endpoint", metavar="URL", help="Of an S3 server other than Amazon's (AWS_ENDPOINT_URL).")
@click.option("--repeat", type=click.IntRange(1, 100), default=5, show_default=True,
    help="Repetitions, after one to warm up.")  # fmt: skip
@click.option("--patience", default="5min", show_default=True, metavar="TIME", help="For one write or read.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    store: str, nbytes: str, connections: int, vs: str, endpoint: str | None, repeat: int, patience: str, as_json: bool
) -> None:
    """Measure the driver of STORE (a URL or a path) beside the raw limit of what is behind it, and other clients.

    Everybody writes one object from the same shared memory, until it is durable, and reads it back (where that can be
    arranged, not from the page cache). They take turns, each in a process of its own, so that the moods of a shared
    machine fall on all alike. The raw limit is the raw client with the best median: system calls, or a bare client
    with many connections; ratios are of the same repetition. Memory is what a process has beyond the object at most.

    \b
    JSON: {"facts", "store", "bytes", "rows": [{"system", "what", "rate",
      "of_raw", "cpu", "memory", "note"}], "bars": [{"what", "value", "bar",
      "met"}], "unavailable": {system: why}}
    rate: {"median", "low", "high"} in MiB/s; of_raw likewise, of the raw limit
    of the same repetition; cpu in seconds for a GiB; memory in MiB.
    """  # noqa: D301  \b is click's
    others = tuple(dict.fromkeys(name for name in vs.split(",") if name))
    unknown = [name for name in others if name not in OTHERS]
    if unknown:
        raise ConfigError(f"--vs {unknown[0]} is not known", hint=f"known: {', '.join(OTHERS)}")
    url = address.parse(store).url
    wanted = systems(url.partition("://")[0], others)
    if endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        os.environ.setdefault("AWS_ALLOW_HTTP", "true")
    pages = -(-parse_size(nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    if not pages or 4 * pages > available_memory():
        raise InvalidInput(f"--size {nbytes}: there must be four times as much memory ({size(available_memory())} are)")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # objects and processes go first
    about = facts(url.removeprefix("file://") if url.startswith("file://") else os.getcwd())
    found = run(url, list(wanted), pages, connections, repeat, parse_duration(patience))
    about["load"] = f"{about['load']} before, {load()} after"
    table = Table(url.partition("://")[0], pages, found)
    if as_json:
        emit(table.document() | {"facts": about, "store": url})
    else:
        table.show(Screen(), about, url)


@dataclass(slots=True)
class Found:
    """Samples by (system, "write" or "read"), and why a system has none.

    Attributes:
        notes: how each did it.
    """

    samples: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def run(url: str, names: Sequence[str], nbytes: int, connections: int, repeat: int, patience: float) -> Found:
    """Have all systems take turns; leaves nothing behind.

    Raises:
        CkptsvcError: our own driver cannot do it.
    """
    found, folder = Found(), f"{FOLDER}{secrets.token_hex(6)}"
    where = f"{url.rstrip('/')}/{folder}"
    with contextlib.ExitStack() as stack:
        stack.callback(_clean, url, folder)
        memory = stack.enter_context(_shared(nbytes))
        workers = {}
        for name in names:
            task = Task(system=name, url=f"{where}/{name.replace(' ', '-')}", memory=memory, nbytes=nbytes,
                connections=connections)  # fmt: skip
            worker = stack.enter_context(Worker(task, patience))
            answer = worker.answer()
            found.notes[name] = answer.get("note", "")
            if "error" in answer:
                _drop(found, name, answer["error"])
            else:
                workers[name] = worker
        os.unlink(memory)  # all have mapped it, or ended
        total = (repeat + 1) * len(workers) * 2 * nbytes
        with progress("measuring", total) as advance:
            for repetition in range(repeat + 1):
                for name, worker in list(workers.items()):
                    if not _turn(found, name, worker, repetition):
                        del workers[name]
                    advance(2 * nbytes)
    return found


def _turn(found: Found, name: str, worker: Worker, repetition: int) -> bool:
    """One repetition of one system, the first to warm up; returns whether it can go on."""
    key = f"object-{repetition}"
    for word in WORDS:
        answer = worker.ask(word, key)
        if "error" in answer or answer["wrong"]:
            _drop(found, name, answer.get("error", "what was read is not what was written"))
            return False
        if repetition:
            found.samples.setdefault((name, word), []).append(answer)
    found.notes[name] = worker.ask("delete", key).get("note") or found.notes[name]
    return True


def _drop(found: Found, name: str, why: str) -> None:
    if name == "ckptsvc":
        raise StoreUnavailable(f"the driver of this store cannot do it: {why}")
    found.unavailable[name] = why
    for word in WORDS:
        found.samples.pop((name, word), None)


class Worker:
    """A process with one system; a context manager."""

    def __init__(self, task: Task, patience: float) -> None:
        self._task, self._patience = task, patience

    def __enter__(self) -> Worker:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptsvc.cli.benchmarks.store.worker",
             msgspec.json.encode(self._task).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, word: str, name: str) -> dict[str, Any]:
        """Have something done; its answer, or {"error": why}."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word} {name}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": self._why()}
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], self._patience)[0]:
            return {"error": f"no answer in {self._patience:g} s"}
        line = out.readline()
        return msgspec.json.decode(line, type=dict[str, Any]) if line else {"error": self._why()}

    def _why(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["it ended"])[0]


@contextlib.contextmanager
def _shared(nbytes: int) -> Iterator[str]:
    """A file of shared memory with random content, twice the size of an object."""
    fd, path = tempfile.mkstemp(prefix="ckptsvc-bench-", dir="/dev/shm")
    try:
        with open(fd, "r+b") as file:
            piece = os.urandom(MiB)
            file.writelines(piece[: min(MiB, 2 * nbytes - start)] for start in range(0, 2 * nbytes, MiB))
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _clean(url: str, folder: str) -> None:
    with contextlib.suppress(CkptsvcError):
        store = connect_as_set(url)
        clear(store, folder)
        store.close()
    if url.startswith("file://"):  # what others have left: folders that were never files
        for path, _, _ in sorted(os.walk(Path(url.removeprefix("file://"), folder)), reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(path)


# ---- the table -------------------------------------------------------------------------------------------------------


class Table:
    """What was found, as ratios of the same repetition.

    Args:
        scheme: of the store.
        nbytes: of an object.
        found: all samples.
    """

    def __init__(self, scheme: str, nbytes: int, found: Found) -> None:
        self._raw, self._nbytes, self._found = list(RAW[scheme]), nbytes, found
        self._names = list(dict.fromkeys(name for name, _ in found.samples))

    def rate(self, name: str, word: str) -> Value:
        """MiB a second."""
        return Value.of([self._nbytes / MiB / each["seconds"] for each in self._found.samples[name, word]])

    def limit(self, word: str) -> str:
        """The raw client with the best median, "" where there is none; luck of another is no limit."""
        raw = [each for each in self._raw if (each, word) in self._found.samples]
        return max(raw, key=lambda each: self.rate(each, word).median, default="")

    def of_raw(self, name: str, word: str) -> Value | None:
        """Of the raw limit, in the same repetition each."""
        limit = self.limit(word)
        if not limit:
            return None
        raw, own = self._found.samples[limit, word], self._found.samples[name, word]
        return Value.of([a["seconds"] / b["seconds"] for a, b in zip(raw, own, strict=True)])

    def cpu(self, name: str, word: str) -> float:
        """CPU seconds for a GiB."""
        return median(each["cpu"] for each in self._found.samples[name, word]) * (1 << 30) / self._nbytes

    def memory(self, name: str, word: str) -> float:
        """MiB beyond the object, at most."""
        return max(each["memory"] for each in self._found.samples[name, word]) / MiB

    def bars(self) -> list[tuple[str, float, float, bool]]:
        """What our driver is to reach: (what, value, bar, whether it is met)."""
        found = []
        for word in WORDS:
            ratio = self.of_raw("ckptsvc", word)
            if ratio is not None:
                found.append((f"{word}: of the raw limit", ratio.median, BARS["raw"], ratio.median >= BARS["raw"]))
        cpu, memory = self.cpu("ckptsvc", "write"), max(self.memory("ckptsvc", word) for word in WORDS)
        found.append(("write: CPU s/GiB", cpu, BARS["cpu"], cpu <= BARS["cpu"]))
        found.append(("memory: MiB beyond the object", memory, BARS["memory"], memory <= BARS["memory"]))
        return found

    def document(self) -> dict[str, Any]:
        """For --json."""
        rows = [
            {
                "system": name,
                "what": word,
                "rate": msgspec.to_builtins(self.rate(name, word)),
                "of_raw": msgspec.to_builtins(self.of_raw(name, word)),
                "cpu": self.cpu(name, word),
                "memory": self.memory(name, word),
                "note": self._found.notes[name],
            }
            for word in WORDS
            for name in self._names
        ]
        bars = [{"what": what, "value": value, "bar": bar, "met": met} for what, value, bar, met in self.bars()]
        return {"bytes": self._nbytes, "rows": rows, "bars": bars, "unavailable": self._found.unavailable}

    def show(self, screen: Screen, about: Mapping[str, str], url: str) -> None:
        """Write it for a person."""
        for name, fact in about.items():
            screen.line(f"{screen.paint(name.ljust(12), 'head')}{fact}")
        screen.line(f"{screen.paint('store'.ljust(12), 'head')}{url}, objects of {size(self._nbytes)}")
        for word in WORDS:
            screen.line()
            rows = []
            for name in self._names:
                rate, ratio = self.rate(name, word), self.of_raw(name, word)
                rows.append((
                    name,
                    f"{rate.median:,.0f} ({rate.low:,.0f} - {rate.high:,.0f})",
                    f"{ratio.median:.2f}" if ratio else "-",
                    f"{self.cpu(name, word):.2f}",
                    f"{self.memory(name, word):,.0f}",
                ))  # fmt: skip
            header = (word.upper(), "MiB/s", "OF RAW", "CPU s/GiB", "MEMORY MiB")
            screen.table(header, rows, right=header[1:])
        screen.line()
        for what, value, bar, met in self.bars():
            least = ">=" if "raw" in what else "<="
            text = f"{what}: {value:.2f}, {'met' if met else 'not met'} ({least} {bar:g})"
            screen.line(screen.paint(text, "good" if met else "bad"))
        screen.line()
        screen.line(
            "medians (minimum - maximum); ratios are of the raw client with the best median, in the same repetition"
        )
        for name, note in self._found.notes.items():
            if name in self._names and note:
                screen.line(f"{name}: {note}")
        for name, why in self._found.unavailable.items():
            screen.line(screen.paint(f"not measured: {name}: {why}", "doubt"))
