"""Hugging Face: directories of save_pretrained, read and written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.truth import check_model, load, same, tensor, written
from safetensors.torch import load_file, save_file

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.formats import exporter, open_foreign

Foreign = Callable[[str], Path]


def test_a_sharded_model_holds_the_truth(foreign: Foreign) -> None:
    path = foreign("hf-llama_tied_fp32")
    logical = open_foreign(str(path / "ckpt"))
    truth = load(path)
    check_model(logical, {"params": truth["params"]})
    assert logical.aliases == {"model/lm_head.weight": "model/model.embed_tokens.weight"}
    assert logical.document()["huggingface"]["config"]["model_type"] == "llama"


@pytest.mark.parametrize(("size", "count"), [("5GB", 1), ("20kB", 3)])
def test_what_is_written_is_what_the_library_reads(foreign: Foreign, tmp_path: Path, size: str, count: int) -> None:
    path = foreign("hf-llama_tied_fp32") / "ckpt"
    logical = open_foreign(f"hf:{path}")
    out = written(exporter("hf")(logical, {"shard-size": size}), logical, tmp_path)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == count
    ours = {name: value for file in files for name, value in load_file(file).items()}
    theirs = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(ours) == set(theirs)
    assert all(same(ours[name], value) for name, value in theirs.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    if count > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        expected = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == expected["metadata"]
        assert set(index["weight_map"]) == set(expected["weight_map"])


def test_pickled_weights_of_older_versions(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "pytorch_model.bin")
    logical = open_foreign(str(tmp_path))
    assert same(tensor(logical, "model/a.weight"), torch.arange(6.0).reshape(2, 3))


def test_a_cache_of_symbolic_links_is_read(foreign: Foreign, tmp_path: Path) -> None:
    for file in (foreign("hf-llama_tied_fp32") / "ckpt").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert len(open_foreign(f"hf:{tmp_path}").names()) == 41


def test_bad_directories(foreign: Foreign, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no checkpoint of a format"):
        open_foreign(str(tmp_path))
    shutil.copytree(foreign("hf-llama_tied_fp32") / "ckpt", tmp_path / "x")
    shard = tmp_path / "x" / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match="00002"):
        open_foreign(f"hf:{tmp_path / 'x'}")
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(Damaged, match="lacks"):
        open_foreign(f"hf:{tmp_path / 'x'}")
    shard.unlink()
    with pytest.raises(Damaged, match=r"missing|does not exist"):
        open_foreign(f"hf:{tmp_path / 'x'}")
