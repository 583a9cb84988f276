"""A second reader of checkpoints, written from `proto/FORMAT.md` alone. It knows nothing of ckptsvc.

    python reader.py RUN            lists the newest checkpoint below a folder

It needs json, numpy and safetensors; with xxhash it also verifies all that it reads, and with zstandard it reads what
is compressed. Sections (§) are the specification's. It has two ways to a tensor: by the index (`tensor`), as a restore
would, and by the headers of the shards (`tensor_from_shards`), with the safetensors library only: where each shard is
one file. What section 13 limits is left to the product.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

try:
    import xxhash
except ImportError:  # it reads all the same, unverified
    xxhash = None

try:
    import zstandard
except ImportError:
    zstandard = None

# §4.2: code -> (name, bytes per element, numpy's name or None)
DTYPES = {
    0: ("bool", 1, "?"),
    1: ("uint8", 1, "<u1"),
    2: ("int8", 1, "<i1"),
    3: ("int16", 2, "<i2"),
    4: ("int32", 4, "<i4"),
    5: ("int64", 8, "<i8"),
    6: ("uint16", 2, "<u2"),
    7: ("uint32", 4, "<u4"),
    8: ("uint64", 8, "<u8"),
    9: ("float16", 2, "<f2"),
    10: ("bfloat16", 2, None),
    11: ("float32", 4, "<f4"),
    12: ("float64", 8, "<f8"),
    13: ("float8_e4m3fn", 1, None),
    14: ("float8_e5m2", 1, None),
    15: ("float8_e4m3fnuz", 1, None),
    16: ("float8_e5m2fnuz", 1, None),
    17: ("float8_e8m0fnu", 1, None),
    18: ("float4_e2m1fn_x2", 1, None),
    19: ("complex32", 4, None),
    20: ("complex64", 8, "<c8"),
    21: ("complex128", 16, "<c16"),
    22: ("bits8", 1, None),
    23: ("bits16", 2, None),
    24: ("bits1x8", 1, None),
    25: ("bits2x4", 1, None),
    26: ("bits4x2", 1, None),
    **{30 + n: (f"uint{n}", 1, None) for n in range(1, 8)},
    **{40 + n: (f"int{n}", 1, None) for n in range(1, 8)},
}
ITEMSIZE = {name: size for name, size, _ in DTYPES.values()}
NUMPY = {name: spelling for name, _, spelling in DTYPES.values()}
TAGS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class BadCheckpointError(Exception):
    """Something is not as the specification says."""


def require(condition, what):
    if not condition:
        raise BadCheckpointError(what)


def parse_record(text, sealed=False):
    """§5: canonical JSON, the version checked first, the seal verified."""
    fields = json.loads(text)
    major, _ = map(int, fields["format"].split("."))
    require(major in (1, 2), f"format {fields['format']} is newer than this reader")

    def canonical(record):
        return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    require(canonical(fields) == text, "a record is not in canonical form")
    if sealed:
        check = fields.pop("check")
        if xxhash:
            require(xxhash.xxh3_64_hexdigest(canonical(fields)) == check, "a record does not match its checksum")
    return fields


def read_container(path):
    """§6: (columns or tensors as arrays of bytes by key with (tag, shape), metadata, info record, header size)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    return header, metadata, parse_record(metadata["ckptsvc"].encode()), 8 + length


def lists(flat, ends):
    """§9: the lists that `ends` cuts a flat column into."""
    ends = [int(end) for end in ends]
    return [flat[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def place(target, kind, numbers, data):
    """§4.3: puts the data of a region [elements, itemsize] into the tensor [*shape, itemsize]."""
    if kind == "flat":
        start, length = numbers
        target.reshape(-1, target.shape[-1])[start : start + length] = data
    else:
        origin, shape = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        box = tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))
        target[box] = data.reshape(*shape, target.shape[-1])


