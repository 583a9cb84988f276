"""Plans of conversions that no machine here could make: 405 billion and 1 trillion parameters, with Adam's state."""

import time

import pytest

from ckptsvc.geometry.box import Box
from ckptsvc.interop.estimate import Estimate, estimate
from ckptsvc.interop.native import Held, Naming, write_native
from ckptsvc.interop.produce import Budget
from ckptsvc.interop.shapes import MODELS, Declared, declared
from ckptsvc.interop.tasks import tasks
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.types import TensorMeta

TP, PP, DP = 8, 64, 4


def placing(layers: int):
    """Tensor parallel by columns or rows, pipeline by layers, each part cut again over the data-parallel ranks."""

    def place(meta: TensorMeta) -> list[Held]:
        parts = meta.name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else (0 if "embed" in meta.name else -1)
        stage = (layer % layers) * PP // layers
        if len(meta.shape) < 2:
            return [Held(stage * TP * DP, Box.full(meta.shape))]
        cut = 1 if "o_proj" in meta.name or "down_proj" in meta.name else 0
        height, width = meta.shape if cut else (meta.shape[0] // TP, meta.shape[1])
        width = width // TP if cut else width
        rows = height // DP
        return [
            Held(
                (stage * TP + tp) * DP + dp,
                Box((dp * rows, tp * width) if cut else (tp * height + dp * rows, 0), (rows, width)),
            )
            for tp in range(TP)
            for dp in range(DP)
        ]

    return place


def planned(source: Declared, layers: int) -> Estimate:
    naming = Naming("run", Ref(1, 0), "", "ab" * 16)
    output = write_native(source, {}, naming, placing(layers), TP * PP * DP)
    return estimate(source, tasks(output.files, source), Budget.of(8 << 30, source.extent))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [pytest.param("llama3-405b", 405.9e9, marks=pytest.mark.slow), ("gpt-1t", 1.009e12)],
)
def test_tp8_pp64_dp4_is_planned_in_seconds_and_reads_every_byte_once(name: str, parameters: float) -> None:
    began = time.monotonic()
    found = planned(declared(name), MODELS[name].layers)
    assert time.monotonic() - began < 120, "a few seconds on a quiet machine"
    assert found.needed == pytest.approx(parameters * 14, rel=0.005)  # bytes: weight, master, two moments
    assert found.amplification < 1.001
    assert found.written >= found.needed
    assert found.files == TP * PP * DP
    assert found.memory < 8 << 30
