"""Checkpoints of Megatron-Core: real ones, bit for bit; written for other layouts; optimizers in every form."""

import json
import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.logicals import render, tensor

from ckptsvc.errors import CkptsvcError, ConfigError, Damaged, InvalidInput, LayoutError, NotFound
from ckptsvc.interop.formats import exporter, open_foreign
from ckptsvc.interop.logical import Logical

DIST = ("megatron-tp2pp2_w4", "megatron-tp2dp2_distopt_fr")
CLASSIC = "megatron-tp2pp2_legacy"
FLAT = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "param": "param"}


@pytest.fixture(autouse=True, scope="module")
def _namespaces() -> Iterator[None]:
    """Megatron's files have the arguments of its command line in them."""
    with torch.serialization.safe_globals([Namespace]):
        yield


def matches(logical: Logical, truth: dict[str, Any]) -> None:
    """Every parameter and its state are what the live job had, bit for bit; groups have the right members."""
    names = set()
    for name, values in truth["params"].items():
        for slot, value in values.items():
            canonical = f"model/{name}" if slot == "param" else f"optimizer/state/{name}/{slot}"
            names.add(canonical)
            expected = torch.as_tensor(value)
            found = tensor(logical, canonical)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), canonical
            assert torch.equal(found, expected), canonical
    assert set(logical.names()) == names
    assert logical.aliases == {"model/output_layer.weight": "model/embedding.word_embeddings.weight"}
    groups = logical.document()["optimizer"]["param_groups"]
    decayed = {name for name, values in truth["params"].items() if values["param"].ndim > 1}
    assert [set(group["params"]) for group in groups] == [decayed, truth["params"].keys() - decayed]
    for group, expected in zip(groups, truth["groups"], strict=True):
        assert {key: group[key] for key in expected} == expected


def written(logical: Logical, folder: Path, kind: str, **options: str) -> Path:
    render(exporter(kind)(logical, options), logical, folder)
    return folder


def truth_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "truth.pt", weights_only=True)
    return found


# ---- real checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIST)
def test_torch_dist_is_read_bit_for_bit(foreign: Callable[[str], Path], name: str) -> None:
    folder = foreign(name)
    logical = open_foreign(str(folder / "ckpt"))
    matches(logical, truth_of(folder))
    assert logical.origin.startswith("megatron:")
    assert logical.step == 5
    assert [note.kind for note in logical.notes] == ["lost"]  # random states of ranks
    one = open_foreign(f"megatron:{folder / 'ckpt' / 'iter_0000005'}?layers=stacked")
    assert one.meta("model/decoder.layers.mlp.linear_fc1.weight").shape == (4, 36, 20)
    assert "model/decoder.layers.self_attention.linear_qkv.layer_norm_weight" in one


def test_classic_is_read_bit_for_bit(foreign: Callable[[str], Path]) -> None:
    folder = foreign(CLASSIC)
    logical = open_foreign(str(folder / "ckpt"))
    matches(logical, truth_of(folder))
    assert logical.origin.startswith("megatron-classic:")
    assert logical.step == 5
    assert logical.document()["megatron"]["args"]["num_layers"] == 4
    without = open_foreign(f"megatron-classic:{folder / 'ckpt'}?optimizer=no")
    assert all(name.startswith("model/") for name in without.names())


