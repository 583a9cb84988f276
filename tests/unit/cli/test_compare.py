"""Two checkpoints side by side, read in batches, whatever their layouts."""

import uuid

import numpy as np
import pytest
from harness.stored import EXTENT, Run, Tensor

from ckptsvc.cli import address, compare
from ckptsvc.cli.compare import Comparison, Pair
from ckptsvc.errors import Damaged
from ckptsvc.interop.conversion import native
from ckptsvc.interop.conversion.native import NativeLogical
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.sources import StoreSource

RNG = np.random.default_rng(7)
ARRAYS = {
    "model/a": RNG.standard_normal((12, 40)).astype(np.float32),
    "model/b": RNG.integers(0, 100, (8, 9)),
    "model/c": RNG.integers(0, 2**16, (30,), dtype=np.uint16),
    "model/big": RNG.standard_normal((64, 257)).astype(np.float32),
    "model/one": np.array(3.0),
    "model/none": np.zeros((3, 0), np.float32),
}
DTYPES = {"model/c": "bfloat16"}
CUTS = {"one": ("whole",), "two": ("dim 0", "dim 1", "flat"), "four": ("tiles", "bricks", "dim 0", "flat")}


def tensors(arrays: dict[str, np.ndarray], layout: str) -> dict[str, Tensor]:
    """The arrays, cut in all the ways in turn that such a world has."""
    made = {}
    for number, (name, array) in enumerate(arrays.items()):
        cut = CUTS[layout][number % len(CUTS[layout])]
        small = array.ndim < 2 or min(array.shape) < 4
        made[name] = Tensor(array, DTYPES.get(name, ""), "flat" if small and cut != "whole" else cut)
    return made


def saved(arrays: dict[str, np.ndarray], layout: str = "one", **more) -> Checkpoint:
    run = Run(f"memory://{uuid.uuid4()}")
    run.save(1, tensors(arrays, layout), world={"one": 1, "two": 2, "four": 4}[layout], **more)
    return address.choose(run.store, address.parse(run.url))


def compared(a: Checkpoint, b: Checkpoint, *, tolerance: float | None = None, match: str = "") -> Comparison:
    return Pair(NativeLogical(a), NativeLogical(b), lambda name: match in name).compare(tolerance)


@pytest.fixture(params=[64 << 20, 700], ids=["one batch", "many batches"])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(compare, "BATCH", request.param)
    return request.param


@pytest.mark.parametrize("a", CUTS)
@pytest.mark.parametrize("b", CUTS)
def test_the_layout_makes_no_difference(a: str, b: str, batch: int) -> None:
    found = compared(saved(ARRAYS, a), saved(ARRAYS, b))
    assert found.is_equal
    assert found.equal == len(ARRAYS)


def test_every_difference_is_found_and_measured(batch: int) -> None:
    changed = {name: array.copy() for name, array in ARRAYS.items()}
    changed["model/a"][11, 39] += np.float32(0.5)
    changed["model/big"][0, 0] = np.nan
    changed["model/big"][63, 256] = 100.0
    changed["model/b"][3, 3] -= 7
    found = compared(saved(ARRAYS, "two"), saved(changed, "four"))
    far = {each.meta.name: each.distance for each in found.different}
    assert far.keys() == {"model/a", "model/big", "model/b"}
    assert found.equal == 3
    assert (far["model/a"].differing, far["model/a"].elements) == (1, 480)
    assert far["model/a"].max_abs == pytest.approx(0.5, rel=1e-6)
    assert (far["model/big"].differing, far["model/big"].not_finite) == (2, 1)
    assert far["model/big"].max_abs == pytest.approx(100 - ARRAYS["model/big"][63, 256])
    assert far["model/b"].max_abs == 7
    assert not found.is_equal


def test_what_only_one_side_has_or_has_otherwise(batch: int) -> None:
    others = dict(ARRAYS)
    del others["model/a"]
    others["model/new"] = np.zeros(3)
    others["model/b"] = ARRAYS["model/b"].astype(np.int32)
    others["model/c"] = ARRAYS["model/c"][:20]
    found = compared(saved(ARRAYS, "two"), saved(others))
    assert [meta.name for meta in found.only_a] == ["model/a"]
    assert [meta.name for meta in found.only_b] == ["model/new"]
    mismatched = {a.name: (a.dtype, b.dtype, a.shape, b.shape) for a, b in found.mismatched}
    assert mismatched == {
        "model/b": ("int64", "int32", (8, 9), (8, 9)),
        "model/c": ("bfloat16", "bfloat16", (30,), (20,)),
    }
    assert found.different == []
    assert compared(saved(ARRAYS), saved(others), match="model/one").is_equal


