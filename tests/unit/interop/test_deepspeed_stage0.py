"""The optimizer of stage 0 in the forms that DeepSpeed's wrappers of low precision give it, and its unnamed numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.deepspeed.order import MAX_STATES, name_parameters
from ckptsvc.interop.formats import open_foreign
from ckptsvc.interop.naming.options import named, numbered
from tests.harness.foreign_values import same, value

NAMES = [["a", "b"], ["c"]]
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2)}


def text_of(names: list[list[str]]) -> str:
    return "\n\n".join("\n".join(group) for group in names)


def states(kind: str) -> dict[str, Any]:
    """What a job in bfloat16 has: weights, masters, Adam's state."""
    torch.manual_seed(1)
    slots = ("fp32", "exp_avg", "exp_avg_sq")
    return {name: {slot: torch.randn(shape) for slot in slots} for name, shape in SHAPES.items()}


def saved(path: Path, kind: str, known: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """One file of model states, its optimizer of that kind."""
    hyper = [{"lr": 0.1}, {"lr": 0.2}]
    if kind == "flat":
        joined = [{slot: torch.cat([known[n][slot].flatten() for n in own]) for slot in known["a"]} for own in NAMES]
        state = {i: {**group, "step": torch.tensor(7.0)} for i, group in enumerate(joined)}
        masters = {"fp32_groups_flat": [group.pop("fp32") for group in state.values()]}
        numbers: list[list[int]] = [[0], [1]]
    else:
        each = [known[name] for own in NAMES for name in own]
        state = {i: {"step": 7, "exp_avg": s["exp_avg"], "exp_avg_sq": s["exp_avg_sq"]} for i, s in enumerate(each)}
        masters = {"fp32_groups": [[known[name]["fp32"] for name in own] for own in NAMES]}
        numbers = [[0, 1], [2]]
    groups = [{**values, "params": own} for values, own in zip(hyper, numbers, strict=True)]
    optimizer = {"optimizer_state_dict": {"state": state, "param_groups": groups}, **masters}
    torch.save({"module": weights, "optimizer": optimizer, "global_steps": 7}, path / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("weights", ["model", "master"])
@pytest.mark.parametrize("kind", ["flat", "each"])
def test_masters_and_state_are_found(tmp_path: Path, kind: str, weights: str) -> None:
    known = states(kind)
    saved(tmp_path, kind, known, {name: state["fp32"].bfloat16() for name, state in known.items()})
    (tmp_path / "names").write_text(text_of(NAMES))
    options = {"names": str(tmp_path / "names"), "weights": weights}
    logical = open_foreign(f"deepspeed:{tmp_path}", options)
    for name, state in known.items():
        master = f"model/{name}" if weights == "master" else f"optimizer/state/{name}/master"
        assert same(value(logical, master), state["fp32"])
        assert same(value(logical, f"optimizer/state/{name}/exp_avg"), state["exp_avg"])
        assert same(value(logical, f"optimizer/state/{name}/exp_avg_sq"), state["exp_avg_sq"])
        assert same(value(logical, f"optimizer/state/{name}/step"), torch.tensor(7.0))
        if weights == "model":
            assert same(value(logical, f"model/{name}"), state["fp32"].bfloat16())
    assert len(logical.names()) == (15 if weights == "model" else 12)
    groups = logical.document()["optimizer"]["param_groups"]
    assert groups == [{"lr": 0.1, "params": ["a", "b"]}, {"lr": 0.2, "params": ["c"]}]


def test_masters_of_numbered_parameters_are_numbered(tmp_path: Path) -> None:
    known = states("each")
    saved(
        tmp_path,
        "each",
        known,
        {f"x.{name}": state["fp32"].bfloat16() for name, state in known.items()} | {"y": torch.ones(5)},
    )
    logical = open_foreign(f"deepspeed:{tmp_path}")
    assert numbered(logical)
    assert same(value(logical, "optimizer/state/2/master"), known["c"]["fp32"])
    assert same(value(named(logical, [["x.a", "x.b"], ["x.c"]]), "optimizer/state/x.c/exp_avg"), known["c"]["exp_avg"])


def test_flat_groups_need_names(tmp_path: Path) -> None:
    known = states("flat")
    saved(tmp_path, "flat", known, {name: state["fp32"].bfloat16() for name, state in known.items()})
    logical = open_foreign(f"deepspeed:{tmp_path}")
    assert [note.kind for note in logical.notes] == ["lost"]
    (tmp_path / "names").write_text(text_of([["a"], ["b", "c"]]))
    with pytest.raises(Damaged, match="partitions of"):
        open_foreign(f"deepspeed:{tmp_path}", {"names": str(tmp_path / "names")})
    (tmp_path / "names").write_text(text_of([["a", "z"], ["c"]]))
    with pytest.raises(InvalidInput, match="'z', which is no tensor"):
        open_foreign(f"deepspeed:{tmp_path}", {"names": str(tmp_path / "names")})


class Tensor:
    def __init__(self, shape: tuple[int, ...], at: int) -> None:
        self.shape, self.strides, self.where = shape, (), ("x", at)


class Model:
    """As much of a ModelState as naming looks at."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.module = {name: Tensor(shape, i) for i, (name, shape) in enumerate(shapes.items())}
        self.buffers: list[str] = []
        self.shared: dict[str, str] = {}


def dealt(shapes: dict[str, tuple[int, ...]], groups: list[list[tuple[int, ...]]], **options: str) -> Any:
    found = name_parameters(Model(shapes), [{} for _ in groups], groups, options)  # type: ignore[arg-type]
    return None if found is None else found.names


def test_shapes_name_parameters_only_where_there_is_one_way() -> None:
    shapes: dict[str, tuple[int, ...]] = {"w": (2, 2), "b": (2,), "v": (2, 2), "c": (2,)}
    assert dealt(shapes, [[(2, 2), (2, 2)], [(2,), (2,)]]) == [["w", "v"], ["b", "c"]]
    assert dealt(shapes, [[(2, 2)], [(2, 2)], [(2,), (2,)]]) is None  # either matrix may be in either group
    assert dealt(shapes, [[(2, 2), (2, 2)], [(2,)]]) is None  # which of the two is frozen?
    assert dealt(shapes, [[(2, 2), (2, 2)], [(2,)]], frozen="b*") == [["w", "v"], ["c"]]
    assert dealt(shapes, [[(2, 2), (2, 2)], [(3,), (2,)]]) is None
    many = {f"p{i}": (1,) for i in range(64)}
    assert MAX_STATES < 1 << 32
    assert dealt(many, [[(1,)] * 8 for _ in range(8)]) is None  # and gives up in time
