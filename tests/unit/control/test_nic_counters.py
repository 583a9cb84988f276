"""How a counter's file is read, and how far it has risen: wraps, resets, ceilings, clocks that jump."""

import re
from pathlib import Path

import pytest
from harness.fake_nics import NAMES, ONLY_CASSINI_2, Cassini
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.nic_counters import (
    BY_FILE,
    CASSINI,
    FASTEST,
    HANDLER,
    INFINIBAND,
    Counter,
    Value,
    elapsed,
    parse,
    rise,
)
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import NicSignal

SPT = BY_FILE["telemetry/pct_spt_timeouts"]
CANCELLED = BY_FILE["connections_cancelled"]
SYMBOLS = BY_FILE["counters/symbol_error"]
RING = BY_FILE["link_restarts/time_0"]


# ---- the tables


def test_every_file_of_the_cassini_table_is_one_that_both_generations_have() -> None:
    items = {counter.file.removeprefix("telemetry/") for counter in CASSINI if counter.file.startswith("telemetry/")}
    assert len(NAMES) == 1922
    assert len([name for name in NAMES if not ONLY_CASSINI_2.fullmatch(name)]) == 1890
    assert items <= set(Cassini(version=1).items)
    assert items <= set(Cassini(version=2).items)


def test_a_file_is_in_one_table_once_and_says_something() -> None:
    counters = [*CASSINI, *HANDLER, *INFINIBAND]
    assert len(BY_FILE) == len(counters)
    assert all(
        counter.says and not Path(counter.file).is_absolute() and ".." not in counter.file for counter in counters
    )


def test_every_signal_has_a_field_on_the_wire_and_a_counter() -> None:
    fields = set(pb.NicReading.DESCRIPTOR.fields_by_name)
    assert {signal.replace("-", "_") for signal in NicSignal} <= fields
    assert {counter.signal for counter in BY_FILE.values()} == set(NicSignal)


# ---- one file


def test_the_formats_of_the_drivers() -> None:
    assert parse(b"103060429480@1743569213.088677609\n") == Value(103060429480, 1743569213_088677609)
    assert parse(b"0@1.000000001") == Value(0, 1_000_000_001)
    assert parse(b"18446744073709551615\n") == Value(2**64 - 1)
    assert parse(b"-2147483648\n") == Value(-(2**31))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40 - 1), st.integers(0, 999_999_999))
def test_what_a_driver_prints_is_read_back(number: int, seconds: int, nanoseconds: int) -> None:
    text = f"{number}@{seconds % 10**12}.{nanoseconds:09d}\n".encode()
    assert parse(text) == Value(number, seconds % 10**12 * 10**9 + nanoseconds)


MALFORMED = [
    b"",
    b"\n",
    b"N/A (no PMA)\n",
    b"1@2\n",
    b"1@2.3\n",
    b"1.5\n",
    b"0x10\n",
    b"1 2\n",
    b"\x00" * 40,
    b"+1",
    b"1@-2.000000000",
]


@pytest.mark.parametrize("text", [*MALFORMED, b"9" * 21, b"\xff\xfe", "٣\n".encode()])
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput, match="is not a counter"):
        parse(text)


@given(st.binary(max_size=60) | st.from_regex(re.compile(rb"[0-9@.\-\n ]{0,30}"), fullmatch=True))
def test_no_bytes_at_all_do_more_than_be_refused(text: bytes) -> None:
    try:
        value = parse(text)
    except InvalidInput:
        return
    assert abs(value.number) < 10**20


# ---- how far it has risen

STEPS = st.lists(st.integers(0, 10**9), min_size=1, max_size=20)


@given(st.sampled_from([SPT, CANCELLED]), st.integers(0, 2**64), STEPS)
def test_wraps_lose_nothing(counter: Counter, start: int, steps: list[int]) -> None:
    true, total = start, 0
    for step in steps:
        step %= 1 << counter.bits - 2
        risen = rise(counter, true % (1 << counter.bits), (true + step) % (1 << counter.bits), 1.0)
        assert risen is not None
        total += risen
        true += step
    assert total == true - start


@given(st.integers(0, 2**31), STEPS)
def test_a_signed_print_of_an_unsigned_count_loses_nothing(start: int, steps: list[int]) -> None:
    def printed(number: int) -> int:
        number %= 2**32
        return number - 2**32 if number >= 2**31 else number

    true = start
    for step in steps:
        assert rise(CANCELLED, printed(true), printed(true + step), 1.0) == step
        true += step


@given(
    st.sampled_from(list(BY_FILE.values())),
    st.integers(-(2**31), 2**64),
    st.integers(-(2**31), 2**64),
    st.floats(0, 1e6),
)
def test_whatever_two_readings_say_the_rise_is_possible(
    counter: Counter, before: int, after: int, seconds: float
) -> None:
    risen = rise(counter, before, after, seconds)
    assert risen is None or 0 <= risen <= max(1, FASTEST * seconds)


@given(st.integers(1, 2**55), st.integers(0, 10**9))
def test_a_reset_shows_what_came_after_it(before: int, after: int) -> None:
    assert rise(SPT, before + after, after, 1.0) == after


def test_a_jump_that_no_card_can_make_is_not_known() -> None:
    assert rise(SPT, 0, 2**50, 1.0) is None
    assert rise(SPT, 0, 2**50, 2**50 / FASTEST) == 2**50


def test_a_counter_at_its_ceiling_is_not_known() -> None:
    assert rise(SYMBOLS, 65535, 65535, 1.0) is None
    assert rise(SYMBOLS, 65530, 65535, 1.0) == 5
    assert rise(SYMBOLS, 65535, 65540, 1.0) == 5, "a newer card counts on"
    assert rise(SYMBOLS, 65535, 3, 1.0) == 3, "it was reset"
    assert rise(SPT, 0, 0, 1.0) == 0


def test_a_time_stamp_is_one_event_when_it_is_new() -> None:
    assert [rise(RING, *pair, 1.0) for pair in ((0, 0), (0, 1743569213), (5, 5), (5, 9), (9, 0))] == [0, 1, 0, 1, 0]


# ---- time


def test_time_is_the_drivers_unless_a_clock_was_set() -> None:
    def between(nanoseconds: int, waited: float) -> float:
        return elapsed(Value(0, 10**18), Value(0, 10**18 + nanoseconds), waited)

    assert between(1_300_000_000, 1.0) == 1.3
    assert between(3_600_000_000_000, 1.0) == 1.0
    assert between(-1_000_000_000, 1.0) == 1.0
    assert between(0, 1.0) == 1.0
    assert between(31_000_000_000, 30.0) == 31.0
    assert elapsed(Value(0), Value(0, 1), 2.0) == 2.0


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.floats(1e-6, 1e6))
def test_time_never_stands_still_or_goes_back(before: int, after: int, waited: float) -> None:
    assert 0 < elapsed(Value(0, before), Value(0, after), waited) <= max(2 * waited, waited + 1)
