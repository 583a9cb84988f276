"""A real job whose state hardly changes: little is written, and all of it comes back, at any layout, by any reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.damage import assert_intact
from harness.job import Launch
from harness.programs import differences, state_digest
from harness.rank import Rank
from harness.stored import cli
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptsvc
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.storage import connect

INCREMENTAL = {"CKPTSVC_SAVE_INCREMENTAL": "true", "CKPTSVC_SAVE_FULL_EVERY": "4", "CKPTSVC_SAVE_EXTENT": "4096"}
COMPRESSED = {"CKPTSVC_SAVE_COMPRESSION": "zstd"}


def build(world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which nine tenths are frozen, sharded where there are several ranks."""
    torch.manual_seed(world)
    model = nn.Sequential(nn.Embedding(90, 200), nn.Linear(200, 9), nn.Linear(9, 3))
    model[0].weight.requires_grad_(False)
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.001)


def train(rank: Rank, store: str, steps: int) -> dict[str, Any]:
    """Goes on from what is there; returns the state at both ends."""
    if rank.world > 1:
        rank.join()
    model, optimizer = build(rank.world)
    with ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every="off") as run:
        found: dict[str, Any] = {"begun": run.steps_done, "restored": state_digest(model, optimizer)}
        for step in range(run.steps_done, run.steps_done + steps):
            torch.manual_seed(step)
            model(torch.randint(0, 90, (8,))).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            run.save(wait=True)
        found["saved"] = state_digest(model, optimizer)
    return found


def totals(store: Path) -> list[dict[str, int]]:
    """What was written for each checkpoint, oldest first."""
    opened = connect(str(store))
    found = []
    for ref, commit in reversed(find(opened)):
        assert not isinstance(commit, Exception), commit
        segments = open_checkpoint(opened, ref, commit).index.segments
        found.append({"bytes": commit.bytes, **(segments.stored(ref.name) if segments else {})})
    return found


@pytest.mark.parametrize(
    "how",
    [
        "incremental and compressed",
        pytest.param("incremental", marks=pytest.mark.slow),
        pytest.param("incremental, over a local disk", marks=pytest.mark.slow),
        pytest.param("compressed", marks=pytest.mark.slow),
    ],
)
def test_a_job_with_frozen_parameters(launch: Launch, tmp_path: Path, how: str) -> None:
    store = tmp_path / "run"
    environ = (INCREMENTAL if "incremental" in how else {}) | (COMPRESSED if "compressed" in how else {})
    if "disk" in how:
        environ |= {"CKPTSVC_TIERS_LOCAL": str(tmp_path / "disk")}
    first = launch.plain(2, train, str(store), 3, **environ).results()
    second = launch.plain(3, train, str(store), 1, **environ).results()
    (third,) = launch.plain(1, train, str(store), 1, **environ).results()
    assert (first[0]["begun"], second[0]["begun"], third["begun"]) == (0, 3, 4)
    for before, after in ((first[0], second[0]), (second[2], third)):
        assert differences(before["saved"], after["restored"]) == []
    assert assert_intact(store) == [5, 4, 3, 2, 1]
    written = totals(store)
    if "incremental" in how:  # every launch has an agent of its own, and its first checkpoint is whole
        assert ["referenced" in each and each["referenced"] > 0 for each in written] == [
            False,
            True,
            True,
            False,
            False,
        ]
        assert all(each["written"] < 0.5 * each["bytes"] for each in written[1:3])
    if "compressed" in how:
        assert all(0 < each["compressed"] <= each["bytes"] and each["written"] < each["bytes"] for each in written)
    _by_the_command_line(store, written)


def _by_the_command_line(store: Path, written: list[dict[str, int]]) -> None:
    second = f"{store}/step-000000000002.e00001"
    shown = json.loads(cli("inspect", second, "--json").out)["checkpoint"]
    for name in ("referenced", "compressed", "written"):
        assert shown["stored"][name] == written[1].get(name)
    assert "referenced" in cli("inspect", second).out or not written[1]["referenced"]
    assert cli("verify", str(store), "--all").status == 0
    assert cli("diff", second, second).status == 0
    assert cli("gc", str(store), "--older-than", "0s", "--delete").status == 0
    assert assert_intact(store) == [5, 4, 3, 2, 1]
    assert cli("convert", second, f"{store}-2").status == 0
    assert cli("diff", second, f"{store}-2").status == 0
