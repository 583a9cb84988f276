"""Files of torch.save, read and written without torch; torch itself is the judge."""

import argparse
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.truth import image

from ckptsvc.errors import Damaged, InvalidInput, UnsupportedObject
from ckptsvc.geometry.box import Box
from ckptsvc.interop import logical
from ckptsvc.interop.files import open_files
from ckptsvc.interop.logical import Foreign, Stretch
from ckptsvc.interop.outputs import OutputFile
from ckptsvc.interop.torch_format.file import read_torch, tensors_in
from ckptsvc.interop.torch_format.write import Call, Global, Inline, Slot, torch_dtype, torch_output
from ckptsvc.interop.views import Mapped, Part, View
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import TensorMeta

STATE = {
    "contiguous": torch.arange(35.0).reshape(5, 7),
    "transposed": torch.arange(35.0).reshape(5, 7).t(),
    "sliced": torch.arange(192.0).reshape(4, 6, 8)[1:3, :, 2:5],
    "permuted": torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1),
    "column": torch.arange(100.0).reshape(10, 10)[2:7, 3],
    "scalar": torch.tensor(3.0),
    "column of one": torch.arange(6.0).reshape(1, 6).t(),
    "slice, transposed": torch.arange(24.0).reshape(6, 4)[:, 1:3].t(),
    "unit inside": torch.arange(192.0).reshape(4, 6, 8)[:, 2:3].transpose(0, 2),
}


@pytest.fixture(params=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Foreign:
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param == "zip")
    files = open_files(str(tmp_path))
    foreign = Foreign("torch:x.pt", files)
    for name, stored in read_torch(files, "x.pt").root.items():
        meta = TensorMeta(name, stored.dtype, stored.shape)
        foreign.add(meta, Box.full(stored.shape), stored.where, stored.block())
    return foreign.seal()


def values(logical: Any, name: str, box: Box | None = None) -> np.ndarray[Any, Any]:
    meta = logical.meta(name)
    want = Want(name, meta.dtype, meta.shape, box or Box.full(meta.shape))
    return read_arrays(logical, logical.source, [want])[0].view(np.float32)


def test_tensors_of_any_strides_come_back(saved: Foreign) -> None:
    for name, tensor in STATE.items():
        assert np.array_equal(values(saved, name), tensor.numpy()), name


def test_a_slice_at_the_end_of_a_file_needs_no_more_than_it_has(tmp_path: Path) -> None:
    part = torch.arange(192.0).reshape(4, 6, 8)[:, 4:5].transpose(0, 2)
    torch.save(part, tmp_path / "x.pt", _use_new_zipfile_serialization=False)  # its storage is the end of the file
    files = open_files(str(tmp_path))
    stored = read_torch(files, "x.pt").root
    foreign = Foreign("torch:x.pt", files)
    foreign.add(TensorMeta("x", "float32", stored.shape), Box.full(stored.shape), stored.where, stored.block())
    assert np.array_equal(values(foreign.seal(), "x"), part.numpy())
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[: -4 * 9])
    with pytest.raises(Damaged):
        values(foreign, "x")


def test_views_of_views_are_parts_of_what_is_stored(saved: Foreign) -> None:
    base = STATE["permuted"]  # (5, 3, 4)
    swapped = View(
        TensorMeta("swapped", "float32", (4, 5, 3)),
        (
            Part(Box((0, 0, 0), (2, 5, 3)), "permuted", Box((0, 0, 2), (5, 3, 2)), (2, 0, 1)),
            Part(Box((2, 0, 0), (2, 5, 3)), "permuted", Box((0, 0, 0), (5, 3, 2)), (2, 0, 1)),
        ),
    )
    expected = torch.cat([base[:, :, 2:], base[:, :, :2]], 2).permute(2, 0, 1)
    once = Mapped(saved, [swapped])
    assert np.array_equal(values(once, "swapped"), expected.numpy())
    row = View(
        TensorMeta("row", "float32", (1, 5, 4)),
        (Part(Box((0, 0, 0), (1, 5, 4)), "swapped", Box((0, 0, 1), (4, 5, 1)), (-1, 1, 0)),),
    )
    assert np.array_equal(values(Mapped(once, [row]), "row"), expected[:, :, 1].t()[None].numpy())


