"""What people save with DCP beside the plain case, and what is wrong with what they have; torch writes all of it."""

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.logicals import render, tensor
from torch import nn
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import get_state_dict

from ckptsvc.errors import CkptsvcError, ConfigError, Damaged, InvalidInput, LayoutError, NotFound
from ckptsvc.format.objects import decode, encode
from ckptsvc.geometry.box import Box
from ckptsvc.interop.dcp import entries as dcp_entries
from ckptsvc.interop.dcp.metadata import Chunk, Place, Tensor
from ckptsvc.interop.files import open_files
from ckptsvc.interop.formats import exporter, open_foreign, recognised
from ckptsvc.interop.logical import Foreign
from ckptsvc.types import TensorMeta


def saved(folder: Path, state: dict[str, Any]) -> str:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return str(folder)


def trained(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, **options)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape)
    optimizer.step()
    return optimizer


def test_a_model_without_a_key_beside_a_flat_optimizer(tmp_path: Path) -> None:
    """As torchtitan saves it."""
    state = {
        "model.norm.weight": torch.randn(3),
        "output.bias": torch.randn(2),
        "optimizer": {
            "state.model.norm.weight.exp_avg": torch.ones(3),
            "state.model.norm.weight.step": torch.tensor(4.0),
            "state.output.bias.preconditioner.left.inverse": torch.ones(2, 2),
            "param_groups.model.norm.weight.lr": 0.1,
            "param_groups.output.bias.lr": torch.tensor(0.25),
        },
        "train_state": {"step": 4, "losses": [1.0, 2.0], "rng": {"cpu": torch.arange(5)}},
        "loader": {"parts": [{"seen": torch.tensor([1, 2])}, 7]},
    }
    logical = open_foreign(saved(tmp_path / "c", state))
    assert [n for n in logical.names() if n.startswith("model/")] == ["model/model.norm.weight", "model/output.bias"]
    assert torch.equal(tensor(logical, "optimizer/state/output.bias/preconditioner/left/inverse"), torch.ones(2, 2))
    assert [(g["params"], g["lr"]) for g in logical.document()["optimizer"]["param_groups"]] == [
        (["model.norm.weight"], 0.1), (["output.bias"], 0.25)]  # fmt: skip
    assert logical.step == 4
    assert logical.document()["train_state"] == {"step": 4, "losses": [1.0, 2.0]}
    assert torch.equal(tensor(logical, "train_state/rng/cpu"), torch.arange(5))
    assert logical.document()["loader"]["parts"][0]["seen"].name == "loader/parts/0/seen"
    render(
        exporter("dcp")(logical, {"model": "", "optimizer": "optimizer", "flatten": "true"}), logical, tmp_path / "d"
    )
    template = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
    template |= {"train_state": {"step": 0, "losses": [], "rng": {"cpu": torch.zeros(5, dtype=torch.long)}}}
    template |= {"loader": {"parts": [{"seen": torch.tensor([0, 0])}, 0]}}
    template["optimizer"] = {key: torch.zeros_like(torch.as_tensor(value)) for key, value in state["optimizer"].items()}
    template["optimizer"]["param_groups.model.norm.weight.lr"] = 0.0
    template["optimizer"]["param_groups.output.bias.lr"] = 0.0
    dcp.load(template, checkpoint_id=tmp_path / "d", no_dist=True)
    state["optimizer"]["param_groups.output.bias.lr"] = 0.25
    assert torch.equal(template.pop("output.bias"), state.pop("output.bias"))
    assert str(template) == str(state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module._orig_mod.", ""])
def test_wrappers_leave_no_trace(tmp_path: Path, prefix: str) -> None:
    state = {
        "model": {
            f"{prefix}inner._checkpoint_wrapped_module.weight": torch.ones(2),
            f"{prefix}module.bias": torch.ones(1),
        },
        "optim": {
            "state": {f"{prefix}module.bias": {"exp_avg": torch.ones(1), "step": 3}},
            "param_groups": [{"lr": 0.1, "params": [f"{prefix}module.bias"]}],
        },
    }
    logical = open_foreign(saved(tmp_path / "c", state))
    assert logical.names() == [
        "model/inner.weight", "model/module.bias", "optimizer/state/module.bias/exp_avg",
        "optimizer/state/module.bias/step"]  # fmt: skip
    assert tensor(logical, "optimizer/state/module.bias/step") == torch.tensor(3.0)
    assert logical.document()["optimizer"]["param_groups"] == [{"lr": 0.1, "params": ["module.bias"]}]


def test_states_of_numpy_generators_are_plain_values(tmp_path: Path) -> None:
    state = np.random.RandomState(3).get_state()
    values = {"scalar": np.float32(0.5), "turned": np.arange(6, dtype=">i4").reshape(2, 3).T, "state": state}
    found = open_foreign(saved(tmp_path / "c", {"rng": values})).document()["rng"]
    assert (found["scalar"], found["scalar"].dtype) == (0.5, np.float32)
    assert np.array_equal(found["turned"], values["turned"])
    assert np.array_equal(found["state"][1], state[1])
    assert (found["state"][0], *found["state"][2:]) == (state[0], *state[2:])
    decode(encode({"rng": found}))
    objects = {"rng": np.array([{}], dtype=object)}
    with pytest.raises(CkptsvcError, match=r"__0_0\.distcp: .*a numpy array"):
        open_foreign(saved(tmp_path / "d", objects))


def test_parameters_may_be_called_by_number_and_may_be_empty(tmp_path: Path) -> None:
    model = nn.ParameterList([torch.ones(2), torch.ones(0, 3)])
    optimizer = trained(model.parameters())
    weights, moments = get_state_dict(model, optimizer)
    logical = open_foreign(saved(tmp_path / "c", {"model": weights, "optim": moments}))
    assert "optimizer/state/1/exp_avg" in logical
    assert tensor(logical, "model/1").shape == (0, 3)
    render(exporter("dcp")(logical, {}), logical, tmp_path / "d")
    again = {"model": {"0": torch.zeros(2), "1": torch.zeros(0, 3)}}
    dcp.load(again, checkpoint_id=tmp_path / "d", no_dist=True)
    assert torch.equal(again["model"]["0"], weights["0"])
    assert tensor(open_foreign(str(tmp_path / "d")), "model/1").shape == (0, 3)


def test_names_that_wrappers_hid_must_stay_apart(tmp_path: Path) -> None:
    state = {"model": {"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}}
    with pytest.raises(Damaged, match=r"model\.a\._orig_mod\.w and model\.a\.w are both"):
        open_foreign(saved(tmp_path / "c", state))


def test_state_by_number_needs_names(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    plain = {"model": model.state_dict(), "optim": trained(model.parameters()).state_dict()}
    place = saved(tmp_path / "plain", plain)
    with pytest.raises(InvalidInput, match="knows 2 parameters by number"):
        open_foreign(place)
    (tmp_path / "names").write_text("weight\nbias\n")
    logical = open_foreign(place, {"names": str(tmp_path / "names")})
    expected = plain["optim"]["state"][1]["exp_avg"]
    assert torch.equal(tensor(logical, "optimizer/state/bias/exp_avg"), expected)
    assert logical.document()["optimizer"]["param_groups"][0]["params"] == ["weight", "bias"]
    without = open_foreign(place, {"names": "no"})
    assert without.names() == ["model/bias", "model/weight"]
    assert [note.kind for note in without.notes] == ["lost"]
    named = {"model": model.state_dict(), "optim": trained(model.named_parameters()).state_dict()}
    assert "optimizer/state/bias/exp_avg" in open_foreign(saved(tmp_path / "named", named)).names()


def test_lightning_keeps_the_rest_beside(tmp_path: Path) -> None:
    place = saved(
        tmp_path / "c", {"state_dict": {"net.w": torch.ones(2)}, "optimizer_0": {"state": {}, "param_groups": []}}
    )
    torch.save(
        {"epoch": 2, "global_step": 9, "loops": {"fit": [torch.arange(3)]}, "path": Path("x")},
        tmp_path / "c" / "meta.pt",
    )
    logical = open_foreign(place)
    assert logical.names() == ["loops/fit/0", "model/net.w"]
    assert (logical.step, logical.document()["epoch"]) == (9, 2)


def test_two_directories_of_accelerate_are_one_checkpoint(tmp_path: Path) -> None:
    state = {"w": {"exp_avg": torch.ones(2), "step": torch.tensor(2.0)}}
    saved(tmp_path / "pytorch_model_fsdp_0", {"model": {"w": torch.ones(2)}})
    saved(tmp_path / "optimizer_0", {"optimizer": {"state": state, "param_groups": [{"lr": 1.0, "params": ["w"]}]}})
    logical = open_foreign(str(tmp_path))
    assert logical.names() == ["model/w", "optimizer/state/w/exp_avg", "optimizer/state/w/step"]
    assert logical.notes == []
    assert open_foreign(str(tmp_path), {"model": "model", "optimizer": "optimizer"}).names() == logical.names()
    with pytest.raises(InvalidInput, match="no key 'net'"):
        open_foreign(str(tmp_path), {"model": "net"})
    (tmp_path / "scheduler.bin").write_bytes(b"")
    assert [note.kind for note in open_foreign(str(tmp_path)).notes] == ["lost"]


def test_equal_tensors_are_tied_only_where_all_speaks_for_it(tmp_path: Path) -> None:
    same = torch.randn(5, 3)
    slots = {"exp_avg": torch.ones(5, 3)}

    def aliases(model: dict[str, torch.Tensor], *trained: str, **options: str) -> dict[str, str]:
        state = {
            "model": model,
            "optim": {"state": dict.fromkeys(trained, slots), "param_groups": [{"params": list(trained)}]},
        }
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return dict(open_foreign(saved(folder, state), options).aliases)

    pair = {"embed_tokens.weight": same, "lm_head.weight": same.clone()}
    one = {"model/lm_head.weight": "model/embed_tokens.weight"}
    assert aliases(pair, "embed_tokens.weight") == one
    assert aliases(pair, "lm_head.weight") == {"model/embed_tokens.weight": "model/lm_head.weight"}
    assert aliases(pair, "embed_tokens.weight", tied="no") == {}
    assert aliases(pair, "embed_tokens.weight", "lm_head.weight") == {}
    assert aliases({**pair, "lm_head.weight": same + 1}, "embed_tokens.weight") == {}
    other = {"a.weight": same, "b.weight": same.clone()}
    assert aliases(other, "a.weight") == {}
    assert aliases(other, "a.weight", tied="a.weight=b.weight") == {"model/b.weight": "model/a.weight"}
    with pytest.raises(InvalidInput, match="not equal"):
        aliases({**other, "b.weight": same + 1}, tied="a.weight=b.weight")


def test_masters_become_the_weights_unless_told_otherwise(tmp_path: Path) -> None:
    foreign = Foreign("test:", open_files(str(tmp_path)))
    master = torch.randn(4)
    foreign.add_value(TensorMeta("model/w", "bfloat16", (4,)), bytes(master.bfloat16().view(torch.uint8).tolist()))
    for slot in ("master", "exp_avg", "exp_avg_sq"):
        foreign.add_value(TensorMeta(f"optimizer/state/w/{slot}", "float32", (4,)), master.numpy().tobytes())
    foreign.plain = {
        "optimizer": {"param_groups": [{"lr": 0.5, "params": ["w"]}]},
        "x": {"kept": (1, b"2"), "not": {3}},
    }
    output = exporter("dcp")(foreign.seal(), {})
    assert sorted(note.kind for note in output.notes) == ["lost", "warning", "warning"]
    render(output, foreign, tmp_path / "a")
    weight, low = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    group = {**torch.optim.AdamW([weight]).state_dict()["param_groups"][0], "params": []}
    state = {"model": {"w": weight}, "optim": {"param_groups": [group]}, "x": {"kept": None}}
    dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True)
    dcp.load({"model": {"w": low}}, checkpoint_id=tmp_path / "a", no_dist=True)
    assert torch.equal(weight, master)
    assert torch.equal(low, master.bfloat16())
    assert state["x"] == {"kept": (1, b"2")}
    assert (state["optim"]["param_groups"][0]["lr"], state["optim"]["param_groups"][0]["params"]) == (0.5, ["w"])
    render(exporter("dcp")(foreign, {"weights": "stored"}), foreign, tmp_path / "b")
    again = open_foreign(str(tmp_path / "b"))
    assert again.meta("model/w").dtype == "bfloat16"
    assert torch.equal(tensor(again, "optimizer/state/w/master"), master)


@pytest.mark.parametrize("options", [{"files": "-1"}, {"chunk": "many"}, {"flatten": "maybe"}, {"ghost": "1"}])
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    logical = open_foreign(saved(tmp_path / "c", {"model": {"w": torch.ones(2)}}))
    with pytest.raises(ConfigError):
        exporter("dcp")(logical, options)


# ---- what is wrong with others ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    moments = trained(model.named_parameters())
    state = {"exp_avg": moments.state[model.weight]["exp_avg"], "step": torch.tensor(1.0)}
    groups = [{"lr": 0.1, "params": ["weight"]}]
    dcp.save({"model": model.state_dict(), "optim": {"state": {"weight": state}, "param_groups": groups}},
             checkpoint_id=tmp_path / "c", no_dist=True)  # fmt: skip
    return tmp_path / "c"


def changed(checkpoint: Path, change: Callable[[meta.Metadata], None]) -> str:
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    return str(checkpoint)


def test_without_metadata_it_was_never_completed(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    with pytest.raises(NotFound, match="never completed"):
        open_foreign(f"dcp:{checkpoint}")
    with pytest.raises(InvalidInput, match="no checkpoint of a format"):
        recognised(open_files(str(checkpoint)))


def test_files_that_are_missing_or_short_are_found_at_once(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Damaged, match="an entry of it ends at"):
        open_foreign(str(checkpoint))
    file.unlink()
    with pytest.raises(Damaged, match=r"__0_0\.distcp is missing"):
        open_foreign(str(checkpoint))


def _hole(content: meta.Metadata) -> None:
    content.state_dict_metadata["model.weight"].chunks[0].sizes = torch.Size([3, 6])


def _outside(content: meta.Metadata) -> None:
    content.state_dict_metadata["model.weight"].chunks[0].sizes = torch.Size([5, 6])


def _twice(content: meta.Metadata) -> None:
    chunks = content.state_dict_metadata["model.weight"].chunks
    chunks.append(meta.ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 6])))
    content.storage_data[meta.MetadataIndex("model.weight", torch.Size([2, 0]))] = _StorageInfo("__0_0.distcp", 0, 9)


def _nowhere(content: meta.Metadata) -> None:
    del content.storage_data[meta.MetadataIndex("model.bias", torch.Size([0]))]


def _elsewhere(content: meta.Metadata) -> None:
    content.storage_data[meta.MetadataIndex("model.bias", torch.Size([0]))] = _StorageInfo("../../etc/passwd", 0, 9)


def _transformed(content: meta.Metadata) -> None:
    for info in content.storage_data.values():
        info.transform_descriptors = ["rot13/1"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (_hole, LayoutError, r"model/weight.*no region has \[3:4, 0:6\]"),
        (_outside, Damaged, "a piece of model.weight"),
        (_twice, Damaged, "pieces of model.weight .* overlap"),
        (_nowhere, LayoutError, "no file has .* of model.bias"),
        (_elsewhere, Damaged, "outside"),
        (_transformed, InvalidInput, "rot13/1"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(checkpoint: Path, change: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        open_foreign(changed(checkpoint, change))


def test_a_piece_that_is_another_than_it_is_said_to_be_is_refused(checkpoint: Path) -> None:
    def other(content: meta.Metadata) -> None:
        content.state_dict_metadata["model.bias"].properties.dtype = torch.int32

    logical = open_foreign(changed(checkpoint, other))
    with pytest.raises(Damaged, match=r"model/bias.*float32\[4\].*int32\[4\] is expected"):
        tensor(logical, "model/bias")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("gotcha",)


def test_no_pickle_is_run(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    def evil(content: Any) -> None:
        content.planner_data = Evil()

    with pytest.raises(InvalidInput, match=r"imports builtins\.print"):
        open_foreign(changed(checkpoint, evil))
    place = saved(tmp_path / "d", {"model": {"w": torch.ones(1)}, "mine": {"evil": Evil(), "good": 1}})
    capsys.readouterr()
    with pytest.raises(InvalidInput, match=r"imports (builtins|__builtin__)\.print"):
        open_foreign(place)
    logical = open_foreign(place, {"unreadable": "skip"})
    assert logical.document()["mine"] == {"good": 1}
    assert [note.kind for note in logical.notes] == ["lost"]
    assert capsys.readouterr().out == ""


def test_entries_of_any_layout_and_order_in_memory_are_found(tmp_path: Path) -> None:
    """As torch lays them out, with other archives' names, transposed, and without a fixed place for the data."""
    tensors = {"plain": torch.arange(12.0).reshape(3, 4), "turned": torch.arange(12.0).reshape(4, 3).t()}
    tensors["last"] = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    foreign = Foreign("test:", open_files(str(tmp_path)))
    data = b""
    for name, value in tensors.items():
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=name != "plain")
        foreign.add(TensorMeta(name, "float32", tuple(value.shape)), Box.full(tuple(value.shape)),
                    dcp_entries.Entry("x", len(data), buffer.tell(), dcp_entries.locate))  # fmt: skip
        data += buffer.getvalue()
    (tmp_path / "x").write_bytes(data)
    foreign.seal()
    for name, value in tensors.items():
        assert torch.equal(tensor(foreign, name), value), name


def test_an_entry_that_negates_what_is_stored_is_refused(tmp_path: Path) -> None:
    torch.save(torch._neg_view(torch.ones(3)), tmp_path / "x")
    foreign = Foreign("test:", open_files(str(tmp_path)))
    entry = dcp_entries.Entry("x", 0, (tmp_path / "x").stat().st_size, dcp_entries.locate)
    foreign.add(TensorMeta("w", "float32", (3,)), Box.full((3,)), entry)
    foreign.seal()
    with pytest.raises(InvalidInput, match="negates"):
        tensor(foreign, "w")


def test_a_compressed_entry_unpacks_to_what_is_expected_and_no_more(tmp_path: Path) -> None:
    import zstandard

    content = zstandard.compress(bytes(10 << 20))
    (tmp_path / "x").write_bytes(content)
    place = Place("x", 0, len(content), (dcp_entries.ZSTD,))
    foreign = Foreign("test:", open_files(str(tmp_path)))
    dcp_entries.add(foreign, "w", Tensor("float32", (4,), [Chunk(Box.full((4,)), place)]))
    with pytest.raises(Damaged, match="more than"):
        tensor(foreign.seal(), "w")
    with pytest.raises(InvalidInput, match="2 times"):
        dcp_entries.check_transforms(place._replace(transforms=(dcp_entries.ZSTD,) * 2))


def test_nothing_but_our_errors_comes_of_broken_files(checkpoint: Path) -> None:
    """Bytes flipped, cut and repeated at random places; what is read of it is of no concern."""
    chance = random.Random(1)
    originals = {path: path.read_bytes() for path in (checkpoint / ".metadata", checkpoint / "__0_0.distcp")}
    failed = 0
    for turn in range(300):
        path = list(originals)[turn % 2]
        data = bytearray(originals[path])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.choice((0, 1, 1, 8))] = chance.randbytes(chance.choice((0, 1, 1, 4)))
        path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        try:
            logical = open_foreign(f"dcp:{checkpoint}")
            for name in logical.names():
                tensor(logical, name)
            logical.close()
        except CkptsvcError:
            failed += 1
        path.write_bytes(originals[path])
    assert failed > 100
