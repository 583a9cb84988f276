"""The list of nodes that have failed, from job to job."""

import json
from pathlib import Path

import pytest

from ckptsvc.agent.nodelist import Entry, directory_of, keep, read
from ckptsvc.control.exclusion import HALF_LIFE
from ckptsvc.errors import Damaged, StoreError
from ckptsvc.settings import LaunchSettings


def entry(score, at=1000.0, why="it died"):
    return Entry(score, at, why)


def test_there_need_not_be_one(tmp_path):
    assert read(tmp_path / "nowhere") == {}


def test_what_is_kept_is_read(tmp_path):
    keep(tmp_path / "state", {"a": entry(1.5), "b": entry(3.0)})
    assert read(tmp_path / "state") == {"a": entry(1.5), "b": entry(3.0)}
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["nodes.json"]


def test_other_jobs_entries_stay(tmp_path):
    keep(tmp_path, {"a": entry(1.0)})
    keep(tmp_path, {"b": entry(2.0)})
    assert set(read(tmp_path)) == {"a", "b"}


def test_the_heavier_entry_stays_whatever_its_age(tmp_path):
    keep(tmp_path, {"a": entry(3.0, at=0.0), "b": entry(3.0, at=0.0)})
    keep(tmp_path, {"a": entry(2.0, at=HALF_LIFE), "b": entry(1.0, at=HALF_LIFE)})
    assert read(tmp_path) == {"a": entry(2.0, at=HALF_LIFE), "b": entry(3.0, at=0.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"version": 1}',
        '{"version": 2, "nodes": {}}',
        '{"version": 1, "nodes": {"a": 7}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_list_is_said_to_be_none_and_replaced(tmp_path, text):
    (tmp_path / "nodes.json").write_text(text)
    with pytest.raises(Damaged, match=r"nodes\.json"):
        read(tmp_path)
    keep(tmp_path, {"a": entry(1.0)})
    assert read(tmp_path) == {"a": entry(1.0)}


def test_entries_that_cannot_be_are_left_out(tmp_path):
    nodes = {"a": {"score": -1, "at": 0, "why": ""}, "b" * 1000: {"score": 1, "at": 0, "why": ""}}
    nodes["c"] = {"score": 1, "at": 0, "why": "", "something": "new"}
    (tmp_path / "nodes.json").write_text(json.dumps({"version": 1, "nodes": nodes, "more": 1}))
    assert list(read(tmp_path)) == ["c"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        keep(tmp_path / "file", {"a": entry(1.0)})
    with pytest.raises(StoreError, match="Not a directory"):
        read(tmp_path / "file")


def test_its_place():
    assert directory_of({}, LaunchSettings(state="/shared")) == Path("/shared")
    assert directory_of({"XDG_STATE_HOME": "/x", "HOME": "/h"}, LaunchSettings()) == Path("/x/ckptsvc")
    assert directory_of({"HOME": "/h"}, LaunchSettings()) == Path("/h/.local/state/ckptsvc")
    assert directory_of({}, LaunchSettings()) is None
