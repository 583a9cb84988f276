"""The page: well-formed, needs nothing from outside, says what happened, survives what went wrong."""

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ckptsvc.cli.demonstration.chart import NARROW, WIDE, chart
from ckptsvc.cli.demonstration.facts import Facts, Run
from ckptsvc.cli.demonstration.report import count, report, seconds, size, verdict

Make = Callable[..., Facts]


class Reader(HTMLParser):
    """Checks that elements nest; collects text and everything that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag in {"script", "link", "img", "iframe", "object", "embed"}:
            self.loads.append(tag)
        self.loads += [name for name, _ in attributes if name in {"src", "href", "onload", "onclick"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> str:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.loads == []
    assert "url(" not in page
    assert "@import" not in page
    return " ".join(" ".join(reader.text).split())


def test_the_page_tells_what_happened(demo_facts_of: Make) -> None:
    text = read(report(demo_facts_of()))
    for words in (
        "A rank was killed in mid-training; 2.25 s later the job was stepping again",
        "After step 8, rank 3 on node-1 was killed with SIGKILL; the job went on from memory after step 6",
        "2 steps had to be done again",
        "4.0 ms training blocked per save",
        "0.25 s until a save was durable",
        "10 of 10",
        "39.7 MB",
        "FSDP2 x TP, 2 x 2 ranks",
        "2 min 10 s",
        "SIGKILL The way to end a process",
    ):
        assert words in text, words


def test_what_comes_from_outside_is_escaped(demo_facts_of: Make) -> None:
    page = report(demo_facts_of())
    assert "2 cores &lt;fast &amp; loud&gt;" in page
    facts = demo_facts_of()
    hostile = replace(facts.runs[2], label="<script>alert(1)</script>")
    read(report(replace(facts, runs=(*facts.runs[:2], hostile, facts.runs[3]))))


def test_a_failed_check_is_the_headline(demo_facts_of: Make) -> None:
    facts = demo_facts_of(apart=(1e-7, 1e-3))
    assert verdict(facts).startswith("1 of 10 checks failed: FSDP2 x TP, 2 x 2 ranks")
    text = read(report(facts))
    assert "FAILED" in text
    assert 'class="bad"' in report(facts)
    assert 'class="bad"' not in report(demo_facts_of())


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_the_picture_shows_each_run_and_incident(demo_facts_of: Make, frame) -> None:
    picture = ElementTree.fromstring(chart(demo_facts_of(), frame))
    lines = {line.get("class"): line.get("points").split() for line in picture.iter("polyline")}
    assert {kind: len(points) for kind, points in lines.items()} == {"control": 12, "first": 8, "again": 6}
    # The run lies on the control, point by point.
    assert lines["first"] == lines["control"][:8]
    assert lines["again"] == lines["control"][6:]
    words = [text.text for text in picture.iter("text")]
    assert {"rank 3 killed", "goes on from step 6", "tolerance 1e-5"} <= set(words)
    assert sum(rect.get("class").startswith("bar") for rect in picture.iter("rect")) == 5
    places = [float(e.get(a)) for e in picture.iter() for a in ("x", "x1", "x2", "cx") if e.get(a)]
    assert min(places) >= 0
    assert max(places) <= frame.width


def test_distances_are_where_they_belong(demo_facts_of: Make) -> None:
    """Equal losses lie in the row called "equal", others between their powers of ten."""
    picture = ElementTree.fromstring(chart(demo_facts_of(apart=(3e-7, 0.0)), WIDE))
    height = {t.text: float(t.get("y")) - 4 for t in picture.iter("text") if t.get("class") == "axis end"}
    titled = [(e, e.findtext("title") or "") for e in picture.iter()]
    apart = [float(e.get("cy")) for e, title in titled if title.endswith("3e-7 apart")]
    equal = [e for e, title in titled if title.endswith("equal")]
    assert len(apart) == 6
    assert all(height["1e-6"] < y < height["1e-7"] for y in apart)
    assert len(equal) == 12 + 6
    assert all(float(e.get("y1")) + 5 == height["equal"] for e in equal if e.tag == "line")


def test_a_demo_that_went_nowhere_still_makes_a_page(demo_facts_of: Make) -> None:
    facts = demo_facts_of()
    nothing = Run("control", "FSDP2, 4 ranks", "control")
    bare = replace(facts, runs=(nothing,), incidents=(), saves=(), checks=())
    assert chart(bare, WIDE) == ""
    assert "Nothing was checked" in read(report(bare))


def test_an_incident_nobody_came_back_from(demo_facts_of: Make) -> None:
    facts = demo_facts_of()
    lost = replace(facts.incidents[0], known=None, stepping=None, resumed_from=None)
    text = read(report(replace(facts, incidents=(lost,))))
    assert "the job did not come back" in text
    assert "–" in text


def test_losses_that_are_no_numbers_do_not_break_the_picture(demo_facts_of: Make, demo_logs) -> None:
    facts = demo_facts_of(demo_logs.run(again_9=float("nan"), again_10=float("inf")), apart=(float("nan"), 0.5))
    picture = chart(facts, WIDE)
    ElementTree.fromstring(picture)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', picture)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"), (0.00004, "0.0 ms"), (0.0032, "3.2 ms"), (0.0099, "9.9 ms"), (0.042, "42 ms"),
        (0.0994, "99 ms"), (0.0999, "0.10 s"), (1.239, "1.24 s"), (9.996, "10.0 s"), (99.9, "99.9 s"),
        (119.7, "2 min 0 s"), (3725, "62 min 5 s"),
    ],
)  # fmt: skip
def test_durations_for_people(value: float | None, words: str) -> None:
    assert seconds(value).replace("\N{NO-BREAK SPACE}", " ") == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (39_700_123, "39.7 MB"), (512e6, "512 MB"), (3e12, "3000 GB")],
)
def test_sizes_for_people(value: float, words: str) -> None:
    assert size(value).replace("\N{NO-BREAK SPACE}", " ") == words


def test_counts() -> None:
    assert [count(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
