"""What a report of an incident shows, and its page."""

from html.parser import HTMLParser

import pytest

from ckptsvc.agent.http.incident_page import page
from ckptsvc.agent.http.incident_view import COLUMNS, MAX_ROWS, seconds, spans, together, view
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

MAIN = "train.py:1 <module>\ntrain.py:9 main\n"
HOSTILE = "<script>alert(1)</script>\x1b[31m\x00 & \"quotes\" 'too' \u202e"


def rank(number: int, **changes: object) -> pb.RankEvidence:
    fields = {
        "rank": number, "step": 1234, "phase": "step", "stalled": 4.0, "state": "S", "waits_in": "futex_do_wait",
        "answers": True, "enqueued": 6, "completed": 5, "collective": "all_reduce of [4]",
        "stack": MAIN + "torch/distributed.py:7 all_reduce",
    }  # fmt: skip
    return pb.RankEvidence(**fields | changes)


def hung(*ranks: pb.RankEvidence, **changes: object) -> pb.Incident:
    fields = {
        "id": "1-1", "job": "gpt", "attempt": 2, "kind": "hung", "opened": "2026-11-21T14:03:11+01:00", "rank": 2,
        "sentence": "Rank 2 on node n1 is to blame: it is stopped (95 % sure).", "node": "n1", "confidence": 0.95,
        "signals": ["its steps stopped"], "actions": ["+0.1 s  SIGKILL to rank 2"], "nics": ["cxi0: 20 timeouts"],
        "step": 1234, "detected": 4.5, "ranks": ranks,
    }  # fmt: skip
    return pb.Incident(**fields | changes)


STOPPED = rank(
    2, state="T", answers=False, enqueued=-1, completed=-1, collective="", waits_in="do_signal_stop", cpu=0.0,
    stack=MAIN + "data.py:3 load", native_stack="read (libc.so)", other_stacks="thread reader\n  data.py:1 f",
    log_tail="step 1234\nreading shard 7", notes=["no thread of the process answered"],
)  # fmt: skip


def test_the_sentence_and_the_facts_come_first() -> None:
    report = view(hung(), "a1b2c3-1-1")
    assert report.sentence == "Rank 2 on node n1 is to blame: it is stopped (95 % sure)."
    assert report.facts == [
        ("incident", "a1b2c3-1-1"),
        ("job", "gpt, attempt 2, step 1,234"),
        ("kind", "hung"),
        ("to blame", "rank 2"),
        ("node", "n1"),
        ("sure to", "95 %"),
        ("opened", "2026-11-21 13:03:11 UTC"),
        ("known after", "4.5 s from the last sign of life"),
    ]
    assert (report.signals, report.actions, report.nics) == (
        ["its steps stopped"], ["+0.1 s SIGKILL to rank 2"], ["cxi0: 20 timeouts"],
    )  # fmt: skip


def test_where_nobody_could_be_named() -> None:
    report = view(hung(sentence="", rank=-1, node="", opened="?"))
    assert report.sentence == "Nobody could be named."
    assert ("to blame", "nobody could be named") in report.facts
    assert ("opened", "not known") in report.facts
    assert (report.rows, report.places, report.log, report.unknown) == ([], [], None, [])


def test_ranks_that_look_alike_share_a_line_and_the_one_to_blame_is_first() -> None:
    gone = rank(9, state="X", answers=False, enqueued=-1, waits_in="", phase="", stack="", collective="")
    report = view(hung(*(rank(n, stalled=n) for n in (0, 1, 3, 4, 6)), STOPPED, gone))
    assert [dict(zip(COLUMNS, row.cells, strict=True)) for row in report.rows] == [
        {"RANKS": "2", "STEP": "1,234", "PHASE": "step", "QUIET FOR": "4.0 s", "STATE": "stopped", "CPU": "0 %",
            "COLLECTIVES": "-", "ANSWERS": "no", "WAITS IN": "do_signal_stop"},
        {"RANKS": "0-1, 3-4, 6", "STEP": "1,234", "PHASE": "step", "QUIET FOR": "6.0 s", "STATE": "sleeping",
            "CPU": "0 %", "COLLECTIVES": "5 of 6", "ANSWERS": "yes", "WAITS IN": "futex_do_wait"},
        {"RANKS": "9", "STEP": "1,234", "PHASE": "-", "QUIET FOR": "4.0 s", "STATE": "gone", "CPU": "-",
            "COLLECTIVES": "-", "ANSWERS": "no", "WAITS IN": "-"},
    ]  # fmt: skip
    assert [row.blamed for row in report.rows] == [True, False, False]


