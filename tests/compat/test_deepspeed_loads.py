"""DeepSpeed itself loads the universal checkpoints that are written here, and trains on as if it had never stopped."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptsvc.interop.formats import exporter, open_foreign
from tests.harness.foreign_values import render

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def losses(directory: Path, stage: int, action: str) -> list[float]:
    script = Path(__file__).parent / "deepspeed_job.py"
    environment = {**os.environ, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(directory), str(stage), action]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("written", "loaded"), [(1, 1), (1, 2), (2, 1), (3, 1)])
def test_deepspeed_goes_on_from_it(tmp_path: Path, written: int, loaded: int) -> None:
    expected = losses(tmp_path / "native", written, "save")
    logical: Any = open_foreign(f"deepspeed:{tmp_path}/native")
    render(exporter("deepspeed-universal")(logical, {}), logical, tmp_path / "universal")
    assert losses(tmp_path / "universal", loaded, "universal") == pytest.approx(expected, abs=1e-6)
