"""Which commands a warm interpreter can stand by for, and what it is told (see `warm.sitecustomize`)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("warm")

MAX_SCRIPT = 1 << 20
"""Bytes of a script that are looked at."""

# Variables that libraries read when they are loaded, which is before a script that is forked from a warm interpreter
# could set them. Those that are read later (CUDA_VISIBLE_DEVICES, NCCL_*, MASTER_ADDR, ...) are of no concern.
_READ_AT_IMPORT = (
    "OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|BLIS_|NUMEXPR_|TORCH_LOGS|TORCHINDUCTOR_|TORCHDYNAMO_|TORCH_COMPILE|PYTORCH_JIT"
)
_SETS_ONE = re.compile(rf"""(?:environ(?:\[|\.setdefault\(|\.update\(\{{)|putenv\()\s*["']((?:{_READ_AT_IMPORT})\w*)""")


@dataclass(frozen=True, slots=True)
class Standby:
    """What the warm interpreter imports, and how much memory it may take.

    Attributes:
        preload: modules; it is of no use without the first.
        memory: bytes of its own, which the ranks share until they write to them.
    """

    preload: Sequence[str]
    memory: int

    def spec(self, first: Path) -> dict[str, Any]:
        """For the keeper; `first` is what stands first in sys.path of the ranks."""
        return {
            "directory": str(DIRECTORY),
            "preload": list(self.preload),
            "memory": self.memory,
            "first": str(first),
        }


def place_of(script: str, *, module: bool) -> tuple[Path, Path]:
    """(file of the script, first entry of its sys.path), as the interpreter finds them."""
    if not module:
        real = Path(os.path.realpath(script))
        return real, real.parent
    here = Path.cwd()
    path = here.joinpath(*script.split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")), here


def reason_against(file: Path) -> str:
    """Why ranks that run this script must not be forked from a warm interpreter; "" if nothing is known."""
    if file.is_dir():
        return f"{file} is a directory"
    try:
        with open(file, encoding="utf-8", errors="replace") as script:
            found = _SETS_ONE.search(script.read(MAX_SCRIPT))
    except OSError:
        return ""  # a module somewhere in sys.path, or nothing at all: the interpreter will say so
    return f"{file.name} sets {found[1]}, which is read when torch is loaded" if found else ""
