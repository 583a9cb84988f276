"""One rank of a benchmark: `python -m ckptsvc.cli.benchmarks.ranks FOLDER`, with torchrun's variables set.

FOLDER has spec.json; the answer goes to rank-<r>.json, the share of the work that is done to progress. The trainer
that is to be killed (workload "stage") then waits for that.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from ckptsvc.cli.benchmarks import reshard, work
from ckptsvc.cli.benchmarks.spec import Results, Spec

PATIENCE = timedelta(minutes=20)
"""How long ranks wait for each other."""

WORKLOADS: dict[str, Callable[[Spec, work.Progress], Results]] = {
    "save": work.save,
    "small": work.save,
    "overlap": work.overlap,
    "stage": work.stage,
    "restore": work.restore,
    "reshard": reshard.reshard,
}


def main(folder: Path) -> None:
    """Measure what the folder's spec says."""
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=Spec)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        meeting = FileStore(str(folder / "meeting"), world)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=PATIENCE)

    def progress(share: float) -> None:
        if rank == 0:
            (folder / "progress").write_text(f"{share:.3f}", encoding="utf-8")

    results = WORKLOADS[spec.workload](spec, progress)
    answer = folder / f"rank-{rank}.json"
    answer.with_suffix(".new").write_bytes(msgspec.json.encode(results))
    answer.with_suffix(".new").rename(answer)
    if spec.workload == "stage":
        signal.pause()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
