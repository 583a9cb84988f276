"""The list of nodes that have failed, from job to job."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptsvc.agent import nodelist
from ckptsvc.agent.nodelist import Entry, Word, directory_of, keep
from ckptsvc.control.exclusion import HALF_LIFE
from ckptsvc.errors import Damaged, StoreError
from ckptsvc.settings import LaunchSettings


def entry(score, at=1000.0, why="it died"):
    return Entry(score, at, why)


def read(directory):
    return nodelist.read(directory).nodes


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


def word(excluded=True, at=1000.0, until=0.0, why="a bad cable (ada)"):
    return Word(excluded, at, until, why)


def test_what_people_have_said_is_kept_and_the_later_word_counts(tmp_path):
    now = time.time()
    keep(tmp_path, {}, {"a": word(at=now - 9), "b": word(False, at=now - 2)})
    keep(tmp_path, {}, {"a": word(False, at=now - 5), "b": word(at=now - 3)})
    words = nodelist.read(tmp_path).words
    assert not words["a"].holds(now)
    assert not words["b"].holds(now)
    keep(tmp_path, {}, {"b": word(at=now - 1, until=now + 60)})
    assert nodelist.read(tmp_path).words["b"].holds(now)
    assert not nodelist.read(tmp_path).words["b"].holds(now + 61)


def test_who_includes_a_node_forgives_it_what_it_had_against_it(tmp_path):
    now = time.time()
    keep(tmp_path, {"a": entry(3.0, at=now - 10), "b": entry(3.0, at=now - 10)})
    keep(tmp_path, {"a": entry(3.0, at=now - 10)}, {"a": word(False, at=now - 5)})
    assert set(read(tmp_path)) == {"b"}
    keep(tmp_path, {"a": entry(1.0, at=now - 1)})
    assert read(tmp_path)["a"].score == 1.0


def test_a_word_whose_time_is_over_is_forgotten_in_the_end(tmp_path):
    now = time.time()
    keep(tmp_path, {}, {"a": word(at=now - 40 * 86400, until=now - 39 * 86400), "b": word(at=now - 40 * 86400)})
    assert set(nodelist.read(tmp_path).words) == {"b"}


def test_no_word_is_lost_when_many_say_one_at_once(tmp_path):
    def say(number):
        keep(tmp_path, {}, {f"n{number}": Word(True, time.time(), 0, "why")})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(say, range(32)))
    assert set(nodelist.read(tmp_path).words) == {f"n{number}" for number in range(32)}


def test_what_is_said_now_counts_more_than_what_a_clock_that_is_ahead_has_dated(tmp_path):
    now = time.time()
    keep(tmp_path, {}, {"a": Word(False, now + 3600, 0, "by a host whose clock is ahead")})
    keep(tmp_path, {}, {"a": Word(True, now, 0, "now")})
    assert nodelist.read(tmp_path).words["a"].why == "now"