def equal(one: Any, other: Any) -> bool:
    """Equal with the order of keys, which numbers of optimizers depend on."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_classic_goes_through_other_layouts_and_comes_back_the_same(
    foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = foreign(CLASSIC)
    truth, at = truth_of(folder), folder / "ckpt"
    for tp, pp, vpp in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 4, 1), (2, 2, 1)):
        source = open_foreign(str(at))
        options = {"tp": str(tp), "pp": str(pp), "vpp": str(vpp), "kv_heads": "4"}
        at = written(source, tmp_path / f"{tp}{pp}{vpp}", "megatron-classic", **options)
        matches(open_foreign(str(at)), truth)
    for file in sorted((folder / "ckpt").rglob("*.pt")):
        original = torch.load(file, weights_only=True)
        ours = torch.load(at / file.relative_to(folder / "ckpt"), weights_only=True)
        del original["rng_state"]
        assert original.keys() == ours.keys()
        assert all(equal(original[key], ours[key]) for key in original), file.parent.name


@pytest.mark.parametrize("name", [*DIST, CLASSIC])
@pytest.mark.parametrize("form", ["plain", "reshardable"])
def test_torch_dist_is_written_from_all(foreign: Callable[[str], Path], tmp_path: Path, name: str, form: str) -> None:
    folder = foreign(name)
    source = open_foreign(str(folder / "ckpt"))
    at = written(source, tmp_path, "megatron", optimizer=form, files="2", chunk="500")
    again = open_foreign(str(at))
    matches(again, truth_of(folder))
    assert again.notes == []
    assert (at / "latest_checkpointed_iteration.txt").read_text() == "5"
    template = {"decoder.layers.mlp.linear_fc1.weight": torch.empty(4, 36, 20)}
    dcp.load(template, checkpoint_id=at / "iter_0000005", no_dist=True)
    third = truth_of(folder)["params"]["decoder.layers.2.mlp.linear_fc1.weight"]["param"]
    assert torch.equal(template["decoder.layers.mlp.linear_fc1.weight"][2], third)


def test_torch_dist_becomes_classic(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    folder = foreign(DIST[0])
    source = open_foreign(str(folder / "ckpt"))
    at = written(source, tmp_path, "megatron-classic", tp="2", pp="2", kv_heads="4", dp="4")
    matches(open_foreign(str(at)), truth_of(folder))


# ---- a model with everything --------------------------------------------------------------------------------

HIDDEN, HEADS, GROUPS, DIM, FFN, EXPERTS, LAYERS, VOCAB = 8, 4, 2, 2, 6, 4, 4, 10


def shapes() -> dict[str, tuple[int, ...]]:
    """Grouped queries, gated experts with a router, an output layer of its own."""
    found: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"decoder.layers.{layer}"
        found[f"{at}.self_attention.linear_proj.weight"] = (HIDDEN, HEADS * DIM)
        found[f"{at}.self_attention.linear_qkv.layer_norm_weight"] = (HIDDEN,)
        found[f"{at}.self_attention.linear_qkv.weight"] = ((HEADS + 2 * GROUPS) * DIM, HIDDEN)
        found[f"{at}.pre_mlp_layernorm.weight"] = (HIDDEN,)
        found[f"{at}.mlp.router.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            found[f"{at}.mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * FFN, HIDDEN)
            found[f"{at}.mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (HIDDEN, FFN)
    found["decoder.final_layernorm.weight"] = (HIDDEN,)
    found["output_layer.weight"] = (VOCAB, HIDDEN)
    return found


@pytest.fixture
def mixed(tmp_path: Path) -> Logical:
    """bfloat16 with fp32 masters, as another framework could have left it."""
    torch.manual_seed(0)
    model = {name: torch.randn(shape).bfloat16() for name, shape in shapes().items()}
    names = list(model)
    matrices = [i for i, name in enumerate(names) if model[name].ndim > 1]
    vectors = [i for i, name in enumerate(names) if model[name].ndim == 1]
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(value.shape), "exp_avg_sq": torch.rand(value.shape),
            "master": torch.randn(value.shape)}
        for i, value in enumerate(model.values())
    }  # fmt: skip
    groups = [
        {"lr": 0.1, "weight_decay": decay, "params": ids, "param_names": [names[i] for i in ids]}
        for decay, ids in ((0.1, matrices), (0.0, vectors))
    ]
    torch.save({"model": model, "optimizer": {"state": state, "param_groups": groups}, "step": 3}, tmp_path / "x.pt")
    return open_foreign(f"torch:{tmp_path / 'x.pt'}")


def same_tensors(one: Logical, other: Logical) -> None:
    assert set(one.names()) == set(other.names())
    for name in one.names():
        assert torch.equal(tensor(one, name), tensor(other, name)), name


@pytest.mark.parametrize(
    "degrees", [{"tp": "2", "ep": "2", "pp": "2"}, {"ep": "4"}, {"tp": "2", "pp": "2", "vpp": "2"}]
)
def test_experts_masters_and_gates_are_written_and_read(
    mixed: Logical, tmp_path: Path, degrees: dict[str, str]
) -> None:
    output = exporter("megatron-classic")(mixed, {**degrees, "heads": "4", "kv_heads": "2"})
    assert [note.kind for note in output.notes] == ["warning"]  # groups without Megatron's marks
    at = written(mixed, tmp_path / "classic", "megatron-classic", **degrees, heads="4", kv_heads="2")
    again = open_foreign(str(at))
    same_tensors(mixed, again)
    dist = written(again, tmp_path / "dist", "megatron")
    stacked = open_foreign(str(dist), {"layers": "stacked"})
    assert stacked.meta("model/decoder.layers.mlp.experts.experts.linear_fc1.weight").shape == (4, 4, 12, 8)
    assert stacked.meta("optimizer/state/decoder.layers.mlp.router.weight/master").dtype == "float32"
    back = written(stacked, tmp_path / "back", "megatron-classic", tp="2", heads="4", kv_heads="2")
    same_tensors(mixed, open_foreign(str(back)))
    same_tensors(mixed, open_foreign(str(dist)))


def test_a_rank_has_its_half_of_gate_and_of_up(mixed: Logical, tmp_path: Path) -> None:
    at = written(mixed, tmp_path / "classic", "megatron-classic", tp="2", ep="2", heads="4", kv_heads="2")
    rank = torch.load(at / "iter_0000003" / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=True)
    whole = tensor(mixed, "model/decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight")
    mine = rank["model"]["decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"]
    assert torch.equal(mine, torch.cat([whole[FFN // 2 : FFN], whole[FFN + FFN // 2 :]]))
    first = rank["optimizer"]["fp32_from_fp16_params"][0][0]
    assert torch.equal(first, tensor(mixed, "optimizer/state/embedding.word_embeddings.weight/master")[5:])
    assert rank["optimizer"]["optimizer"]["param_groups"][1]["wd_mult"] == 0.0


def test_sizes_of_the_model_are_handed_on(mixed: Logical, tmp_path: Path) -> None:
    mixed.document()["config"] = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN}
    again = open_foreign(str(written(mixed, tmp_path / "one", "megatron-classic", tp="2")))
    assert again.document()["megatron"]["model_config"]["num_query_groups"] == GROUPS
    same_tensors(mixed, open_foreign(str(written(again, tmp_path / "two", "megatron-classic", tp="2", pp="2"))))


def test_a_vocabulary_is_padded_anew(mixed: Logical, tmp_path: Path) -> None:
    options = {"tp": "2", "heads": "4", "kv_heads": "2", "vocab": "9", "vocab_multiple": "3"}
    output = exporter("megatron-classic")(mixed, options)
    assert sum("rows of padding" in note.what for note in output.notes) == 2
    assert sum("rows of zeros" in note.what for note in output.notes) == 2
    again = open_foreign(str(written(mixed, tmp_path / "out", "megatron-classic", **options)))
    rows = tensor(again, "model/output_layer.weight")
    assert rows.shape == (12, HIDDEN)
    assert torch.equal(rows[:9], tensor(mixed, "model/output_layer.weight")[:9])
    assert not rows[9:].any()


def test_what_megatron_cannot_have_is_refused(mixed: Logical, foreign: Callable[[str], Path]) -> None:
    real = open_foreign(str(foreign(CLASSIC) / "ckpt"))
    write = exporter("megatron-classic")
    with pytest.raises(LayoutError, match="how many key and value heads"):
        write(real, {"tp": "2"})
    with pytest.raises(LayoutError, match="cannot be divided over tp=3"):
        write(real, {"tp": "3", "kv_heads": "4"})
    with pytest.raises(LayoutError, match="do not divide over pp 3"):
        write(real, {"pp": "3"})
    with pytest.raises(ConfigError, match="'tpp'"):
        write(real, {"tpp": "2"})
    with pytest.raises(LayoutError, match="at least 1"):
        write(real, {"tp": "0"})
    with pytest.raises(LayoutError, match="experts cannot be divided over ep=3"):
        write(mixed, {"ep": "3"})


# ---- the distributed optimizer ------------------------------------------------------------------------------


def flat(named: dict[str, torch.Tensor], *, alone: bool) -> torch.Tensor:
    """A buffer as Megatron-Core lays it out: from the last to the first, each from a multiple of 64 elements on."""
    parts: list[torch.Tensor] = []
    at = done = 0
    for name, value in reversed(named.items()):
        pad = -at % 64
        parts += [torch.zeros(pad), value.reshape(-1)]
        at, done = at + pad + value.numel(), done + 1
        if alone and name == "output_layer.weight":
            at = 0  # the next one is the first of a bucket
    return torch.cat(parts)


def distributed(source: Path, at: Path) -> Path:
    """The classic checkpoint as the distributed optimizer would have left it."""
    shutil.copytree(source, at)
    for file in at.rglob("model_optim_rng.pt"):
        root = torch.load(file, weights_only=True)
        names = [name for name, value in root["model"].items() if isinstance(value, torch.Tensor)]
        order = [n for n in names if root["model"][n].ndim > 1] + [n for n in names if root["model"][n].ndim == 1]
        state = {name: root["optimizer"]["state"][i] for i, name in enumerate(order)}
        buffer = {
            slot: flat({n: root["model"][n] if slot == "param" else state[n][slot] for n in names}, alone=True)
            for slot in FLAT
        }
        buffer["numel_unpadded"] = len(buffer["param"])
        root["optimizer"] = {"optimizer": {"param_groups": root["optimizer"]["param_groups"]}}
        for group in root["optimizer"]["optimizer"]["param_groups"]:
            del group["params"]
            group["step"] = 5
        torch.save(root, file)
        key = (torch.float32, torch.float32)
        torch.save({"buckets_coalesced": True, 0: {key: buffer}}, file.with_name("distrib_optim.pt"))
    return at


def test_flat_buffers_of_the_classic_form_are_read(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    folder = foreign(CLASSIC)
    at = distributed(folder / "ckpt", tmp_path / "x")
    matches(open_foreign(str(at)), truth_of(folder))
    file = next(at.rglob("distrib_optim.pt"))
    root = torch.load(file, weights_only=True)
    for slot in FLAT:
        root[0][torch.float32, torch.float32][slot] = torch.zeros(100)
    torch.save(root, file)
    with pytest.raises(LayoutError, match="100 elements, and the parameters of this rank take"):
        open_foreign(str(at))
    file.unlink()
    with pytest.raises(NotFound, match="distrib_optim"):
        open_foreign(str(at))


def common(folder: Path, kind: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [{**group, "step": 5} for group in groups]
    return {"iteration": 5, "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": kind}}


def saved_dist(at: Path, state: dict[str, Any], root: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=at, no_dist=True)
    torch.save(root, at / "common.pt")
    (at / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return at


def stacked_model(folder: Path) -> dict[str, torch.Tensor]:
    logical = open_foreign(str(folder / "ckpt"), {"layers": "stacked"})
    return {name.removeprefix("model/"): tensor(logical, name) for name in logical.names() if name.startswith("model/")}


def reformulated(value: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    inner = [n // g for n, g in zip(value.shape, grid, strict=True)]
    split = value.reshape([n for pair in zip(grid, inner, strict=True) for n in pair])
    order = [*range(0, split.ndim, 2), *range(1, split.ndim, 2)]
    return split.permute(order).reshape(*grid, math.prod(inner))


def test_optimizers_of_older_versions_are_read(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    folder = foreign(DIST[0])
    logical, truth = open_foreign(str(folder / "ckpt"), {"layers": "stacked"}), truth_of(folder)
    model = stacked_model(folder)
    state: dict[str, Any] = dict(model)
    for name, value in model.items():
        stacked = name.startswith("decoder.layers.")
        grid = [value.shape[0] if stacked else 1, *(1 for _ in value.shape[1:])]
        for d in range(int(stacked), value.ndim):
            if value.shape[d] in (36, 60, 68):
                grid[d] = 2  # tensor parallelism
        for slot in ("exp_avg", "exp_avg_sq"):
            moments = tensor(logical, f"optimizer/state/{name}/{slot}")
            state[f"optimizer.state.{slot}.{name}"] = reformulated(moments, tuple(grid))
        state[f"optimizer.state.fp32_param.{name}"] = reformulated(value, tuple(grid))
    root = common(folder, "fully_sharded_model_space", truth["groups"])
    state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"] = [None]
    at = saved_dist(tmp_path / "x", state, root)
    matches(open_foreign(str(at)), truth)


@pytest.fixture
def buffers(foreign: Callable[[str], Path], tmp_path: Path) -> Path:
    """The form of flat buffers, tp=2 and pp=2, made of the classic checkpoint's files of ranks."""
    state: dict[str, Any] = dict(stacked_model(foreign(DIST[0])))
    for pp in range(2):
        for tp in range(2):
            folder = foreign(CLASSIC) / "ckpt" / "iter_0000005" / f"mp_rank_{tp:02d}_{pp:03d}"
            root = torch.load(folder / "model_optim_rng.pt", weights_only=True)
            names = [name for name, value in root["model"].items() if isinstance(value, torch.Tensor)]
            order = [n for n in names if root["model"][n].ndim > 1] + [n for n in names if root["model"][n].ndim == 1]
            moments = {name: root["optimizer"]["state"][i] for i, name in enumerate(order)}
            first = [name for name in names if name == "output_layer.weight"]
            for bucket, members in enumerate(part for part in (first, [n for n in names if n not in first]) if part):
                for slot in FLAT:
                    named = {n: root["model"][n] if slot == "param" else moments[n][slot] for n in members}
                    key = f"dp_group_idx_{2 * pp + tp}.gbuf_idx_0.dtype_(torch.float32, torch.float32)"
                    state[f"optimizer.distributed.{key}.bucket_idx_{bucket}.{slot}"] = flat(named, alone=False)
            state[f"rng_state/shard_{pp}.{tp}_2.2"] = [None]
    state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"] = [None]
    root = common(tmp_path, "dp_reshardable", truth_of(foreign(CLASSIC))["groups"])
    return saved_dist(tmp_path / "buffers", state, root)


