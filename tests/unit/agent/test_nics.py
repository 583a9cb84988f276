"""The probe on trees as the drivers lay them out, whole and broken."""

import os
import random
import stat
from pathlib import Path

import pytest
from harness.fake_nics import NAMES, Cassini, Port, put

from ckptsvc.agent.watching.nics import NicProbe, Place, Reading, read
from ckptsvc.control.nic_counters import BY_FILE, CASSINI, HANDLER, INFINIBAND, Value
from ckptsvc.control.nic_job import MAX_NICS

CLOCK = 1_743_569_213.088677609


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def card_of(root: Path) -> tuple[Place, Place]:
    """The telemetry and the retry handler of the only card."""
    telemetry, handler = NicProbe(root).places()
    return telemetry, handler


def test_a_node_without_cards_has_none(root: Path) -> None:
    assert NicProbe(root).places() == []
    (root / "sys/class").mkdir(parents=True)
    assert NicProbe(root).places() == []


@pytest.mark.parametrize(("version", "files"), [(1, 1890), (2, 1922)])
def test_a_cassini_is_read_as_its_driver_shows_it(root: Path, version: int, files: int) -> None:
    card = Cassini("cxi0", version, whole=True)
    card.count("pct_spt_timeouts", 320)
    card.handle("connections_cancelled", (1 << 32) - 5)
    card.restart_link(CLOCK)
    card.write(root, CLOCK)
    items = {entry.name for entry in (root / "sys/class/cxi/cxi0/device/telemetry").iterdir()}
    assert len(items & set(NAMES)) == files
    telemetry, handler = card_of(root)
    reading = read(telemetry)
    assert (telemetry.nic, telemetry.family, reading.link) == ("cxi0", "cxi", "up")
    assert set(reading.values) == {counter.file for counter in CASSINI}
    assert (reading.failed, reading.missing) == ({}, set())
    assert reading.values["telemetry/pct_spt_timeouts"].number == 320
    assert reading.values["telemetry/pct_spt_timeouts"].stamp == pytest.approx(CLOCK * 1e9, abs=1000)
    assert reading.values["link_restarts/time_0"] == Value(int(CLOCK))
    assert read(handler).values["connections_cancelled"] == Value(-5)
    assert set(read(handler).values) == {counter.file for counter in HANDLER}


def test_infiniband_and_roce_are_told_apart(root: Path) -> None:
    Port("mlx5_0", 1).write(root)
    second = Port("mlx5_0", 2)
    second.state = "1: DOWN"
    second.write(root)
    Port("mlx5_bond_0", 1, roce=True).write(root)
    places = NicProbe(root).places()
    assert [(place.nic, place.family) for place in places] == [
        ("mlx5_0:1", "ib"), ("mlx5_0:2", "ib"), ("mlx5_bond_0:1", "roce")]  # fmt: skip
    readings = [read(place) for place in places]
    assert [reading.link for reading in readings] == ["4: ACTIVE", "1: DOWN", "4: ACTIVE"]
    assert all(set(reading.values) == {counter.file for counter in INFINIBAND} for reading in readings)


def test_a_port_of_an_old_kernel_without_counters(root: Path) -> None:
    Port("mlx4_0", roce=True).write(root)
    directory = Port("mlx4_0").directory(root)
    for file in (directory / "counters").iterdir():
        put(file, "N/A (no PMA)\n")
    for file in (directory / "hw_counters").iterdir():
        file.unlink()
    (directory / "link_layer").unlink()
    (place,) = NicProbe(root).places()
    reading = read(place)
    assert (place.family, reading.link, reading.values) == ("ib", "4: ACTIVE", {})
    assert set(reading.failed) | reading.missing == {counter.file for counter in INFINIBAND}


def test_a_virtual_function_is_no_card(root: Path) -> None:
    Cassini("cxi0").write(root, CLOCK)
    (root / "sys/class/cxi/cxi1/device/properties").mkdir(parents=True)
    assert {place.nic for place in NicProbe(root).places()} == {"cxi0"}


