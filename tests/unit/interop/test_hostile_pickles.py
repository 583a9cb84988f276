"""Pickles made by hand, as no framework writes them: they are refused, at once and without harm."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput
from ckptsvc.interop.dcp import metadata as dcp_metadata
from ckptsvc.interop.deepspeed import files as deepspeed_files
from ckptsvc.interop.files import open_files
from ckptsvc.interop.megatron import files as megatron_files
from ckptsvc.interop.torch_format.file import MAGIC, TORCH, TorchFile, read_torch, storage_id
from ckptsvc.interop.torch_format.pickles import PLAIN, loads


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(key: str, elements: int, view: bytes = b"N", kind: str = "FloatStorage") -> bytes:
    number = b"J" + struct.pack("<i", elements)
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number + view + b"tQ"


def tensor(stored: bytes, elements: int) -> bytes:
    shape = b"J" + struct.pack("<i", elements) + b"\x85"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + stored + b"K\x00" + shape + b"K\x01\x85\x89NtR"


def legacy(folder: Path, root: bytes, storages: dict[str, tuple[int, int]]) -> TorchFile:
    """A legacy file read: `storages` has for each key the number of elements stated, and how many there are."""
    data = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    data += b"\x80\x02" + root + b"." + pickle.dumps(list(storages), 2)
    for stated, elements in storages.values():
        data += struct.pack("<q", stated) + np.ones(elements, np.float32).tobytes()
    (folder / "x.pt").write_bytes(data)
    return read_torch(open_files(str(folder)), "x.pt")


def test_a_legacy_file_made_by_hand_is_read(tmp_path: Path) -> None:
    found = legacy(tmp_path, tensor(storage("0", 8), 8), {"0": (8, 8)})
    assert found.root.shape == (8,)


@pytest.mark.parametrize(
    ("root", "storages", "error", "says"),
    [
        (tensor(storage("0", 8, b"(" + text("v") + b"K\x04K\x04t"), 4), {"0": (8, 8)}, InvalidInput, "view of another"),
        (
            b"(" + tensor(storage("0", 8), 8) + tensor(storage("0", 2), 2) + b"t",
            {"0": (8, 8)},
            Damaged,
            "contradicts itself",
        ),
        (
            b"(" + tensor(storage("0", 8), 8) + tensor(storage("0", 8, kind="IntStorage"), 8) + b"t",
            {"0": (8, 8)},
            Damaged,
            "contradicts itself",
        ),
        (b"(" + storage("0", -8) + b"t", {"0": (8, 8)}, Damaged, "cannot be"),
        (tensor(storage("0", 4), 4), {"0": (8, 8)}, Damaged, "not the 4 elements"),
    ],
)
def test_legacy_storages_that_are_not_what_is_said_are_refused(
    tmp_path: Path, root: bytes, storages: dict[str, tuple[int, int]], error: type[CkptsvcError], says: str
) -> None:
    with pytest.raises(error, match=says):
        legacy(tmp_path, root, storages)


MANY = b"J" + struct.pack("<i", 50_000_000)


@pytest.mark.parametrize(
    "pickled",
    [
        named("builtins", "bytearray") + MANY + b"\x85R.",
        named("torch", "Size") + named("builtins", "bytearray") + text("\0\0") + text("latin1") + b"\x86R\x85R.",
        named("torch", "Size") + text("ab") + b"\x85R.",
    ],
)
def test_memory_is_made_of_what_the_pickle_has_only(pickled: bytes) -> None:
    with pytest.raises(Damaged, match=r"neither bytes nor text|a shape is"):
        loads(b"\x80\x02" + pickled, TORCH, "x")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_harmless_bytes_are_read(protocol: int) -> None:
    assert loads(pickle.dumps(bytearray(b"a\xff"), protocol), TORCH, "x") == bytearray(b"a\xff")
    assert loads(pickle.dumps([bytearray(), b"\xff"], protocol), TORCH, "x") == [bytearray(), b"\xff"]


@pytest.mark.parametrize(
    "pickled",
    [
        b"Np30000000\n.",
        b"Np+30000000\n.",
        b"Np 30000000 \n.",
        b"Np\x0c30_000_000\n.",
        b"Np030000000\x00n\n.",
        b"Np30000000",
        text("p" * 10_001) + b"0Np30000000\n.",
        text("p" * 10_001) + b"0Nr" + struct.pack("<I", 30_000_000) + b".",
    ],
)
def test_places_in_the_memo_are_not_more_than_the_pickle_has_bytes(pickled: bytes) -> None:
    with pytest.raises(Damaged, match="memory"):
        loads(b"\x80\x02" + pickled, TORCH, "x")


def test_text_that_looks_like_a_place_in_the_memo_is_text() -> None:
    value = {"p99999999\n": "up 99999999\n", "step+1": b"p_99999999", "p1\n": "p\n", "r9999": b"r\xff\xff\xff\xff"}
    for protocol in range(6):
        assert loads(pickle.dumps({n: str(v) for n, v in value.items()}, protocol), TORCH, "x")["p1\n"] == "p\n"
    assert loads(pickle.dumps(value, 4), TORCH, "x") == value


EVERYTHING = {**PLAIN, **TORCH, **dcp_metadata.ALLOWED, **deepspeed_files.ALLOWED, **megatron_files.MEGATRON}


@pytest.mark.parametrize("name", EVERYTHING, ids=".".join)
def test_what_a_pickle_names_cannot_be_changed_by_it(name: tuple[str, str]) -> None:
    for attribute in ("dtype", "__setstate__", "__kwdefaults__", "__doc__", "_call"):
        item = text(attribute) + b"Ns"
        for state in (b"}" + item, b"N}" + item + b"\x86"):
            with pytest.raises(CkptsvcError):
                loads(b"\x80\x02" + named(*name) + state + b"b.", EVERYTHING, "x")


def laughs(levels: int, first: bytes = b"]") -> bytes:
    """An object in two bytes more for each level that has it twice: 2**levels are met in it."""
    return first + b"".join(b"q%ch%c\x86" % (level, level) for level in range(1, levels + 1))


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (laughs(60), "expands"),
        (b"}K\x01" + laughs(60) + b"s", "expands"),
        (named(dcp_metadata._METADATA, "Metadata") + b")\x81}" + text("planner_data") + laughs(60) + b"sb", "expands"),
        (named("argparse", "Namespace") + b")\x81}" + text("a") + laughs(60) + b"sb", "expands"),
        (b"(]q\x00(" + b"N" * 1000 + b"eh\x00" + b"h\x00" * 1000 + b"t", "expands"),
        (named("torch.serialization", "_get_layout") + laughs(60) + b"\x85R", "text"),
        (named("torch", "device") + laughs(60) + b"\x85R", "text"),
        (named("pathlib", "PosixPath") + laughs(60, text("a")) + b"\x85R", "text"),
        (named("torch", "Size") + laughs(60) + b"\x85R", "shape"),
        (b"]q\x00(h\x00h\x00e", "contains itself"),
        (b"]" * 1000 + b"a" * 999, "nested"),
        (laughs(60) + b"Q", "refers to"),
        (named("numpy", "dtype") + b"]\x85Rq\x00" + laughs(60, b"h\x00"), "expands"),
    ],
    ids=range(13),
)
def test_a_small_pickle_that_makes_an_endless_walk_is_refused(pickled: bytes, says: str) -> None:
    with pytest.raises(Damaged, match=says):
        loads(b"\x80\x02" + pickled + b".", EVERYTHING, "x", lambda pid: storage_id(pid, "x"))


def test_what_is_shared_within_reason_is_read() -> None:
    shared = [0.9, 0.999]
    value = {i: {"betas": shared, "lr": i} for i in range(1000)}
    assert loads(pickle.dumps(value), PLAIN, "x") == value
