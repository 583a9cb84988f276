"""The language of layout rules: patterns, sizes, claims, and how a dimension is cut."""

import tomllib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import CkptsvcError, InvalidInput, LayoutError
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.patterns import Pattern, evaluate, skeleton
from ckptsvc.geometry.rules import Local, Rule, Rules, local_part


def rules(text: str) -> Rules:
    return Rules.parse(tomllib.loads(text))


def rule(text: str) -> Rule:
    return rules(f'[[rule]]\nname = "w"\nstage = "all"\n{text}').rules[0]


def parts(text: str, shape: tuple[int, ...], tp: int, uneven: bool = False, **variables: int) -> list[Local]:
    parallel = Parallel(tp=tp, uneven=uneven)
    return [local_part("w", shape, rule(text), parallel, variables, rank, 0) for rank in range(tp)]


def local_arrays(array: np.ndarray, found: list[Local]) -> list[np.ndarray]:
    """What each rank holds; padding is -1."""
    arrays = [np.full(local.shape, -1) for local in found]
    for target, local in zip(arrays, found, strict=True):
        for piece in local.pieces:
            assert (target[piece.local.slices()] == -1).all()
            target[piece.local.slices()] = array[piece.box.slices()]
    return arrays


class TestPatterns:
    def test_holes_hold_numbers_words_choices_or_anything(self) -> None:
        pattern = Pattern("model.layers.{layer}.{part}.{kind:weight|bias}")
        assert pattern.match("model.layers.12.attn.bias") == {"layer": "12", "part": "attn", "kind": "bias"}
        assert pattern.fill({"layer": "3", "part": "mlp", "kind": "weight"}) == "model.layers.3.mlp.weight"
        for other in ("model.layers.x.attn.bias", "model.layers.1.a.b.bias", "model.layers.1.attn.bias2", ""):
            assert pattern.match(other) is None
        assert Pattern("{all:*}").match("a.b.c") == {"all": "a.b.c"}
        assert Pattern("experts.weight{expert}").match("experts.weight17") == {"expert": "17"}

    def test_dots_are_dots_and_no_text_is_an_expression(self) -> None:
        assert Pattern("a.b").match("axb") is None
        assert Pattern("a+(b)*").match("a+(b)*") == {}

    @pytest.mark.parametrize("text", ["", "{", "a}", "{a}{a}", "{}", "{layer:a}", "{1}", "x" * 501])
    def test_what_is_no_pattern_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidInput):
            Pattern(text)

    def test_names_that_differ_in_numbers_have_one_skeleton(self) -> None:
        assert skeleton("a.12.linear_fc1.3") == skeleton("a.0.linear_fc1.44") != skeleton("a.0.linear_fc2.4")


class TestSizes:
    def test_arithmetic(self) -> None:
        assert evaluate("(heads + 2 * kv) * dim // 4 - 1", {"heads": 8, "kv": 2, "dim": 16}) == 47
        assert evaluate(5, {}) == 5

    @pytest.mark.parametrize("text", ["", "a +", "f(1)", "a.b", "1.5", "'x'", "a ** 2", "True", "[1]", "(" * 300])
    def test_nothing_else_is_run(self, text: str) -> None:
        with pytest.raises(InvalidInput):
            evaluate(text, {"a": 1})

    def test_a_missing_variable_is_named(self) -> None:
        with pytest.raises(LayoutError, match="'heads'"):
            evaluate("heads * 2", {})
        with pytest.raises(LayoutError, match="zero"):
            evaluate("1 // none", {"none": 0})


class TestClaims:
    TEXT = """
    [[rule]]
    name = ["a.{layer}.w", "b.{layer}.w"]
    cut = 0
    [[rule]]
    name = "a.{layer}.{kind}"
    [[rule]]
    name = "{rest:*}"
    stage = "all"
    """

    def test_exactly_one_is_for_the_caller_to_see(self) -> None:
        found = rules(self.TEXT)
        assert [claim.rule.number for claim in found.claims("a.7.w")] == [1, 2]
        (claim,) = found.claims("b.12.w")
        assert (claim.rule.number, claim.layer, claim.expert) == (1, 12, None)
        assert [claim.rule.number for claim in found.claims("a.7.bias")] == [2]

    def test_what_takes_anything_takes_only_what_is_left(self) -> None:
        assert [claim.rule.number for claim in rules(self.TEXT).claims("nobody.s")] == [3]

    def test_a_number_that_is_spelled_out_counts(self) -> None:
        found = rules('[[rule]]\nname="a.0.w"\nstage="all"\n[[rule]]\nname="b.{layer}.w"')
        assert found.claims("a.0.w")
        assert not found.claims("a.1.w")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "rule = 3",
            "rule = [3]",
            "[[rule]]\ncut = 0",
            '[[rule]]\nname = "w"',
            '[[rule]]\nname = "w"\nstage = "middle"',
            '[[rule]]\nname = "w"\nstage = "layer"',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = -1',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = true',
            '[[rule]]\nname = "w"\nstage = "all"\nwhole = 4',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = 0\nsections = "a +"',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = 0\nsections = 1.5',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = 0\npad = 4\nsections = 2',
            '[[rule]]\nname = "w"\nstage = "all"\ncut = 0\nexperts = 0',
            '[[rule]]\nname = "w"\nstage = "all"\ncolour = "red"',
            '[[rule]]\nname = ["w", 3]\nstage = "all"',
            '[[rule]]\nname = "w"\nstage = "all"\ntied = 3',
            '[[rule]]\nname = ["e.{expert}", "w"]\nstage = "all"',
        ],
    )
    def test_rules_of_another_form_are_refused_by_number(self, text: str) -> None:
        with pytest.raises(InvalidInput, match="the rules"):
            rules(text)