def test_tolerance() -> None:
    near = {
        name: array + array.dtype.type(1e-5) if array.dtype.kind == "f" else array for name, array in ARRAYS.items()
    }
    a, b = saved(ARRAYS), saved(near)
    assert len(compared(a, b).different) == 3
    assert compared(a, b, tolerance=1e-4).is_equal
    assert not compared(a, b, tolerance=1e-6).is_equal


def test_tied_tensors() -> None:
    arrays = {"model/a": ARRAYS["model/a"]}
    tied = saved(arrays, aliases={"model/head": "model/a"})
    assert compared(tied, saved(arrays, aliases={"model/head": "model/a"})).equal == 1
    untied = saved(arrays | {"model/head": arrays["model/a"]})
    assert compared(tied, untied).equal == 2
    changed = saved(arrays | {"model/head": arrays["model/a"] + 1})
    for pair in ((tied, changed), (changed, tied)):
        (different,) = compared(*pair).different
        assert different.meta.name == "model/head"
    assert [meta.name for meta in compared(tied, saved(arrays)).only_a] == ["model/head"]


def test_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DOCUMENTS", 2)
    before = {"lr": 0.1, "seen": [1, 2], "old": None, "nan": float("nan"), "@rank": 0, "@world_size": 4}
    after = {"lr": 0.2, "seen": [1, 2], "new": "x", "nan": float("nan"), "@rank": 9, "@world_size": 3}
    a = saved({}, "four", values=before)
    found = compared(a, saved({}, "four", values=[before, before, before, after]))
    changes = {(c.rank, c.path): (c.a and c.a.value, c.b and c.b.value) for c in found.changes}
    assert changes == {(3, "lr"): (0.1, 0.2), (3, "old"): (None, None), (3, "new"): (None, "x")}
    old = next(c for c in found.changes if c.path == "old")
    assert old.a is not None, "a value that is None is there all the same"
    assert old.b is None
    assert (found.ranks, found.values) == (4, 3 * 4 + 5)
    assert compared(a, saved({}, "four", values=after), match="seen").is_equal


def test_ranks_that_only_one_side_has_do_not_count() -> None:
    own = {f"@rank/{rank}/cursor": np.array([rank]) for rank in range(4)}
    values = [{"seed": rank} for rank in range(4)]
    a = saved(ARRAYS | own, "four", values=values)
    b = saved(ARRAYS | {name: own[name] for name in list(own)[:2]}, "two", values=values[:2])
    for pair in ((a, b), (b, a)):
        found = compared(*pair)
        assert found.is_equal
        assert (found.ranks, found.equal) == (2, len(ARRAYS) + 2)


def test_memory_is_bounded_and_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BATCH", 4 * EXTENT)
    large: list[int] = []
    reads: list[int] = []
    read_arrays, read_into = compare.read_arrays, StoreSource.read_into

    def counted(*arguments, **keywords):
        found = read_arrays(*arguments, **keywords)
        large.append(sum(array.nbytes for array in found))
        return found

    def watched(self, shard, offset, buffer):
        reads.append(len(buffer))
        return read_into(self, shard, offset, buffer)

    monkeypatch.setattr(compare, "read_arrays", counted)
    monkeypatch.setattr(StoreSource, "read_into", watched)
    arrays = {f"t{n}": np.zeros(1000, np.float32) for n in range(20)} | {"huge": np.zeros((40, 1024), np.float32)}
    a, b = saved(arrays), saved(arrays)
    seen: list[int] = []
    pair = Pair(NativeLogical(a), NativeLogical(b))
    assert pair.compare(None, seen.append).is_equal
    assert max(large) <= 4 * EXTENT
    assert sum(seen) == pair.nbytes == 20 * 4000 + 40 * 4096
    # Batches begin anywhere, so that an extent at a seam is read for both; plus the documents.
    assert sum(reads) <= 2 * (pair.nbytes + (len(large) + 2) * EXTENT)


def test_damage_is_not_compared() -> None:
    a = saved(ARRAYS)
    b = saved(ARRAYS)
    key = b.key(0)
    content = bytearray(b.store.read(key))
    content[5000] ^= 1
    b.store.write(key, memoryview(content), len(content))
    with pytest.raises(Damaged, match=key):
        compared(a, b)
