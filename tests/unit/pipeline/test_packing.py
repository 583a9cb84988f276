"""Extents are made smaller where that is possible, and stay as they are where it is not."""

import numpy as np
import pytest
from harness.increments import floats

from ckptsvc.format.columns import Columns
from ckptsvc.format.planes import PLAIN, decompress, exclusive_or
from ckptsvc.format.shard import Part, ShardTemplate
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.packing import measure, pack, planes_of
from ckptsvc.types import TensorMeta

NOISE = np.random.default_rng(1).bytes(1 << 20)


@pytest.mark.parametrize("nbytes", [1, 15, 64 << 10, 200_001, 1 << 20])
def test_what_is_stored_gives_back_the_bytes(nbytes):
    plain = floats(1 << 18).tobytes()[:nbytes]
    near = (floats(1 << 18) ^ 3).tobytes()[:nbytes]
    for data in (plain, NOISE[:nbytes], bytes(nbytes)):
        for base in (None, near, NOISE[:nbytes]):
            found = pack(memoryview(data), None if base is None else memoryview(base), 4, 1)
            content = found.data if found.codec == PLAIN else decompress(found.data, found.codec, nbytes, "x")
            assert bytes(exclusive_or(content, base) if found.delta else content) == data
            assert len(found.data) <= nbytes


def test_the_smallest_way_is_taken():
    data, near = memoryview(floats(1 << 18).tobytes()), memoryview((floats(1 << 18) ^ 3).tobytes())
    assert pack(data, None, 4, 1)[1:] == (4, False)
    assert pack(data, near, 4, 1)[1:] == (4, True)
    assert pack(data, memoryview(NOISE), 4, 1)[1:] == (4, False), "a base that has nothing in common"
    assert pack(memoryview(NOISE), None, 4, 1)[1:] == (PLAIN, False)


def test_each_extent_has_the_planes_of_its_tensor():
    kinds = (("bfloat16", 4096), ("float64", 1024), ("uint8", 9000), ("float32", 2048), ("complex128", 512))
    metas = [TensorMeta(dtype, dtype, (elements,)) for dtype, elements in kinds]
    template = ShardTemplate([Part(meta, Box.full(meta.shape)) for meta in metas])
    columns = Columns.from_entries(template.entries, template.objects_offset, template.structure)
    count = -(-template.total(10) // 4096)
    first = template.data_start // 4096
    assert planes_of(columns, count, 4096).tolist()[first:] == [8, 8, 8, 8, 4, 4, 2, 2, 1, 1, 1]
    empty = Columns.from_entries([], 4096, "")
    assert planes_of(empty, 3, 4096).tolist() == [1, 1, 1]


def test_a_trial_looks_at_a_few_extents_everywhere():
    looked = []

    def packer(number):
        looked.append(number)
        return pack(memoryview(bytes(1000)), None, 1, 1)

    trial = measure(range(100), packer, lambda number: 1000)
    assert looked == [0, 12, 24, 36, 48, 60, 72, 84]
    assert 0 < trial.ratio < 0.1
    assert trial.speed > 0
