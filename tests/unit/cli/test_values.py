"""Plain values as a flat list, for people, for programs, and compared."""

import json
import math
import uuid
from collections import OrderedDict

import numpy as np
import pytest
from harness.stored import Run
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.cli import address, values
from ckptsvc.cli.values import as_json, flatten, same, text, without_skeleton
from ckptsvc.errors import InvalidInput
from ckptsvc.format.objects import Opaque, TensorRef, decode, encode

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.builds(lambda n: np.arange(n, dtype=np.float32), st.integers(0, 3)) | st.frozensets(st.integers())
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def paths(tree) -> dict:
    return {value.path: value.value for value in flatten(tree)}


def test_a_tree_becomes_paths() -> None:
    tree = {
        "lr": 0.1,
        "groups": [{"betas": (0.9, 0.99)}, {"betas": (0.8, 0.9)}],
        "a/b~c": {1: None},
        "names": ["x", "y"],
        "empty": [],
        "weight": TensorRef("weight"),
        "both": [TensorRef("both/0"), 7],
    }
    assert paths(tree) == {
        "lr": 0.1,
        "groups/0/betas": (0.9, 0.99),
        "groups/1/betas": (0.8, 0.9),
        "a~1b~0c/1": None,
        "names": ["x", "y"],
        "empty": [],
        "both/1": 7,
    }
    assert paths({}) == {}


def test_places_of_tensors_are_no_values() -> None:
    found = list(flatten({"model": {}, "history": {}, "optimizer": {"state": {}, "lr": 1}}))
    kept = without_skeleton(found, ["model/w", "modelling/w", "optimizer/state/w/exp_avg"])
    assert [value.path for value in kept] == ["history", "optimizer/lr"]


@given(trees)
def test_every_value_can_be_shown_and_sent(tree) -> None:
    for value in flatten({"tree": tree}):
        assert isinstance(text(value.value), str)
        assert json.loads(json.dumps(as_json(value.value), allow_nan=False)) is not ...


@given(trees)
def test_a_stored_tree_is_the_same(tree) -> None:
    again = decode(encode({"tree": tree}))
    left, right = ({v.path: v for v in flatten(t)} for t in ({"tree": tree}, again))
    assert left.keys() == right.keys()
    assert all(left[p].type == right[p].type and same(left[p].value, right[p].value) for p in left)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.arange(3, dtype=np.uint8), "uint8[3], xxh3 "),
        (np.float32(0.5), "0.5"),
        (b"ab", "b'ab'"),
        (b"a" * 40, "40 bytes, xxh3 "),
        ({2, 1}, "{1, 2}"),
        (Opaque("torch.dtype", "bfloat16"), "'bfloat16'"),
        ("x\ny", "'x\\ny'"),
    ],
)
def test_how_a_value_looks(value, shown: str) -> None:
    assert text(value).startswith(shown)


def test_json_keeps_what_json_has() -> None:
    assert as_json([1, "a", None, (True, 0.5)]) == [1, "a", None, [True, 0.5]]
    assert as_json(math.nan) == "nan"
    assert as_json({}) == {}


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, True, False),
        (1, 1.0, False),
        (math.nan, math.nan, True),
        (0.0, -0.0, False),
        ([math.nan, 1], [math.nan, 1], True),
        ([1], (1,), False),
        ([1], [1, 2], False),
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.arange(3).astype(np.int32), False),
        (np.zeros((2, 3)), np.zeros((3, 2)), False),
        (np.float32(1), np.float32(2), False),
        (Opaque("a.b", [math.nan]), Opaque("a.b", [math.nan]), True),
        (Opaque("a.b", 1), Opaque("a.c", 1), False),
        (OrderedDict(a=1), OrderedDict(a=2), False),
        ({"a": np.arange(2)}, {"a": np.arange(2)}, True),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_same(a, b, equal: bool) -> None:
    assert same(a, b) is equal
    assert same(b, a) is equal


def test_a_tolerance_is_for_floats() -> None:
    assert same(1.0, 1.0 + 1e-9, 1e-6)
    assert same([1e9], [1e9 + 1], 1e-6)
    assert not same(1.0, 1.1, 1e-6)
    assert not same(math.inf, 1.0, 1e6)
    assert same(math.inf, math.inf, 1e-6)
    assert not same(1, 2, 10.0)


def test_documents_are_read_rank_by_rank() -> None:
    run = Run(f"memory://{uuid.uuid4()}")
    run.save(1, world=3, values=[{"rank": rank, "own": np.arange(5000) + rank} for rank in range(3)])
    checkpoint = address.choose(run.store, address.parse(run.url))
    found = values.read_documents(checkpoint, [2, 0])
    assert [document["rank"] for document in found] == [2, 0]
    assert found[0]["own"][-1] == 5001
    with pytest.raises(InvalidInput, match="0 to 2"):
        values.read_documents(checkpoint, [3])
