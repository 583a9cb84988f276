"""Bytes that changed, files that are gone: the next older good checkpoint is restored, and what is wrong is said.

One process restores over every damage in turn: each is done, met, and undone.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness.damage import Damage, checkpoints, damaged, newer_record, steps
from harness.job import Launch
from harness.programs import adam, network, save_three, state_digest
from harness.rank import Rank

import ckptsvc
from ckptsvc.errors import CkptsvcError, Damaged, IncompatibleVersion
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect

SHARD, INDEX, COMMIT = "r00000-*", "index-*", "COMMIT"

DAMAGES = [
    Damage(SHARD, "flip", 4),  # the length of the header
    Damage(SHARD, "flip", 40),  # the header
    Damage(SHARD, "flip", 4096),  # the first tensor
    Damage(SHARD, "flip", -1),  # the document of plain values
    Damage(SHARD, "cut", 5000),
    Damage(SHARD, "cut", -1),
    Damage(SHARD, "empty"),
    Damage(SHARD, "remove"),
    Damage(INDEX, "flip", 3),
    Damage(INDEX, "flip", -1),
    Damage(INDEX, "cut", 100),
    Damage(INDEX, "remove"),
    Damage(COMMIT, "flip", 0),
    Damage(COMMIT, "flip", 77),
    Damage(COMMIT, "cut", -1),
    Damage(COMMIT, "empty"),
    Damage(COMMIT, "replace", text="{}"),
]


def restore_over(rank: Rank, store: str, damages: list[list[Any]]) -> list[dict[str, Any]]:
    """Restores once for each damage; returns what came back, and what was said."""
    if rank.world > 1:
        rank.join()
    model = network(seed=1)
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every="off", resume=False)
    found = []
    for fields in damages:
        with damaged(Path(store), Damage(*fields)) if rank.number == 0 else warnings.catch_warnings():
            if rank.world > 1:
                dist.barrier()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    restored: int | str = run.restore()
                except CkptsvcError as error:
                    restored = f"{type(error).__name__}: {error}"
            if rank.world > 1:
                dist.barrier()
        state = state_digest(model, optimizer)
        found.append({"restored": restored, "said": [str(w.message) for w in said], "state": state})
    run.close()
    return found


@pytest.fixture
def run_of_three(launch: Launch, tmp_path: Path) -> tuple[Path, list[dict[str, str]]]:
    """A run with the steps 1, 2 and 3, and the states they hold."""
    store = tmp_path / "run"
    (states,) = launch.plain(1, save_three, str(store)).results()
    assert steps(store) == [3, 2, 1]
    return store, states


def test_restore_falls_back_over_any_damage_and_says_so(
    launch: Launch, run_of_three: tuple[Path, list[dict[str, str]]]
) -> None:
    store, states = run_of_three
    newer = Damage(COMMIT, "replace", text=newer_record(store, "3.0"))
    compatible = Damage(COMMIT, "replace", text=newer_record(store, "1.7"))
    (found,) = launch.plain(1, restore_over, str(store), [*DAMAGES, newer, compatible]).results()
    for damage, outcome in zip([*DAMAGES, newer], found[:-1], strict=True):
        assert outcome["restored"] == 2, f"{damage}: {outcome}"
        assert outcome["state"] == states[1], str(damage)
        (message,) = outcome["said"]
        assert "step 3" in message, str(damage)
        assert checkpoints(store)[0].name in message, f"{damage}: {message}"
    assert "3.0" in found[-2]["said"][0]
    # A newer minor version adds only what may be ignored.
    assert (found[-1]["restored"], found[-1]["said"], found[-1]["state"]) == (3, [], states[2])


def test_ranks_fall_back_together_when_one_shard_is_bad(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    states, _ = launch.plain(2, save_three, str(store)).results()
    damages = [
        Damage("r00001-*", "flip", 4096),
        Damage("r00001-*", "remove"),
        Damage("r00000-*", "cut", 4500),
        Damage(INDEX, "flip", 9),
        Damage(COMMIT, "flip", 9),
        Damage(COMMIT, "replace", text=newer_record(store, "3.0")),
    ]
    ranks = launch.plain(2, restore_over, str(store), damages).results()
    for damage, *outcomes in zip(damages, *ranks, strict=True):
        assert [o["restored"] for o in outcomes] == [2, 2], f"{damage}: {outcomes}"
        assert [o["state"] for o in outcomes] == [states[1]] * 2, str(damage)
        assert "step 3" in outcomes[0]["said"][0], str(damage)


def test_verify_names_file_tensor_and_bytes(run_of_three: tuple[Path, list[dict[str, str]]]) -> None:
    store, _ = run_of_three
    newest = checkpoints(store)[0]
    opened = connect(str(store))

    def faults() -> list[tuple[str, set[str], str]]:
        ref, commit = find(opened)[0]
        assert not isinstance(commit, Damaged)
        return [(d.key, set(d.tensors), d.why) for d in verify_checkpoint(open_checkpoint(opened, ref, commit))]

    assert faults() == []
    with damaged(store, Damage(SHARD, "flip", 4096)) as path:
        ((key, tensors, why),) = faults()
        assert key == f"{newest.name}/{path.name}"
        assert "model/0.weight" in tensors
        assert "checksum" in why
    with damaged(store, Damage(SHARD, "remove")) as path:
        ((key, tensors, why),) = faults()
        assert (key, "model/0.weight" in tensors) == (f"{newest.name}/{path.name}", True)
        assert "missing" in why
    with damaged(store, Damage(SHARD, "cut", -1)) as path:
        assert {key for key, _, _ in faults()} == {f"{newest.name}/{path.name}"}
    for damage in (d for d in DAMAGES if d.file == INDEX):
        with damaged(store, damage) as path, pytest.raises(Damaged, match=path.name):
            faults()
    for damage in (d for d in DAMAGES if d.file == COMMIT):
        with damaged(store, damage):
            error = find(opened)[0][1]
            assert isinstance(error, Damaged), str(damage)
            assert f"{newest.name}/COMMIT" in str(error)
    with damaged(store, Damage(COMMIT, "replace", text=newer_record(store, "3.0"))):
        assert isinstance(find(opened)[0][1], IncompatibleVersion)


def refuse(rank: Rank, store: str) -> str:
    """Attaches to a run that has checkpoints of which none is good."""
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ckptsvc.attach({"model": model, "optimizer": adam(model)}, store=store)
        except CkptsvcError as error:
            return f"{type(error).__name__}: {error}"
    return "started afresh"


def test_a_run_without_a_good_checkpoint_is_not_begun_anew(
    launch: Launch, run_of_three: tuple[Path, list[dict[str, str]]]
) -> None:
    store, _ = run_of_three
    for folder in checkpoints(store):
        (shard,) = folder.glob(SHARD)
        shard.write_bytes(shard.read_bytes()[:-1])
    (answer,) = launch.plain(1, refuse, str(store)).results()
    assert answer.startswith("Damaged: none of 3 checkpoints could be restored")
    assert "step 3" in answer
    for folder in checkpoints(store):
        (folder / "COMMIT").write_text(newer_record(store, "3.0", folder))
    (answer,) = launch.plain(1, refuse, str(store)).results()
    assert answer.startswith("IncompatibleVersion: none of 3 checkpoints could be restored")
