"""The limit on bytes per second, by a clock of the test's own: bytes are counted, not seconds."""

import mmap
import threading

import pytest

from ckptsvc.errors import ConfigError, StoreUnavailable
from ckptsvc.storage import connect
from ckptsvc.storage.rate import Rate
from ckptsvc.storage.wrappers import Fault, Faulty, Limited, Retrying

MIB = 1 << 20


class Clock:
    """Time that goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(store, key: str, nbytes: int) -> None:
    with mmap.mmap(-1, nbytes) as memory, memoryview(memory) as view:
        store.write(key, view, nbytes)


@pytest.mark.parametrize("block", [1, 1000, 64 * 1024, 8 * MIB])
def test_no_more_bytes_pass_than_the_limit_allows_and_hardly_less(clock: Clock, block: int) -> None:
    rate = Rate(10 * MIB, clock, clock.sleep)
    moved = 0
    for _ in range(200):
        rate.pay(block)
        moved += block
        assert moved <= 10 * MIB * (clock.now - 100.0) * 1.001
    assert moved >= 10 * MIB * (clock.now - 100.0) * 0.999


def test_what_was_not_used_is_not_saved_up(clock: Clock) -> None:
    rate = Rate(MIB, clock, clock.sleep)
    clock.sleep(3600)
    began = clock.now
    rate.pay(4 * MIB)
    assert clock.now - began == pytest.approx(4)


def test_a_new_limit_holds_from_the_next_bytes_on(clock: Clock) -> None:
    rate = Rate(MIB, clock, clock.sleep)
    rate.pay(MIB)
    rate.limit = 4 * MIB
    rate.pay(4 * MIB)
    rate.limit = None
    rate.pay(1 << 50)
    assert clock.now == pytest.approx(102.0)
    assert rate.collect() == pytest.approx(2.0)
    assert rate.collect() == 0.0
    with pytest.raises(ConfigError, match="bytes_per_second"):
        rate.limit = 0


def test_stores_share_one_limit(clock: Clock, tmp_path) -> None:
    rate = Rate(MIB, clock, clock.sleep)
    for name in ("a", "b"):
        write(Limited(connect(str(tmp_path / name)), bytes_per_second=rate), "object", 20 * MIB)
    assert clock.now == pytest.approx(140.0)


def test_bytes_that_are_written_again_are_paid_for_again(clock: Clock, tmp_path) -> None:
    plan = [Fault(op="write", error="store-unavailable", short=10 * MIB)]
    rate = Rate(MIB, clock, clock.sleep)
    limited = Limited(Faulty(connect(str(tmp_path)), plan), bytes_per_second=rate)
    with pytest.raises(StoreUnavailable):
        Retrying(limited, attempts=1).write("x", memoryview(bytes(16 * MIB)), 16 * MIB)
    Retrying(limited, attempts=1).write("x", memoryview(bytes(16 * MIB)), 16 * MIB)
    assert clock.now == pytest.approx(126.0)
