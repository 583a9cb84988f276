"""Whether a document has fields that its schema does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def missing(given: Any, known: Any, path: str) -> Iterator[str]:
    """Paths of what is in `given` and got lost in `known`, which is the same read by a schema and written again."""
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(known, dict) or name not in known:
                yield f"{path}.{name}"
            else:
                yield from missing(value, known[name], f"{path}.{name}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from missing(value, known[number], f"{path}[{number}]")
