"""Real checkpoints of DeepSpeed, against what was gathered from the live model and optimizer."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput
from ckptsvc.interop.files import open_files
from ckptsvc.interop.formats import exporter, open_foreign, recognised
from ckptsvc.interop.naming.options import named, numbered
from tests.harness.foreign_values import render, same, value

NATIVE = [
    "deepspeed-z1_w4_fp32",
    "deepspeed-z2_w4_bf16",
    "deepspeed-z3_w4_fp32",
    "deepspeed-pp2dp2_z1_fp32_uinfo",
    "deepspeed-z2_w3_fp32_roundrobin",
    "deepspeed-z3_w2_bf16_subgroups",
]
UNIVERSAL = NATIVE[:4]
Get = Callable[[str], Path]


def pipeline_name(name: str) -> str:
    """The name in the PipelineModule of the fixture's model."""
    if name in ("tok_emb.weight", "pos_emb.weight", "frozen_scale"):
        return f"tied_modules.embed.{name}"
    head, _, rest = name.partition("layers.")
    number, _, local = rest.partition(".")
    return f"{int(number) + 1}.{local}" if rest else f"4.{head}"


def check(logical: Any, truth: dict[str, Any], rename: Callable[[str], str] = str, *, rest: bool = True) -> None:
    """Every tensor is what the truth has, and nothing else is there."""
    expected = set()
    for name, state in truth["params"].items():
        model, own = f"model/{rename(name)}", f"optimizer/state/{rename(name)}"
        tensor = value(logical, model)
        expected |= {model, f"{own}/exp_avg", f"{own}/exp_avg_sq", f"{own}/step"}
        if tensor.dtype != torch.float32:
            expected.add(f"{own}/master")
            assert same(tensor, state["param"].to(tensor.dtype)), name
            tensor = value(logical, f"{own}/master")
        assert same(tensor, state["param"]), name
        assert same(value(logical, f"{own}/exp_avg"), state["exp_avg"]), name
        assert same(value(logical, f"{own}/exp_avg_sq"), state["exp_avg_sq"]), name
        assert same(value(logical, f"{own}/step"), torch.tensor(float(state["step"]))), name
    if rest:
        for name, tensor in {**truth["frozen"], **truth["buffers"]}.items():
            expected.add(f"model/{rename(name)}")
            assert same(value(logical, f"model/{rename(name)}"), tensor), name
    assert {name for name in logical.names() if not name.startswith("deepspeed/")} == expected


def check_groups(logical: Any, truth: dict[str, Any]) -> None:
    groups = logical.document()["optimizer"]["param_groups"]
    assert groups == [
        {**{key: value for key, value in group.items() if key != "names"}, "params": group["names"]}
        for group in truth["groups"]
    ]


def truth_of(path: Path) -> dict[str, Any]:
    truth: dict[str, Any] = torch.load(path / "truth.pt", weights_only=True)
    return truth


def rename_for(name: str) -> Callable[[str], str]:
    return pipeline_name if "pp2" in name else str


@pytest.mark.parametrize("name", NATIVE)
def test_every_tensor_comes_back_bit_for_bit(foreign: Get, name: str) -> None:
    path = foreign(name)
    assert recognised(open_files(f"{path}/ckpt")) == "deepspeed"
    logical = open_foreign(f"deepspeed:{path}/ckpt")
    truth = truth_of(path)
    check(logical, truth, rename_for(name))
    if truth["groups"]:
        check_groups(logical, truth)
        assert list(logical.aliases) == ["model/lm_head.weight"]
    assert logical.step == 5
    assert logical.document()["deepspeed"]["client_state"]["my_epoch"] == 3
    logical.close()


@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_checkpoint_comes_back_as_far_as_deepspeed_wrote_it(foreign: Get, name: str) -> None:
    path = foreign(name)
    address = f"{path}/ckpt/global_step5_universal"
    assert recognised(open_files(address)) == "deepspeed-universal"
    logical = open_foreign(address)
    check(logical, truth_of(path), rename_for(name), rest="pp2" not in name)
    lost = [note.what for note in logical.notes if note.kind == "lost"]
    assert len(lost) == ("pp2" in name)


@pytest.mark.parametrize("stage", ["any", "1", "3"])
@pytest.mark.parametrize("name", NATIVE)
def test_what_is_written_is_read_back(foreign: Get, tmp_path: Path, name: str, stage: str) -> None:
    path = foreign(name)
    logical = open_foreign(f"deepspeed:{path}/ckpt")
    render(exporter("deepspeed-universal")(logical, {"stage": stage, "dp": "2"}), logical, tmp_path)
    back = open_foreign(str(tmp_path), {"weights": "master"})
    truth = truth_of(path)
    check(back, truth, rename_for(name))
    assert back.document()["optimizer"] == logical.document()["optimizer"]
    assert dict(back.aliases) == dict(logical.aliases)
    assert back.step == 5


