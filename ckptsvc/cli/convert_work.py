"""The processes of a conversion: the same command again, one for each share.

A worker writes one JSON object a line to its standard output: {"written": bytes since the last line}, and at the end
{"read", "infinite"} or {"error"}. It ends when its standard input does: with the process that started it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ckptsvc.cli.terminal import emit
from ckptsvc.errors import BY_CODE, CkptsvcError, SaveFailed
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.interop.conversion.convert import Conversion
from ckptsvc.interop.conversion.request import Request, Sources, model_of, open_sources, target_format
from ckptsvc.interop.formats import NATIVE
from ckptsvc.interop.naming.layouts import arrange

_EVERY = 0.2  # seconds between two reports of a worker

Progress = Callable[[int], None]


def planned(
    request: Request,
    opened: Sources,
    memory: int,
    *,
    dry: bool = False,
    restart: bool = False,
    part: tuple[int, int] | None = (0, 1),
) -> Conversion:
    """The plan of a conversion, with a layout if one is asked for.

    For a target of our own, each rank of the layout gets a shard of what it will hold. Exporters of other formats take
    the sizes of the layout as options of theirs.

    Raises:
        CkptsvcError: as `Conversion` and `layouts.arrange` raise.
    """
    arrangement = None
    ranks = 0
    if request.to:
        parallel = Parallel.parse(request.to)
        if target_format(request.target) == NATIVE:
            given = request.variables
            arrangement = arrange(opened.logical, parallel, model=model_of(request.family), given=given)
            arrangement.placement.check()
            ranks = parallel.world_size
        else:
            request = msgspec.structs.replace(request, options={**_sizes(request), **request.options})
    holding = arrangement.regions if arrangement else None
    return Conversion(request, opened, memory, holding=holding, ranks=ranks, dry=dry, restart=restart, part=part)


def _sizes(request: Request) -> dict[str, str]:
    """The layout as options of an exporter: without sizes of one, which say nothing."""
    sizes = dict(item.strip().partition("=")[::2] for item in request.to.split(","))
    kind = target_format(request.target)
    if kind.startswith("deepspeed") and "zero" in sizes:
        sizes["stage"] = sizes.pop("zero")
    if kind.startswith("megatron"):
        sizes = {name: value for name, value in sizes.items() if name not in {"dp", "zero"}}  # any may load it
    return {name: value for name, value in sizes.items() if value != "1" or name in {"dp", "stage"}}


def be_worker(request: Request, memory: int, number: int, of: int) -> int:
    """Do one share, and report."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = _Report()
    opened = open_sources(request)
    conversion = planned(request, opened, memory, part=None)
    try:
        conversion.run(report, number, of)
    finally:
        conversion.close()
    report.flush()
    emit({"read": conversion.bytes_read, "infinite": dict(conversion.infinite)})
    sys.stdout.flush()
    return 0


def _end_with_parent() -> None:
    if not os.read(sys.stdin.fileno(), 1):
        os._exit(1)


class _Report:
    """Writes progress, not too often; called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting, self._last = 0, time.monotonic()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._waiting += nbytes
            if time.monotonic() - self._last >= _EVERY:
                self._write()

    def flush(self) -> None:
        """Write what has not been written."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        emit({"written": self._waiting})
        sys.stdout.flush()
        self._waiting, self._last = 0, time.monotonic()


class _Worker:
    """A process that does one share."""

    def __init__(self, number: int, arguments: Sequence[str], advance: Progress) -> None:
        self.number = number
        self.last: dict[str, Any] = {}
        self._tail = ""
        self._advance = advance
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptsvc.cli.main", "convert", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                self._tail = (self._tail + line)[-2000:]
                continue
            if "written" in found:
                self._advance(found["written"])
            else:
                self.last = found

    def end(self) -> None:
        """Stop it, and wait."""
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()

    def wait(self) -> int:
        """Wait for its end; returns its exit status."""
        status = self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def error(self, of: int) -> CkptsvcError:
        """What its end means, when it was not a good one."""
        who, status = f"worker {self.number} of {of} (process {self.process.pid})", self.process.returncode
        again = "the same command again goes on where this one stopped"
        if "error" in self.last:
            error = self.last["error"]
            return BY_CODE[error["code"]](f"{who}: {error['what']}", hint=error["hint"] or again)
        if status < 0:
            return SaveFailed(f"{who} was killed by {signal.Signals(-status).name}", hint=again)
        return SaveFailed(f"{who} ended with status {status}: {self._tail.strip()[-500:]}", hint=again)


def run_workers(conversion: Conversion, request: Request, shares: Sequence[int], of: int, advance: Progress) -> None:
    """Run a process for each share that is not finished, and wait for all.

    Raises:
        CkptsvcError: the error of the first that failed, naming it; the others are stopped.
    """
    ended = threading.Semaphore(0)
    workers = [
        _Worker(number, _arguments(request, conversion.memory, number, of), advance)
        for number in shares
        if conversion.left(number, of)
    ]

    def watch(worker: _Worker) -> None:
        worker.process.wait()
        ended.release()

    watchers = [threading.Thread(target=watch, args=(worker,)) for worker in workers]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in workers:
            ended.acquire()
            failed = [worker for worker in workers if worker.process.poll() not in (None, 0)]
            if failed:
                failed[0].wait()
                raise failed[0].error(of)
        for worker in workers:
            worker.wait()
            conversion.bytes_read += worker.last.get("read", 0)
            conversion.infinite.update(worker.last.get("infinite", {}))
    finally:
        for worker in workers:
            worker.end()
        for watcher in watchers:
            watcher.join()
    conversion.reread()


def _arguments(request: Request, memory: int, number: int, of: int) -> list[str]:
    """The command line of a worker."""
    arguments = [*request.sources, request.target, "--json", "--memory", str(memory), "--share", f"{number}/{of}"]
    for name, values in (("--only", request.only), ("--rename", request.rename)):
        arguments += [f"{name}={value}" for value in values]
    for name, settings in (("--option", request.options), ("--from-option", request.from_options)):
        arguments += [f"{name}={key}={value}" for key, value in settings.items()]
    for name, value in (("--to", request.to), ("--names", request.names), ("--family", request.family)):
        arguments += [f"{name}={value}"] if value else []
    arguments += [f"--variable={name}={value}" for name, value in request.variables.items()]
    if request.drop_optimizer:
        arguments.append("--drop-optimizer")
    if request.dtype:
        arguments.append(f"--dtype={request.dtype}")
    if request.average:
        last = len(request.sources) == 1 and request.average > 1
        arguments.append(f"--average=last:{request.average}" if last else "--average=all")
    return arguments