def test_cards_are_in_the_order_of_their_numbers_and_not_without_end(root: Path) -> None:
    for number in (10, 2, 0):
        (root / f"sys/class/cxi/cxi{number}/device/telemetry").mkdir(parents=True)
    (root / "sys/class/cxi/..evil name\n").mkdir()
    assert [p.nic for p in NicProbe(root).places() if not p.is_handler] == ["cxi0", "cxi2", "cxi10"]
    for number in range(2 * MAX_NICS):
        (root / f"sys/class/cxi/cxi{number}/device/telemetry").mkdir(parents=True, exist_ok=True)
    assert len({place.nic for place in NicProbe(root).places()}) == MAX_NICS


def test_missing_files_cost_their_own_signal_only_and_are_not_looked_for_again(root: Path) -> None:
    card = Cassini("cxi0")
    card.write(root, CLOCK)
    device = card.device(root)
    gone = {"telemetry/pct_spt_timeouts", "link_restarts/time_3"}
    for file in gone:
        (device / file).unlink()
    telemetry, _ = card_of(root)
    reading = read(telemetry)
    assert reading.missing == gone
    assert len(reading.values) == len(CASSINI) - 2
    assert read(telemetry, frozenset(gone)).missing == set()


def test_a_card_that_vanishes_while_it_is_read_is_all_missing(root: Path) -> None:
    card = Cassini("cxi0")
    card.write(root, CLOCK)
    telemetry, handler = card_of(root)
    card.remove(root)
    reading = read(telemetry)
    assert (reading.values, reading.link) == ({}, "")
    assert len(reading.missing) == len(CASSINI)
    assert NicProbe(root).places() == []
    assert set(read(handler).values) == {counter.file for counter in HANDLER}, "it is told of apart"


BROKEN = {
    "empty": lambda path: put(path, ""),
    "cut off": lambda path: put(path, "103060429480@17435"),
    "words": lambda path: put(path, "N/A\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "huge": lambda path: put(path, "9" * 100_000),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe that nobody writes": lambda path: (path.unlink(), os.mkfifo(path)),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "a socket's path": lambda path: (path.unlink(), os.mknod(path, stat.S_IFSOCK | 0o600)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_told_and_leaves_the_others_alone(root: Path, how: str) -> None:
    card = Cassini("cxi0")
    card.write(root, CLOCK)
    file = "telemetry/hni_tx_paused_3"
    BROKEN[how](card.device(root) / file)
    reading = read(card_of(root)[0])
    assert set(reading.failed) == {file}
    assert len(reading.values) == len(CASSINI) - 1


def test_a_fuzzed_tree_is_read_without_a_fault(root: Path) -> None:
    rng = random.Random("trees")
    card = Cassini("cxi0", 2)
    card.write(root, CLOCK)
    Port().write(root)
    files = [card.device(root) / counter.file for counter in CASSINI]
    files += [card.handler_directory(root) / counter.file for counter in HANDLER]
    files += [Port().directory(root) / name for name in (*(c.file for c in INFINIBAND), "state", "link_layer")]
    for _ in range(150):
        path = rng.choice(files)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or path.exists():
            path.unlink()
        if path.parent.is_dir():
            kind = rng.randrange(4)
            if kind == 0:
                path.write_bytes(rng.randbytes(rng.choice([0, 1, 20, 5000])))
            elif kind == 1:
                path.write_bytes(bytes(rng.choice(b"0123456789@.-\n ") for _ in range(rng.randrange(60))))
            elif kind == 2:
                path.mkdir()
        for place in NicProbe(root).places():
            reading = read(place)
            known = reading.values.keys() | reading.failed.keys() | reading.missing
            assert known == {counter.file for counter in place.counters}


def test_reading_an_unreadable_place_never_fails() -> None:
    reading = read(Place("cxi0", "cxi", Path("/proc/self/mem"), tuple(BY_FILE.values()), ("port/link",)))
    assert reading == Reading(failed=dict.fromkeys(BY_FILE, "ENOTDIR"))


@pytest.mark.skipif(not os.environ.get("CKPTSVC_TEST_NICS"), reason="reads real cards: set CKPTSVC_TEST_NICS=1")
def test_the_real_cards_of_this_node_can_be_read() -> None:
    places = NicProbe().places()
    assert places, "this node has no card that is known"
    for place in places:
        reading = read(place)
        print(place.nic, place.family, place.directory, reading)
        assert reading.values
        assert reading.failed == {}
        assert place.is_handler or reading.link
