"""A job of DeepSpeed on one CPU process, for test_deepspeed_loads: trains, saves, loads, and says its losses.

    deepspeed_job.py DIRECTORY STAGE {save|native|universal}

`save` trains three steps and saves below DIRECTORY; the others load from there. All print the losses of two more steps.
"""

import json
import os
import socket
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


class Model(nn.Module):
    """Tied weights, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 6)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad=False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.inner(self.embedding(ids)) * self.scale)
        return nn.functional.cross_entropy(logits.float(), (ids * 5 + 1) % 13)


def engine_of(stage: int, universal: bool) -> deepspeed.DeepSpeedEngine:
    model = Model()
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": matrices, "lr": 0.05, "weight_decay": 0.1}, {"params": vectors, "lr": 0.02}]
    config = {
        "train_batch_size": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def step(engine: deepspeed.DeepSpeedEngine, number: int) -> float:
    ids = torch.randint(0, 13, (8,), generator=torch.Generator().manual_seed(number))
    loss = engine(ids)
    engine.backward(loss)
    engine.step()
    return float(loss)


def main(directory: str, stage: str, action: str) -> None:
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # nothing is compiled for this
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    engine = engine_of(int(stage), action == "universal")
    if action == "save":
        for number in range(3):
            step(engine, number)
        engine.save_checkpoint(directory)
    else:
        engine.load_checkpoint(directory, load_lr_scheduler_states=False)
    print(json.dumps([step(engine, number) for number in (3, 4)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # DeepSpeed's threads do not always end
