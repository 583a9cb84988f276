"""`ckptsvc inspect`."""

import json
import uuid

import numpy as np
import pytest
from harness.stored import Run, Tensor, cli
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.cli.inspect import Layout, layout_of, matches
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.layout import Shard, local_box

TENSORS = {
    "model/emb.weight": Tensor(np.zeros((50, 8), np.float32), cut="dim 0"),
    "model/layers.2.w": Tensor(np.zeros((8, 9), np.uint16), "bfloat16", cut="dim 1"),
    "model/layers.10.w": Tensor(np.zeros((8, 9), np.float32), cut="tiles"),
    "model/odd": Tensor(np.zeros((8, 9), np.float32), cut="bricks"),
    "model/step": Tensor(np.zeros((), np.int64)),
    "model/none": Tensor(np.zeros((0, 3), np.float32)),
    "optimizer/flat": Tensor(np.zeros(100, np.float64), cut="flat"),
}
VALUES = {"lr": 0.1, "betas": (0.9, 0.99), "model": {}, "nan": float("nan"), "rng": np.arange(3)}


@pytest.fixture(scope="module")
def run() -> Run:
    made = Run(f"memory://{uuid.uuid4()}")
    made.save(1, {"w": Tensor(np.zeros((4, 4)), cut="dim 0")}, world=2)
    values = [VALUES | {"rank": rank} for rank in range(4)]
    made.save(10, TENSORS, world=4, values=values, aliases={"model/head.weight": "model/emb.weight"}, job="j\x1b[31m")
    return made


def table(out: str) -> dict[str, str]:
    """The rows of the table, by the first column."""
    lines = iter(out.splitlines())
    next(line for line in lines if line.startswith(("NAME", "PATH")))
    rows = [line.split(maxsplit=1) for line in iter(lines.__next__, "")]
    return {row[0]: " ".join(row[1].split()) for row in rows}


def test_the_table(run: Run) -> None:
    status, out, err = cli("inspect", run.url)
    assert (status, err) == (0, "")
    assert table(out) == {
        "model/emb.weight": "float32 [50, 8] 1.6 KiB 4 along dim 0 4",
        "model/head.weight": "float32 [50, 8] - tied to model/emb.weight 4",
        "model/layers.2.w": "bfloat16 [8, 9] 144 B 4 along dim 1 4",
        "model/layers.10.w": "float32 [8, 9] 288 B 2x2 tiles 4",
        "model/none": "float32 [0, 3] 0 B whole 1",
        "model/odd": "float32 [8, 9] 288 B 4 boxes 4",
        "model/step": "int64 [] 8 B whole 1",
        "optimizer/flat": "float64 [100] 800 B 4 flat ranges 4",
    }
    assert list(table(out)) == sorted(table(out), key=lambda name: name.replace("s.2", "s.02"))
    assert out.splitlines()[0] == f"step-000000000010.e00001  {run.url}"
    assert "by 4 ranks" in out
    assert "\n7 tensors, 717 elements, 3.1 KiB\n" in out
    assert "that belong to single ranks" in out
    assert "\x1b" not in out
    assert "j\\x1b[31m" in out


def test_json(run: Run) -> None:
    document = json.loads(cli("inspect", run.url, "--json", "--match", "model/layers.10").out)
    assert document["tensors"] == [
        {
            "name": "model/layers.10.w", "dtype": "float32", "shape": [8, 9], "bytes": 288,
            "layout": {"kind": "tiles", "pieces": 4, "dims": [0, 1], "grid": [2, 2]}, "shards": 4, "alias_of": None,
        }
    ]  # fmt: skip
    assert document["totals"] == {"tensors": 1, "elements": 72, "bytes": 288}
    checkpoint = document["checkpoint"]
    assert checkpoint.keys() == {
        "store", "name", "step", "epoch", "attempt", "job", "world_size", "created", "format", "shards", "bytes",
        "stored", "metrics", "refers",
    }  # fmt: skip
    assert checkpoint["stored"] == {
        "written": checkpoint["bytes"], "referenced": 0, "compressed": 0, "compressed_to": 0, "deltas": 0,
        "ratio": 1.0, "refers": [],
    }  # fmt: skip
    assert (checkpoint["store"], checkpoint["step"], checkpoint["world_size"]) == (run.url, 10, 4)
    tied = json.loads(cli("inspect", run.url, "--json", "--match", "head").out)
    assert tied["tensors"][0]["alias_of"] == "model/emb.weight"
    assert tied["totals"]["tensors"] == 0


