"""A training process that is told to end (preemption, a time limit) saves first.

The handler only leaves a mark: in the session, and on the heartbeat page, where the agent finds it and has the
coordinator order a stop for all ranks at the same step. A rank that is alone stops at its next step.

    SIGUSR1   save and stop
    SIGTERM   the same; a second one ends the process at once

Nothing is changed where the program has a handler of its own. SIGTERM keeps its default action under `ckptsvc run` and
torchrun, which stop the survivors of a failed attempt by it: a rank that hangs in a collective runs no handler,
and must end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType

from ckptsvc.errors import EXIT_STATUS

_RESTARTED_BY = ("CKPTSVC_SOCKET", "TORCHELASTIC_RUN_ID")
"""Variables that a launcher sets which restarts ranks."""


class StopTraining(SystemExit):
    """Raised by `step` when the job was asked to stop, after a last save has committed."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STATUS["interrupted"])
        self.reason = reason


class StopSignals:
    """Handlers for as long as the session is open.

    Args:
        on_signal: called with the signal's number, between two instructions of the main thread.

    Attributes:
        number: the signal that came first, or 0.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self.number = 0
        self._on_signal = on_signal
        self._pid = 0
        self._installed: list[signal.Signals] = []

    def install(self, environ: Mapping[str, str]) -> None:
        """Take the signals that nobody else has taken. Only the main thread can; in another one nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        wanted = [signal.SIGUSR1]
        if not any(environ.get(name) for name in _RESTARTED_BY):
            wanted.append(signal.SIGTERM)
        for number in wanted:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._handle)
                self._installed.append(number)

    def restore(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number in self._installed:
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, signal.SIG_DFL)
        self._installed.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGTERM and self.number == signal.SIGTERM
        if again or os.getpid() != self._pid:  # a data loader's worker, forked from here, is ended by SIGTERM
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = number
        # os.write, not logging: the signal may have come in the middle of a log line.
        name = signal.Signals(number).name
        os.write(2, f"ckptsvc: {name}: process {os.getpid()} saves and stops after a step\n".encode())
        self._on_signal(number)
