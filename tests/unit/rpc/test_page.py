"""The heartbeat page: what one process writes, another reads."""

import os

import pytest

from ckptsvc.rpc.identity import PAGE, PAGE_BYTES, PHASE_BYTES, Page


def blank():
    return Page(memoryview(bytearray(Page.blank().ljust(PAGE_BYTES, b"\0"))))


def name(text):
    return text.encode().ljust(PHASE_BYTES, b"\0")


def test_nothing_has_happened_on_a_blank_page():
    page = blank()
    words = ("step", "at", "save_at", "stop_at", "committed", "failed", "phases", "since", "progress")
    assert [page.get(word) for word in words] == [0, 0, -1, -1, -1, -1, 0, 0, 0]
    assert page.phase == ""


def test_words_do_not_overlap():
    page = blank()
    words = ("step", "at", "save_at", "stop_at", "committed", "failed", "phases", "since", "progress")
    for number, word in enumerate(words):
        page.put(word, number - 4)
    page._name[:] = name("x" * 31)
    assert [page.get(word) for word in words] == [number - 4 for number in range(len(words))]
    assert page.phase == "x" * 31
    assert PAGE.size <= PAGE_BYTES


def test_a_phase_begins_with_its_name_its_time_and_no_progress():
    page = blank()
    page.enter(name("restore"), 100)
    page.advance(7, 150)
    page.advance(5, 170)
    assert [page.get(word) for word in ("phases", "since", "at", "progress")] == [1, 100, 170, 12]
    page.enter(name("step"), 200)
    assert [page.get(word) for word in ("phases", "since", "at", "progress")] == [2, 200, 200, 0]
    assert page.phase == "step"


def test_it_is_read_by_another_process(tmp_path):
    path = tmp_path / "page"
    path.write_bytes(Page.blank().ljust(PAGE_BYTES, b"\0"))
    import mmap

    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), PAGE_BYTES)
    pid = os.fork()
    if pid == 0:
        Page(memoryview(memory)).enter(name("evaluation"), 42)
        os._exit(0)
    os.waitpid(pid, 0)
    page = Page(memoryview(memory))
    assert (page.phase, page.get("at")) == ("evaluation", 42)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"a\x00b", "a"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\x1b[31mred", "?[31mred"),
        (b"x" * PHASE_BYTES, "x" * PHASE_BYTES),
        (b"", ""),
    ],
)
def test_any_bytes_in_place_of_a_name_can_be_shown(raw, shown):
    page = blank()
    page._name[:] = raw.ljust(PHASE_BYTES, b"\0")
    assert page.phase == shown


class TestCarrying:
    """A new agent gives a new page: what the rank has written goes over, the agent's own words do not."""

    def test_what_the_rank_has_written(self):
        old, new = blank(), blank()
        old.enter(name("evaluation"), 10)
        old.put("step", 5)
        old.put("committed", 3)
        new.carry(old)
        assert [new.get(word) for word in ("step", "at", "phases", "since", "committed")] == [5, 10, 1, 10, -1]
        assert new.phase == "evaluation"

    def test_not_what_is_older(self):
        old, new = blank(), blank()
        old.enter(name("evaluation"), 10)
        new.carry(old)
        new.enter(name("step"), 20)
        new.carry(old)
        assert (new.phase, new.get("at")) == ("step", 20)
        new.put("at", 30)
        old.put("at", 25)
        new.carry(old)
        assert new.get("at") == 30
