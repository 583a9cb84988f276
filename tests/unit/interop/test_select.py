"""Parts of checkpoints under other names, and means of several."""

import numpy as np
import pytest
from harness.declared import Arrays

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.conversion.average import Averaged
from ckptsvc.interop.conversion.select import Recast, renaming, select
from ckptsvc.pipeline.read import Want, read_arrays

RNG = np.random.default_rng(2)
PLAIN = {
    "optimizer": {
        "state": {"h.0.w": {"k": 1}},
        "param_groups": [{"lr": 1, "params": ["h.0.w", "a/b"]}, {"params": []}],
    },
    "epoch": 3,
}


class Checkpoint(Arrays):
    def document(self, rank: int = 0):
        return PLAIN


@pytest.fixture
def base() -> Checkpoint:
    arrays = {
        "model/h.0.w": np.arange(6.0),
        "model/a~1b": np.arange(3.0),
        "model/n": np.arange(2),
        "optimizer/state/h.0.w/exp_avg": np.arange(6.0) * 2,
        "optimizer/state/a~1b/exp_avg": np.arange(3.0) * 3,
        "extra": np.zeros(1),
    }
    return Checkpoint(arrays, {"model/tied": "model/h.0.w"})


def value(logical, name: str, region=None) -> np.ndarray:
    meta = logical.meta(name)
    want = Want(name, meta.dtype, meta.shape, region or Box.full(meta.shape))
    return read_arrays(logical, logical.source, [want])[0].view(meta.dtype)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["model.*"], ["model/a~1b", "model/h.0.w", "model/n"]),
        (["model/*"], ["model/a~1b", "model/h.0.w", "model/n"]),
        (["h.0.*"], ["model/h.0.w", "optimizer/state/h.0.w/exp_avg"]),
        (["a/b"], ["model/a~1b", "optimizer/state/a~1b/exp_avg"]),
        (["extra", "*.n"], ["extra", "model/n"]),
    ],
)
def test_only_takes_canonical_names_dotted_ones_and_those_of_parameters(base, patterns, names) -> None:
    chosen = select(base, only=patterns)
    assert chosen.names() == names
    assert any("left out" in note.what for note in chosen.notes)


def test_the_optimizer_goes_with_its_settings(base) -> None:
    chosen = select(base, drop_optimizer=True)
    assert [name for name in chosen.names() if name.startswith("optimizer")] == []
    assert chosen.document() == {"epoch": 3}
    assert select(base, only=["model.*"]).document() == {"epoch": 3}
    part = select(base, only=["h.0.*"]).document()["optimizer"]
    assert [group["params"] for group in part["param_groups"]] == [["h.0.w"], []]


def test_renaming_takes_state_groups_and_aliases_along(base) -> None:
    chosen = select(base, rename=renaming([r"^h\.(\d)=layers.\1", "a/b=c/d"]))
    assert chosen.names() == ["extra", "model/c~1d", "model/layers.0.w", "model/n", "optimizer/state/c~1d/exp_avg",
        "optimizer/state/layers.0.w/exp_avg"]  # fmt: skip
    assert chosen.aliases == {"model/tied": "model/layers.0.w"}
    assert chosen.document()["optimizer"]["param_groups"][0]["params"] == ["layers.0.w", "c/d"]
    assert list(chosen.document()["optimizer"]["state"]) == ["layers.0.w"]
    assert value(chosen, "model/layers.0.w").tolist() == list(range(6))
    assert value(chosen, "model/tied").tolist() == list(range(6))
    assert chosen.meta("model/tied").name == "model/layers.0.w"
    with pytest.raises(LayoutError, match="any more"):
        chosen.meta("model/h.0.w")
    with pytest.raises(InvalidInput, match="would be called"):
        select(base, rename=lambda name: "x")


def test_what_was_read_is_not_changed(base) -> None:
    select(base, rename=renaming(["h=k"]), drop_optimizer=False).document()
    assert PLAIN["optimizer"]["param_groups"][0]["params"] == ["h.0.w", "a/b"]


def test_a_recast_is_of_weights_only(base) -> None:
    cast = Recast(base, "bfloat16")
    found = {name: cast.meta(name).dtype for name in cast.names()}
    assert found["model/h.0.w"] == "bfloat16"
    assert {found["model/n"], found["optimizer/state/a~1b/exp_avg"], found["extra"]} == {"int64", "float64"}
    with pytest.raises(InvalidInput, match="weights cannot be cast"):
        Recast(base, "int8")


def test_the_mean_is_of_floating_weights_and_rounded_once() -> None:
    arrays = [RNG.standard_normal((900, 1300)).astype(np.float32) for _ in range(3)]
    members = [
        Arrays({"model/w": a, "model/h": a[0].astype(np.float16), "model/n": np.array([i]), "optimizer/state/w/m": a})
        for i, a in enumerate(arrays)
    ]
    mean = Averaged(members)
    assert mean.names() == ["model/h", "model/n", "model/w"]
    wanted = np.mean(np.stack(arrays).astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(value(mean, "model/w"), wanted)
    assert np.array_equal(value(mean, "model/w", FlatRange(7, 500_000)), wanted.reshape(-1)[7:500_007])
    half = np.mean(np.stack([a[0].astype(np.float16) for a in arrays]).astype(np.float32), axis=0, dtype=np.float32)
    assert np.array_equal(value(mean, "model/h"), half.astype(np.float16))
    assert value(mean, "model/n").tolist() == [0]
    assert any("mean of 3" in note.what for note in mean.notes)


def test_checkpoints_of_different_models_have_no_mean() -> None:
    a = Arrays({"model/w": np.zeros(3, np.float32)})
    for other in ({"model/v": np.zeros(3, np.float32)}, {"model/w": np.zeros(4, np.float32)}):
        with pytest.raises(LayoutError, match="not the same tensor"):
            Averaged([a, Arrays(other)])
    with pytest.raises(InvalidInput, match="no checkpoint to average"):
        Averaged([])
