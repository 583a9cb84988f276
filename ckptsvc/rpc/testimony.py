"""What a training process says about itself when its agent asks: where its threads are, which collectives it has seen.

The question and the answer are one packet each on a connection of their own (`witness` in rpc.identity):

    {id, what: "stacks" | "collectives"} -> {id, stacks: [...]} or {id, groups: [...]}, and a note where it cannot

An answer at all, from a thread beside the training, says that the interpreter lock is free.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

MAX_FRAMES = 64
"""Frames kept of one stack: the innermost."""

MAX_THREADS = 64
"""Threads whose stacks are told."""

MAX_GROUPS = 256
"""Process groups that are told of."""

WAITING_THREADS = ("ckptsvc-witness", "ckptsvc-keep-connected")
"""Threads of a session that do nothing but wait for its agent: no report needs them."""

_Line = Annotated[str, msgspec.Meta(max_length=2000)]
_Count = Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]

# What comes before the part of a path that is the same on every machine.
_INSTALLED = re.compile(r".*/(?:site-packages|dist-packages|lib/python3\.[0-9]+)/")


class Question(msgspec.Struct, frozen=True):
    """What the agent asks."""

    id: int
    what: Literal["stacks", "collectives"]


class Stack(msgspec.Struct, frozen=True):
    """One thread in Python; frames are lines as `frame_line` makes them, innermost last."""

    thread: _Line
    main: bool
    frames: Annotated[list[_Line], msgspec.Meta(max_length=MAX_FRAMES + 1)]


class Group(msgspec.Struct, frozen=True):
    """The collectives of one process group; fields as in `GroupProgress` of coordinator.proto."""

    name: _Line
    enqueued: _Count
    completed: _Count
    collective: _Line


class Answer(msgspec.Struct, frozen=True):
    """The answer. The group that the process waits in, or used last, comes first."""

    id: int
    stacks: Annotated[list[Stack], msgspec.Meta(max_length=MAX_THREADS)] = []
    groups: Annotated[list[Group], msgspec.Meta(max_length=MAX_GROUPS)] = []
    note: _Line = ""


def frame_line(filename: str, line: int, function: str) -> str:
    """One frame for people: the same for the same place on every rank, whoever has looked."""
    return f"{function[:300]} ({_INSTALLED.sub('', filename)[-600:]}:{line})"


def cut(frames: list[str]) -> list[str]:
    """The innermost frames (the last ones), and how many were left out."""
    if len(frames) <= MAX_FRAMES:
        return frames
    return [f"... {len(frames) - MAX_FRAMES} outer frames", *frames[-MAX_FRAMES:]]
