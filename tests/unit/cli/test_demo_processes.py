"""Children are real processes here: none is left behind, and one that fails is named with the end of its log."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptsvc.cli.demonstration.processes import Children, DemoFailed, Events, wait_until


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path, os.environ) as group:
        yield group


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for yet has, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_stop_ends_children_and_what_they_started(children: Children, monkeypatch) -> None:
    monkeypatch.setattr("ckptsvc.cli.demonstration.processes.GRACE", 0.1)
    stubborn = children.start("stubborn", python(FAMILY))
    wait_until(lambda: stubborn.log.read_text().endswith("\n"), "the grandchild", 20, [stubborn])
    grandchild = int(stubborn.log.read_text())
    children.stop()
    assert stubborn.status == -signal.SIGKILL
    wait_until(lambda: is_gone(grandchild), "the grandchild to end", 5)


def test_what_a_child_that_has_ended_leaves_behind_is_ended_too(children: Children) -> None:
    code = "import subprocess as s, sys; print(s.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    parent = children.start("parent", python(code))
    wait_until(lambda: parent.status == 0, "the parent to end", 20)
    children.stop()
    wait_until(lambda: is_gone(int(parent.log.read_text())), "the grandchild to end", 5)


def test_a_child_gets_the_chance_to_end_well(children: Children) -> None:
    code = "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(7)); print(1, flush=True); time.sleep(60)"
    polite = children.start("polite", python(code))
    wait_until(lambda: polite.log.read_text() != "", "it to start", 20, [polite])
    children.stop()
    assert polite.status == 7


SERVICE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(7 if os.path.exists(sys.argv[1]) else 8))
print(1, flush=True)
time.sleep(60)
"""

USER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.2), open(sys.argv[1], "w").close(), sys.exit()))
print(1, flush=True)
time.sleep(60)
"""


def test_services_end_last(children: Children, tmp_path: Path) -> None:
    """A service that has to end looks whether its user has ended."""
    mark = str(tmp_path / "user-has-ended")
    service = children.start("service", [*python(SERVICE), mark], service=True)
    user = children.start("user", [*python(USER), mark])
    wait_until(lambda: all(c.log.read_text() for c in (service, user)), "both to start", 20, [service, user])
    children.stop()
    assert service.status == 7


def test_an_exception_leaves_no_child(tmp_path: Path) -> None:
    started = []

    def interrupted() -> None:
        with Children(tmp_path, os.environ) as group:
            started.append(group.start("sleeper", ["sleep", "60"]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].status == -signal.SIGINT


def test_a_child_that_fails_is_named_with_the_end_of_its_log(children: Children) -> None:
    child = children.start("ranks", python("print('the reason'); raise SystemExit(3)"))
    with pytest.raises(DemoFailed, match="ranks ended with status 3") as caught:
        wait_until(lambda: False, "nothing", 20, [child])
    assert "the reason" in caught.value.hint


def test_a_child_that_ends_well_is_no_failure(children: Children) -> None:
    child = children.start("ranks", ["true"])
    wait_until(lambda: child.status == 0, "it to end", 20, [child])


def test_waiting_ends_in_time(children: Children) -> None:
    child = children.start("sleeper", ["sleep", "60"])
    began = time.monotonic()
    with pytest.raises(DemoFailed, match=r"waited 0\.05 s for a miracle"):
        wait_until(lambda: False, "a miracle", 0.05, [child])
    assert time.monotonic() - began < 5


def test_events_are_given_out_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    events = Events(path)
    assert events.new() == []
    path.write_text('{"a": 1}\n{"a"')
    assert events.new() == [{"a": 1}]
    with open(path, "a") as log:
        log.write(': 2}\nnot JSON\n[3]\n\xff\n{"a": 4}\n')
    assert events.new() == [{"a": 2}, {"a": 4}]
    assert events.new() == []
