"""What a rank says it is doing."""

from pathlib import Path

import pytest

from ckptsvc.client.link import AgentLink
from ckptsvc.client.phases import FIRST_STEP, STEP, Phases, phase_bytes
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.identity import PAGE_BYTES, Page


@pytest.fixture
def link():
    """Not connected: the page is in this process's memory."""
    return AgentLink(Path("nowhere"), {})


@pytest.fixture
def phases(link):
    return Phases(link)


def test_a_session_begins_with_attach_and_goes_over_to_steps(phases, link):
    assert link.page.phase == "attach"
    phases.become(FIRST_STEP)
    assert link.page.phase == "first step"
    page = phases.beat(1)
    phases.become(STEP)
    assert (page.phase, page.get("step")) == ("step", 1)


def test_the_innermost_counts(phases, link):
    phases.become(STEP)
    with phases.inside("evaluation"):
        assert link.page.phase == "evaluation"
        with phases.inside("save"):
            assert link.page.phase == "save"
        assert link.page.phase == "evaluation"
    assert link.page.phase == "step"


def test_the_outermost_may_change_while_another_is_open(phases, link):
    with phases.inside("restore"):
        phases.become(STEP)
        assert link.page.phase == "restore"
    assert link.page.phase == "step"


def test_a_phase_ends_with_an_exception_too(phases, link):
    with pytest.raises(ZeroDivisionError), phases.inside("evaluation"):
        1 / 0  # noqa: B018
    assert link.page.phase == "attach"


def test_every_change_and_all_progress_is_a_sign_of_life(phases, link):
    signs = [link.page.get("at")]
    for act in (lambda: phases.become(STEP), lambda: phases.progress(5), lambda: phases.beat(3)):
        act()
        signs.append(link.page.get("at"))
    assert signs == sorted(set(signs))
    assert link.page.get("progress") == 5


def test_the_phase_goes_along_to_a_new_agents_page(phases, link, monkeypatch):
    """At whatever moment the page is replaced."""
    before = link.page
    replaced = Page(memoryview(bytearray(PAGE_BYTES)))
    entered = Page.enter

    def enter(page, name, now):
        entered(page, name, now)
        if page is before:
            link.page = replaced  # the other thread comes in between

    monkeypatch.setattr(Page, "enter", enter)
    phases.become("late")
    assert (replaced.phase, before.phase) == ("late", "late")


@pytest.mark.parametrize("name", ["a", "evaluation", "Epoch 3/4", "x.y-z_0", "9" * 31])
def test_names(name):
    assert phase_bytes(name).rstrip(b"\0").decode() == name


@pytest.mark.parametrize("name", ["", " ", "9" * 32, "tab\t", "ü", "-x", "a\n", "\0", "a;b"])
def test_not_names(phases, name):
    with pytest.raises(InvalidInput, match="is not a name for a phase"):
        phases.inside(name)
