"""How the log is written: lines for people, or one JSON object a line. Secrets are in neither."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from json import dumps, loads
from typing import TYPE_CHECKING, TextIO, Unpack, cast

from ckptsvc.telemetry.events import Fields

if TYPE_CHECKING:
    from types import TracebackType

FORMAT = "CKPTSVC_LOG_FORMAT"
"""The variable of the setting log.format: processes that ours start write what ours does."""

ABOUT = "CKPTSVC_LOG_ABOUT"
"""The variable in which they are told what all their lines are about, as JSON."""

KEYS = {
    "ts": "time, ISO 8601 in UTC, with milliseconds",
    "level": "debug, info, warning, error or critical",
    "logger": "which part has written it; of other libraries, their name",
    "event": "what has happened, one of the names below; empty where it has no name",
    "msg": "the line as people read it",
    "job": "the job, as `ckptsvc status` names it",
    "node": "the node",
    "rank": "the rank, a number",
    "attempt": "the attempt of the job, a number",
    "step": "the training step, a number",
    "epoch": "the epoch of the run, a number",
    "reason": "why, a sentence",
    "error": "a traceback",
}
"""Every key of a JSON line, in order, and what it says."""

OURS = ("ckptsvc", "ckptsvc_drivers")
"""The loggers of the service."""

MASKED = "***"

_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_NAME = re.compile(r"""(?<![\w-])([\w-]++)["']?\s{0,4}[=:]\s{0,4}["']?""")
"""What comes before a value. It takes whole words, so that a long one costs no more than its length."""

_VALUE = re.compile(r"""[^\s"'&,;)}\]]*""")

_SECRET = re.compile(r"secret|passw|passphrase|credential|token|signature|(api|access)_?key", re.IGNORECASE)

About = Callable[[], Fields]


def masked(text: str) -> str:
    """The same text without what looks like a secret."""
    text = _KEY.sub(MASKED, _BEARER.sub(rf"\1 {MASKED}", _LOGIN.sub(f"{MASKED}@", text)))
    parts, done = [], 0
    for found in _NAME.finditer(text):
        name = found[1]
        if (
            found.start() >= done and _SECRET.search(name) and not name.lower().endswith("_file")
        ):  # where it is, is none
            value = _VALUE.match(text, found.end())
            if value is not None and value[0]:
                parts += [text[done : found.end()], MASKED]
                done = value.end()
    return "".join((*parts, text[done:]))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys of `KEYS`; `about` says what every line is about, where it does not."""

    def __init__(self, about: About = Fields) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        known = {**self._about(), **_fields_of(record)}
        fields = {name: known[name] for name in Fields.__annotations__ if name in known}
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", ""),
            "msg": masked(_message(record)),
            **{key: masked(value) if isinstance(value, str) else value for key, value in fields.items()},
        }
        if record.exc_info:
            line["error"] = masked(self.formatException(record.exc_info))
        return dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """A line for a person: time, level unless it is INFO, message, what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        message, fields = _message(record), _fields_of(record)
        about = " ".join(f"{k}={v}" for k, v in fields.items() if k != "job" or str(v) not in message)
        line = _shown(f"{time} {level}{message}" + (f"  ({about})" if about else ""))
        return masked(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


def _message(record: logging.LogRecord) -> str:
    """The message; one that cannot be made is no reason to write none."""
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001  whatever an argument's __str__ raises
        return f"{record.msg!r} with {len(record.args or ())} arguments: {type(error).__name__}"


def _shown(line: str) -> str:
    """As one line that no terminal obeys: what is in it may be another node's, or a program's."""
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    present = vars(record)
    return {name: present[name] for name in Fields.__annotations__ if present.get(name) is not None}


LOST = "lines of this log were lost or late: %d"
"""What the log says once it can be written again."""


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `setup_logging` replaces it and leaves others alone.

    Lines that cannot be written (the disk is full, the terminal is gone) are counted, and that is said when it can be.
    """

    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        lost = self.lost
        super().emit(record)
        if lost and lost == self.lost:
            self.lost = 0
            about = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": LOST}
            super().emit(logging.makeLogRecord(vars(record) | about | {"args": (lost,), "exc_info": None, "event": ""}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that could not be written; one that could not be made is a mistake of ours, and shown."""
        if isinstance(sys.exc_info()[1], OSError):
            self.lost += 1
        else:
            super().handleError(record)


def setup_logging(stream: TextIO, *, json: bool, level: str = "info", about: About = Fields) -> None:
    """Send the log of this process to `stream`: ours from `level` up, other libraries' from WARNING up."""
    _replace(logging.getLogger(), stream, json=json, about=about)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """From which level up our lines are logged: "debug", "info", "warning" or "error"."""
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())


def log_apart(stream: TextIO, about: About) -> None:
    """Write what the service says in somebody else's process as JSON, and leave the rest of its log alone."""
    for name in OURS:
        logger = logging.getLogger(name)
        _replace(logger, stream, json=True, about=about)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def start_logging(form: str, level: str = "info", **about: Unpack[Fields]) -> None:
    """Log to standard error, in a process of our own, and have those that it starts do the same.

    As JSON, whatever Python would print otherwise becomes a line too: warnings, and exceptions that nobody catches.

    Args:
        form: the setting log.format.
        level: the setting log.level.
        about: what every line is about.
    """
    os.environ[FORMAT], os.environ[ABOUT] = form, dumps(about)
    setup_logging(sys.stderr, json=form == "json", level=level, about=lambda: about)
    if form == "json":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes what is no JSON; its errors reach us
        logging.captureWarnings(capture=True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def told() -> Fields:
    """What this process was told in `ABOUT`; what makes no sense is left out."""
    try:
        found = loads(os.environ.get(ABOUT, "{}"))
    except ValueError:
        return Fields()
    known = found.items() if isinstance(found, dict) else ()
    return cast("Fields", {k: v for k, v in known if k in Fields.__annotations__ and isinstance(v, str | int)})


def line(message: str, level: int = logging.INFO, *, logger: str, about: Fields) -> str:
    """One JSON line for a process that does not log but speaks to people."""
    return JsonFormatter(lambda: about).format(logging.LogRecord(logger, level, "", 0, message, None, None))


def _replace(logger: logging.Logger, stream: TextIO, *, json: bool, about: About) -> None:
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter(about) if json else HumanFormatter())
    logger.addHandler(handler)


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    found = error if error is not None else kind()
    logging.getLogger("ckptsvc").critical("uncaught: %s", kind.__name__, exc_info=(kind, found, traceback))
