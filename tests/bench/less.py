"""What references and compression save, and what they cost (decision 016).

    python tests/bench/less.py [--megabytes 512] [--folder /tmp]

First a state is written of which some part is frozen: plainly, by reference, compressed. Then a small language model is
trained on the text of this repository, and what it is after some steps is packed as a save would: alone, and as the
difference to what it was 1, 20 and 100 steps before. CPU seconds are those of all threads of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckptsvc.format.planes import PLAIN, decompress, exclusive_or
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.increments import Economy, ShardWriter
from ckptsvc.pipeline.packing import pack
from ckptsvc.pipeline.write import ShardImage
from ckptsvc.storage import connect
from ckptsvc.types import TensorMeta

EXTENT = 1 << 20
STEPS, APART = 220, (1, 20, 100)


def trained() -> dict[int, dict[str, np.ndarray]]:
    """The state of a small transformer in bfloat16 with masters and Adam in float32, at some steps."""
    torch.manual_seed(0)
    root = Path(__file__).parents[2] / "ckptsvc"
    text = torch.tensor(bytearray(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))), dtype=torch.long)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(256, 256), nn.TransformerEncoder(layer, 4), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    wanted, found = {STEPS, *(STEPS - n for n in APART)}, {}
    for step in range(1, STEPS + 1):
        starts = torch.randint(0, len(text) - 65, (4,))
        batch = torch.stack([text[s : s + 65] for s in starts.tolist()])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).reshape(-1, 256), batch[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in wanted:
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            states = {k: torch.cat([optimizer.state[p][k].reshape(-1) for p in model.parameters()])
                for k in ("exp_avg", "exp_avg_sq")}  # fmt: skip
            found[step] = {
                "weights, bfloat16": flat.bfloat16().view(torch.uint8).numpy(),
                "masters, float32": flat.view(torch.uint8).numpy(),
                "exp_avg, float32": states["exp_avg"].view(torch.uint8).numpy(),
                "exp_avg_sq, float32": states["exp_avg_sq"].view(torch.uint8).numpy(),
            }
    return found


def packed(data: np.ndarray, base: np.ndarray | None, planes: int) -> tuple[float, float, float]:
    """(stored per byte, MB/s packing, MB/s unpacking) of one thread."""
    view, other = memoryview(data), None if base is None else memoryview(base)
    stored, unpack = 0, 0.0
    began = time.thread_time()
    found = []
    for start in range(0, len(view), EXTENT):
        part = slice(start, start + EXTENT)
        found.append(pack(view[part], None if other is None else other[part], planes, 1))
        stored += len(found[-1].data)
    pack_seconds = time.thread_time() - began
    for number, one in enumerate(found):
        part = slice(number * EXTENT, (number + 1) * EXTENT)
        began = time.thread_time()
        content = one.data if one.codec == PLAIN else decompress(one.data, one.codec, len(view[part]), "x")
        if one.delta:
            content = exclusive_or(content, other[part])
        unpack += time.thread_time() - began
        assert content == view[part]
    return stored / len(view), len(view) / pack_seconds / 1e6, len(view) / unpack / 1e6


def ratios() -> None:
    """Print a table of what each kind of state is packed to."""
    states = trained()
    last = states[STEPS]
    print(f"{'':22}{'alone':>22}" + "".join(f"{f'{n} steps apart':>22}" for n in APART))
    for kind, data in last.items():
        planes = 2 if "bfloat16" in kind else 4
        cells = [packed(data, None, planes), *(packed(data, states[STEPS - n][kind], planes) for n in APART)]
        print(f"{kind:22}" + "".join(f"{f'{r:.0%} {p:.0f}/{u:.0f} MB/s':>22}" for r, p, u in cells))


def write(folder: str, megabytes: int, frozen: float) -> None:
    """Print what writing a state of which a part is frozen takes."""
    print(f"\n{megabytes} MiB, {frozen:.0%} of it frozen, load {os.getloadavg()[0]:.1f}")
    modes = {"plain": Economy(), "incremental": Economy(incremental=True), "zstd": Economy(compression="zstd"),
        "both": Economy(incremental=True, compression="zstd")}  # fmt: skip
    rng = np.random.default_rng(0)
    values = rng.normal(size=megabytes << 18).astype(np.float32)
    template = ShardTemplate([Part(TensorMeta("w", "float32", values.shape), Box.full(values.shape))])
    size = template.total(2)
    for mode, economy in modes.items():
        arenas: dict[str, mmap.mmap] = {}

        @contextlib.contextmanager
        def pages(path: str, nbytes: int, arenas: dict[str, mmap.mmap] = arenas) -> Iterator[memoryview]:
            with memoryview(arenas[path]) as view:
                yield view

        where = tempfile.mkdtemp(dir=folder)
        store, pool = connect(f"file://{where}"), ThreadPoolExecutor(4)
        writer = ShardWriter(economy, pool, pages)
        for step in (1, 2):
            arena = arenas[str(step)] = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            info = ShardInfo(run="r", job="j", step=step, epoch=1, attempt=1, rank=0, world_size=1)
            arena[: template.data_start] = template.header(info, 2)
            part = round(len(values) * (1 - frozen))
            values[:part] *= np.float32(1 - 1e-4)
            arena[template.data_start : template.objects_offset] = memoryview(values).cast("B")
            with memoryview(arena) as view:
                began, cpu = time.perf_counter(), time.process_time()
                shard = ShardImage(view, size, EXTENT, 1, step, 0)
                written = writer.write(store, shard, path=str(step), committed=(1, step - 1), on_digests=lambda _: None)
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                del shard
            gib = written.stored / 2**30
            print(f"{mode:12} step {step}: {written.stored / size:4.0%} written in {seconds:5.2f} s, CPU {cpu:5.2f} s, "
                  f"{cpu / gib:5.2f} s per GiB written, {cpu / (size / 2**30):5.2f} per GiB of state")  # fmt: skip
        pool.shutdown()
        store.close()
        shutil.rmtree(where)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--folder", default=None)
    chosen = parser.parse_args()
    for frozen in (0.9, 0.5, 0.0):
        write(chosen.folder, chosen.megabytes, frozen)
    ratios()


if __name__ == "__main__":
    main()
