"""How the log is written: lines for people, or one JSON object a line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from json import dumps
from typing import TextIO

from ckptsvc.telemetry.events import Fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", ""),
            "msg": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """A line for a person: time, level unless it is INFO, message, what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        about = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        line = f"{time} {level}{record.getMessage()}" + (f"  ({about})" if about else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    present = vars(record)
    return {name: present[name] for name in Fields.__annotations__ if present.get(name) is not None}


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `setup_logging` replaces it and leaves others alone."""


def setup_logging(stream: TextIO, *, json: bool, level: int = logging.INFO) -> None:
    """Send the log of this process to `stream`: ours from `level` up, other libraries' from WARNING up."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter() if json else HumanFormatter())
    root.addHandler(handler)
    for name in ("ckptsvc", "ckptsvc_drivers"):
        logging.getLogger(name).setLevel(level)