def test_what_torch_does_not_see_as_a_box_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(3).expand(4, 3), torch.arange(9.0).reshape(3, 3).diagonal()], tmp_path / "x.pt")
    for stored in read_torch(open_files(str(tmp_path)), "x.pt").root[:1]:
        with pytest.raises(InvalidInput, match="no box"):
            stored.block()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("view", [torch.tensor([1 + 2j]).conj(), torch._neg_view(torch.tensor([1.0]))])
def test_views_that_change_what_is_stored_are_refused(tmp_path: Path, view: torch.Tensor, kind: str) -> None:
    torch.save({"w": view}, tmp_path / "x.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InvalidInput, match=r"x\.pt: .*conjugates or negates"):
        read_torch(open_files(str(tmp_path)), "x.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("gotcha",)


def test_a_pickle_that_imports_is_refused_by_name_and_not_run(tmp_path: Path, capsys: Any) -> None:
    torch.save({"a": Evil()}, tmp_path / "x.pt")
    with pytest.raises(InvalidInput, match=r"imports (builtins|__builtin__)\.print"):
        read_torch(open_files(str(tmp_path)), "x.pt")
    assert capsys.readouterr().out == ""


def test_a_pickle_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    pickled = b"\x80\x02}r\xff\xff\xff\x7f."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
    with pytest.raises(Damaged, match="memory"):
        read_torch(open_files(str(tmp_path)), "x.pt")


def test_a_pickle_that_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N.")
    with pytest.raises(Damaged, match="compressed"):
        read_torch(open_files(str(tmp_path)), "x.pt")


def test_of_large_arrays_that_are_unpacked_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    foreign = Foreign("test:", open_files(str(tmp_path)))
    for name in "ab":

        def load(_files: Any, name: str = name) -> bytes:
            loaded.append(name)
            return bytes(40)

        foreign.add(TensorMeta(name, "float32", (10,)), Box.full((10,)), Stretch(name, 0, 40, None, load))
    foreign.seal()
    for limit, expected in ((79, "aba"), (80, "b")):
        monkeypatch.setattr(logical, "MAX_LOADED_BYTES", limit)
        loaded.clear()
        for name in "aba":
            values(foreign, name)
        assert "".join(loaded) == expected


def test_a_truncated_or_foreign_file_is_damaged(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for nbytes in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "y.pt").write_bytes(whole[:nbytes])
        with pytest.raises(Damaged):
            read_torch(open_files(str(tmp_path)), "y.pt")
    (tmp_path / "z.pt").write_bytes(b"hello, world, I am text")
    with pytest.raises(Damaged):
        read_torch(open_files(str(tmp_path)), "z.pt")


def rendered(output: OutputFile, tensors: dict[str, torch.Tensor]) -> bytes:
    """The file of a plan: what `convert` does, without its care."""
    return image(output, lambda fill: tensors[fill.name].view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path: Path, mmap: bool) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3).bfloat16(),
        "c": torch.randint(0, 60000, (4,)).to(torch.uint16),
        "d": torch.tensor(True),
    }
    slots = {
        n: Slot(n, Box.full(tuple(t.shape)), str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for n, t in tensors.items()
    }
    root = {
        "module": OrderedDict(slots),
        "tied": slots["a"],
        "plain": [1, -5, 10**20, 300, 2.5, None, True, False, "é", (1, (2,)), {}],
        3: Inline("float32", (), struct.pack("<f", 5.0)),
        "dtype": torch_dtype("bfloat16"),
        "size": Call(Global("torch", "Size"), ((3, 4),)),
        "args": Call(Global("argparse", "Namespace"), (), {"lr": 0.1}),
        "empty": Slot("none", Box((0, 0), (0, 3)), "float32", (0, 3)),
    }
    (tmp_path / "x.pt").write_bytes(rendered(torch_output("x.pt", root), tensors))
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert all(torch.equal(back["module"][n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())
    assert back["tied"].data_ptr() == back["module"]["a"].data_ptr()
    assert back["plain"] == root["plain"]
    assert (back[3], back["dtype"], back["size"]) == (torch.tensor(5.0), torch.bfloat16, torch.Size([3, 4]))
    assert back["args"] == argparse.Namespace(lr=0.1)
    assert back["empty"].shape == (0, 3)
    stored = read_torch(open_files(str(tmp_path)), "x.pt").root
    assert [path for path, _ in tensors_in(stored)][:2] == [("module", "a"), ("module", "b")]


def test_what_torch_load_would_not_take_is_not_written() -> None:
    with pytest.raises(UnsupportedObject, match="/a/1"):
        torch_output("x.pt", {"a": [1, object()]})
