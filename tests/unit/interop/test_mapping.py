"""Name maps: both ways, element for element, weights and optimizer state; and everything they refuse."""

import tomllib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from harness.tensors import arrays, checkpoint, same, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import CkptsvcError, InvalidInput, LayoutError
from ckptsvc.interop.naming.mapping import mapped
from ckptsvc.interop.naming.names import NameMap

QKV = """
[names]
sides = ["a", "b"]
[[names.pair]]
a = ["{layer}.q", "{layer}.k", "{layer}.v"]
b = "layer.{layer}.qkv"
sections = ["heads * dim", "kv * dim", "kv * dim"]
groups = "kv"
[[names.pair]]
a = "{layer}.up"
b = "layer.{layer}.up"
transpose = true
[[names.pair]]
a = "vocab"
b = "embedding"
rows = "rows"
[[names.pair]]
a = ["x.{kind}", "y.{kind}"]
b = "xy.{kind}"
[[names.drop]]
a = "mask"
why = "is computed"
"""


def table(text: str) -> NameMap:
    return NameMap.parse(tomllib.loads(text))


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def groups(*names: Sequence[str]) -> dict[str, Any]:
    return {"optimizer": {"state": {}, "param_groups": [{"lr": float(i), "params": [*n]} for i, n in enumerate(names)]}}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_there_and_back_is_the_identity_for_weights_and_optimizer_state(
    kv: int, per_group: int, dim: int, hidden: int, layers: int
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"vocab": (7, hidden), "x.w": (2, 3), "y.w": (2, 3), "x.b": (2,), "y.b": (2,)}
    for layer in range(layers):
        shapes |= {f"{layer}.q": (kv * per_group * dim, hidden), f"{layer}.k": (kv * dim, hidden)}
        shapes |= {f"{layer}.v": (kv * dim, hidden), f"{layer}.up": (hidden, 5)}
    variables = {"heads": kv * per_group, "kv": kv, "dim": dim}
    base = checkpoint(trained(random(shapes)), groups(list(shapes)), {"model/tied": "model/vocab"})
    pairs = table(QKV + '[[names.pair]]\na = "tied"\nb = "output"\n')
    over = mapped(base, pairs, variables, to="b")
    assert over.aliases == {"model/output": "model/embedding"}
    assert "model/layer.0.qkv" in over.names()
    back = mapped(over, pairs, variables, to="a")
    same(arrays(back), arrays(base))
    assert back.document() == base.document()
    assert back.aliases == base.aliases


def test_groups_of_heads_are_interleaved() -> None:
    """Against the fused tensor made by reshaping: for each group its queries, then its key, then its value."""
    kv, per_group, dim, hidden = 3, 2, 4, 5
    shapes = {"0.q": (kv * per_group * dim, hidden), "0.k": (kv * dim, hidden), "0.v": (kv * dim, hidden)}
    tensors = trained(random(shapes))
    over = arrays(mapped(checkpoint(tensors), table(QKV), {"heads": 6, "kv": 3, "dim": 4}, to="b"))
    for name, tail in (("model/{}", ""), ("optimizer/state/{}", "/exp_avg"), ("optimizer/state/{}", "/master")):
        q, k, v = (tensors[name.format(f"0.{part}") + tail].reshape(kv, -1, hidden) for part in "qkv")
        expected = np.concatenate([q, k, v], axis=1).reshape(-1, hidden)
        assert np.array_equal(over[name.format("layer.0.qkv") + tail], expected)
    assert over["optimizer/state/layer.0.qkv/step"] == 5


def test_a_transposed_matrix_is_and_a_vector_is_not() -> None:
    pairs = table(
        '[names]\nsides=["a","b"]\n[[names.pair]]\na="c.{k}"\nb="d.{k}"\ntranspose=true\nsections=3\ngroups=2'
    )
    tensors = random({"model/c.w": (3, 12), "model/c.b": (12,)})
    over = arrays(mapped(checkpoint(tensors), pairs, {}, to="b"))
    split = [np.split(part, 2) for part in np.split(np.arange(12), 3)]  # Q, K, V of two heads
    order = np.concatenate([split[part][head] for head in range(2) for part in range(3)])
    assert np.array_equal(over["model/d.b"], tensors["model/c.b"][order])
    assert np.array_equal(over["model/d.w"], tensors["model/c.w"].T[order])
    same(arrays(mapped(mapped(checkpoint(tensors), pairs, {}, to="b"), pairs, {}, to="a")), arrays(checkpoint(tensors)))