@pytest.mark.parametrize(("stage", "dp"), [("1", "3"), ("2", "1"), ("3", "2"), ("3", "5")])
@pytest.mark.parametrize("name", [NATIVE[0], NATIVE[4], NATIVE[5]])
def test_native_checkpoints_of_any_world_are_written(
    foreign: Get, tmp_path: Path, name: str, stage: str, dp: str
) -> None:
    path = foreign(name)
    logical = open_foreign(f"deepspeed:{path}/ckpt")
    options = {"stage": stage, "dp": dp, "sub_group_size": "300", "dtype": "bfloat16" if "bf16" in name else "float32"}
    render(exporter("deepspeed")(logical, options), logical, tmp_path)
    back = open_foreign(str(tmp_path))
    check(back, truth_of(path))
    check_groups(back, truth_of(path))
    assert dict(back.aliases) == dict(logical.aliases)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_native_checkpoints_in_low_precision_keep_weights_and_masters(foreign: Get, tmp_path: Path, stage: str) -> None:
    path = foreign(NATIVE[1])
    logical = open_foreign(f"deepspeed:{path}/ckpt")
    render(exporter("deepspeed")(logical, {"stage": stage, "dp": "3"}), logical, tmp_path)
    assert (tmp_path / "global_step5" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").exists()
    check(open_foreign(str(tmp_path)), truth_of(path))


def test_round_robin_partitions_are_read_right_and_deepspeeds_universal_form_of_them_is_refused(
    foreign: Get, tmp_path: Path
) -> None:
    logical = open_foreign(f"deepspeed:{foreign('deepspeed-z2_w3_fp32_roundrobin')}/ckpt")
    assert [note.kind for note in logical.notes] == ["repaired"]
    render(exporter("deepspeed-universal")(logical, {}), logical, tmp_path)
    model = torch.load(tmp_path / "global_step5_universal" / "mp_rank_00_model_states.pt", weights_only=True)
    model["ds_config"]["zero_optimization"]["round_robin_gradients"] = True  # as in a copy by DeepSpeed's converter
    model["dp_world_size"] = 3
    for file in tmp_path.rglob("*_model_states.pt"):
        torch.save(model, file)
    with pytest.raises(InvalidInput, match="mixes the parameters up"):
        open_foreign(str(tmp_path))
    assert open_foreign(str(tmp_path), {"trust": "yes"}).notes[-1].kind == "warning"


def test_tensors_in_the_client_state_are_tensors(foreign: Get) -> None:
    logical = open_foreign(f"deepspeed:{foreign('deepspeed-z3_w2_bf16_subgroups')}/ckpt")
    ref = logical.document()["deepspeed"]["client_state"]["rng"]
    assert same(value(logical, ref.name), torch.arange(5, dtype=torch.uint8))


def test_a_pipelines_stale_copies_are_noted_and_not_used(foreign: Get) -> None:
    logical = open_foreign(f"deepspeed:{foreign(NATIVE[3])}/ckpt")
    assert [note.kind for note in logical.notes] == ["repaired"]
    assert "pos_emb.weight/exp_avg in stage 1" in logical.notes[0].what


def test_stage_0_is_numbered_until_somebody_names_the_parameters(foreign: Get, tmp_path: Path) -> None:
    path = foreign("deepspeed-z0_w2_fp32")
    truth = truth_of(path)
    logical = open_foreign(f"deepspeed:{path}/ckpt")
    assert [note.kind for note in logical.notes] == ["warning"]
    assert numbered(logical)
    names = [group["names"] for group in truth["groups"]]
    (tmp_path / "names").write_text("\n\n".join("\n".join(group) for group in names))
    check(named(logical, names), truth)  # as `init_from` does with a live optimizer
    for options in ({"names": str(tmp_path / "names")}, {"frozen": "frozen_*"}):
        logical = open_foreign(f"deepspeed:{path}/ckpt", options)
        check(logical, truth)
        check_groups(logical, truth)
    (tmp_path / "names").write_text("a")
    with pytest.raises(InvalidInput, match="names"):
        open_foreign(f"deepspeed:{path}/ckpt", {"names": str(tmp_path / "names")})


def test_a_job_in_fp32_can_take_the_masters(foreign: Get) -> None:
    path = foreign("deepspeed-z2_w4_bf16")
    logical = open_foreign(f"deepspeed:{path}/ckpt", {"weights": "master"})
    for name, state in truth_of(path)["params"].items():
        assert same(value(logical, f"model/{name}"), state["param"])
    assert not any(name.endswith("/master") for name in logical.names())


def copied(path: Path, tmp_path: Path) -> Path:
    shutil.copytree(path, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return tmp_path / "copy"


def test_a_missing_rank_is_named(foreign: Get, tmp_path: Path) -> None:
    for name, missing in (
        ("deepspeed-z1_w4_fp32", "zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ("deepspeed-z1_w4_fp32", "zero_pp_rank_3_mp_rank_00_optim_states.pt"),
        ("deepspeed-z3_w4_fp32", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("deepspeed-pp2dp2_z1_fp32_uinfo", "mp_rank_01_model_states.pt"),
    ):
        copy = copied(foreign(name) / "ckpt" / "global_step5", tmp_path)
        (copy / missing).unlink()
        with pytest.raises((Damaged, InvalidInput), match=r"rank|partitions"):
            open_foreign(f"deepspeed:{copy}")
        shutil.rmtree(copy)


@pytest.mark.parametrize("form", ["global_step5", "global_step5_universal"])
@pytest.mark.parametrize("name", [NATIVE[0], NATIVE[2], NATIVE[3]])
def test_damaged_files_give_errors_of_ours(foreign: Get, tmp_path: Path, name: str, form: str) -> None:
    copy = copied(foreign(name) / "ckpt" / form, tmp_path)
    rng = random.Random(name + form)
    files = sorted(copy.rglob("*.pt"))
    for _ in range(40):
        file = rng.choice(files)
        data = file.read_bytes()
        if rng.random() < 0.2:
            broken = data[: rng.randrange(len(data))]
        else:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 8))):
                changed[rng.randrange(min(len(data), 6000))] = rng.randrange(256)
            broken = bytes(changed)
        file.write_bytes(broken)
        try:
            logical = open_foreign(str(copy))
            for tensor in rng.sample(logical.names(), 5):
                value(logical, tensor)
            logical.close()
        except CkptsvcError:
            pass
        file.write_bytes(data)


def test_what_cannot_be_written_is_said(foreign: Get) -> None:
    logical: Any = open_foreign(f"deepspeed:{foreign(NATIVE[0])}/ckpt")
    for form, options, match in (
        ("deepspeed", {"stage": "4"}, "cannot be '4'"),
        ("deepspeed", {"dp": "0"}, "number of ranks"),
        ("deepspeed", {"dtype": "int8"}, "cannot be 'int8'"),
        ("deepspeed", {"tag": "../x"}, "name of a directory"),
        ("deepspeed-universal", {"tp_dims": "a"}, "PATTERN:DIMENSION"),
        ("deepspeed-universal", {"dp": "65536", "tp": "2"}, "are allowed"),
    ):
        with pytest.raises(InvalidInput, match=match):
            exporter(form)(logical, options)
    del logical.plain["optimizer"]
    with pytest.raises(InvalidInput, match="no parameter groups"):
        exporter("deepspeed")(logical, {})
    logical.drop("optimizer/state/ln_f.bias/exp_avg")
    with pytest.raises(InvalidInput, match="no complete state of Adam"):
        exporter("deepspeed-universal")(logical, {"stage": "3"})


@pytest.mark.parametrize("form", ["deepspeed", "deepspeed-universal"])
def test_a_loss_scaler_is_carried(foreign: Get, tmp_path: Path, form: str) -> None:
    logical: Any = open_foreign(f"deepspeed:{foreign(NATIVE[0])}/ckpt")
    scaler = {"class": "DynamicLossScaler", "cur_scale": 1024.0, "dynamic": True, "scale_window": 2000}
    logical.plain["deepspeed"]["loss_scaler"] = scaler
    render(exporter(form)(logical, {}), logical, tmp_path)
    assert open_foreign(str(tmp_path)).document()["deepspeed"]["loss_scaler"] == scaler


def test_an_unknown_option_is_refused(foreign: Get) -> None:
    path = foreign("deepspeed-z1_w4_fp32")
    with pytest.raises(InvalidInput, match="no option"):
        open_foreign(f"deepspeed:{path}/ckpt", {"weight": "master"})
    with pytest.raises(InvalidInput, match="cannot be 'fp64'"):
        open_foreign(f"deepspeed:{path}/ckpt", {"weights": "fp64"})