def test_which_checkpoint(run: Run) -> None:
    for arguments in (["--step", "1"], ["step-000000000001.e00001"]):
        assert "by 2 ranks" in cli("inspect", run.url, *arguments).out
    assert "by 2 ranks" in cli("inspect", f"{run.url}/step-000000000001.e00001").out
    status, out, err = cli("inspect", run.url, "--step", "5")
    assert (status, out) == (10, "")
    assert err.splitlines()[1].startswith("hint: ")
    status, out, _ = cli("inspect", run.url, "--step", "5", "--json")
    assert status == 10
    assert json.loads(out)["error"]["code"] == "no-checkpoint"


def test_selecting_and_sorting(run: Run) -> None:
    assert table(cli("inspect", run.url, "-m", "optimizer/*", "-m", "step").out).keys() == {
        "optimizer/flat",
        "model/step",
    }
    out = cli("inspect", run.url, "--sort", "size", "--limit", "2").out
    assert list(table(out)) == ["model/emb.weight", "model/head.weight"]
    assert "the first 2 of 7 tensors" in out
    everything = table(cli("inspect", run.url, "--all").out)
    assert {f"@rank/{rank}/objects" for rank in range(4)} <= everything.keys()
    assert "0 tensors" in cli("inspect", run.url, "-m", "nothing").out


def test_values(run: Run) -> None:
    out = cli("inspect", run.url, "--values", "--rank", "3").out
    found = table(out)
    assert found.pop("rng").startswith("ndarray int64[3], xxh3 ")
    assert found == {"lr": "float 0.1", "betas": "tuple (0.9, 0.99)", "nan": "float nan", "rank": "int 3"}
    assert out.endswith("\n5 values\n")
    document = json.loads(cli("inspect", run.url, "--values", "--json", "-m", "beta", "-m", "nan").out)
    assert document["rank"] == 0
    assert document["values"] == [
        {"path": "betas", "type": "tuple", "value": [0.9, 0.99]},
        {"path": "nan", "type": "float", "value": "nan"},
    ]
    assert cli("inspect", run.url, "--values", "--rank", "4").status == 2


def test_patterns() -> None:
    assert matches("model/a.weight", [])
    assert matches("model/a.weight", ["weight"])
    assert matches("model/a.weight", ["x", "model/*"])
    assert not matches("model/a.weight", ["odel/*"])
    assert not matches("model/a.weight", ["Model"])


def test_flat_and_boxes_of_one_tensor() -> None:
    assert layout_of((4, 4), [Box((0, 0), (2, 4)), FlatRange(8, 8)]) == Layout("mixed", 2)
    assert str(Layout("mixed", 2)) == "2 pieces"
    assert layout_of((4,), [FlatRange(0, 4)]) == Layout("whole", 1)
    assert layout_of((4,), [FlatRange(0, 4), FlatRange(4, 0)]) == Layout("whole", 1)


def test_the_same_box_twice_is_no_grid() -> None:
    assert layout_of((4,), [Box((0,), (2,)), Box((2,), (2,)), Box((2,), (2,))]).kind == "boxes"
    assert layout_of((4, 4), [Box.full((4, 4)), Box.full((4, 4))]).kind == "boxes"


@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), st.permutations([0, 1]), st.integers(6, 9), st.integers(6, 9))
def test_the_layouts_of_a_mesh(mesh: tuple[int, int], dims: list[int], rows: int, columns: int) -> None:
    placements = tuple(Shard(dim) for dim in dims)
    coordinates = [(i, j) for i in range(mesh[0]) for j in range(mesh[1])]
    boxes = [local_box((rows, columns), mesh, at, placements) for at in coordinates]
    found = layout_of((rows, columns), boxes)
    cut = {dim: parts for dim, parts in zip(dims, mesh, strict=True) if parts > 1}
    assert found.kind == ("whole", "slabs", "tiles")[len(cut)]
    assert found.dims == tuple(sorted(cut))
    assert found.pieces == len(boxes)
    assert found.grid == tuple(cut[dim] for dim in sorted(cut))
