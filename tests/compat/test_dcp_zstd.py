"""DCP checkpoints that are compressed; they need the package `zstandard`, as torch's own extension does."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.logicals import tensor
from torch.distributed.checkpoint import FileSystemWriter

from ckptsvc.errors import CkptsvcError
from ckptsvc.interop.formats import open_foreign

pytest.importorskip("zstandard")


def test_compressed_entries_are_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._extension import ZStandard

    state = {
        "model": {"w": torch.arange(70_000.0).reshape(700, 100), "turned": torch.arange(12.0).reshape(4, 3).t(),
                  "flag": torch.tensor(True)},
        "optim": {"state": {"w": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5, "params": ["w"]}]},
        "mine": {"a": (1, 2), "hidden": (torch.ones(2),)},
    }  # fmt: skip
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, _extensions=[ZStandard()]), no_dist=True)
    logical = open_foreign(f"dcp:{tmp_path}")
    for name, value in state["model"].items():
        assert torch.equal(tensor(logical, f"model/{name}"), value), name
    assert logical.document()["optimizer"]["param_groups"] == [{"lr": 0.5, "params": ["w"]}]
    assert logical.document()["mine"]["a"] == (1, 2)
    assert [(note.kind, "compressed" in note.what) for note in logical.notes] == [("lost", True)]

    file = tmp_path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 97):
        data[at] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(CkptsvcError):
        tensor(open_foreign(f"dcp:{tmp_path}"), "model/w")
