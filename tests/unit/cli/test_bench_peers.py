"""Every peer that is installed really saves and restores; one that is not says so."""

import importlib.util
from pathlib import Path

import pytest

from ckptsvc.cli.benchmarks.peers import PEERS, as_dicts, missing
from ckptsvc.cli.benchmarks.state import is_intact, large_state, small_state, wipe

INSTALLED = [name for name in PEERS if not missing(name)]


@pytest.mark.parametrize("make", [lambda: large_state(1 << 20), lambda: small_state(20)], ids=["large", "small"])
@pytest.mark.parametrize("name", INSTALLED)
def test_what_a_peer_has_saved_it_brings_back(name: str, make, tmp_path: Path) -> None:
    tree = make()
    peer = PEERS[name](tree, tmp_path / name)
    for _ in range(2):
        peer.save()
        peer.finish()
    peer.discard_older()
    assert len(list((tmp_path / name).iterdir())) == 1
    assert sum(path.stat().st_size for path in peer.files()) > 20 * 4096
    wipe(tree)
    peer.load()
    peer.close()
    assert is_intact(tree)


def test_the_usual_peers_are_installed_where_the_tests_run() -> None:
    assert {"dcp", "dcp_async", "dcp_async_tuned", "torch_save", "safetensors"} <= set(INSTALLED)


def test_a_peer_that_is_not_installed_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing("torchsnapshot") == "torchsnapshot is not installed"


def test_modules_go_to_peers_as_state_dicts() -> None:
    assert set(as_dicts(small_state(2))["model"]) == {"weight00000", "weight00001"}
