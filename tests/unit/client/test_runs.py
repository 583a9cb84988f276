"""`ckptsvc.open`: a run to look at; and what notebooks show of it, and of a session."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness.stored import Run, Tensor

import ckptsvc
from ckptsvc.client.session_view import session_view
from ckptsvc.errors import Damaged, NoCheckpoint
from ckptsvc.html import view
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.pipeline.pins import pin

HOSTILE = "<script>hit()</script>&\"'"


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Run]:
    run = Run(str(tmp_path / "run"))
    for step in (10, 20, 30):
        run.save(step, {"model/w": Tensor(np.full(8, step, np.float32), cut="dim 0")}, world=2)
    yield run
    run.store.close()


class Strict(HTMLParser):
    """Every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(html: str) -> set[str]:
    parser = Strict()
    parser.feed(html)
    assert parser.open == []
    return parser.seen


def test_a_run_is_a_list_of_checkpoints(stored: Run) -> None:
    with ckptsvc.open(stored.url) as run:
        assert run.steps == [10, 20, 30]
        assert [each.step for each in run] == [30, 20, 10]
        assert len(run) == 3
        assert (run.latest.step, run.latest.world_size) == (30, 2)
        assert run[20].bytes > 0
        assert run[20].created is not None
        with pytest.raises(NoCheckpoint, match="no committed checkpoint of step 25"):
            run[25]
        assert repr(run) == f"<ckptsvc run {stored.url}: 3 steps, newest step 30>"


def test_tensors_come_when_they_are_asked_for(stored: Run) -> None:
    with ckptsvc.open(stored.url) as run:
        assert run[20].load()["model"]["w"].tolist() == [20.0] * 8
        assert run.latest.load(only="none/*") == {}


def test_looking_needs_no_torch(stored: Run) -> None:
    code = f"""
import sys, ckptsvc
run = ckptsvc.open({stored.url!r})
run.latest, run._repr_html_(), repr(run), run.latest._repr_html_()
print("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_pins_and_what_retention_says(stored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(stored.store, Ref(1, 10))
    monkeypatch.setenv("CKPTSVC_SAVE_KEEP", "1")
    with ckptsvc.open(stored.url) as run:
        assert [each.pinned for each in run] == [False, False, True]
        assert run[10].stays == ("pinned",)
        assert run[20].stays == ()
        assert run[30].stays == ("the newest", "among the last 1")
        assert "the next save may delete it" in run._repr_html_()


def test_a_damaged_record_is_shown_and_passed_over(stored: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / Ref(1, 30).name / "COMMIT").write_bytes(b"nonsense")
    with ckptsvc.open(stored.url) as run:
        assert run.latest.step == 20
        assert run[30].problem
        assert "COMMIT" in run._repr_html_()
        with pytest.raises(Damaged):
            run[30].load()


def test_an_empty_store(tmp_path: Path) -> None:
    with ckptsvc.open(str(tmp_path / "none")) as run:
        assert list(run) == []
        with pytest.raises(NoCheckpoint):
            _ = run.latest
        assert "0 steps" in repr(run)
        tags(run._repr_html_())


def test_a_connected_store_stays_open(stored: Run) -> None:
    with ckptsvc.open(stored.store) as run:
        assert len(run) == 3
    assert stored.store.children("")


def test_views_are_whole_static_and_escaped(stored: Run) -> None:
    with ckptsvc.open(stored.url) as run:
        for shown in (run._repr_html_(), run.latest._repr_html_()):
            assert not tags(shown) & {"script", "img", "link", "a"}
            assert not re.search(r"https?://|url\(|@import", shown)
    shown = view(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], (f">{HOSTILE}",), [[HOSTILE]], HOSTILE)
    assert "script" not in tags(shown)
    assert shown.count("&lt;script&gt;") == 7


def test_a_session_says_where_it_stands() -> None:
    session: Any = SimpleNamespace(
        _place=SimpleNamespace(job=HOSTILE, rank=3, world_size=8, attempt=2, node="n1"), _url="file:///run",
        steps_done=1234,
        committed_step=None, settings=SimpleNamespace(save=SimpleNamespace(every=None)), last_blocked=0.0123, skipped=1,
        restored_from="memory", _closed=SimpleNamespace(is_set=lambda: False), _link=SimpleNamespace(identity=object()),
    )  # fmt: skip
    shown = session_view(session)
    assert "script" not in tags(shown)
    for text in ("1,234", "none yet", "3 of 8", "12.3 ms", ": connected", "memory"):
        assert text in shown