def test_flat_buffers_need_the_order_of_parameters(
    foreign: Callable[[str], Path], buffers: Path, tmp_path: Path
) -> None:
    truth = truth_of(foreign(CLASSIC))
    with pytest.raises(InvalidInput, match="what is missing is the order"):
        open_foreign(str(buffers))
    matches(open_foreign(str(buffers), {"names": "local"}), truth)
    names = tmp_path / "names"
    order = sorted(truth["params"], key=lambda name: (name.startswith("decoder"), "final" in name))
    names.write_text("\n".join(order))
    matches(open_foreign(str(buffers), {"names": str(names)}), truth)
    alike = ["decoder.layers.0.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.bias"]
    swapped = [alike[1 - alike.index(name)] if name in alike else name for name in order]
    names.write_text("\n".join(swapped))
    with pytest.raises(LayoutError, match="are not its weights"):
        open_foreign(str(buffers), {"names": str(names)})
    names.write_text("\n".join(order[1:]))
    with pytest.raises(LayoutError, match="do not fill"):
        open_foreign(str(buffers), {"names": str(names)})


def test_flat_buffers_may_lie_in_pieces(foreign: Callable[[str], Path], buffers: Path, tmp_path: Path) -> None:
    whole = open_foreign(f"dcp:{buffers}", {"model": "", "tied": "no"})
    at = written(whole, tmp_path / "pieces", "dcp", model="", chunk="1000")
    root = torch.load(buffers / "common.pt", weights_only=True)
    root["args"] = Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    torch.save(root, at / "common.pt")
    shutil.copy(buffers / "metadata.json", at)
    matches(open_foreign(f"megatron:{at}", {"names": "local", "layers": "local"}), truth_of(foreign(CLASSIC)))