def test_bfloat16_is_carried_bit_for_bit() -> None:
    bits = np.arange(24, dtype=np.uint16).reshape(4, 6) + 0x3F80
    base = checkpoint({"model/x.w": bits, "model/y.w": bits + 100})
    over = mapped(base, table(QKV), {}, to="b")
    assert over.meta("model/xy.w").dtype == "bfloat16"
    assert np.array_equal(arrays(over)["model/xy.w"], np.concatenate([bits, bits + 100]))


class TestStacks:
    STACK = '[names]\nsides=["a","b"]\nkeep=true\n[[names.pair]]\na="l.{layer}.e.{expert}.w"\nb="l.e.w"'

    def test_layers_and_experts_become_dimensions_and_come_back(self) -> None:
        shapes = {f"l.{i}.e.{j}.w": (2, 3) for i in range(12) for j in range(3)}
        base = checkpoint(trained(random({**shapes, "else": (4,)})), groups([*shapes, "else"]))
        over = mapped(base, table(self.STACK), {}, to="b")
        assert over.meta("model/l.e.w").shape == (12, 3, 2, 3)
        found = arrays(over)
        assert np.array_equal(found["model/l.e.w"][11, 2], arrays(base)["model/l.11.e.2.w"])
        assert over.document()["optimizer"]["param_groups"][0]["params"] == ["l.e.w", "else"]
        back = mapped(over, table(self.STACK), {}, to="a")
        same(arrays(back), arrays(base))
        assert back.document() == base.document()

    def test_a_missing_one_is_named(self) -> None:
        shapes = {f"l.{i}.e.{j}.w": (2,) for i in range(3) for j in range(2) if (i, j) != (1, 1)}
        with pytest.raises(LayoutError, match=r"l\.1\.e\.1\.w is missing"):
            mapped(checkpoint(random({f"model/{n}": s for n, s in shapes.items()})), table(self.STACK), {}, to="b")
        far = checkpoint(random({"model/l.0.e.0.w": (2,), "model/l.999999999.e.9.w": (2,)}))
        with pytest.raises(LayoutError, match="some are missing"):
            mapped(far, table(self.STACK), {}, to="b")

    def test_one_of_another_shape_is_named(self) -> None:
        with pytest.raises(LayoutError, match="different shapes"):
            mapped(
                checkpoint(random({"model/l.0.e.0.w": (2,), "model/l.1.e.0.w": (3,)})), table(self.STACK), {}, to="b"
            )

    def test_what_is_stacked_on_the_left_is_one_each_on_the_right(self) -> None:
        pairs = table('[names]\nsides=["a","b"]\n[[names.pair]]\na="e.{kind}"\nb="e.{expert}.{kind}"')
        base = checkpoint(trained(random({"e.w": (3, 2, 4)})))
        over = mapped(base, pairs, {}, to="b")
        assert np.array_equal(arrays(over)["model/e.2.w"], arrays(base)["model/e.w"][2])
        same(arrays(mapped(over, pairs, {}, to="a")), arrays(base))


class TestVocabulary:
    def test_padding_is_left_out_on_the_way_to_the_left_and_said_to_be(self) -> None:
        base = checkpoint(random({"model/embedding": (8, 3)}))
        over = mapped(base, table(QKV), {"rows": 7}, to="a")
        assert np.array_equal(arrays(over)["model/vocab"], arrays(base)["model/embedding"][:7])
        assert [(note.kind, note.what) for note in over.notes] == [("lost", "embedding: rows of padding: 1")]

    def test_without_a_known_size_all_is_kept_with_a_warning(self) -> None:
        over = mapped(checkpoint(random({"model/embedding": (8, 3)})), table(QKV), {}, to="a")
        assert over.meta("model/vocab").shape == (8, 3)
        assert [note.kind for note in over.notes] == ["warning"]
        assert "all 8 rows are kept" in over.notes[0].what

    def test_a_vocabulary_larger_than_its_tensor_is_refused(self) -> None:
        with pytest.raises(LayoutError, match="embedding has 8 rows, and rows is 9"):
            mapped(checkpoint(random({"model/embedding": (8, 3)})), table(QKV), {"rows": 9}, to="a")


