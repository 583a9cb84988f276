"""`ckptsvc convert` between real checkpoints of the frameworks: every pair ends where it began."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.stored import cli
from safetensors.torch import load_file

import ckptsvc

Foreign = Callable[[str], Path]

SOURCES = {
    "dcp": "dcp-fsdp2_w4/ckpt",
    "deepspeed": "deepspeed-z1_w4_fp32/ckpt",
    "megatron": "megatron-tp2pp2_w4/ckpt",
    "megatron-classic": "megatron-tp2pp2_legacy/ckpt",
    "hf": "hf-llama_tied_fp32/ckpt",
}
CIRCLES = {
    "dcp": ["torch:{0}/a", "ckptsvc:{0}/b", "dcp:{0}/c"],
    "deepspeed": ["ckptsvc:{0}/a", "deepspeed-universal:{0}/b", "deepspeed:{0}/c"],
    "megatron": ["ckptsvc:{0}/a", "dcp:{0}/b"],
    "megatron-classic": ["ckptsvc:{0}/a", "megatron-classic:{0}/b"],
    "hf": ["torch:{0}/a", "ckptsvc:{0}/b", "hf:{0}/c"],
}
FILES = {"torch": "checkpoint.pt", "npz": "checkpoint.npz"}
PARTS = {"megatron-classic": ["--to", "tp=1,pp=2"], "deepspeed": ["--to", "dp=3,zero=2"]}


def address_of(target: str) -> str:
    """Where a target of one file is to be read."""
    kind = target.partition(":")[0]
    return f"{target}/{FILES[kind]}" if kind in FILES else target


def source(foreign: Foreign, kind: str) -> str:
    archive, _, folder = SOURCES[kind].partition("/")
    return f"{kind}:{foreign(archive) / folder}"


@pytest.mark.parametrize("kind", CIRCLES)
def test_what_goes_through_other_formats_is_what_it_was(foreign: Foreign, tmp_path: Path, kind: str) -> None:
    first = last = source(foreign, kind)
    for target in (name.format(tmp_path) for name in CIRCLES[kind]):
        extra = PARTS.get(target.partition(":")[0], [])
        ended = cli("convert", last, target, *extra)
        assert ended.status == 0, ended.err
        last = address_of(target)
    ended = cli("verify", "--against", last, first)
    assert ended.status == 0, ended.out + ended.err
    assert "the same: " in ended.out


def test_a_layout_gives_every_rank_its_shard(foreign: Foreign, tmp_path: Path) -> None:
    hf = source(foreign, "hf")
    ended = cli("convert", hf, tmp_path / "run", "--to", "dp=1,tp=1,pp=3", "--workers", "2")
    assert ended.status == 0, ended.err
    assert len(list((tmp_path / "run").glob("step-*/*.safetensors"))) >= 3
    assert cli("verify", "--against", tmp_path / "run", hf).status == 0
    uneven = cli("convert", hf, tmp_path / "other", "--to", "tp=4")
    assert uneven.status == 14
    assert "divide" in uneven.err
    assert not list(tmp_path.glob("other*/step-*"))


def test_other_names_and_back(foreign: Foreign, tmp_path: Path) -> None:
    hf = source(foreign, "hf")
    assert cli("convert", hf, tmp_path / "run", "--names", "megatron").status == 0
    names = ckptsvc.load(str(tmp_path / "run"), only="*linear_qkv.weight")["model"]
    assert set(names) == {f"decoder.layers.{n}.self_attention.linear_qkv.weight" for n in range(3)}
    config = f"config={foreign('hf-llama_tied_fp32') / 'ckpt' / 'config.json'}"
    back = ["--names", "hf", "--family", "llama", "--option", config]
    assert cli("convert", tmp_path / "run", f"hf:{tmp_path / 'back'}", *back).status == 0
    ours = load_file(tmp_path / "back" / "model.safetensors")
    theirs = {
        name: value
        for file in (foreign("hf-llama_tied_fp32") / "ckpt").glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
