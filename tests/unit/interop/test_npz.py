"""numpy archives, read and written; numpy is the judge."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.truth import tensor, written

from ckptsvc.errors import CkptsvcError, InvalidInput, UnsupportedObject
from ckptsvc.interop.formats import exporter, open_foreign

ARRAYS = {
    "layers/0/w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "column_major": np.asfortranarray(np.arange(24, dtype=np.float64).reshape(2, 3, 4)),
    "optimizer/state/layers~10~1w/exp_avg": np.ones((3, 4), np.float16),
    "flags": np.array([True, False]),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_of_numpy_are_read_and_written(save, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **ARRAYS)
    logical = open_foreign(str(tmp_path / "x.npz"))
    for name, expected in ARRAYS.items():
        ours = tensor(logical, name if name.startswith("optimizer/") else f"model/{name}")
        assert np.array_equal(ours.numpy(), expected)
        assert ours.numpy().dtype == expected.dtype
    written(exporter("npz")(logical, {"file": "y.npz"}), logical, tmp_path)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as back:
        assert set(back.files) == set(ARRAYS)
        assert all(np.array_equal(back[name], expected) for name, expected in ARRAYS.items())


def test_objects_and_unknown_element_types_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"a": 1}], object))
    with pytest.raises(InvalidInput, match="Python objects"):
        open_foreign(f"npz:{tmp_path / 'x.npz'}")
    torch.save({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    logical = open_foreign(f"torch:{tmp_path / 'x.pt'}")
    with pytest.raises(UnsupportedObject, match="bfloat16"):
        exporter("npz")(logical, {})
    assert exporter("npz")(logical, {"dtype": "float32"}).notes[0].kind == "lost"


def test_broken_archives_raise_errors_of_ours_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    whole = (tmp_path / "x.npz").read_bytes()
    rng = random.Random(3)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        (tmp_path / "y.npz").write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            logical = open_foreign(f"npz:{tmp_path / 'y.npz'}")
            for name in logical.names():
                tensor(logical, name)
        except CkptsvcError:
            pass
