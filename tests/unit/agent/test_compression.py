"""What an agent says of compression: once when it changes, and not at every save."""

from __future__ import annotations

import logging

import pytest

from ckptsvc.agent.compression import QUIET, Compression
from ckptsvc.pipeline.arena import Label


def test_a_verdict_is_told_when_it_changes_and_never_often(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="ckptsvc.agent")
    found = Compression()

    def told(compressed: bool | None, now: float) -> list[tuple[int, str]]:
        caplog.clear()
        label = Label(
            job="job", store="s", coordinator="", attempt=1, epoch=1, step=3, rank=0, world_size=1, nbytes=1,
            extent=4096, aliases={},
        )  # fmt: skip
        found.note(label, None if compressed is None else [compressed, "so it is"], now)
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    assert told(None, 0.0) == []
    assert found.latest is None
    assert told(True, 1.0) == [(logging.INFO, "shards are compressed: so it is")]
    assert told(True, 1.0 + 2 * QUIET) == [(logging.DEBUG, "shards are compressed: so it is")]
    assert told(False, 2.0 + 2 * QUIET) == [(logging.INFO, "shards are not compressed: so it is")]
    assert told(True, 3.0 + 2 * QUIET)[0][0] == logging.DEBUG, "the ranks do not agree"
    assert found.latest == (True, "so it is")
    assert told(True, 3.0 + 3 * QUIET)[0][0] == logging.INFO
