"""The training of `ckptsvc bench faults`: small, written as a user's own, and it misbehaves when it is asked to.

    ckptsvc run ... -m ckptsvc.cli.benchmarks.faults.job FOLDER            with ckptsvc's two calls, attach and step
    torchrun ... -m ckptsvc.cli.benchmarks.faults.job FOLDER --plain       with torch.save by rank 0 instead

FOLDER/order.json, {"fault", "rank", "attempt", "step"}, is obeyed once by that rank in that attempt, or by all ranks
(-1) at that step. What happens goes to FOLDER/steps.jsonl, each line appended by one `write`; all times are the
machine's monotonic clock, in seconds:

* `begun`, from every rank: `born` is when its process was started or forked;
* `start`, once it is ready to step: `steps_done`, and where they come from;
* `step`, after every step: the checkpoint known to be committed, and how many snapshots have been skipped;
* `fault`, right before it does what it was asked to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

STEP = 0.03
"""Seconds that a step computes."""

EVERY = 10
"""Steps between checkpoints."""

EVERYBODY = -1
"""Ranks that an order is for."""

EVALUATE_EVERY = 10
BATCHES = 3
BATCH = 0.1
"""Steps between evaluations, batches of each, and seconds of a batch."""

GROWN = 32 << 20
"""Elements of float32 by which the state grows: more than the arenas that the benchmark allows."""

SHARE = 16 << 20
"""Bytes that a rank takes at once when it takes all memory there is."""


class Session(Protocol):
    """What the loop needs of `ckptsvc.attach`."""

    steps_done: int
    restored_from: str | None
    skipped: int

    @property
    def committed_step(self) -> int | None:
        """The newest checkpoint known to be committed."""

    def step(self) -> None:
        """Called at the end of every step."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Declares what is not a step."""

    def progress(self) -> None:
        """Shows that it goes on."""


class Plain:
    """Checkpoints as many programs do them: `torch.save` by rank 0, under another name until it is whole."""

    skipped = 0

    def __init__(self, state: dict[str, Any], path: Path) -> None:
        self._state, self._path = state, path
        self.steps_done = 0
        self.restored_from: str | None = None
        self.committed_step: int | None = None
        if path.exists():
            found = torch.load(path, weights_only=True)
            self.steps_done, self.restored_from = found["steps"], "store"
            for name, part in state.items():
                part.load_state_dict(found[name])

    def step(self) -> None:
        """Count, and save when it is due."""
        self.steps_done += 1
        if dist.get_rank() == 0 and self.steps_done % EVERY == 0:
            fresh = self._path.with_suffix(".new")
            parts = {name: part.state_dict() for name, part in self._state.items()}
            torch.save({"steps": self.steps_done, **parts}, fresh)
            fresh.rename(self._path)
            self.committed_step = self.steps_done

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Nobody listens."""
        yield

    def progress(self) -> None:
        """Nobody listens."""


class Training:
    """One rank."""

    def __init__(self, folder: Path, *, plain: bool, evaluates: bool, timeout: float) -> None:
        self.folder, self.plain, self.evaluates = folder, plain, evaluates
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
        self._log = os.open(folder / "steps.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.log("begun", born=born())
        # None: torch's own default, half an hour.
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout) if timeout else None)
        self.aside = dist.new_group(group_desc="aside")
        torch.manual_seed(0)
        self.model = nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.own = {"ballast": torch.zeros(16)}
        self.pause, self.obeyed = STEP, False
        self.run = self._attach()

    def _attach(self) -> Session:
        if self.plain:
            return Plain({"model": self.model, "optimizer": self.optimizer}, self.folder / "plain.pt")
        import ckptsvc

        state = {"model": self.model, "optimizer": self.optimizer, f"own{self.rank}": self.own}
        return ckptsvc.attach(state, store=str(self.folder / "store"), every=EVERY, keep=3)

    def log(self, event: str, **fields: Any) -> None:
        """Append one event."""
        about = {"event": event, "monotonic": time.monotonic(), "rank": self.rank, "pid": os.getpid()}
        os.write(self._log, json.dumps(about | {"attempt": self.attempt} | fields).encode() + b"\n")

    def train(self) -> NoReturn:
        """Steps until somebody ends it."""
        self.log("start", steps_done=self.run.steps_done, source=self.run.restored_from)
        while True:
            time.sleep(self.pause)
            loss = self.model(torch.ones(8, 64)).pow(2).mean()
            loss.backward()
            self.obey()
            self.average()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.evaluates and self.run.steps_done % EVALUATE_EVERY == 0:
                self.evaluate(lambda: time.sleep(BATCH))
            self.run.step()
            self.log("step", step=self.run.steps_done, committed=self.run.committed_step, skipped=self.run.skipped)

    def average(self) -> None:
        """The gradients over all ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient) / self.world)
            at += gradient.numel()

    def evaluate(self, batch: Callable[[], object]) -> None:
        """A phase in a step, and phases in that one."""
        with self.run.phase("evaluation"):
            for _ in range(BATCHES):
                with self.run.phase("scoring"):
                    batch()

    def obey(self) -> None:
        """Do what this rank was asked to do, if it was."""
        path = self.folder / "order.json"
        try:
            order = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        mine = order["rank"] in (self.rank, EVERYBODY) and order["step"] in (self.run.steps_done, 0)
        if mine and order["attempt"] == self.attempt and not self.obeyed:
            self.obeyed = True
            self.log("fault", fault=order["fault"])
            FAULTS[order["fault"]](self)


