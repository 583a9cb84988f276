"""Random number generators: read and set without disturbing them.

Covers Python's `random`, NumPy's global (legacy) generator, torch's CPU generator, and the accelerator
devices in use. All states become plain values and small arrays for the rank's document.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ckptsvc.errors import Damaged


def capture(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """The states of all generators; `devices` are those that the state tree has tensors on."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)  # the one that np.random.seed() seeds
    return {
        "python": {"version": version, "words": np.array(words, dtype=np.uint64), "gauss": gauss},
        "numpy": list(numpy_state),
        "torch": torch.get_rng_state().numpy(),
        "devices": {
            kind: [torch.get_device_module(kind).get_rng_state(i).numpy() for i in indices]
            for kind, indices in _in_use(devices).items()
        },
    }


def restore(state: dict[str, Any], devices: Iterable[torch.device] = ()) -> None:
    """Sets all generators. Device states go to this process's devices in their order, whatever their numbers
    were.

    Raises:
        Damaged: the state is not what `capture` makes.
    """
    try:
        python = state["python"]
        random.setstate((python["version"], tuple(int(w) for w in python["words"]), python["gauss"]))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
        for kind, indices in _in_use(devices).items():
            for i, saved in zip(indices, state["devices"].get(kind, ()), strict=False):
                torch.get_device_module(kind).set_rng_state(torch.from_numpy(saved.copy()), i)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Damaged(f"the saved state of the random number generators is malformed: {error}") from error


def _in_use(devices: Iterable[torch.device]) -> dict[str, list[int]]:
    """Kind of device -> sorted indices, of those that have a generator of their own."""
    found: dict[str, set[int]] = {}
    for device in devices:
        if device.type != "cpu" and device.type != "meta":
            found.setdefault(device.type, set()).add(device.index)  # where a tensor is, there is an index
    # A program may draw on its device with no tensor of the tree there. Asking must not wake a sleeping
    # device.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator.type)
        if getattr(module, "is_initialized", lambda: False)():
            found.setdefault(accelerator.type, set()).add(module.current_device())
    return {kind: sorted(indices) for kind, indices in found.items()}
