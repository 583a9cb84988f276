"""Our own format through the table of formats: read as what it is, written so that nothing is lost."""

import uuid
from pathlib import Path

import numpy as np
import pytest
from harness.declared import Arrays
from harness.stored import Run, Tensor

from ckptsvc.errors import InvalidInput, LayoutError, NoCheckpoint
from ckptsvc.format.commit import COMMIT
from ckptsvc.geometry.box import Box
from ckptsvc.interop.conversion.convert import Conversion
from ckptsvc.interop.conversion.memory import resident
from ckptsvc.interop.conversion.native import Naming, NativeLogical, step_of, write_native
from ckptsvc.interop.conversion.request import Request, open_sources
from ckptsvc.interop.formats import open_foreign
from ckptsvc.pipeline.catalog import Ref, open_checkpoint
from ckptsvc.pipeline.read import Want, read_arrays

RNG = np.random.default_rng(9)
ARRAYS = {
    "model/a": RNG.standard_normal((300, 70)).astype(np.float32),
    "model/b": RNG.standard_normal((50, 11)),
    "model/scalar": np.array(2.5, np.float32),
    "model/none": np.zeros((0, 4), np.float32),
    "model/flags": np.array([True, False, True]),
    "@rank/1/cursor": np.array([7]),
}
VALUES = [{"lr": 0.5, "rank": rank, "@rank": rank} for rank in range(3)]
NAMING = Naming("run", Ref(1, 0), "2026-01-01T00:00:00+00:00", "ab" * 16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    cuts = {"model/a": "dim 1", "model/b": "flat"}
    tensors = {name: Tensor(array, cut=cuts.get(name, "whole")) for name, array in ARRAYS.items()}
    run.save(3, {"model/old": Tensor(np.ones(3))})
    run.save(9, tensors, world=3, values=VALUES, aliases={"model/tied": "model/a"})
    return run


def value(logical, name: str) -> np.ndarray:
    meta = logical.meta(name)
    return read_arrays(logical, logical.source, [Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape))])[0]


def converted(run: Run, place: Path, holding=None, ranks: int = 0, **options: str) -> NativeLogical:
    request = Request(sources=(run.url,), target=str(place), options=options)
    conversion = Conversion(request, open_sources(request), (600 << 20) + resident(), holding=holding, ranks=ranks)
    conversion.run(lambda nbytes: None)
    assert conversion.finish()
    conversion.close()
    assert conversion.ref is not None
    return NativeLogical(open_checkpoint(conversion.target.store, conversion.ref))


def test_every_way_to_name_it(run: Run) -> None:
    folder = f"{run.url}/step-000000000009.e00001"
    for address in (run.url, run.url.removeprefix("file://"), f"ckptsvc:{run.url}", folder, f"{folder}/"):
        logical = open_foreign(address)
        assert (logical.step, logical.world_size, logical.aliases) == (9, 3, {"model/tied": "model/a"})
        assert set(logical.names()) == set(ARRAYS), "documents are no tensors"
        logical.close()
    assert open_foreign(run.url, {"step": "3"}).names() == ["model/old"]
    assert open_foreign(run.url, {"name": "step-000000000003.e00001"}).step == 3
    with pytest.raises(NoCheckpoint, match="of step 4"):
        open_foreign(run.url, {"step": "4"})
    with pytest.raises(InvalidInput, match="no option"):
        open_foreign(run.url, {"stepp": "4"})


def test_a_file_beside_checkpoints_is_not_taken_for_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "notes.txt").write_text("hello")
    with pytest.raises(InvalidInput, match="no checkpoint of a format"):
        open_foreign(str(tmp_path / "run" / "notes.txt"))


@pytest.mark.parametrize("shards", ["1", "2", "3", "8"])
def test_tensors_aliases_and_the_values_of_every_rank_survive(run: Run, tmp_path: Path, shards: str) -> None:
    made = converted(run, tmp_path / "out", shards=shards)
    assert made.world_size == max(3, int(shards))
    assert made.aliases == {"model/tied": "model/a"}
    before = open_foreign(run.url)
    for name in ARRAYS:
        assert value(made, name).tobytes() == value(before, name).tobytes(), name
    for rank in range(made.world_size):
        assert made.document(rank) == VALUES[rank % 3]


def test_shards_are_of_about_one_size() -> None:
    small = {f"model/{i}": np.zeros((97, 41), np.float32) for i in range(20)}
    source = Arrays(small | {"model/x": np.zeros((900, 80))})
    output = write_native(source, {"shards": "7"}, NAMING)
    sizes = [file.nbytes for file in output.files]
    assert len(sizes) == 7
    assert max(sizes) < 1.15 * sum(sizes) / 7


def test_a_rank_holds_what_it_is_told_to(run: Run, tmp_path: Path) -> None:
    """What `--to` makes of a layout: here the columns of a matrix on two ranks, all else on the first."""
    names = [name for name in ARRAYS if name != "model/a"]

    def holding(rank: int):
        rest = [] if rank else [(name, Box.full(ARRAYS[name].shape)) for name in names]
        return [*rest, ("model/a", Box((0, 35 * rank), (300, 35)))]

    made = converted(run, tmp_path / "out", holding, 2)
    assert made.world_size == 2
    assert [made.document(rank) for rank in range(2)] == VALUES[:2]
    regions = made.checkpoint.index.regions("model/a")
    shards = made.checkpoint.index.shards
    assert sorted((shards[r.shard].rank, r.region.origin[1]) for r in regions) == [(0, 0), (1, 35)]
    assert np.array_equal(value(made, "model/a").view(np.float32), ARRAYS["model/a"])


def test_a_layout_that_leaves_a_hole_is_refused(run: Run, tmp_path: Path) -> None:
    def holding(rank: int):
        whole = {name: Box.full(array.shape) for name, array in ARRAYS.items()}
        return (whole | {"model/a": Box((0, 0), (299, 70))}).items()

    with pytest.raises(LayoutError, match="no region has"):
        converted(run, tmp_path / "out", holding, 1)
    assert not list((tmp_path / "out").rglob(COMMIT))


def test_the_same_conversion_makes_the_same_names(run: Run) -> None:
    logical = open_foreign(run.url)
    first, again = (write_native(logical, {}, NAMING) for _ in range(2))
    assert [file.key for file in first.files] == [file.key for file in again.files]
    other = write_native(logical, {}, NAMING._replace(writer="cd" * 16))
    assert not {file.key for file in first.files} & {file.key for file in other.files}
    for bad in ({"shards": "x"}, {"shards": "0"}, {"step": "-1"}):
        with pytest.raises(InvalidInput):
            write_native(logical, bad, NAMING._replace(ref=Ref(1, step_of(logical, bad))))


def test_a_memory_store_can_be_converted_to() -> None:
    run = Run(f"memory://{uuid.uuid4()}")
    run.save(1, {"model/w": Tensor(np.arange(10.0))})
    made = converted(run, f"memory://{uuid.uuid4()}")  # type: ignore[arg-type]
    assert value(made, "model/w").view(np.float64).tolist() == list(range(10))
