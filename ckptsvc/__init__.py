"""ckptsvc: asynchronous sharded checkpoints and fault tolerance for large PyTorch jobs.

    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store="file:///scratch/run7")
    for batch in batches(start=run.steps_done):
        train_step(batch)
        run.step()

What a run holds can be looked at without a job: `ckptsvc.open("file:///scratch/run7")`.

Importing this package imports neither torch nor grpc; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptsvc.client.reading import load
    from ckptsvc.client.runs import Run, open  # noqa: A004, F401
    from ckptsvc.client.session import Session, attach

__version__ = "0.1.0"
# Not "open": `from ckptsvc import *` must not hide the one of Python.
__all__ = ["Run", "Session", "__version__", "attach", "load"]

_HOMES = {
    "attach": "ckptsvc.client.session",
    "Session": "ckptsvc.client.session",
    "load": "ckptsvc.client.reading",
    "Run": "ckptsvc.client.runs",
    "open": "ckptsvc.client.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
