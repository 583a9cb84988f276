"""Messages at random: whatever a field can hold, and now and then what makes sense, so that not all are refused."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

INT32 = (0, 1, 2, 3, 7, -1, (1 << 31) - 1, -(1 << 31), 1 << 20, 1 << 30)
INT64 = (*INT32, (1 << 63) - 1, -(1 << 63), (1 << 53) + 1, 1 << 53)
UINT = (0, 1, 4096, 1 << 20, (1 << 32) - 1)
UINT64 = (*UINT, 1 << 42, (1 << 64) - 1)
REAL = (0.0, 1.0, 0.5, 60.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 1e18)
WORDS = ("", "a", "job", "n1", "n2", "../../x", "\0", "\u202e\ud7ff", "x" * 5000, "\n", " ", "a/b", "%s{}", "a" * 100)
NUMBERS: Mapping[int, Sequence[float]] = {
    Field.CPPTYPE_INT32: INT32, Field.CPPTYPE_INT64: INT64, Field.CPPTYPE_UINT32: UINT, Field.CPPTYPE_UINT64: UINT64,
    Field.CPPTYPE_DOUBLE: REAL, Field.CPPTYPE_ENUM: (0, 1, 2, 99), Field.CPPTYPE_BOOL: (0, 1),
}  # fmt: skip

SOUND: Mapping[str, Sequence[Any]] = {
    "job": ("job", "job", "other"), "node": ("n1",), "store": ("memory://run",), "rank": (0, 1, 2, 3),
    "first_rank": (0, 2), "world_size": (4, 4, 2), "nproc": (1, 2), "min_nodes": (1, 2), "max_nodes": (2, 4),
    "attempt": (1, 1, 2), "epoch": (1, 1, 2), "step": (1, 2, 3, 10), "nbytes": (4096,), "extent": (4096,),
    "address": ("",),
    "doorbell": (0,), "port": (1234,), "generation": (0, 1), "highest": (3, 10), "lowest": (1, 3), "losses": (1, 2),
    "round": (1, 2), "first": (0, 1), "count": (1, 2), "incident": ("1-1-m",), "target": ("n1", "n2"), "digest": ("d",),
}  # fmt: skip
"""What makes sense of a small job."""


def value(rng: random.Random, field: Field, sound: float) -> Any:
    """One for a field: with the probability `sound` one that makes sense."""
    if field.name in SOUND and rng.random() < sound:
        return rng.choice(SOUND[field.name])
    if field.type == Field.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 3, 100]))
    if field.cpp_type in NUMBERS:
        few = NUMBERS[field.cpp_type]
        return rng.choice(few[:3] if rng.random() < sound else few)
    return rng.choice(WORDS[:5] if rng.random() < sound else WORDS)


def fill(rng: random.Random, message: Message, sound: float = 0.5) -> Message:
    """The same message, with some of its fields set."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > max(sound, 0.65):
            continue
        here = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(rng.randrange(3)):
                here[rng.choice(WORDS)] = rng.choice(WORDS)
        elif isinstance(here, Message):
            here.SetInParent()
            fill(rng, here, sound)
        elif field.message_type is not None:
            for _ in range(rng.randrange(3)):
                fill(rng, here.add(), sound)
        elif hasattr(here, "extend"):
            here.extend(value(rng, field, sound) for _ in range(rng.randrange(4)))
        elif field.cpp_type == Field.CPPTYPE_ENUM:
            setattr(message, field.name, rng.choice(NUMBERS[field.cpp_type]))
        else:
            setattr(message, field.name, value(rng, field, sound))
    return message


def one_of(rng: random.Random, message: Message, group: str, sound: float = 0.5) -> Message:
    """The same message, with one of those fields set of which a message has only one."""
    field = rng.choice(message.DESCRIPTOR.oneofs_by_name[group].fields)
    part = getattr(message, field.name)
    part.SetInParent()
    fill(rng, part, sound)
    return message