class TestRefusals:
    def over(self, tensors: dict[str, np.ndarray], document: Any = None, to: str = "b", **variables: int) -> Any:
        return mapped(checkpoint(tensors, document), table(QKV), {"heads": 2, "kv": 1, "dim": 2, **variables}, to=to)

    def test_names_nobody_takes(self) -> None:
        with pytest.raises(LayoutError, match="no name for other, strange"):
            self.over(random({"model/other": (1,), "model/strange": (1,)}))

    def test_a_part_that_is_missing(self) -> None:
        with pytest.raises(LayoutError, match=r"0\.v is missing"):
            self.over(random({"model/0.q": (4, 3), "model/0.k": (2, 3)}))

    def test_sizes_that_contradict_the_variables(self) -> None:
        with pytest.raises(LayoutError, match=r"4 \+ 2 \+ 2, and there are 6 \+ 2 \+ 2 rows"):
            self.over(random({"model/0.q": (6, 3), "model/0.k": (2, 3), "model/0.v": (2, 3)}))
        with pytest.raises(LayoutError, match=r"4 \+ 2 \+ 2, and there are 9 rows"):
            self.over(random({"model/layer.0.qkv": (9, 3)}), to="a")
        with pytest.raises(LayoutError, match="needs the variable 'heads'"):
            mapped(checkpoint(random({"model/layer.0.qkv": (8, 3)})), table(QKV), {}, to="a")

    def test_shapes_that_cannot_be_joined(self) -> None:
        with pytest.raises(LayoutError, match="joins tensors of shapes"):
            self.over(random({"model/x.w": (2, 3), "model/y.w": (2, 4)}))
        with pytest.raises(LayoutError, match="is a number"):
            self.over(random({"model/x.w": (), "model/y.w": ()}))

    def test_parts_of_different_types(self) -> None:
        tensors = random({"model/x.w": (2, 3)}) | {"model/y.w": np.zeros((2, 3), np.uint16)}
        with pytest.raises(LayoutError, match="different element types"):
            self.over(tensors)

    def test_steps_that_differ(self) -> None:
        tensors = trained(random({"x.w": (2, 3)}), step=5) | trained(random({"y.w": (2, 3)}), step=6)
        with pytest.raises(LayoutError, match=r"x\.w/step and optimizer/state/y\.w/step differ"):
            self.over(tensors)

    def test_state_that_only_one_part_has(self) -> None:
        with pytest.raises(LayoutError, match=r"x\.w has exp_avg, and y\.w has not"):
            self.over(trained(random({"x.w": (2, 3)})) | random({"model/y.w": (2, 3)}))

    def test_parts_in_different_param_groups(self) -> None:
        with pytest.raises(LayoutError, match=r"the parts of xy\.w are in param groups 0 and 1"):
            self.over(trained(random({"x.w": (2, 3), "y.w": (2, 3)})), groups(["x.w"], ["y.w"]))

    def test_state_of_another_shape_than_its_parameter(self) -> None:
        tensors = random({"model/x.w": (2, 3), "model/y.w": (2, 3)})
        tensors |= random({"optimizer/state/x.w/row": (2,), "optimizer/state/y.w/row": (2,)})
        with pytest.raises(LayoutError, match="another shape than its parameter"):
            self.over(tensors)

    def test_a_side_that_is_none(self) -> None:
        with pytest.raises(InvalidInput, match="'c' is no side"):
            self.over(random({"model/vocab": (2, 3)}), to="c")

    def test_what_is_left_out_is_said(self) -> None:
        over = self.over(random({"model/vocab": (2, 3), "model/mask": (2,)}))
        assert over.names() == ["model/embedding"]
        assert [note.what for note in over.notes] == ["mask: is computed"]

    def test_a_frozen_parameter_has_no_state_and_needs_none(self) -> None:
        assert self.over(random({"model/x.w": (2, 3), "model/y.w": (2, 3)})).names() == ["model/xy.w"]

    def test_tensors_that_are_of_no_parameter_stay(self) -> None:
        over = self.over(random({"model/vocab": (2, 3), "scheduler/table": (4,)}))
        assert "scheduler/table" in over.names()


