"""A checkpoint of a real distributed job, read with the independent reader: specification, json, numpy, safetensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from harness.job import Launch
from harness.programs import adam, network, raw, tensors_of, train_step
from harness.rank import Rank
from safetensors import safe_open

import ckptsvc

READER = Path(__file__).with_name("reader.py")


def train(rank: Rank, store: str) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model)
    optimizer = adam(model)
    tree = {"model": model, "optimizer": optimizer, "note": [1, "two", 3.0]}
    with ckptsvc.attach(tree, store=store, every="off") as run:
        for step in range(3):
            train_step(model, optimizer, step, rank.number)
            run.step()
        # Gathered by torch, on its own way.
        truth = {name: raw(tensor).hex() for name, tensor in tensors_of(model, optimizer).items()}
        run.save(wait=True)
    return truth


def test_the_independent_reader_reads_what_a_job_of_two_ranks_has_saved(launch: Launch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("independent_reader", READER)
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    truth, _ = launch.plain(2, train, str(tmp_path / "run")).results()
    (folder,) = (tmp_path / "run").glob("step-*")
    checkpoint = reader.Checkpoint(folder)
    # Buffers differ between ranks; the checkpoint has those of rank 0, whose truth this is.
    for name, data in truth.items():
        assert checkpoint.tensor(name).tobytes().hex() == data, name
        assert checkpoint.tensor_from_shards(name).tobytes().hex() == data, name
    assert checkpoint.objects(0)["note"] == [1, "two", 3.0]
    shards = sorted(folder.glob("r*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert any(key.startswith("model/") for key in opened.keys())  # noqa: SIM118  not a dict
