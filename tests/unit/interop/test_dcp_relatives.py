"""ByteCheckpoint and torchsnapshot: real checkpoints, bit for bit, and what is wrong with others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.logicals import compare, tensor

from ckptsvc.errors import Damaged, InvalidInput, NotFound
from ckptsvc.interop.formats import open_foreign


def test_a_bytecheckpoint_is_read_bit_for_bit(foreign: Callable[[str], Path]) -> None:
    folder = foreign("bytecheckpoint-fsdp2_w2")
    logical = open_foreign(str(folder / "ckpt"))
    assert compare(logical, torch.load(folder / "truth.pt", weights_only=True)) == {"extra_state/torch_rng_state"}
    assert logical.origin.startswith("bytecheckpoint:")
    assert logical.aliases == {"model/lm_head.weight": "model/tok_emb.weight"}
    assert logical.step == 5
    assert logical.document()["extra_state"]["note"] == "tiny"
    one = open_foreign(str(folder / "ckpt" / "global_step_5"))
    assert one.names() == logical.names()
    assert one.step == 5


def test_a_bytecheckpoint_of_another_step_is_not_there(foreign: Callable[[str], Path]) -> None:
    with pytest.raises(NotFound, match="no step 6"):
        open_foreign(f"bytecheckpoint:{foreign('bytecheckpoint-fsdp2_w2') / 'ckpt'}", {"step": "6"})


def test_a_snapshot_is_read_bit_for_bit(foreign: Callable[[str], Path]) -> None:
    folder = foreign("torchsnapshot-w2")
    logical = open_foreign(str(folder / "ckpt"))
    truth = torch.load(folder / "truth.pt", weights_only=True)
    assert compare(logical, truth) == {"big/table", "progress/parts/1/a", "progress/wave"}
    assert torch.equal(tensor(logical, "big/table"), truth["table"])
    assert tensor(logical, "progress/wave").dtype == torch.complex64
    progress = logical.document()["progress"]
    assert progress["parts"][1]["a"].name == "progress/parts/1/a"
    plain = {key: value for key, value in progress.items() if key != "parts"}
    assert plain == {"steps": 3, "lr": 0.5, "name": "a/b%", "done": True, "none": None, "pair": (1, 2)}
    assert logical.document()["own"] == {"rank": 0}
    assert [note.kind for note in logical.notes] == ["warning"]


@pytest.fixture
def snapshot(foreign: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign("torchsnapshot-w2") / "ckpt", tmp_path / "snapshot"))


def test_a_snapshot_in_yaml_is_the_same(snapshot: Path) -> None:
    yaml = pytest.importorskip("yaml")
    names = open_foreign(str(snapshot)).names()
    metadata = snapshot / ".snapshot_metadata"
    metadata.write_text(yaml.safe_dump(json.loads(metadata.read_text())))
    assert open_foreign(str(snapshot)).names() == names


def test_a_snapshot_that_is_not_whole_is_damaged(snapshot: Path) -> None:
    largest = max((snapshot / "batched").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(Damaged, match=f"{largest.name} has"):
        open_foreign(str(snapshot))
    largest.unlink()
    with pytest.raises(Damaged, match=f"{largest.name} is missing"):
        open_foreign(str(snapshot))
    (snapshot / ".snapshot_metadata").unlink()
    with pytest.raises(NotFound, match="writes it last"):
        open_foreign(f"torchsnapshot:{snapshot}")


@pytest.mark.parametrize(
    ("path", "change", "error"),
    [
        ("0/model/tok_emb.weight", {"shape": [14, 6]}, Damaged),
        ("0/model/frozen", {"dtype": "torch.float64"}, Damaged),
        ("0/model/frozen", {"byte_range": [10, 4]}, Damaged),
        ("0/model/frozen", {"location": "../../etc/passwd"}, Damaged),
        ("0/model/frozen", {"serializer": "per_tensor_qtensor"}, InvalidInput),
        ("0/progress/steps", {"serialized_value": "three"}, Damaged),
        ("0/progress/steps", {"type": "ghost"}, InvalidInput),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    snapshot: Path, path: str, change: dict[str, object], error: type[Exception]
) -> None:
    metadata = snapshot / ".snapshot_metadata"
    content = json.loads(metadata.read_text())
    entry = content["manifest"][path]
    if "chunks" in entry and "shape" in change:
        entry = entry["chunks"][0]["tensor"]
    entry.update(change)
    metadata.write_text(json.dumps(content))
    with pytest.raises(error):
        open_foreign(str(snapshot))


def test_shards_of_a_snapshot_that_overlap_are_refused(tmp_path: Path) -> None:
    def shard(first: int, location: str) -> dict[str, object]:
        stored = {"type": "Tensor", "location": location, "serializer": "buffer_protocol", "dtype": "torch.float32",
                  "shape": [4], "replicated": False}  # fmt: skip
        (tmp_path / location).write_bytes(bytes(16))
        return {"offsets": [first], "sizes": [4], "tensor": stored}

    entry = {"type": "ShardedTensor", "shards": [shard(0, "a"), shard(2, "b")]}
    manifest = {"0": {"type": "dict", "keys": ["w"]}, "0/w": entry}
    content = {"version": "0.1.0", "world_size": 1, "manifest": manifest}
    (tmp_path / ".snapshot_metadata").write_text(json.dumps(content))
    with pytest.raises(Damaged, match="overlap"):
        open_foreign(f"torchsnapshot:{tmp_path}")