class TestForms:
    FORMS = """
    [names]
    sides = ["a", "b"]
    [[names.pair]]
    a = "n.{layer}"
    b = "new.{layer}"
    unless = {a = "old.{layer}"}
    [[names.pair]]
    a = "n.{layer}"
    b = "other.{layer}"
    form = {b = "spelled"}
    [[names.pair]]
    a = "old.{layer}"
    b = "o.{layer}"
    """

    def test_a_spelling_is_understood_always_and_written_on_request(self) -> None:
        base = checkpoint(random({"model/n.0": (2,)}))
        assert mapped(base, table(self.FORMS), {}, to="b").names() == ["model/new.0"]
        over = mapped(base, table(self.FORMS), {}, to="b", forms=("spelled",))
        assert over.names() == ["model/other.0"]
        assert mapped(over, table(self.FORMS), {}, to="a").names() == ["model/n.0"]

    def test_it_is_also_written_where_nothing_else_applies(self) -> None:
        base = checkpoint(random({"model/n.0": (2,), "model/old.0": (2,), "model/n.1": (2,)}))
        assert mapped(base, table(self.FORMS), {}, to="b").names() == ["model/new.1", "model/o.0", "model/other.0"]

    def test_two_pairs_for_one_name_are_an_error_that_names_both(self) -> None:
        twice = '[names]\nsides=["a","b"]\n[[names.pair]]\na="n.{x}"\nb="m.{x}"\n[[names.pair]]\na="{x}.0"\nb="{x}.1"'
        with pytest.raises(LayoutError, match=r"n\.0 is taken by pair 1 .* and by pair 2"):
            mapped(checkpoint(random({"model/n.0": (2,)})), table(twice), {}, to="b")

    def test_two_tensors_of_one_new_name_are_an_error(self) -> None:
        twice = '[names]\nsides=["a","b"]\n[[names.pair]]\na="n"\nb="m"\n[[names.pair]]\na="o"\nb="m"'
        with pytest.raises(LayoutError, match=r"two tensors .* called m"):
            mapped(checkpoint(random({"model/n": (2,), "model/o": (2,)})), table(twice), {}, to="b")


VALUES = st.one_of(
    st.integers(-2, 5), st.booleans(), st.sampled_from(["", "a", "{layer}.x", "{x:*}", "n // 2", "{"]),
    st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["a.{layer}", "b"])), max_size=3),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["", "x", 1]), max_size=2),
)  # fmt: skip
KEYS = ["a", "b", "sections", "groups", "transpose", "rows", "form", "when", "unless", "colour"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES), max_size=3), st.integers(0, 4))
def test_a_map_of_anything_is_a_map_or_a_clear_error(pairs: list[dict[str, Any]], size: int) -> None:
    with suppress(CkptsvcError):
        made = NameMap.parse({"names": {"sides": ["a", "b"], "pair": pairs, "keep": True}})
        base = checkpoint({"model/a": np.zeros((size, 2), np.float32), "model/0.x": np.zeros(size, np.float32)})
        mapped(base, made, {"n": 4}, to="b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "names = 3",
        '[names]\nsides = ["a"]',
        '[names]\nsides = ["a", "a"]',
        '[names]\nsides = ["a", "form"]',
        '[names]\nsides = ["a", "b"]',
        '[names]\nsides = ["a", "b"]\npair = [3]',
        '[names]\nsides = ["a", "b"]\npair = 3',
        *(
            f'[names]\nsides = ["a", "b"]\n[[names.pair]]\n{pair}'
            for pair in (
                'a = "x"',
                'a = "x"\nb = ["y"]',
                'a = "x"\nb = "y"\nc = "z"',
                'a = "x.{k}"\nb = "y"',
                'a = ["x.{layer}", "y"]\nb = "y"',
                'a = "x"\nb = "y"\ntranspose = 1',
                'a = "x"\nb = "y"\nform = "f"',
                'a = "x"\nb = "y"\nwhen = {c = "f"}',
                'a = "x"\nb = "y"\nwhen = {a = "{layer}"}',
                'a = "x"\nb = "y"\nsections = "1 +"',
                'a = ["x", "z"]\nb = "y"\nsections = [1, 2, 3]',
                'a = "x"\nb = "y"\n[[names.drop]]\na = "z"',
            )
        ),
    ],
)
def test_maps_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        table(text)
