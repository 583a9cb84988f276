"""Megatron-Core itself loads the checkpoints that are written here, and lays out its buffers as they are read here."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptsvc.interop.formats import exporter, open_foreign
from ckptsvc.interop.megatron.flat import Item, spots
from tests.harness.foreign_values import render

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="Megatron-Core is not installed")


@pytest.mark.slow
def test_megatron_loads_what_is_written(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    for name, kind in (("megatron-tp2pp2_w4", "megatron-classic"), ("megatron-tp2pp2_legacy", "megatron")):
        logical = open_foreign(str(foreign(name) / "ckpt"))
        render(exporter(kind)(logical, {}), logical, tmp_path / kind)
    script = Path(__file__).parent / "megatron_job.py"
    rank = tmp_path / "megatron-classic" / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    command = [
        sys.executable, str(script), str(rank), str(tmp_path / "megatron" / "iter_0000005"),
        str(foreign("megatron-tp2pp2_w4") / "truth.pt"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found["classic"], found["dist"]) == (0, 0)
    for size, shared, total, expected in found["buffers"]:
        items = [
            Item(name, numel, shared and name == "embedding.word_embeddings.weight") for name, numel, _, _ in expected
        ]
        places, lengths = spots(items, size)
        assert sum(lengths) == total
        assert [(spot.start, spot.bucket) for spot in places] == [(start, bucket) for *_, start, bucket in expected]