# ---- what a rank can do wrong


def loop_with_the_interpreter_lock(training: Training) -> None:
    """Python code that never ends."""
    while True:
        pass


def loop_without_it(training: Training) -> None:
    """Native code that lets go of the lock and computes for a quarter of an hour: PBKDF2 with too many rounds."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


class Stuck(Dataset[Tensor]):
    """Data that never comes."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(1e6)
        return torch.zeros(1)


def stuck_loader(training: Training) -> None:
    """A process of a data loader does not answer."""
    next(iter(DataLoader(Stuck(), num_workers=1)))


def missed_collective(training: Training) -> None:
    """Go on to the next collective, in another group, without the one that all others are in."""
    dist.barrier(group=training.aside)


def mismatched_collective(training: Training) -> None:
    """Another collective than the others, in the same group."""
    dist.all_gather([torch.zeros(1) for _ in range(training.world)], torch.zeros(1))


def slow(training: Training) -> None:
    """From now on, ten times slower."""
    training.pause *= 10


def out_of_address_space(training: Training) -> None:
    """An allocation that is refused: Python raises MemoryError, and nobody catches it."""
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + 16 * SHARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    take_memory(training)


def take_memory(training: Training) -> NoReturn:
    """Take memory until there is no more."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1) * SHARE))


def grow(training: Training) -> None:
    """More state than the arenas hold."""
    training.own["ballast"] = torch.zeros(GROWN)


def hang_in_an_evaluation(training: Training) -> None:
    """In the middle of the second phase inside a step."""
    read, _ = os.pipe()
    training.evaluate(lambda: select.select([read], [], []))


FAULTS: dict[str, Callable[[Training], None]] = {
    f.__name__: f
    for f in (
        loop_with_the_interpreter_lock, loop_without_it, stuck_loader, missed_collective, mismatched_collective, slow,
        out_of_address_space, take_memory, grow, hang_in_an_evaluation,
    )
}  # fmt: skip


def born() -> float:
    """When this process was started or forked: field 22 of /proc/self/stat, proc_pid_stat(5), in seconds since boot."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    since_boot = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()  # the machine, so far
    return since_boot - asleep


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="The training of `ckptsvc bench faults`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="without ckptsvc")
    parser.add_argument("--evaluates", action="store_true", help="evaluate now and then")
    parser.add_argument("--timeout", type=float, default=0.0, help="of collectives, in seconds; 0: torch's default")
    Training(**vars(parser.parse_args())).train()


if __name__ == "__main__":
    main()
