"""The training program of `ckptsvc demo`: a small byte-level GPT, on one to many CPU ranks.

    python -m ckptsvc.cli.demonstration.train --store file:///tmp/run --log-file /tmp/run.jsonl

It is written as a user's own `train.py`, and uses ckptsvc by its two calls only (`attach` and `step`); with
`--no-ckpt` not even those, which is the control that the demo compares with.

What it guarantees, so that runs can be compared:

* The global batch of a step is a pure function of the step, whatever the number of ranks; every rank takes an
  equal share of it and FSDP averages the gradients, so any layout trains on the mean over the same batch.
* At one layout two runs are equal bit for bit (one thread, deterministic kernels, no randomness in the loop).
  At another layout sums are taken in another order, and losses agree within rounding only.

The log is one JSON object a line, appended by a single `write` so that ranks may share the file:

* `start`, from every rank, once it is ready to step: `steps_done` says where it starts, `source` ("memory",
  "store" or null) where the state comes from.
* `step`, from rank 0 (from every rank with `--log-all-ranks`): `loss_hex` is `float.hex`, exact; `seconds` is
  the whole step and `checkpoint_seconds` the part of it spent in `run.step()`.
* `state`, from rank 0: a digest of the whole model and optimizer state, independent of the layout.
* `end`, from every rank.

`time` is Unix time, `monotonic` the machine's monotonic clock; both in seconds, comparable between processes.
"""

from __future__ import annotations

import json
import os
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

VOCABULARY = 256  # bytes
LAYERS = 4
HEADS = 4
WIDTH = 256
CONTEXT = 64
GLOBAL_BATCH = 12  # divisible by 1, 2, 3, 4 and 6 ranks
TEXT_BYTES = 4_000_000
SEED = 20_240_607
PEAK_RATE = 1e-3
LAYOUTS = ("none", "fsdp", "fsdp2x2tp")


class Attention(nn.Module):
    """Causal self-attention; reads its number of heads off its weights, so that a column-wise shard works."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        # Rows go head by head (q, k, v of head 0, then of head 1, ...): a slice of rows is a set of heads.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result: [batch, context, width]."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, -1, 3, self.head_width).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result: [batch, context, width]."""
        x = x + self.attention(self.attention_norm(x))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return mixed


class ByteGPT(nn.Module):
    """A byte-level GPT of 3.3 million parameters at its default sizes."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [batch, context] -> logits [batch, context, 256]."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Text:
    """Real text for a byte-level model: the sources of Python's standard library on this machine."""

    def __init__(self) -> None:
        """Reads at most `TEXT_BYTES` bytes, the modules in the order of their names.

        Raises:
            click.ClickException: if this Python has no readable standard library sources.
        """
        folder = Path(sysconfig.get_path("stdlib"))
        text = bytearray()
        for module in sorted(folder.glob("*.py")):
            text += module.read_bytes()
            if len(text) >= TEXT_BYTES:
                break
        if len(text) < 100 * CONTEXT:
            raise click.ClickException(f"{folder} holds only {len(text)} bytes of Python sources to train on")
        self.bytes = np.frombuffer(bytes(text[:TEXT_BYTES]), dtype=np.uint8)

    def batch(self, step: int) -> Tensor:
        """The global batch of a step, [GLOBAL_BATCH, CONTEXT + 1] int64: a pure function of the step."""
        starts = np.random.default_rng([SEED, step]).integers(0, len(self.bytes) - CONTEXT, GLOBAL_BATCH)
        windows = self.bytes[starts[:, None] + np.arange(CONTEXT + 1)]
        return torch.from_numpy(windows.astype(np.int64))


class Session(Protocol):
    """What the loop needs of ckptsvc: the object `ckptsvc.attach` returns."""

    steps_done: int
    restored_from: str | None

    def step(self) -> None:
        """Called once at the end of every step."""

    def close(self) -> None:
        """Waits for what is being saved."""


class NoCheckpoints:
    """The control: a run that nothing looks after."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.restored_from: str | None = None

    def step(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Log:
    """JSON lines, each appended by one `write` so that all ranks of all attempts may share a file."""

    def __init__(self, path: Path, **common: Any) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._common = common

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event, with the time of both clocks."""
        line = {"event": event, "time": time.time(), "monotonic": time.monotonic()} | self._common | fields
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Share:
    """This rank's part of each global batch: share `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """The rows of the batch that are this rank's."""
        rows = len(batch) // self.count
        return batch[self.index * rows : (self.index + 1) * rows]


