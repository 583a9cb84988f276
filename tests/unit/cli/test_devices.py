"""What --nproc-per-node means on a node."""

import os
from pathlib import Path

import pytest

from ckptsvc.cli import devices
from ckptsvc.cli.devices import ranks_of
from ckptsvc.errors import ConfigError


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A node with four cards of NVIDIA."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_number(dev: Path) -> None:
    assert ranks_of("3", {}, dev) == 3


@pytest.mark.parametrize("text", ["gpu", "auto"])
def test_cards_of_nvidia(dev: Path, text: str) -> None:
    assert ranks_of(text, {}, dev) == 4


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,2", 2),
        (" 3 ", 1),
        ("1,0,3,2", 4),
        ("0,9,1", 1),
        ("GPU-8a1f,GPU-77b0", 2),
        ("MIG-1,MIG-2,MIG-3,MIG-4,MIG-5", 5),
    ],
)
def test_those_that_may_be_used(dev: Path, visible: str, count: int) -> None:
    assert ranks_of("gpu", {"CUDA_VISIBLE_DEVICES": visible}, dev) == count


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_none_of_them(dev: Path, visible: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    assert ranks_of("auto", environ, dev) == len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match="gpu: this node has no such device"):
        ranks_of("gpu", environ, dev)


def test_a_node_without_devices_runs_a_rank_on_each_core_that_it_may_use(tmp_path: Path) -> None:
    assert ranks_of("auto", {}, tmp_path) == ranks_of("cpu", {}, tmp_path) == len(os.sched_getaffinity(0))


def test_of_other_devices_torch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dri").mkdir()
    monkeypatch.setattr(devices, "sys", type("Python", (), {"executable": str(tmp_path / "python")}))
    (tmp_path / "python").write_text("#!/bin/sh\necho a warning\necho 12\n")
    (tmp_path / "python").chmod(0o755)
    assert ranks_of("xpu", {}, tmp_path) == 12
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match="xpu: this node has no such device"):
        ranks_of("xpu", {}, tmp_path)


@pytest.mark.slow
def test_torch_answers(tmp_path: Path) -> None:
    (tmp_path / "kfd").touch()
    assert ranks_of("auto", {}, tmp_path) >= 1
    assert devices._asked("torch.ones(7).numel()") == 7


@pytest.mark.parametrize("text", ["0", "-1", "", "two", "tpu"])
def test_what_is_none_of_these(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a number, auto, gpu, xpu or cpu"):
        ranks_of(text, {}, tmp_path)
