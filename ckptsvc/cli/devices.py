"""How many ranks a node runs by itself: one for each accelerator that torch would use there, as torchrun has it.

Those of NVIDIA are counted in /dev; of others only torch knows what it makes of them, and is asked in another process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ckptsvc.errors import ConfigError

DEV = Path("/dev")

TORCH_TIMEOUT = 120.0
"""Seconds for torch to be imported, on a cold file system, and to look."""

_ASK = {
    "gpu": "torch.cuda.device_count()",
    "xpu": "torch.xpu.device_count()",
    "auto": "torch.accelerator.device_count() if torch.accelerator.is_available() else 0",
}


def ranks_of(text: str, environ: Mapping[str, str], dev: Path = DEV) -> int:
    """The number that --nproc-per-node means on this node.

    Args:
        text: a number, "cpu", "gpu", "xpu" or "auto".
        environ: may have CUDA_VISIBLE_DEVICES.
        dev: stands for /dev (tests).

    Raises:
        ConfigError: it is none of these, or there is no such device.
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text in _ASK:
        found = _nvidia(environ, dev) if text != "xpu" else 0
        if not found and any((dev / name).exists() for name in ("kfd", "dri")):  # of AMD, Intel and others
            found = _asked(_ASK[text])
        if found:
            return found
        if text != "auto":
            raise ConfigError(f"--nproc-per-node {text}: this node has no such device")
    if text in ("auto", "cpu"):
        return len(os.sched_getaffinity(0))
    raise ConfigError(f"--nproc-per-node {text!r} is not a number, auto, gpu, xpu or cpu")


def _nvidia(environ: Mapping[str, str], dev: Path) -> int:
    there = sum(re.fullmatch(r"nvidia[0-9]+", path.name) is not None for path in dev.glob("nvidia*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    count = 0
    for name in visible.split(","):  # what follows the first that is no device is not seen (CUDA programming guide)
        word = name.strip()
        if not (word.startswith(("GPU-", "MIG-")) or (word.isdecimal() and int(word) < there)):
            break
        count += 1
    return count


def _asked(expression: str) -> int:
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", f"import torch; print({expression})"],
            capture_output=True, text=True, timeout=TORCH_TIMEOUT, check=False,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return 0
    last = answer.split()[-1:]
    return int(last[0]) if last and last[0].isdecimal() else 0