def as_numpy(dtype, data):
    """An array of numpy's own dtype where there is one, else of bytes with one more last dimension."""
    if NUMPY[dtype] is None:
        return data
    return np.ascontiguousarray(data).view(NUMPY[dtype]).reshape(data.shape[:-1])


def unpacked(data, planes, nbytes):
    """§9.2: the content of a segment: decompressed, and its planes joined."""
    if planes == 0:
        return np.frombuffer(data, np.uint8)
    content = np.frombuffer(zstandard.ZstdDecompressor().decompress(data, max_output_size=nbytes), np.uint8)
    require(len(content) == nbytes, "a segment comes to another size")
    whole = nbytes // planes * planes
    return np.concatenate((content[:whole].reshape(planes, -1).T.reshape(-1), content[whole:]))


class Checkpoint:
    """§12: one committed checkpoint, opened by its index."""

    def __init__(self, folder):
        self.folder = folder
        step, epoch = map(int, re.fullmatch(r"step-(\d+)\.e(\d+)", folder.name).groups())
        self.commit = parse_record((folder / "COMMIT").read_bytes(), sealed=True)
        require((self.commit["step"], self.commit["epoch"]) == (step, epoch), "the commit record is of another folder")
        path = folder / self.commit["index"]
        image = path.read_bytes()
        require(len(image) == self.commit["index_bytes"], "the index has another size")
        if xxhash:
            require(xxhash.xxh3_128_hexdigest(image) == self.commit["index_digest"], "the index is damaged")
        header, _, self.info, base = read_container(path)
        self.columns = {}
        for name, entry in header.items():
            dtype = {"U8": "<u1", "U32": "<u4", "U64": "<u8", "I64": "<i8"}[entry["dtype"]]
            begin, end = entry["data_offsets"]
            self.columns[name] = np.frombuffer(image[base + begin : base + end], dtype)
        names = lists(self.columns["tensor_names"].tobytes(), self.columns["tensor_name_ends"])
        self.rows = {name.decode(): row for row, name in enumerate(names)}
        shard_names = lists(self.columns["shard_names"].tobytes(), self.columns["shard_name_ends"])
        self.shards = [self.folder / name.decode() for name in shard_names]
        self.digests = lists(self.columns["shard_digests"], self.columns["shard_digest_ends"])
        require(len(self.shards) == self.commit["shards"], "the index lists another number of shards")
        self.segments = [[] for _ in self.shards]
        if self.info["format"].startswith("2."):
            self._read_segments()
        if xxhash:
            hashes = [xxhash.xxh3_64_intdigest(name) for name in names]
            require(hashes == self.columns["tensor_hash"].tolist() == sorted(hashes), "names do not match hashes")

    def _read_segments(self):
        """§9.2: for each shard [(first extent, extents, place, base)]; a place is a row of `fields`."""
        columns = self.columns
        folders = [name.decode() for name in lists(columns["folder_names"].tobytes(), columns["folder_name_ends"])]
        own = self.folder.name
        require(sorted({*folders} - {own}) == self.commit.get("refers", []), "the commit record refers to others")
        names = lists(columns["file_names"].tobytes(), columns["file_name_ends"])
        self.files = [
            self.folder.parent / folders[folder] / name.decode()
            for folder, name in zip(columns["file_folder"], names, strict=True)
        ]
        fields = [columns[f"file_{name}"].tolist() for name in ("nbytes", "header_nbytes", "header_digest")]
        for path, size, header, digest in zip(self.files, *fields, strict=True):
            with path.open("rb") as file:
                head = file.read(header)
            require(path.stat().st_size == size, f"{path} has another size")
            if xxhash and header:
                require(xxhash.xxh3_64_intdigest(head) == digest, f"the header of {path} is damaged")
        fields = ("file", "offset", "nbytes", "codec", "digest")
        places, bases = (
            list(zip(*(columns[f"{kind}_{n}"].tolist() for n in fields), strict=True)) for kind in ("segment", "base")
        )
        rows = list(zip(columns["segment_extents"].tolist(), places, columns["segment_base"].tolist(), strict=True))
        self.segments = []
        for listed in lists(rows, columns["shard_segment_ends"]):
            first, found = 0, []
            for extents, place, base in listed:
                found.append((first, extents, place, bases[base - 1] if base else None))
                first += extents
            self.segments.append(found)

    def _stored(self, place):
        file, offset, nbytes, codec, digest = place
        with self.files[file].open("rb") as opened:
            opened.seek(offset)
            data = opened.read(nbytes)
        require(len(data) == nbytes, f"{self.files[file]} is truncated")
        if xxhash and digest:
            require(xxhash.xxh3_64_intdigest(data) == digest, f"{self.files[file]}: a segment is damaged")
        return data, codec

    def _extents(self, shard, first, last):
        """The bytes of extents [first, last) of a shard."""
        extent = self.info["extent"]
        size = int(self.columns["shard_nbytes"][shard])
        if not self.segments[shard]:
            with self.shards[shard].open("rb") as file:
                file.seek(first * extent)
                return file.read((last - first) * extent)
        parts = []
        for begin, extents, place, base in self.segments[shard]:
            low, high = max(begin, first), min(begin + extents, last)
            if low >= high:
                continue
            nbytes = min((begin + extents) * extent, size) - begin * extent
            content = unpacked(*self._stored(place), nbytes)
            if base is not None:
                content = content ^ unpacked(*self._stored(base), nbytes)
            parts.append(content[(low - begin) * extent : (high - begin) * extent].tobytes())
        return b"".join(parts)

    def names(self):
        """All tensors and aliases but the objects documents."""
        own = [name for name in self.rows if not re.fullmatch(r"@rank/\d+/objects", name)]
        return sorted([*own, *self.info["aliases"]])

    def meta(self, name):
        """(dtype, shape)."""
        row = self.rows[self.info["aliases"].get(name, name)]
        first = int(self.columns["tensor_ndim"][:row].sum(dtype=np.int64))
        shape = self.columns["tensor_shape"][first : first + int(self.columns["tensor_ndim"][row])]
        return DTYPES[int(self.columns["tensor_dtype"][row])][0], tuple(shape.tolist())

    def regions(self, name):
        """[(kind, numbers, shard, offset)]."""
        row = self.rows[self.info["aliases"].get(name, name)]
        ends = self.columns["tensor_region_ends"].astype(int).tolist()
        kinds = self.columns["region_kind"]
        tensor = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        counts = np.where(kinds == 1, 2, 2 * self.columns["tensor_ndim"].astype(int)[tensor])
        stops = np.cumsum(counts)
        found = []
        for region in range(ends[row - 1] if row else 0, ends[row]):
            numbers = self.columns["region_geometry"][stops[region] - counts[region] : stops[region]].tolist()
            kind = "flat" if kinds[region] else "box"
            shard, offset = self.columns["region_shard"][region], self.columns["region_offset"][region]
            found.append((kind, numbers, int(shard), int(offset)))
        return found

    def read(self, shard, offset, nbytes):
        """§10: bytes of a shard, verified in whole extents."""
        extent = self.info["extent"]
        first, last = offset // extent, -(-(offset + nbytes) // extent)
        data = self._extents(shard, first, last)
        for i in range(first, last) if xxhash else ():
            part = data[(i - first) * extent : (i - first + 1) * extent]
            require(
                xxhash.xxh3_64_intdigest(part) == self.digests[shard][i], f"{self.shards[shard]}: extent {i} is damaged"
            )
        found = data[offset - first * extent : offset - first * extent + nbytes]
        require(len(found) == nbytes, f"{self.shards[shard]} is truncated")
        return found

    def tensor(self, name):
        """A whole tensor, by the index."""
        dtype, shape = self.meta(name)
        itemsize = ITEMSIZE[dtype]
        target = np.zeros((*shape, itemsize), np.uint8)
        missing = np.ones((*shape, 1), bool)
        for kind, numbers, shard, offset in self.regions(name):
            elements = numbers[1] if kind == "flat" else int(np.prod(numbers[len(numbers) // 2 :], dtype=int))
            data = np.frombuffer(self.read(shard, offset, elements * itemsize), np.uint8)
            place(target, kind, numbers, data.reshape(-1, itemsize))
            place(missing, kind, numbers, np.zeros((elements, 1), bool))
        require(not missing.any(), f"{name} has a hole")
        return as_numpy(dtype, target)

    def tensor_from_shards(self, name):
        """§7: the same by the shards' own headers, read with safetensors."""
        name, target = self.info["aliases"].get(name, name), None
        for path in self.shards:
            with safe_open(path, "numpy") as shard:
                listed = json.loads(shard.metadata()["ckptsvc.parts"])
            header, _, _, base = read_container(path)
            for key, entry in header.items():
                tag, shape = TAGS[entry["dtype"]], entry["shape"]
                own = listed.get(key, [key, tag, shape, "box", [0] * len(shape) + shape])
                if own[0] != name:
                    continue
                _, dtype, shape, kind, numbers = own
                if target is None:
                    target = np.zeros((*shape, ITEMSIZE[dtype]), np.uint8)
                begin, end = entry["data_offsets"]
                data = np.fromfile(path, np.uint8, end - begin, offset=base + begin)
                place(target, kind, numbers, data.reshape(-1, ITEMSIZE[dtype]))
        return as_numpy(dtype, target)

    def objects(self, rank):
        """§8: the saved state of a rank without its tensors; a tensor is ("tensor", name)."""
        name = f"@rank/{rank}/objects"
        document = json.loads(self.tensor(name).tobytes())
        require(document["format"].startswith("1."), "the objects document is newer than this reader")
        return decode_tree(document["tree"])


def decode_tree(value):
    """§8: the values of an objects document."""
    if isinstance(value, list):
        return [decode_tree(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: decode_tree(item) for key, item in value.items()}
    tag, v = value["!"], value["v"]
    if tag in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](decode_tree(v))
    if tag in ("dict", "OrderedDict", "Counter"):
        return {decode_tree(key): decode_tree(item) for key, item in v}
    if tag == "defaultdict":
        return {decode_tree(key): decode_tree(item) for key, item in v[1]}
    if tag == "deque":
        return decode_tree(v[1])
    if tag == "int":
        return int(v, 16)
    if tag == "float":
        return float(v)
    if tag == "complex":
        return complex(*decode_tree(v))
    if tag == "range":
        return range(*decode_tree(v))
    if tag in ("bytes", "bytearray"):
        return base64.b64decode(v)
    if tag == "str":
        return base64.b64decode(v).decode("utf-8", "surrogatepass")
    if tag in ("numpy.ndarray", "numpy.scalar"):
        return np.frombuffer(base64.b64decode(v[2]), v[0]).reshape(v[1])
    return (tag, decode_tree(v))


def committed(run):
    """§12: the committed checkpoints of a run, newest first."""
    found = []
    for folder in run.iterdir():
        match = re.fullmatch(r"step-(\d{12,18})\.e(\d{5,9})", folder.name)
        if match and (folder / "COMMIT").exists():
            found.append((int(match[2]), int(match[1]), folder))
    return [folder for _, _, folder in sorted(found, reverse=True)]


def main():
    checkpoint = Checkpoint(committed(Path(sys.argv[1]))[0])
    print(f"{checkpoint.folder.name}: step {checkpoint.commit['step']}, {checkpoint.commit['shards']} shards")
    for name in checkpoint.names():
        dtype, shape = checkpoint.meta(name)
        tensor = checkpoint.tensor(name)
        print(f"{name}  {dtype} {list(shape)}  {tensor.nbytes} bytes in {len(checkpoint.regions(name))} regions")


if __name__ == "__main__":
    main()