def lay_out(model: ByteGPT, layout: str, rank: int, world_size: int) -> Share:
    """Distributes the model in place over all ranks.

    Args:
        model: built from the same seed on every rank.
        layout: `none` (one rank), `fsdp` (FSDP2 over all ranks) or `fsdp2x2tp` (2 x 2, tensor parallel).
        rank: this rank.
        world_size: number of ranks.

    Raises:
        click.UsageError: if the layout does not fit the number of ranks.
    """
    if layout == "none":
        if world_size != 1:
            raise click.UsageError(f"--layout none is for one rank, and there are {world_size}")
        return Share()
    if layout == "fsdp":
        if GLOBAL_BATCH % world_size:
            raise click.UsageError(f"a global batch of {GLOBAL_BATCH} cannot be shared by {world_size} ranks")
        _shard(model, init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",)))
        return Share(rank, world_size)
    if world_size != 4:
        raise click.UsageError(f"--layout fsdp2x2tp is for 4 ranks, and there are {world_size}")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        by_column, by_row = ColwiseParallel(), RowwiseParallel()
        plan = {"attention.qkv": by_column, "attention.out": by_row, "up": by_column, "down": by_row}
        parallelize_module(block, mesh["tp"], plan)
    _shard(model, mesh["dp"])
    return Share(mesh["dp"].get_local_rank(), 2)


def _shard(model: ByteGPT, mesh: DeviceMesh) -> None:
    # So small a model need not be gathered twice a step; every collective costs milliseconds on a busy machine.
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def state_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """xxh3-128 over all weights and optimizer moments as whole tensors, so equal states in any layout agree.

    A collective: every rank must call it.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        digest.update(name.encode())
        for tensor in (parameter, *(moments[key] for key in sorted(moments))):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(whole.detach().contiguous().numpy().tobytes())
    digest.update(repr([group["lr"] for group in optimizer.param_groups]).encode())
    return digest.hexdigest()


def mean_over_ranks(loss: Tensor) -> float:
    """The loss of the global batch: all shares are equal, so it is the mean of their means."""
    total = loss.detach().to(torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


@dataclass(frozen=True)
class Plan:
    """What the command line asks for; see the options of `main`."""

    store: str | None
    steps: int
    stop_at: int
    every: int
    layout: str
    log_file: Path
    log_all_ranks: bool
    digest_every: int


def train(plan: Plan) -> None:
    """Trains from wherever the run is to `plan.stop_at` steps."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    text = Text()
    torch.manual_seed(SEED)
    model = ByteGPT()
    share = lay_out(model, plan.layout, rank, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.steps)

    run: Session = NoCheckpoints()
    if plan.store is not None:
        import ckptsvc

        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        run = ckptsvc.attach(state, store=plan.store, every=plan.every)

    attempt = int(os.environ.get("CKPTSVC_ATTEMPT", "1"))
    log = Log(plan.log_file, rank=rank, attempt=attempt, pid=os.getpid())
    log.write("start", steps_done=run.steps_done, source=run.restored_from)
    if run.steps_done > 0:
        _log_state(log, run.steps_done, model, optimizer)
    for step in range(run.steps_done, plan.stop_at):
        began = time.perf_counter()
        tokens = share.of(text.batch(step))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean = mean_over_ranks(loss)
        trained = time.perf_counter()
        run.step()
        ended = time.perf_counter()
        if rank == 0 or plan.log_all_ranks:
            # Numbered from 1: the step that has just been done, as `steps_done` and checkpoints count them.
            facts = {"loss": mean, "loss_hex": mean.hex(), "seconds": ended - began}
            log.write("step", step=step + 1, **facts, checkpoint_seconds=ended - trained)
        if plan.digest_every and (step + 1) % plan.digest_every == 0:
            _log_state(log, step + 1, model, optimizer)
    run.close()
    log.write("end", steps_done=plan.stop_at)


def _log_state(log: Log, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    digest = state_digest(model, optimizer)
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.write("state", step=step, digest=digest)


@click.command(context_settings={"show_default": True})
@click.option("--store", metavar="URL", help="Where the run keeps its checkpoints.")
@click.option("--no-ckpt", is_flag=True, help="Train without ckptsvc: the control.")
@click.option("--steps", type=click.IntRange(1), default=48, help="Length of the training and of its schedule.")
@click.option("--stop-at", type=click.IntRange(1), help="Stop after this step. [default: the last]")
@click.option("--every", type=click.IntRange(1), default=5, help="Steps between snapshots.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="none", help="How the model is distributed.")
@click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Appended to.")
@click.option("--log-all-ranks", is_flag=True, help="Log the steps of every rank, not of rank 0 only.")
@click.option("--digest-every", type=click.IntRange(0), default=0, help="Steps between state digests; 0 for none.")
def main(store: str | None, no_ckpt: bool, steps: int, stop_at: int | None, **options: Any) -> None:
    """Train a small GPT on Python's own sources."""
    if no_ckpt == (store is not None):
        raise click.UsageError("give either --store or --no-ckpt")
    torch.set_num_threads(1)  # with the seed and deterministic kernels: equal runs are equal bit for bit
    torch.use_deterministic_algorithms(True)
    train(Plan(store=store, steps=steps, stop_at=min(stop_at or steps, steps), **options))


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        os._exit(error.exit_code)
    # All work is done and closed: leave without ending the interpreter. With torch 2.13 a Gloo thread that
    # lets go of its last collective needs the interpreter lock, and the process aborts (one exit in ten,
    # measured) when the interpreter is already ending.
    os._exit(0)