class TestCuts:
    def test_rows_and_columns(self) -> None:
        array = np.arange(24).reshape(4, 6)
        for dim in (0, 1):
            got = local_arrays(array, parts(f"cut = {dim}", (4, 6), 2))
            assert all(np.array_equal(a, b) for a, b in zip(got, np.split(array, 2, dim), strict=True))

    def test_gate_and_up_are_each_divided(self) -> None:
        array = np.arange(36).reshape(12, 3)
        gate, up = array[:6], array[6:]
        for rank, got in enumerate(local_arrays(array, parts("cut = 0\nsections = 2", (12, 3), 3))):
            assert np.array_equal(got, np.concatenate([np.split(gate, 3)[rank], np.split(up, 3)[rank]]))

    def test_queries_keys_and_values_are_divided_between_heads(self) -> None:
        heads, kv_heads, dim = 4, 2, 3
        array = np.arange((heads + 2 * kv_heads) * dim)
        said = """cut = 0
        sections = ["heads * dim", "kv_heads * dim", "kv_heads * dim"]
        whole = ["heads", "kv_heads", "kv_heads"]"""
        got = local_arrays(array, parts(said, array.shape, 2, heads=heads, kv_heads=kv_heads, dim=dim))
        q, k, v = np.split(array, [12, 18])
        for rank in range(2):
            expected = np.concatenate([np.split(part, 2)[rank] for part in (q, k, v)])
            assert np.array_equal(got[rank], expected)

    def test_with_fewer_heads_than_ranks_the_cut_goes_through_or_heads_are_copied(self) -> None:
        array = np.arange(12)
        through = local_arrays(array, parts("cut = 0\nwhole = 2", (12,), 4))
        assert np.array_equal(np.concatenate(through), array)
        copied = local_arrays(array, parts("cut = 0\nwhole = 2\ncopies = true", (12,), 4))
        assert [list(part) for part in copied] == [list(range(6))] * 2 + [list(range(6, 12))] * 2

    def test_a_vocabulary_is_padded_and_the_padding_is_nobodys(self) -> None:
        array = np.arange(67 * 2).reshape(67, 2)
        found = parts('cut = 0\npad = "8 * tp"', (67, 2), 4)
        assert [local.shape for local in found] == [(24, 2)] * 4
        assert [local.padding for local in found] == [0, 0, 10, 48]
        joined = np.concatenate(local_arrays(array, found))
        assert np.array_equal(joined[:67], array)
        assert (joined[67:] == -1).all()

    @given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 3))
    def test_uneven_cuts_are_those_of_torch_chunk(self, size: int, tp: int, sections: int) -> None:
        array = np.arange(size * sections)
        got = local_arrays(array, parts(f"cut = 0\nsections = {sections}", array.shape, tp, uneven=True))
        chunk = -(-size // tp)
        for rank, held in enumerate(got):
            expected = [part[rank * chunk : (rank + 1) * chunk] for part in np.split(array, sections)]
            if size % tp == 0 or tp == 1:
                expected = [np.split(part, tp)[rank] for part in np.split(array, sections)]
            assert np.array_equal(held, np.concatenate(expected))

    @pytest.mark.parametrize(
        ("said", "shape", "message"),
        [
            ("cut = 0", (7, 2), r"w: 7 cannot be divided over tp=2, as rule 1 \(w\) says"),
            ("cut = 0\nwhole = 3", (12,), r"12 \(3 units of 4\)"),
            ("cut = 0\nwhole = 5", (12,), "5 units, which do not divide 12"),
            ("cut = 2", (4, 4), r"w \[4, 4\] has no dimension 2"),
            ("cut = 0\nsections = 5", (12,), "5 equal sections"),
            ("cut = 0\nsections = [4, 6]", (12,), r"4 \+ 6 = 10, and the dimension is 12"),
            ("cut = 0\nsections = [4, 8]\nwhole = [2, 2, 2]", (12,), "3 units for 2 sections"),
            ("cut = 0\npad = 3", (4,), "pads 4 to 6|6, which"),
            ('cut = 0\nwhole = "heads"', (4,), "'heads'"),
            ("cut = 0\npad = 0", (4,), "multiple of 0"),
        ],
    )
    def test_what_does_not_divide_names_tensor_rule_and_numbers(
        self, said: str, shape: tuple[int, ...], message: str
    ) -> None:
        tp = 4 if "pad = 3" in said else 2
        with pytest.raises(LayoutError, match=message):
            parts(said, shape, tp)


VALUES = st.one_of(
    st.integers(-2, 5),
    st.booleans(),
    st.floats(),
    st.sampled_from(["", "a", "{layer}.x", "{x:*}", "n // 2", "{", "first", "all"]),
    st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["a.{layer}", "first"])), max_size=3),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(), max_size=2),
)
KEYS = ["name", "stage", "cut", "sections", "whole", "copies", "experts", "pad", "uneven", "tied", "colour"]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.integers(1, 3), st.integers(0, 6))
def test_a_rule_of_anything_is_a_rule_or_a_clear_error(row: dict[str, object], tp: int, size: int) -> None:
    with suppress(CkptsvcError):
        (made,) = Rules.parse({"rule": [{"name": "a", "stage": "all", **row}]}).rules
        for rank in range(tp):
            local = local_part("a", (size, 4), made, Parallel(tp=tp), {"n": 4}, rank, 0)
            assert local.padding >= 0


@given(st.text(max_size=30) | st.from_regex(r"([a-z]{2,6}=[0-9/a-z-]{1,6},?){0,4}", fullmatch=True))
def test_a_layout_of_anything_is_a_layout_or_a_clear_error(text: str) -> None:
    with suppress(CkptsvcError):
        Parallel.parse(text).chunks(8)
