"""Which settings a running agent takes over, and what it says of the others."""

import logging

import msgspec
import pytest

from ckptsvc.agent.process.reload import CHANGES, READ_BY_JOBS, changed, sentence
from ckptsvc.config import load


def settings(**environ: str):
    return load(environ, files=[])


def test_what_has_changed_and_what_becomes_of_it() -> None:
    before = settings()
    after = settings(
        CKPTSVC_LOG_LEVEL="debug",
        CKPTSVC_STORE_MAX_WRITE_RATE="1GB/s",
        CKPTSVC_SAVE_EVERY="5min",
        CKPTSVC_AGENT_LISTEN="127.0.0.1:7000",
        CKPTSVC_AGENT_NAME="",
    )
    keys = changed(before, after)
    assert sorted(keys) == ["agent.listen", "log.level", "save.every", "store.max_write_rate"]
    assert sentence(sorted(keys)) == (
        "log.level, store.max_write_rate: changed; save.every: for what jobs start from now on;"
        " agent.listen: not before `ckptsvc agent --replace`"
    )
    assert sentence(changed(after, after)) == "nothing has changed"


def test_every_key_that_changes_at_once_is_one() -> None:
    assert set(CHANGES) <= set(settings().origin)
    assert set(READ_BY_JOBS) <= {key.partition(".")[0] for key in settings().origin}


def test_a_level_is_a_level_of_the_log() -> None:
    kind = next(f for f in msgspec.structs.fields(type(settings().log)) if f.name == "level").type
    assert all(isinstance(logging.getLevelName(level.upper()), int) for level in kind.__args__)
    with pytest.raises(Exception, match=r"log\.level"):
        settings(CKPTSVC_LOG_LEVEL="loud")
