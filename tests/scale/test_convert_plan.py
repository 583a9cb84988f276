"""Plans of conversions that no machine here could make: 405 billion and 1 trillion parameters, with Adam's state."""

import time
from collections.abc import Iterable

import pytest

from ckptsvc.geometry.box import Box, Region
from ckptsvc.interop.conversion.estimate import Estimate, estimate
from ckptsvc.interop.conversion.native import Naming, write_native
from ckptsvc.interop.conversion.produce import Budget
from ckptsvc.interop.conversion.tasks import tasks
from ckptsvc.interop.naming.shapes import Declared, declared
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.types import TensorMeta

TP, PP, DP = 8, 64, 4
ROW_PARALLEL = ("o_proj", "down_proj", "linear_proj.weight", "linear_fc2.weight")


def held(metas: Iterable[TensorMeta], layers: int) -> dict[int, list[tuple[str, Region]]]:
    """Tensor parallel by columns or rows, pipeline by layers, each part cut again over the data-parallel ranks."""
    found: dict[int, list[tuple[str, Region]]] = {rank: [] for rank in range(TP * PP * DP)}
    for meta in metas:
        parts = meta.name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else (0 if "embed" in meta.name else -1)
        first = (layer % layers) * PP // layers * TP * DP
        if len(meta.shape) < 2:
            found[first].append((meta.name, Box.full(meta.shape)))
            continue
        cut = 1 if any(part in meta.name for part in ROW_PARALLEL) else 0
        height, width = meta.shape if cut else (meta.shape[0] // TP, meta.shape[1])
        width = width // TP if cut else width
        rows = height // DP
        for tp in range(TP):
            for dp in range(DP):
                origin = (dp * rows, tp * width) if cut else (tp * height + dp * rows, 0)
                found[first + tp * DP + dp].append((meta.name, Box(origin, (rows, width))))
    return found


def planned(source: Declared, layers: int) -> Estimate:
    naming = Naming("run", Ref(1, 0), "", "ab" * 16)
    parts = held([source.meta(name) for name in source.names()], layers)
    output = write_native(source, {}, naming, parts.__getitem__, TP * PP * DP)
    return estimate(source, tasks(output.files, source), Budget.of(8 << 30, source.extent))


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [pytest.param("llama3-405b", 126, 405.9e9, marks=pytest.mark.slow), ("gpt-1t", 128, 1.008e12)],
)
def test_tp8_pp64_dp4_is_planned_in_seconds_and_reads_every_byte_once(
    name: str, layers: int, parameters: float
) -> None:
    began = time.monotonic()
    found = planned(declared(name), layers)
    assert time.monotonic() - began < 120, "a few seconds on a quiet machine"
    assert found.needed == pytest.approx(parameters * 14, rel=0.005)  # bytes: weight, master, two moments
    assert found.amplification < 1.001
    assert found.written >= found.needed
    assert found.files == TP * PP * DP
    assert found.memory < 8 << 30
