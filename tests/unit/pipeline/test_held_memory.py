"""What a process holds beyond the arenas while it compresses as many shards as a worker takes at once: measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20

WRITER = """if True:
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import numpy as np
    from harness.increments import Saver, big_run
    from ckptsvc.pipeline.increments import Economy
    from ckptsvc.storage import connect

    SHARDS, COUNT = 16, 3 << 19

    folder, drained = Path(sys.argv[1]), sys.argv[2] == "drained"
    store, disk = connect(str(folder / "run")), connect(str(folder / "disk")) if drained else None
    saver = Saver(store, Economy(compression="zstd", threads=8), disk)
    run = big_run({"w": np.random.default_rng(0).normal(size=COUNT).astype(np.float32).view(np.uint32)}, extent=1 << 20)
    shards = {step: saver.shard(run, 0, step) for step in range(SHARDS)} if not drained else {}
    copies = [saver.keep(saver.shard(run, 0, step), run) for step in range(SHARDS)] if drained else []
    warm = big_run({"w": run.truth["w"][: 1 << 18]}, extent=1 << 20)
    saver.write(warm, 0, 99)  # all is imported now

    def write(step):
        if drained:
            return saver.writer.drain(disk, store, copies[step], saver.committed, lambda: None)
        return saver.writer.write(store, shards[step], path="", committed=(0, -1), on_digests=lambda digests: None)

    def most():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    # As a worker does it: 16 requests at a time, of which 4 are drains at most.
    with ThreadPoolExecutor(4 if drained else 16) as pool:
        Path("/proc/self/clear_refs").write_text("5")
        before = most()
        done = list(pool.map(write, range(SHARDS)))
    assert all(each.segments is not None and each.stored < 0.95 * each.nbytes for each in done)
    print(most() - before)
"""


@pytest.mark.parametrize("how", ["from arenas", pytest.param("drained", marks=pytest.mark.slow)])
def test_compressing_many_shards_at_once_takes_little_memory(tmp_path: Path, how: str) -> None:
    """64 MiB at most, whatever the number and the size of the shards: here 16 of 6 MiB, which were held whole once."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), how]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 * MIB, f"{int(done.stdout) / MIB:.0f} MiB"
