"""`ckptsvc diff`."""

import json
import uuid

import numpy as np
import pytest
from harness.stored import Outcome, Run, Tensor, cli

from ckptsvc.cli.diff import _ranges

BEFORE = {
    "model/layers.2.w": Tensor(np.arange(72, dtype=np.float32).reshape(8, 9), cut="dim 0"),
    "model/layers.10.w": Tensor(np.ones((8, 9), np.float32), cut="tiles"),
    "model/same": Tensor(np.ones(5, np.uint8), "float8_e4m3fn"),
    "model/bits": Tensor(np.zeros(4, np.uint8), "bits8"),
    "model/old": Tensor(np.ones(3)),
    "model/cast": Tensor(np.ones(3)),
}
AFTER = BEFORE | {
    "model/layers.2.w": Tensor(np.arange(72, dtype=np.float32).reshape(8, 9) * np.float32(1.5), cut="flat"),
    "model/layers.10.w": Tensor(np.full((8, 9), np.nan, np.float32), cut="dim 1"),
    "model/bits": Tensor(np.array([0, 0, 1, 1], np.uint8), "bits8"),
    "model/new\x1b[31m": Tensor(np.ones(3)),
    "model/cast": Tensor(np.ones(3, np.float32)),
}
del AFTER["model/old"]


@pytest.fixture(scope="module")
def run() -> Run:
    made = Run(f"memory://{uuid.uuid4()}")
    made.save(1, BEFORE, world=4, values={"lr": 0.1, "same": 1})
    made.save(2, AFTER, world=4, values=[{"lr": 0.2, "same": 1, "rank": rank} for rank in range(4)])
    made.save(3, BEFORE, world=4, values={"lr": 0.1, "same": 1})
    return made


def diff(run: Run, a: int, b: int, *more: str) -> Outcome:
    return cli("diff", run.url, run.url, "--step-a", a, "--step-b", b, *more)


def test_equal(run: Run) -> None:
    status, out, err = diff(run, 1, 3)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"A  {run.url}/step-000000000001.e00001"
    assert out.splitlines()[-1] == "equal: 6 tensors, 8 plain values"
    assert cli("diff", run.url, f"{run.url}/step-000000000001.e00001").status == 0


def test_different(run: Run) -> None:
    status, out, err = diff(run, 1, 2)
    assert (status, err) == (1, "")
    assert "\x1b" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "tensors only in A: 1" in lines
    assert "model/new\\x1b[31m float64 [3]" in lines
    assert "model/cast float64 [3] float32 [3]" in lines
    at = lines.index("tensors that differ: 3")
    assert lines[at + 1 : at + 5] == [
        "NAME DIFFERING OF MAX ABS MAX REL NOT FINITE",
        "model/bits 2 4 - - bits only",
        "model/layers.2.w 71 72 35.5 0.333 0",
        "model/layers.10.w 72 72 - - 72",
    ]
    at = lines.index("plain values that differ: 5")
    assert lines[at + 2 : at + 4] == ["lr 0.1 0.2 all", "rank (none) 0 0"]
    assert lines[-1] == (
        "different: 3 of 4 tensors, 1 of another dtype or shape, 1 only in A, 1 only in B, 8 of 12 plain values"
    )


def test_json(run: Run) -> None:
    status, out, err = diff(run, 1, 2, "--json")
    document = json.loads(out)
    assert (status, err) == (1, "")
    assert document.keys() == {"a", "b", "equal", "tolerance", "tensors", "values"}
    assert (document["a"]["step"], document["b"]["step"], document["equal"]) == (1, 2, False)
    tensors = document["tensors"]
    assert tensors["equal"] == 1
    assert tensors["only_in_a"] == [{"name": "model/old", "dtype": "float64", "shape": [3]}]
    assert tensors["mismatched"] == [
        {"name": "model/cast", "a": {"dtype": "float64", "shape": [3]}, "b": {"dtype": "float32", "shape": [3]}}
    ]
    assert tensors["different"][1] == {
        "name": "model/layers.2.w", "dtype": "float32", "shape": [8, 9], "elements": 72, "differing": 71,
        "not_finite": 0, "max_abs": 35.5, "max_rel": pytest.approx(1 / 3),
    }  # fmt: skip
    assert tensors["different"][2]["max_abs"] is None
    values = document["values"]
    assert (values["ranks"], values["compared"]) == (4, 12)
    assert values["different"][:2] == [
        {"rank": 0, "path": "lr", "in_a": True, "in_b": True, "a": 0.1, "b": 0.2},
        {"rank": 0, "path": "rank", "in_a": False, "in_b": True, "a": None, "b": 0},
    ]
    equal = json.loads(diff(run, 1, 3, "--json").out)
    assert (equal["equal"], equal["tensors"]["different"]) == (True, [])


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["-m", "model/same"], 0),
        (["-m", "same"], 0),
        (["-m", "layers.2"], 1),
        (["-m", "layers.2", "--tolerance", "1"], 0),
        (["-m", "layers.10", "--tolerance", "1000"], 1),
        (["-m", "bits", "--tolerance", "1000"], 1),
        (["-m", "lr", "--tolerance", "0.2"], 0),
        (["--tolerance", "-1"], 2),
        (["--tolerance", "nan"], 2),
        (["--tolerance", "x"], 2),
    ],
)
def test_what_counts(run: Run, options: list[str], status: int) -> None:
    assert diff(run, 1, 2, *options).status == status


@pytest.mark.parametrize(
    ("order", "first"), [("name", "model/bits"), ("abs", "model/layers.2.w"), ("rel", "model/layers.2.w"),
        ("count", "model/layers.10.w")],
)  # fmt: skip
def test_the_worst_first(run: Run, order: str, first: str) -> None:
    document = json.loads(diff(run, 1, 2, "--json", "--sort", order, "--limit", "1").out)
    assert [each["name"] for each in document["tensors"]["different"]] == [first]
    out = diff(run, 1, 2, "--sort", order, "--limit", "1").out
    assert "tensors that differ: 3, the first 1" in out


def test_a_side_that_is_not_there(run: Run) -> None:
    assert diff(run, 1, 9).status == 10
    assert cli("diff", run.url, f"memory://{uuid.uuid4()}").status == 10


def test_ranges_of_ranks() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert len(_ranges(range(0, 1000, 2))) == 30
