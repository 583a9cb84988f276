"""One line for many requests that are no messages."""

import logging

import pytest
from google.protobuf.message import DecodeError

from ckptsvc.agent.process.malformed import LOGGER, REMIND_EVERY, Malformed


def record(error: BaseException | None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord(LOGGER, logging.ERROR, "x.py", 1, "Unexpected [%s]", ("x",), info)


def test_the_first_of_a_minute_is_one_line_and_says_how_many_there_were() -> None:
    now = 0.0
    malformed = Malformed(lambda: now)
    first = record(DecodeError("no message"))
    assert malformed.filter(first)
    assert (first.levelname, first.exc_info) == ("WARNING", None)
    assert first.getMessage() == "requests that make no sense were refused: 1 so far; the last: no message"
    assert not any(malformed.filter(record(DecodeError("x" * 1000))) for _ in range(100))
    now = REMIND_EVERY
    later = record(DecodeError("x" * 1000))
    assert malformed.filter(later)
    assert "refused: 102 so far" in later.getMessage()
    assert len(later.getMessage()) < 300


@pytest.mark.parametrize("error", [None, ValueError("ours")])
def test_whatever_else_grpc_says_stays_as_it_is(error: BaseException | None) -> None:
    malformed, other = Malformed(), record(error)
    assert malformed.filter(other)
    assert (other.getMessage(), other.levelname) == ("Unexpected [x]", "ERROR")
