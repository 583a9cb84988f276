from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput
from ckptsvc.format.header import ITEMSIZE_BY_TAG
from ckptsvc.format.shard import PAGE, Part, ShardTemplate, decode_header, header_length
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import DTYPES, TensorMeta


def whole(name, dtype="float32", shape=(2, 3)):
    return Part(TensorMeta(name, dtype, shape), Box.full(shape))


def image(template, info, objects=b"{}"):
    """A complete shard whose tensors hold the bytes 0, 1, 2, ..."""
    data = (np.arange(template.tensor_bytes) % 251).astype(np.uint8).tobytes()
    return template.header(info, len(objects)) + data + objects


def table(file):
    return decode_header(file, len(file))


def edited(file, change):
    """The shard with its header's JSON changed by a function."""
    length = header_length(file)
    header = json.loads(file[8 : 8 + length])
    change(header)
    body = json.dumps(header).encode()
    body = body.ljust(-(-(len(body) + 8) // PAGE) * PAGE - 8)
    return len(body).to_bytes(8, "little") + body + file[8 + length :]


def parts_of(header):
    return json.loads(header["__metadata__"]["ckptsvc.parts"])


@given(st.data())
def test_any_parts_come_back(kit, data):
    parts = data.draw(kit.parts_lists())
    info = kit.shard_info(data.draw(st.sampled_from([0, 3, 999_999])))
    objects = data.draw(st.binary(max_size=9))
    template = ShardTemplate(parts)
    file = image(template, info, objects)
    assert len(file) == template.total(len(objects))
    found = table(file)
    # Entries are in file order; where empty tensors begin together any order is one.
    assert sorted(map(repr, found.entries[:-1])) == sorted(map(repr, template.entries))
    assert [(e.meta, e.region) for e in template.entries] == [(p.meta, p.region) for p in parts]
    assert found.info.structure == template.structure
    assert (found.info.rank, found.info.job, found.data_start) == (info.rank, info.job, template.data_start)
    assert file[found.objects.offset :] == objects
    assert found.objects.meta.name == f"@rank/{info.rank}/objects"


@given(st.data())
def test_every_tensor_is_aligned_and_there_is_no_hole(kit, data):
    template = ShardTemplate(data.draw(kit.parts_lists()))
    position = template.data_start
    assert position % PAGE == 0
    for entry in sorted(template.entries, key=lambda entry: (entry.offset, entry.nbytes)):
        assert entry.offset % DTYPES[entry.meta.dtype].itemsize == 0
        assert entry.offset == position
        position += entry.nbytes
    assert position == template.objects_offset == template.data_start + template.tensor_bytes


@pytest.mark.parametrize("framework", ["numpy", "pt"])
def test_safetensors_opens_a_shard_with_every_dtype(tmp_path, kit, framework):
    parts = [whole(f"w/{dtype}", dtype, shape) for dtype in DTYPES for shape in [(2, 3)]]
    parts += [Part(TensorMeta(f"box/{dtype}", dtype, (4, 3)), Box((1, 0), (2, 3))) for dtype in DTYPES]
    parts += [Part(TensorMeta(f"flat/{dtype}", dtype, (4, 3)), FlatRange(5, 6)) for dtype in DTYPES]
    parts += [whole(f"zero/{dtype}", dtype, (0, 5)) for dtype in DTYPES]
    parts += [whole(f"scalar/{dtype}", dtype, ()) for dtype in DTYPES]
    parts = [part for part in parts if part.meta.dtype != "bool"] + [whole("w/bool", "bool")]
    template = ShardTemplate(parts)
    file = image(template, kit.shard_info())
    path = tmp_path / "r00000-00000000.safetensors"
    # A bool is 0 or 1; all else may have any bits.
    entry = template.entries[-1]
    file = file[: entry.offset] + b"\1\0\1\0\1\1" + file[entry.offset + 6 :]
    path.write_bytes(file)
    bare = {"BF16", "F8_E4M3", "F8_E5M2"}  # NumPy has none of these
    with safe_open(path, framework) as shard:
        assert shard.metadata().keys() == {"ckptsvc", "ckptsvc.parts"}
        listed = json.loads(shard.metadata()["ckptsvc.parts"])
        named = {(listed[key][0] if key in listed else key): key for key in shard.keys()}  # noqa: SIM118
        assert named.keys() == {part.meta.name for part in parts} | {"@rank/0/objects"}
        for entry in template.entries:
            key, dtype = named[entry.meta.name], DTYPES[entry.meta.dtype]
            shape = list((entry.region.length,) if isinstance(entry.region, FlatRange) else entry.region.shape)
            raw = [dtype.itemsize] if not dtype.tag and dtype.itemsize > 1 else []
            assert shard.get_slice(key).get_shape() == shape + raw
            if framework == "numpy" and dtype.tag in bare:
                continue
            tensor = shard.get_tensor(key)
            flat = torch.as_tensor(tensor).reshape(-1).view(torch.uint8).numpy()
            assert flat.tobytes() == file[entry.offset : entry.offset + entry.nbytes], key
            if framework == "pt" and dtype.tag:
                assert tensor.dtype == getattr(torch, dtype.name)


def test_the_header_says_what_a_key_cannot(kit):
    raw = whole("c", "complex64")
    partial = Part(TensorMeta("w", "bfloat16", (10, 4)), Box((2, 0), (3, 4)))
    flat = Part(TensorMeta("f", "float32", (10, 4)), FlatRange(7, 9))
    file = image(ShardTemplate([whole("a"), raw, partial, flat]), kit.shard_info())
    header = json.loads(file[8 : 8 + header_length(file)])
    assert list(header)[1:] == ["c", "a", "f@flat:7:9", "w@2:3,0:4", "@rank/0/objects"]
    assert (header["c"]["dtype"], header["c"]["shape"]) == ("U8", [2, 3, 8])
    assert parts_of(header) == {
        "c": ["c", "complex64", [2, 3], "box", [0, 0, 2, 3]],
        "f@flat:7:9": ["f", "float32", [10, 4], "flat", [7, 9]],
        "w@2:3,0:4": ["w", "bfloat16", [10, 4], "box", [2, 0, 3, 4]],
    }


def test_names_that_look_like_keys_are_kept_apart(kit):
    parts = [
        Part(TensorMeta("w", "int8", (4,)), Box((0,), (1,))),
        whole("w@0:1", "int8", (4,)),
        Part(TensorMeta("w@0:1", "int8", (4,)), FlatRange(0, 4)),
        whole("__metadata__", "int8", (1,)),
    ]
    template = ShardTemplate(parts)
    file = image(template, kit.shard_info())
    assert table(file).entries[:-1] == template.entries
    header = json.loads(file[8 : 8 + header_length(file)])
    assert list(header)[1:-1] == ["w@0:1", "w@0:1@", "w@0:1@flat:0:4", "__metadata__@"]


def test_the_structure_stands_for_the_entries_only(kit):
    template = ShardTemplate([whole("a"), whole("b")])
    assert template.structure == ShardTemplate([whole("a"), whole("b")]).structure
    assert len({template.structure, ShardTemplate([whole("b"), whole("a")]).structure}) == 2
    first = table(image(template, kit.shard_info(step=1)))
    second = table(image(template, kit.shard_info(step=2), b"longer"))
    assert first.info.structure == second.info.structure == template.structure


def test_the_header_has_room_for_what_changes(kit):
    most = 2**63 - 1
    info = kit.shard_info(rank=10**9 - 1, step=most, epoch=most, attempt=most, world_size=most, run="r" * 1500)
    template = ShardTemplate([whole("a")])
    header = template.header(info, 2**62)
    assert len(header) == template.data_start
    assert decode_header(header, template.total(2**62)).info.run == "r" * 1500
    with pytest.raises(InvalidInput, match="run and the job"):
        template.header(kit.shard_info(run="r" * 5000), 0)


@pytest.mark.parametrize(
    "parts",
    [
        [whole("")],
        [whole("\ud800")],
        [whole("x" * 4097)],
        [whole("a", "float31")],
        [Part(TensorMeta("a", "int8", (-1,)), Box((0,), (0,)))],
        [Part(TensorMeta("a", "int8", (2**62, 2**62)), FlatRange(0, 1))],
        [Part(TensorMeta("a", "int8", (1,) * 65), FlatRange(0, 1))],
        [Part(TensorMeta("a", "int8", (4,)), Box((2,), (3,)))],
        [Part(TensorMeta("a", "int8", (4,)), Box((-1,), (3,)))],
        [Part(TensorMeta("a", "int8", (4,)), Box((0, 0), (1, 1)))],
        [Part(TensorMeta("a", "int8", (4,)), FlatRange(2, 3))],
        [Part(TensorMeta("a", "int8", (4,)), FlatRange(-1, 1))],
        [whole("a"), whole("a")],
        [whole("a"), Part(TensorMeta("a", "float32", (2, 4)), FlatRange(0, 1))],
        [whole("a"), Part(TensorMeta("a", "float64", (2, 3)), FlatRange(0, 1))],
        [whole("@rank/3/objects")],
        [whole(f"big{i}", "int8", (2**61,)) for i in range(4)],
    ],
)
def test_impossible_parts_are_refused(parts):
    with pytest.raises(InvalidInput):
        ShardTemplate(parts)


def sample(kit):
    parts = [
        whole("a"),
        Part(TensorMeta("w", "complex64", (10, 4)), Box((2, 0), (3, 4))),
        whole("e", "int8", (0, 3)),
    ]
    return image(ShardTemplate(parts), kit.shard_info())


def relist(key, value):
    def change(header):
        parts = parts_of(header)
        parts[key] = value
        header["__metadata__"]["ckptsvc.parts"] = json.dumps(parts)

    return change


KEY = "w@2:3,0:4"


@pytest.mark.parametrize(
    "change",
    [
        relist("nothing", ["n", "int8", [1], "box", [0, 1]]),
        relist(KEY, ["w", "complex64", [10, 4], "box", [8, 0, 3, 4]]),  # outside
        relist(KEY, ["w", "complex64", [10, 4], "box", [2, 0, 4, 3]]),  # another shape
        relist(KEY, ["w", "complex64", [10, 4], "box", [2, 0, 3]]),
        relist(KEY, ["w", "complex64", [10, 4], "box", [2, 0, 0, 3, 4, 1]]),
        relist(KEY, ["w", "complex64", [10, 4], "flat", [2, 12, 1]]),
        relist(KEY, ["w", "complex64", [10, 4], "flat", [30, 12]]),
        relist(KEY, ["w", "complex64", [10, 4], "cone", [2, 0, 3, 4]]),
        relist(KEY, ["w", "complex32", [10, 4], "box", [2, 0, 3, 4]]),
        relist(KEY, ["w", "complex63", [10, 4], "box", [2, 0, 3, 4]]),
        relist(KEY, ["", "complex64", [10, 4], "box", [2, 0, 3, 4]]),
        relist(KEY, ["a", "complex64", [10, 4], "box", [2, 0, 3, 4]]),  # "a" has another dtype
        relist(KEY, ["w", "complex64", [10, -4], "box", [2, 0, 3, 4]]),
        relist(KEY, ["w", "complex64", [10, 2**63], "box", [2, 0, 3, 4]]),
        relist(KEY, ["w", "complex64", [10, 4], "box", [2, 0, 3, 4.0]]),
        relist(KEY, ["w", "complex64", [10, 4], "box"]),
        relist(KEY, {}),
        relist("a", ["a", "float32", [2, 3], "flat", [0, 6]]),  # stored as [2, 3], not [6]
        lambda header: header["__metadata__"].pop("ckptsvc.parts"),
        lambda header: header["__metadata__"].pop("ckptsvc"),
        lambda header: header["__metadata__"].update({"ckptsvc.parts": "[" * 9999}),
        lambda header: header["__metadata__"].update(ckptsvc='{"format":"1.0"}'),
        lambda header: header.update({"@rank/1/objects": header.pop("@rank/0/objects")}),
        lambda header: header["@rank/0/objects"].update(dtype="I8"),
        lambda header: header["@rank/0/objects"].update(shape=[1, 2]),
        lambda header: header["e"].update(shape=[3, 0, 2**62, 2**62]),
    ],
)
def test_a_header_that_contradicts_itself_is_damage(kit, change):
    assert table(edited(sample(kit), lambda header: None)) is not None
    file = edited(sample(kit), change)
    with pytest.raises(Damaged, match="r7"):
        decode_header(file, len(file), "the shard r7")


def test_a_part_listed_twice_is_damage(kit):
    def change(header):
        text = header["__metadata__"]["ckptsvc.parts"]
        header["__metadata__"]["ckptsvc.parts"] = text[:-1] + "," + text[1:]

    with pytest.raises(Damaged, match="twice"):
        table(edited(sample(kit), change))


def test_the_data_starts_at_a_page(kit):
    file = sample(kit)
    length = header_length(file)
    body = file[8 : 8 + length].rstrip().ljust(length + 8)
    with pytest.raises(Damaged, match="multiple of 4096"):
        table(len(body).to_bytes(8, "little") + body + file[8 + length :])


def test_versions(kit):
    def set_version(version):
        def change(header):
            info = json.loads(header["__metadata__"]["ckptsvc"])
            info.update(format=version, novelty="x")
            text = json.dumps(info, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            header["__metadata__"]["ckptsvc"] = text

        return change

    assert table(edited(sample(kit), set_version("1.9"))).info.step == 7
    with pytest.raises(IncompatibleVersion):
        table(edited(sample(kit), set_version("3.0")))


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    file = sample(kit)
    broken = data.draw(kit.damaged(file[: header_length(file)].rstrip() + file[header_length(file) :]))
    kit.survives(table, broken)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_valid_json_with_wrong_values_comes_out_as_damage(kit, data):
    """The header stays JSON, so that the fuzz gets past the parser to the checks of values."""

    def spoil(value):
        if isinstance(value, dict) and value:
            key = data.draw(st.sampled_from(sorted(value)))
            if key.startswith("ckptsvc") and isinstance(value[key], str):
                inner = json.loads(value[key])
                spoil(inner)
                value[key] = json.dumps(inner, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            elif data.draw(st.booleans()):
                spoil(value[key]) if isinstance(value[key], dict | list) else value.update(
                    {key: data.draw(json_values)}
                )
            else:
                value[key] = data.draw(json_values)
        elif isinstance(value, list) and value:
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(json_values | st.integers(0, 20))

    kit.survives(table, edited(sample(kit), spoil))


def test_every_tag_in_types_is_one_that_safetensors_knows():
    known = {"BOOL", "U8", "I8", "I16", "I32", "I64", "U16", "U32", "U64", "F16", "BF16", "F32", "F64"}
    assert set(ITEMSIZE_BY_TAG) == known | {"F8_E4M3", "F8_E5M2"}
