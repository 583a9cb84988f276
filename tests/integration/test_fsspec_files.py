"""A run's tensors as files through fsspec: every layout, ranges, addresses, damage, and paths that lead nowhere."""

import json
import os
import pickle
import random
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from harness.stored import Run, Tensor

from ckptsvc.errors import Damaged
from ckptsvc.format.objects import decode
from ckptsvc.integrations import fsspec_tree
from ckptsvc.integrations.fsspec_files import CheckpointFiles
from ckptsvc.storage import connect
from ckptsvc.types import DTYPES

GRID = np.arange(6000, dtype=np.float32).reshape(60, 100)
CUTS = ("whole", "dim 0", "dim 1", "tiles", "flat", "bricks")


@pytest.fixture(autouse=True)
def _registered():
    """As the entry point does in an installation."""
    fsspec.register_implementation("ckptsvc", CheckpointFiles, clobber=True)


@pytest.fixture
def run():
    return Run(f"memory://{uuid.uuid4()}")


def address(run, path=""):
    return f"ckptsvc://{run.url}!/{path}"


def opened(run):
    return fsspec.filesystem("ckptsvc", store=run.url)


def test_the_entry_point_names_the_class():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (point,) = project["project"]["entry-points"]["fsspec.specs"].values()
    assert point == f"{CheckpointFiles.__module__}:{CheckpointFiles.__qualname__}"


def test_installed_it_is_known_to_fsspec(tmp_path):
    """A process that has never heard of ckptsvc opens a tensor."""
    Run(str(tmp_path / "run")).save(1, {"w": Tensor(GRID)})
    site = tmp_path / "ckptsvc_files-1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: ckptsvc_files\nVersion: 1\n")
    entry = f"[fsspec.specs]\nckptsvc = {CheckpointFiles.__module__}:{CheckpointFiles.__qualname__}\n"
    (site / "entry_points.txt").write_text(entry)
    program = (
        "import fsspec, numpy, sys; print(numpy.load(fsspec.open(sys.argv[1]).open()).sum(), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", program, f"ckptsvc://{tmp_path}/run!/latest/w.npy"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(GRID.sum()), "False"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_tensor_of_any_layout_is_an_npy_file(run, cut):
    run.save(1, {"model/w": Tensor(GRID, cut=cut)}, world=4)
    with fsspec.open(address(run, "latest/model/w.npy")) as file:
        array = np.load(file)
    assert array.dtype == np.float32
    assert np.array_equal(array, GRID)


@pytest.mark.parametrize("cut", CUTS)
def test_any_range_is_what_the_whole_file_has_there(run, cut):
    run.save(1, {"w": Tensor(GRID.astype(np.float64), cut=cut)}, world=4)
    files, dice = opened(run), random.Random(cut)
    whole = files.cat_file("latest/w.npy")
    assert len(whole) == files.size("latest/w.npy") == 48_000 + whole.index(b"\n") + 1
    for _ in range(60):
        start, stop = dice.randint(-50_000, 50_000), dice.randint(-50_000, 50_000)
        assert files.cat_file("latest/w.npy", start, stop) == whole[start:stop]
    assert files.cat_ranges(["latest/w.npy"] * 2, [0, 7], [5, 200]) == [whole[:5], whole[7:200]]
    with files.open("latest/w.npy", block_size=1000) as file:
        for _ in range(40):
            start, size = dice.randint(0, 48_000), dice.randint(0, 3000)
            file.seek(start)
            assert file.read(size) == whole[start : start + size]


def test_a_range_reads_the_extents_that_hold_it_and_no_more(run):
    run.save(1, {"w": Tensor(np.arange(100_000, dtype=np.int64))})
    files = opened(run)
    files.info("latest/w.npy")
    store, read = files._tree("latest").checkpoint.store, []
    whole = store.read_into
    store.read_into = lambda key, offset, buffer: (read.append(len(buffer)), whole(key, offset, buffer))
    files.cat_file("latest/w.npy", 400_000, 400_100)
    assert 0 < sum(read) <= 2 * 4096


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_element_type_has_its_bytes(run, name):
    size = DTYPES[name].itemsize
    raw = np.frombuffer(random.Random(name).randbytes(24 * size), np.uint8)
    if name == "bool":
        raw = raw & 1
    carrier = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[size])
    run.save(1, {"w": Tensor(carrier.reshape(4, 6), dtype=name, cut="dim 0")}, world=2)
    with fsspec.open(address(run, "1/w.npy")) as file:
        array = np.load(file)
    assert array.shape == (4, 6)
    assert array.tobytes() == raw.tobytes()
    assert opened(run).info("latest/w.npy")["dtype"] == name
    assert str(array.dtype) == name or array.dtype.kind == "u"


