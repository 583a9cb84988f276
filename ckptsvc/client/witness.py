"""The thread that answers when the agent asks where this process is.

It waits in the kernel, costs nothing until it is asked, and then does nothing that could wait for a file, an import or
a lock of the training: that the process is stuck is what the question is about.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import types

import msgspec

from ckptsvc.client import flight
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.identity import MAX_PACKET, IdentityClient
from ckptsvc.rpc.testimony import MAX_THREADS, WAITING_THREADS, Answer, Question, Stack, cut, frame_line

log = logging.getLogger("ckptsvc")

_PR_SET_PTRACER = 0x59616D61  # linux/prctl.h


def testify(path: str, token: str) -> None:
    """Answer the agent's questions from now on, in a thread that ends when the connection does.

    Args:
        path: of the identity socket.
        token: of this rank's session.
    """
    try:
        connection = IdentityClient(path)
        try:
            connection.call({"op": "witness", "token": token})
        except BaseException:
            connection.close()
            raise
    except CkptsvcError as error:  # an agent of an older version
        log.debug("the agent will have to look from outside only: %s", error)
        return
    _let_look(connection.peer)
    threading.Thread(target=connection.serve, args=(answer,), name=WAITING_THREADS[0], daemon=True).start()


def answer(packet: bytes) -> bytes:
    """The answer to one question; never an exception."""
    number = 0
    try:
        question = msgspec.json.decode(packet, type=Question)
        number = question.id
        if question.what == "stacks":
            return _encoded(Answer(number, stacks=_stacks()))
        groups = flight.progress(flight.recorded())
        note = "" if groups else "torch's flight recorder has recorded nothing in this process"
        return _encoded(Answer(number, groups=groups, note=note))
    except Exception as error:  # noqa: BLE001  the agent is told, and the training must not end of it
        return _encoded(Answer(number, note=_plain(f"{type(error).__name__}: {error}"[:1000])))


def _encoded(whole: Answer) -> bytes:
    """As many stacks and groups as fit into a packet; the first ones matter most."""
    stacks, groups = whole.stacks, whole.groups
    while True:
        packet = msgspec.json.encode(Answer(whole.id, stacks, groups, whole.note))
        if len(packet) <= MAX_PACKET:
            return packet
        if len(stacks) == 1:
            stacks = [Stack(stacks[0].thread, stacks[0].main, stacks[0].frames[len(stacks[0].frames) // 2 :])]
        else:
            stacks, groups = stacks[: len(stacks) // 2], groups[: len(groups) // 2]


def _stacks() -> list[Stack]:
    """Where every thread but this one is, the main thread first."""
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    order = sorted(frames, key=lambda ident: (ident != main, names.get(ident, "")))
    return [
        Stack(_plain(names.get(ident) or f"thread {ident}"), ident == main, _lines(frames[ident]))
        for ident in order[:MAX_THREADS]
    ]


def _lines(frame: types.FrameType | None) -> list[str]:
    """A thread's frames, innermost last. Their source is not read: it may lie where reading hangs."""
    lines = []
    while frame is not None:
        code = frame.f_code
        lines.append(_plain(frame_line(code.co_filename, frame.f_lineno or 0, code.co_qualname)))
        frame = frame.f_back
    return cut(lines[::-1])


def _plain(text: str) -> str:
    """Without what UTF-8 cannot say (file names may have it)."""
    return text.encode("utf-8", "replace").decode()


def _let_look(pid: int) -> None:
    """Allow the agent, and the tools it starts, to read this process's stacks where only a parent may (Yama)."""
    if pid > 0:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)
