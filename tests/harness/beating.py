"""A rank without torch: it registers, beats its page, and steps in lockstep with the others. It starts in 100 ms.

    python beating.py FOLDER

In place of a collective, every rank waits until all have come as far (words in a shared file; the last one is the
step after which all end). A file
FOLDER/fault-<attempt>-<rank> makes that rank do what it names; FOLDER/go-end ends the job.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import PAGE_BYTES, PHASE_BYTES, IdentityClient, Page

STEP = 0.005


class Rank:
    """One rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt = int(os.environ["CKPTSVC_ATTEMPT"])
        self.identity = IdentityClient(sockets(Path(os.environ["CKPTSVC_SOCKET"]))[1])
        registration = {
            "op": "register",
            "job": f"{os.environ['CKPTSVC_JOB']}@beating",
            "store": "memory://beating",
            "attempt": self.attempt,
            "rank": self.number,
            "world_size": self.world,
            "coordinator": os.environ["CKPTSVC_COORDINATOR"],
        }
        _, fd = self.identity.call(registration)
        self.page = Page(memoryview(mmap.mmap(fd, PAGE_BYTES)))
        path = folder / f"lockstep-{self.attempt}"
        with open(path, "ab") as file:
            file.truncate(8 * self.world + 8)
        with open(path, "r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), 8 * self.world + 8)).cast("q")
        self.steps, self.last = words[: self.world], words[self.world :]

    def report(self, event: str, **values: object) -> None:
        """Tell the test."""
        line = {"event": event, "rank": self.number, "attempt": self.attempt, "pid": os.getpid(), **values}
        with open(self.folder / f"rank-{self.number}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.page.enter(phase.encode().ljust(PHASE_BYTES, b"\0"), time.monotonic_ns())

    def together(self, step: int) -> None:
        """Wait for the others."""
        self.steps[self.number] = step
        while min(self.steps) < step:
            time.sleep(0.005)

    def train(self) -> None:
        """Steps until the end."""
        self.enter("step")
        self.report("begun")
        print(f"rank {self.number} begins", flush=True)
        fault = self.folder / f"fault-{self.attempt}-{self.number}"
        step = 0
        while not 0 < self.last[0] <= step:
            step += 1
            if self.number == 0 and (self.folder / "go-end").exists() and not self.last[0]:
                self.last[0] = step + 2  # nobody is there yet
            time.sleep(STEP)
            self.together(step)
            if fault.exists() and (name := fault.read_text()):
                fault.unlink()
                self.report("fault", fault=name)
                FAULTS[name](self)
            self.page.put("step", step)
            self.page.put("at", time.monotonic_ns())
            if step % 10 == 0:
                self.report("stepped", step=step)


def stop(rank: Rank) -> None:
    """As SIGSTOP by anybody."""
    os.kill(os.getpid(), signal.SIGSTOP)


def compute(rank: Rank) -> None:
    """For ever, with the interpreter lock."""
    sum(iter(int, 1))


def pause(rank: Rank) -> None:
    """For a while."""
    time.sleep(1.5)


def evaluate(rank: Rank) -> None:
    """Declared, and longer than any step."""
    rank.enter("evaluation")
    time.sleep(1.5)
    rank.enter("step")


def hang_in_an_evaluation(rank: Rank) -> None:
    """After some that went well."""
    for _ in range(30):
        rank.enter("evaluation")
        time.sleep(0.02)
    stop(rank)


FAULTS = {f.__name__: f for f in (stop, compute, pause, evaluate, hang_in_an_evaluation)}

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR2)  # `Job.story` asks where the ranks are
    Rank(Path(sys.argv[1])).train()