def test_scalars_and_empty_tensors(run):
    run.save(1, {"scalar": Tensor(np.float32(2.5)[()].reshape(())), "none": Tensor(np.zeros((0, 7), np.int32))})
    files = opened(run)
    for name, shape in (("scalar", ()), ("none", (0, 7))):
        with files.open(f"latest/{name}.npy") as file:
            assert np.load(file).shape == shape


def test_which_checkpoint(run):
    """The latest, a step (of the newest attempt), a name; what was never committed is not there."""
    first = run.save(100, {"w": Tensor(np.zeros(1))})
    run.save(200, {"w": Tensor(np.ones(1))})
    again = run.save(100, {"w": Tensor(np.full(1, 2.0))}, epoch=2)
    run.save(300, {"w": Tensor(np.full(1, 3.0))}, epoch=2, commit=False)
    expected = {"latest": 2.0, "100": 2.0, "200": 1.0, first: 0.0, again: 2.0}
    for which, value in expected.items():
        with fsspec.open(address(run, f"{which}/w.npy")) as file:
            assert np.load(file)[0] == value
    files = opened(run)
    assert sorted(files.ls("", detail=False)) == sorted([first, again, "step-000000000200.e00001"])
    for which in ("300", "400", "latest2", "step-000000000300.e00002", "9" * 500, "0x64", "١"):
        assert not files.exists(f"{which}/w.npy")


def test_the_latest_is_looked_up_by_each_open_and_kept_by_an_instance(run):
    run.save(1, {"w": Tensor(np.zeros(1))})
    files = opened(run)
    assert files.exists("latest/w.npy")
    run.save(2, {"other": Tensor(np.zeros(1))})
    assert files.exists("latest/w.npy")
    with fsspec.open(address(run, "latest/other.npy")) as file:
        assert np.load(file).shape == (1,)
    files.invalidate_cache()
    assert not files.exists("latest/w.npy")


def test_directories_walks_and_maps(run):
    tensors = {name: Tensor(np.arange(3)) for name in ("model/a/w", "model/a/b", "model/c", "top")}
    run.save(1, tensors)
    files, path = fsspec.url_to_fs(address(run, "latest"))
    assert path == "latest"
    documents = ["latest/@rank/0/objects.json", "latest/checkpoint.json"]
    assert files.find(path) == sorted([f"latest/{name}.npy" for name in tensors] + documents)
    assert files.ls("latest/model", detail=False) == ["latest/model/a", "latest/model/c.npy"]
    assert files.isdir("latest/model/a")
    assert files.isfile("latest/model/c.npy")
    assert [each for each, _, _ in files.walk("latest/model")] == ["latest/model", "latest/model/a"]
    assert files.glob("latest/model/**/*.npy") == [f"latest/{name}.npy" for name in sorted(tensors)][:3]
    assert files.unstrip_protocol("latest/top.npy") == address(run, "latest/top.npy")
    mapper = fsspec.get_mapper(address(run, "latest/model"))
    assert sorted(mapper) == ["a/b.npy", "a/w.npy", "c.npy"]
    assert mapper["c.npy"] == files.cat_file("latest/model/c.npy")
    found = files.cat("latest/model", recursive=True, on_error="omit")
    assert found.keys() == {f"latest/model/{key}" for key in mapper}
    with pytest.raises(KeyError):
        mapper["d.npy"]


def test_the_documents(run):
    values = [{"step": 7, "rank": rank} for rank in range(2)]
    name = run.save(7, {"model/w": Tensor(GRID, cut="dim 0")}, world=2, values=values, aliases={"head": "model/w"})
    files = opened(run)
    summary = json.loads(files.cat_file("7/checkpoint.json"))
    assert summary["checkpoint"]["name"] == name
    assert summary["checkpoint"]["step"] == 7
    rows = {row["name"]: row for row in summary["tensors"]}
    assert rows["model/w"] == {
        "name": "model/w",
        "dtype": "float32",
        "shape": [60, 100],
        "bytes": 24_000,
        "file": "model/w.npy",
        "alias_of": None,
    }
    assert rows["head"]["alias_of"] == "model/w"
    assert files.cat_file("7/head.npy") == files.cat_file("7/model/w.npy")
    for rank in range(2):
        document = files.cat_file(f"7/@rank/{rank}/objects.json")
        json.loads(document)
        assert decode(document, "", strict=False) == values[rank]


ODD = ("a//b", "/", "", ".", "..", "a/../b", "x.npy/y", "x", "checkpoint.json/z", "50%/%2E", "%", "*?[x]", "module::w")
MORE = ("a!/b", "ünïcode/größe", "back\\slash", "line\nbreak", "a b", "~/#", "@rank/0/objects.npy", "...", "x.npy")


