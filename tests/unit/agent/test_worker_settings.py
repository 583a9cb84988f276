"""A worker knows what its agent knows of the settings, whatever has become of the files since."""

import os
import sys

import pytest

from ckptsvc.agent.worker.settings import VARIABLE, heard, told
from ckptsvc.config import load
from ckptsvc.errors import ConfigError


def test_what_is_told_is_heard(tmp_path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[save]\nevery = "5min"\nextent = "2MiB"\n[store]\ntimeout = "7s"\nmax_write_rate = "1GB/s"\n'
        '[store.options.s3]\nregion = "eu-west-1"\n'
    )
    settings = load({}, files=[config])
    found = heard(told(settings))
    assert (found.store, found.save) == (settings.store, settings.save)


def test_a_file_that_has_got_a_mistake_since_is_not_read(tmp_path) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text("[save]\nevrey = 1\n")
    environ = {"CKPTSVC_CONFIG": str(broken)}
    assert heard(environ | told(load({}, files=[]))).save.keep == 0
    with pytest.raises(ConfigError, match="evrey"):
        heard(environ)


def test_it_fits_into_an_environment() -> None:
    options = {"s3": {f"key-{number}": "x" * 100 for number in range(200)}}
    settings = load({}, {"store.options": options}, files=[])
    text = told(settings)[VARIABLE]
    assert sys.platform == "linux"
    assert len(text) < 32 * os.sysconf("SC_PAGESIZE"), "MAX_ARG_STRLEN of execve(2)"