# ---- bad input ----------------------------------------------------------------------------------------------


@pytest.fixture
def classic(foreign: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign(CLASSIC) / "ckpt", tmp_path / "ckpt"))


def changed(folder: Path, rank: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "iter_0000005" / rank / "model_optim_rng.pt"
    root = torch.load(file, weights_only=True)
    change(root)
    torch.save(root, file)


def test_a_missing_rank_is_named(classic: Path) -> None:
    shutil.rmtree(classic / "iter_0000005" / "mp_rank_01_000")
    with pytest.raises(LayoutError, match="pp=0 ep=0 tp=1"):
        open_foreign(str(classic))


def test_a_tensor_without_a_rule_is_named(classic: Path) -> None:
    changed(classic, "mp_rank_00_000", lambda root: root["model"].update({"decoder.odd": torch.zeros(2)}))
    with pytest.raises(LayoutError, match=r"no rules take decoder\.odd"):
        open_foreign(str(classic))


def test_state_that_cannot_be_assigned_is_refused(classic: Path) -> None:
    changed(classic, "mp_rank_00_000", lambda root: root["optimizer"]["param_groups"][1]["params"].pop())
    with pytest.raises(InvalidInput, match="has 15 parameters, and by Megatron-Core's rules 16"):
        open_foreign(str(classic))
    changed(classic, "mp_rank_00_000", lambda root: root["optimizer"]["param_groups"][1].pop("wd_mult"))
    with pytest.raises(InvalidInput, match="cannot be proved"):
        open_foreign(str(classic))
    assert "optimizer" not in open_foreign(f"{classic}?optimizer=no").document()


def test_state_of_another_shape_is_refused(classic: Path) -> None:
    changed(classic, "mp_rank_01_001", lambda root: root["optimizer"]["state"][0].update(exp_avg=torch.zeros(10, 20)))
    with pytest.raises(LayoutError, match=r"is \[10, 20\]"):
        open_foreign(str(classic))


def test_copies_of_an_embedding_that_differ_are_noted(classic: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        root["model"]["output_layer.weight"] += 1

    changed(classic, "mp_rank_00_001", change)
    assert "model/output_layer.weight" in open_foreign(str(classic)).names()  # nothing says that it is a copy

    def say(root: dict[str, Any]) -> None:
        root["args"].untie_embeddings_and_output_weights = False

    changed(classic, "mp_rank_00_000", say)
    logical = open_foreign(str(classic))
    assert "model/output_layer.weight" not in logical.names()
    assert any("differ" in note.what for note in logical.notes)


def test_folders_without_a_checkpoint_are_told(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign(DIST[0]) / "ckpt", tmp_path / "x"))
    config = folder / "iter_0000005" / "metadata.json"
    config.write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(InvalidInput, match="zarr"):
        open_foreign(f"megatron:{folder}")
    config.unlink()
    with pytest.raises(NotFound, match="not complete"):
        open_foreign(f"megatron:{folder}")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(NotFound):
        open_foreign(f"megatron:{folder}")
    (folder / "latest_checkpointed_iteration.txt").write_text("../..")
    with pytest.raises(Damaged, match="no iteration"):
        open_foreign(f"megatron:{folder}")


@pytest.mark.parametrize("name", [*DIST, CLASSIC])
def test_damaged_files_give_errors_of_ours(foreign: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(foreign(name) / "ckpt", tmp_path / "x"))
    kind = "megatron-classic" if name == CLASSIC else "megatron"
    random = torch.Generator().manual_seed(0)
    names = (".metadata", "common.pt", "metadata.json", "model_optim_rng.pt", "latest_checkpointed_iteration.txt")
    for file in [path for path in sorted(folder.rglob("*")) if path.name in names][:4]:
        data = file.read_bytes()
        for turn in range(25):
            at = int(torch.randint(len(data), (1,), generator=random))
            bad = bytearray(data if turn % 3 else data[:at])
            for _ in range(turn % 3 * 4):
                bad[int(torch.randint(len(data), (1,), generator=random))] ^= 1 << turn % 8
            file.write_bytes(bad)
            try:
                logical = open_foreign(f"{kind}:{folder}")
                tensor(logical, logical.names()[0])
            except CkptsvcError:
                continue
        file.write_bytes(data)