def test_odd_names_are_files_of_their_own(run):
    names = [name for name in (*ODD, *MORE) if name]
    run.save(1, {name: Tensor(np.array([number])) for number, name in enumerate(names)})
    files = opened(run)
    table = json.loads(files.cat_file("latest/checkpoint.json"))["tensors"]
    assert {row["name"] for row in table} == set(names)
    assert len({row["file"] for row in table}) == len(names)
    found = files.find("latest")
    for row in table:
        assert f"latest/{row['file']}" in found
        with fsspec.open(address(run, f"latest/{row['file']}"), expand=False) as file:
            assert np.load(file)[0] == names.index(row["name"])


def test_two_names_never_share_a_file():
    dice = random.Random(1)
    parts = ["", ".", "..", "%", "%2E", "a", "a.npy", "a%2Enpy", "a.json", "é", "/", "!", "\udc80"[:0], " ", "~"]
    names = {"/".join(dice.choices(parts, k=dice.randint(1, 4))) for _ in range(4000)}
    assert len({fsspec_tree.path_of(name) for name in names}) == len(names)
    files = {fsspec_tree.path_of(name) for name in names}
    above = {path[:at] for path in files for at, letter in enumerate(path) if letter == "/"}
    assert not files & above, "a file and a directory of one name"


def test_paths_that_lead_nowhere(run):
    """Whatever is asked for: a file that is there, or one of the errors that fsspec knows."""
    run.save(1, {"model/w": Tensor(GRID)})
    files, dice = opened(run), random.Random(2)
    parts = ["latest", "1", "model", "w.npy", "..", ".", "", "%2E%2E", "@rank", "checkpoint.json", "\0", "é" * 300, "!"]
    for _ in range(3000):
        path = "/".join(dice.choices(parts, k=dice.randint(0, 6)))
        try:
            found = files.info(path)
        except FileNotFoundError:
            with pytest.raises(FileNotFoundError):
                files.ls(path)
            with pytest.raises(FileNotFoundError):
                files.cat_file(path)
        else:
            assert found["type"] in ("file", "directory")
    with pytest.raises(IsADirectoryError):
        files.cat_file("latest/model")


def test_nothing_can_be_changed(run):
    run.save(1, {"w": Tensor(GRID)})
    files = opened(run)
    attempts = (
        lambda: files.pipe_file("latest/w.npy", b""),
        lambda: files.open("latest/w.npy", "wb"),
        lambda: files.rm("latest", recursive=True),
        lambda: files.rm_file("latest/w.npy"),
        lambda: files.mkdir("new"),
        lambda: files.mv("latest/w.npy", "latest/v.npy"),
        lambda: files.touch("latest/w.npy"),
    )
    for attempt in attempts:
        with pytest.raises(OSError, match="does not change"):
            attempt()
    assert files.exists("latest/w.npy")


def test_a_damaged_shard_is_not_read(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.save(1, {"w": Tensor(np.arange(100_000, dtype=np.int64))})
    (shard,) = (each for each in (tmp_path / "run").glob("step-*/*.safetensors") if "index" not in each.name)
    content = bytearray(shard.read_bytes())
    content[500_000] ^= 1
    shard.write_bytes(content)
    files = opened(run)
    with pytest.raises(Damaged, match="do not match their checksum"):
        files.cat_file("latest/w.npy")
    assert len(files.cat_file("latest/w.npy", 0, 100_000)) == 100_000, "the rest is as good as ever"


def test_a_damaged_index_is_not_believed(run):
    run.save(1, {"w": Tensor(GRID)})
    store = connect(run.url)
    (key,) = [each.key for each in store.list() if each.key.rpartition("/")[2].startswith("index")]
    content = bytearray(store.read(key))
    content[-1] ^= 1
    store.write(key, memoryview(content), len(content))
    with pytest.raises(Damaged):
        fsspec.open(address(run, "latest/w.npy")).open()


def test_a_file_system_can_be_sent_to_another_process(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.save(1, {"w": Tensor(GRID)})
    files = pickle.loads(pickle.dumps(opened(run)))
    with files.open("latest/w.npy") as file:
        assert np.array_equal(np.load(file), GRID)


def test_a_path_is_the_address_of_a_store_too(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.save(1, {"w": Tensor(GRID)})
    with fsspec.open(f"ckptsvc://{tmp_path}/run!/latest/w.npy") as file:
        assert np.array_equal(np.load(file), GRID)
    files, path = fsspec.url_to_fs(f"ckptsvc://{tmp_path}/run")
    assert files.ls(path, detail=False) == ["step-000000000001.e00001"]
