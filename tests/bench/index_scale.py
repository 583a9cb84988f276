"""How the index behaves at scale: `python tests/bench/index_scale.py [--regions N] [--case NAME]`.

Not run by the suite. Each case builds the columns of all shards of a synthetic job, then measures what the
coordinator does (build, encode, check_cover) in this process and what a reader does (decode, look up every
name, plan) in a fresh one, whose memory is what a reader needs. Bars (DESIGN, section 8): build <= 1 us a
region; a reader < 3 s and < 500 MB for 3,000,000 regions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from ckptsvc.format.columns import Columns
from ckptsvc.format.index import Index, IndexInfo, ShardRecord
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.ranges import plan_ranges
from ckptsvc.geometry.reshard import plan
from ckptsvc.types import DTYPES

CASES = {
    "fsdp": "1024 ranks, every tensor cut in 1024 slabs of dimension 0",
    "grid": "FSDP x TP on 128 x 8 ranks, every tensor a grid of boxes",
    "experts": "1024 ranks, every tensor cut in 8 slabs, each rank has other tensors",
    "single": "1024 ranks, every tensor whole in one of them",
}
RANKS = 1024
WIDTH = 64


def columns(case: str, rank: int, per_rank: int) -> Columns:
    """The table of one rank's shard: `per_rank` regions of bfloat16 tensors with two dimensions."""
    first = {"single": rank * per_rank, "experts": rank // 8 * per_rank}.get(case, 0)
    names = [
        f"model/layers.{i // 12}.block.{i % 12}.projection.weight".encode() for i in range(first, first + per_rank)
    ]
    box = {
        "fsdp": (rank, 0, 1, WIDTH),
        "grid": (rank // 8 * 2, rank % 8 * (WIDTH // 8), 2, WIDTH // 8),
        "experts": (rank % 8, 0, 1, WIDTH),
        "single": (0, 0, 1, WIDTH),
    }[case]
    rows = {"fsdp": RANKS, "grid": RANKS // 4, "experts": 8, "single": 1}[case]
    nbytes = box[2] * box[3] * 2
    return Columns(
        name_hash=np.array([xxhash.xxh3_64_intdigest(name) for name in names], np.uint64),
        name_check=np.array([xxhash.xxh3_64_intdigest(name, 1) for name in names], np.uint64),
        name_ends=np.cumsum([len(name) for name in names]).astype(np.uint64),
        names=np.frombuffer(b"".join(names), np.uint8),
        dtype=np.full(per_rank, DTYPES["bfloat16"].code, np.uint8),
        ndim=np.full(per_rank, 2, np.uint8),
        shape=np.tile(np.array([rows, WIDTH], np.int64), per_rank),
        kind=np.zeros(per_rank, np.uint8),
        geometry=np.tile(np.array(box, np.int64), per_rank),
        offset=np.arange(per_rank, dtype=np.uint64) * np.uint64(nbytes) + np.uint64(4096),
        objects_offset=4096 + per_rank * nbytes,
        structure="0" * 16,
    )


def coordinator(case: str, regions: int, path: Path) -> dict[str, float]:
    per_rank = regions // RANKS
    records = []
    for rank in range(RANKS):
        table = columns(case, rank, per_rank)
        nbytes = table.objects_offset + 1000
        digests = np.arange(-(-nbytes // 2**20), dtype=np.uint64)
        records.append(ShardRecord(f"r{rank:05d}-00000000.safetensors", rank, nbytes, digests, table))
    info = IndexInfo(step=1, epoch=1, attempt=1, job="bench", world_size=RANKS, created="2026-01-01T00:00:00Z")
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    index = Index.build(info, records)
    seconds["build"] = time.perf_counter() - start
    start = time.perf_counter()
    data = index.encode()
    seconds["encode"] = time.perf_counter() - start
    start = time.perf_counter()
    index.check_cover()
    seconds["check_cover"] = time.perf_counter() - start
    path.write_bytes(data)
    rows = len(index.region_tensor)
    return {"regions": rows, "tensors": len(index), "bytes_per_region": len(data) / rows, **seconds}


def peak_megabytes() -> float:
    """Peak memory of this process since it began (`ru_maxrss` would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reader(path: Path) -> dict[str, float]:
    """Opens the index, plans all tensors whole at once, and what one of 768 ranks reads tensor by tensor."""
    base = peak_megabytes()
    start = time.perf_counter()
    index = Index.decode(path.read_bytes())
    seconds = {"decode": time.perf_counter() - start}
    start = time.perf_counter()
    names = index.names()
    found = index.find(names)
    assert (found >= 0).all()
    seconds["look up all names"] = time.perf_counter() - start
    seconds["megabytes until then"] = peak_megabytes() - base
    start = time.perf_counter()
    line = index.line
    if line.contiguous.all():
        copies = 0
        for low in range(0, len(index), step := max(1, len(index) // 16)):
            tensors = range(low, min(low + step, len(index)))
            rows = slice(index.region_rows(tensors[0]).start, index.region_rows(tensors[-1]).stop)
            base_of = line.base[tensors[0] : tensors[-1] + 1]
            last = rows.stop - 1
            size = np.diff(base_of, append=line.start[last] + line.length[last])
            copies += len(plan_ranges(line.start[rows], line.length[rows], base_of, size).stored)
        seconds["plan all tensors whole"] = time.perf_counter() - start
        assert copies == len(line.start)
    seconds["megabytes"] = peak_megabytes() - base
    start = time.perf_counter()
    some = names[:: max(1, len(names) // 3000)]
    for name in some:
        shape = index.meta(name).shape
        step = -(-shape[0] // 768)
        wanted = [Box((min(step * 5, shape[0] - step), *(0 for _ in shape[1:])), (step, *shape[1:]))]
        plan(index.touching(name, wanted), wanted, 2 if len(shape) == 2 else 1, shape, name=name)
    seconds["plan one rank, us a tensor"] = (time.perf_counter() - start) / len(some) * 1e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--regions", type=int, default=3_000_000)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(reader(arguments.read)))
        return
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "index.safetensors"
            print(f"{case}: {CASES[case]}")
            result = coordinator(case, arguments.regions, path)
            output = subprocess.run([sys.executable, __file__, "--read", path], check=True, capture_output=True)
            for key, value in {**result, **json.loads(output.stdout)}.items():
                print(f"  {key:30} {value:12.3f}")


if __name__ == "__main__":
    main()
