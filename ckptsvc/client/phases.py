"""What this rank is doing, told to the agent through the heartbeat page: no call, no lock, less than a microsecond.

    step         a training step; every `run.step()` is proof of progress
    evaluation   declared by the program: `with run.phase("evaluation"):`, with `run.progress()` where it takes long
    attach, restore, first step, save        declared by the session itself

The innermost phase counts: each has its own history, so that a hang inside an evaluation inside a step is measured by
evaluations.
"""

from __future__ import annotations

import re
import time

from ckptsvc.client.link import AgentLink
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.identity import PHASE_BYTES, Page

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/-]*")

STEP = "step"
"""The phase between two calls of `step`."""

FIRST_STEP = "first step"
"""The phase before the first of them: it compiles and warms up, and says nothing about the others."""


def phase_bytes(name: str) -> bytes:
    """A phase's name as it stands in the page.

    Raises:
        InvalidInput: the name is not one.
    """
    if len(name) >= PHASE_BYTES or not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a name for a phase",
            hint=f"at most {PHASE_BYTES - 1} letters, digits, spaces and . _ / -, a letter or digit first",
        )
    return name.encode().ljust(PHASE_BYTES, b"\0")


class Phases:
    """The phases of one rank; all but `progress` is for the training thread alone."""

    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._open = [phase_bytes("attach")]
        self._known: dict[str, bytes] = {}
        self._enter()

    def inside(self, name: str) -> Inside:
        """A context manager that declares a phase.

        Raises:
            InvalidInput: the name is not one.
        """
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = phase_bytes(name)
        return Inside(self, known)

    def become(self, name: str) -> None:
        """Go over to another outermost phase."""
        self._open[0] = phase_bytes(name)
        if len(self._open) == 1:
            self._enter()

    def beat(self, step: int) -> Page:
        """Note that so many steps are done; returns the page."""
        page = self._link.page
        page.put("step", step)
        page.put("at", time.monotonic_ns())
        return page

    def start(self, step: int) -> None:
        """Note that steps are done from here on: so many were, before."""
        self.beat(step).put("began", step)

    def progress(self, amount: int = 1) -> None:
        """Note that the phase is `amount` further; from any thread."""
        self._link.page.advance(amount, time.monotonic_ns())

    def begin(self, name: bytes) -> None:
        """Begin an inner phase."""
        self._open.append(name)
        self._enter()

    def end(self) -> None:
        """Go back to the phase around it."""
        self._open.pop()
        self._enter()

    def _enter(self) -> None:
        page = self._link.page
        page.enter(self._open[-1], time.monotonic_ns())
        if page is not self._link.page:
            # The agent was replaced this very moment. Its page has what stood in the old one before or after that.
            self._link.page.enter(self._open[-1], time.monotonic_ns())


class Inside:
    """One phase, for `with`."""

    __slots__ = ("_name", "_phases")

    def __init__(self, phases: Phases, name: bytes) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._phases.end()