def test_equal_stacks_are_shown_once_without_what_all_share_the_odd_ones_first() -> None:
    odd = rank(5, stack=MAIN + "eval.py:2 evaluate", collective="")
    unseen = rank(7, stack="")
    report = view(hung(*(rank(n) for n in (0, 1, 3)), STOPPED, odd, unseen))
    assert report.common == MAIN.splitlines()
    assert [(place.who, place.frames, place.collective) for place in report.places] == [
        ("rank 2", ["data.py:3 load"], ""),
        ("rank 5", ["eval.py:2 evaluate"], ""),
        ("ranks 0-1, 3", ["torch/distributed.py:7 all_reduce"], "all_reduce of [4]"),
        ("rank 7", [], "all_reduce of [4]"),
    ]
    blamed = report.places[0]
    assert (blamed.blamed, blamed.native, blamed.others) == (
        True, ["read (libc.so)"], ["thread reader", "  data.py:1 f"],
    )  # fmt: skip


def test_a_stack_is_never_left_out_as_a_whole() -> None:
    report = view(hung(rank(0, stack="a\nb"), rank(1, stack="a\nb\nc")))
    assert [place.frames for place in report.places] == [["b"], ["b", "c"]]
    assert [place.frames for place in view(hung(rank(0, stack="a\nb"))).places] == [["a", "b"]]


def test_the_log_of_the_one_to_blame_and_what_is_not_known() -> None:
    report = view(hung(STOPPED, rank(0, log_tail="mine", notes=["x"]), rank(1, notes=["x"]), notes=["n2 is silent"]))
    assert report.log == ("rank 2", ["step 1234", "reading shard 7"])
    assert report.unknown == ["n2 is silent", "rank 2: no thread of the process answered", "ranks 0-1: x"]
    assert view(hung(rank(0, log_tail="mine"), rank=-1)).log == ("rank 0", ["mine"])
    assert view(hung(rank(0, log_tail="mine"), rank(1), rank=-1)).log is None


def test_of_ten_thousand_ranks_that_all_differ_some_lines_are_shown() -> None:
    report = view(hung(*(rank(n, step=n) for n in range(10_000))))
    assert (len(report.rows), report.left_out) == (MAX_ROWS, 10_000 - MAX_ROWS)
    assert report.rows[0].cells[0] == "2"
    assert "9,936 more lines are in the JSON report" in page(hung(*(rank(n, step=n) for n in range(10_000))))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 1, 2, 2], "ranks 0-2, 5"), ([1, 3], "ranks 1, 3")],
)
def test_ranks_in_few_words(numbers: list[int], text: str) -> None:
    assert together(numbers) == text
    assert text.endswith(spans(numbers))


def test_spans_of_time() -> None:
    assert [seconds(value) for value in (0.04, 99.94, 120, 7200)] == ["0.0 s", "99.9 s", "2 min", "2.0 h"]


class Checker(HTMLParser):
    """Whether every element is closed, and what is in the page."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_opens_with_the_sentence_and_needs_nothing_else() -> None:
    text = page(hung(rank(0), rank(1), STOPPED, notes=["n"]), "a1b2c3-1-1")
    found = checked(text)
    assert text.startswith("<!doctype html>")
    body = text.partition("<body>")[2]
    assert body.index("<h1>Rank 2 on node n1 is to blame") < body.index("<h2>")
    for title in ("What says so", "What was done", "What the ranks were doing", "Where they were",
        "The last output of rank 2", "Network cards", "Remarks, and what could not be found out"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert {"script", "img", "link", "iframe", "a"} & set(found.seen) == set()
    assert {name for name, _ in found.attributes} & {"src", "href", "style", "onclick"} == set()
    assert "url(" not in text
    assert "@import" not in text
    for feature in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert feature in text


def test_nothing_in_an_incident_can_command_the_page() -> None:
    fields: dict[str, object] = dict.fromkeys(("job", "kind", "sentence", "node"), HOSTILE)
    fields |= {name: [HOSTILE] for name in ("signals", "actions", "nics", "notes")}
    texts = ("phase", "state", "waits_in", "collective", "stack", "native_stack", "log_tail", "other_stacks")
    text = page(hung(rank(2, notes=[HOSTILE], **dict.fromkeys(texts, HOSTILE)), **fields), HOSTILE)
    found = checked(text)
    assert "script" not in found.seen
    assert found.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "\u202e" not in text


def test_an_empty_incident_has_a_page() -> None:
    assert "Nobody could be named." in checked(page(pb.Incident())).text
