"""What every rank of a test's job runs: one function of a test module.

    python rank.py '{"file": ..., "function": ..., "arguments": [...], "folder": ...}'

The function gets a `Rank` and the arguments. What it reports, and what it returns, are lines of JSON in
folder/rank-<r>.jsonl, which the test reads while the rank runs.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # test modules import `harness`


class Rank:
    """What a rank's function knows of its place, and its way to talk to the test."""

    def __init__(self, folder: Path) -> None:
        self.number = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.attempt = int(os.environ.get("CKPTSVC_ATTEMPT", "0"))
        self.folder = folder

    def report(self, event: str, **values: Any) -> None:
        """Tell the test; it is on record before this returns, whatever happens to this process next."""
        line = {"event": event, "rank": self.number, "attempt": self.attempt, "pid": os.getpid(), **values}
        with open(self.folder / f"rank-{self.number}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def until(self, name: str, timeout: float = 60.0) -> None:
        """Wait until the test says so (`Job.go`)."""
        deadline = time.monotonic() + timeout
        while not (self.folder / f"go-{name}").exists():
            assert time.monotonic() < deadline, f"the test did not say {name!r} in time"
            time.sleep(0.01)

    def join(self) -> None:
        """Join the process group of all ranks."""
        import torch.distributed as dist

        dist.init_process_group("gloo")


def main() -> None:
    """Load the test module, run its function, report what it returns."""
    faulthandler.register(signal.SIGUSR2)  # `Job.story` asks where the ranks are
    job = json.loads(sys.argv[1])
    spec = importlib.util.spec_from_file_location(Path(job["file"]).stem, job["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rank = Rank(Path(job["folder"]))
    rank.report("begun")
    import torch

    torch.set_num_threads(1)
    result = getattr(module, job["function"])(rank, *job["arguments"])
    rank.report("result", result=result)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # gloo does not like to lose a peer before its own end
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
