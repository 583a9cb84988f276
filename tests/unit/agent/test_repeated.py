"""One line for many requests that are no messages, and for what there is no memory for."""

import logging

import pytest
from google.protobuf.message import DecodeError

from ckptsvc.agent.process.repeated import LOGGERS, REMIND_EVERY, WithoutTracebacks


def record(error: BaseException | None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord(LOGGERS[0], logging.ERROR, "x.py", 1, "Unexpected [%s]", ("x",), info)


def test_the_first_of_a_minute_is_one_line_and_says_how_many_there_were() -> None:
    now = 0.0
    repeated = WithoutTracebacks(lambda: now)
    first = record(DecodeError("no message"))
    assert repeated.filter(first)
    assert (first.levelname, first.exc_info) == ("WARNING", None)
    assert first.getMessage() == "requests that make no sense were refused: 1 so far; the last: no message"
    assert not any(repeated.filter(record(DecodeError("x" * 1000))) for _ in range(100))
    now = REMIND_EVERY
    later = record(DecodeError("x" * 1000))
    assert repeated.filter(later)
    assert "refused: 102 so far" in later.getMessage()
    assert len(later.getMessage()) < 300


@pytest.mark.parametrize("error", [None, ValueError("ours")])
def test_whatever_else_grpc_says_stays_as_it_is(error: BaseException | None) -> None:
    repeated, other = WithoutTracebacks(), record(error)
    assert repeated.filter(other)
    assert (other.getMessage(), other.levelname) == ("Unexpected [x]", "ERROR")


def test_want_of_memory_is_counted_apart() -> None:
    repeated = WithoutTracebacks(lambda: 0.0)
    assert repeated.filter(record(DecodeError("no message")))
    first = record(MemoryError())
    assert repeated.filter(first)
    assert first.getMessage() == "the agent gets no memory: 1 things were left undone so far; the last: Unexpected [x]"
    assert not repeated.filter(record(MemoryError()))
