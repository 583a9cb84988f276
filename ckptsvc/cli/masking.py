"""Taking secrets out of what is shown or handed on: by the name they are under, by their form, and by their value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "..."

NAMED = re.compile(
    r"secret|passw|passphrase|pwd|token|credential|key|signature|connection_?string|authori[sz]ation|cookie"
    r"|(^|[_-])(sas|sig|auth)([_-]|$)",
    re.IGNORECASE,
)
"""Names of what is not shown."""

SHORTEST = 6
"""Characters of a value that is looked for everywhere: shorter ones are words of the language."""

_WORDS = (
    r"(?=[\w.-]*(?:secret|passw|passphrase|pwd|token|credential|signature|(?:api|access|account|private)[_-]?key"
    r"|shared[_-]?access|connection[_-]?string|x-amz-))[\w.-]++|sig|sas"
)
"""A name that has one of these in it, taken as a whole: a long one costs no more than its length."""

_USERINFO = re.compile(
    r"(?<=://)(?:[^/@:\s\"']*:[^\s\"']{0,512}|[^/@\s\"']+)@"
)  # a password may have "/" and "@" in it
_PARAMETER = re.compile(rf"(?i)([?&;]({_WORDS}|key)=)[^&;#\s\"']+")
_QUOTED = r"\\?\"[^\"]*\"|\\?'[^']*'"
_BARE = r"(?:[^\s,;})\"']|[,;})](?=[^\s,;})\"'])(?![\w.-]+\s*[=:]))+"  # up to a space, a quote, or the next name
_REST = r"(?:[^\r\n\"]|\"(?!\s*(?:[,}\]]|$)))+"  # of the line, or of the text in a document
_ASSIGNED = re.compile(rf"(?i)((?:^|[\s,;{{(\"'])(?:{_WORDS})\\?[\"']?\s*[=:]\s*)({_QUOTED}|{_BARE})", re.MULTILINE)
_PHRASE = re.compile(
    rf"(?i)((?:^|[\s,;{{(\"'])(?=[\w.-]*(?:passw|passphrase|pwd))[\w.-]++:[ \t]+)(?![\"'\\]){_REST}", re.MULTILINE
)
_OPTION = re.compile(rf"(?i)((?:^|[\s\"'=])--?(?:{_WORDS})[\s\"',]+)(?!-)[^\s\"',]+", re.MULTILINE)
_HEADER = re.compile(
    rf"(?i)\b((?:proxy-)?authori[sz]ation|(?:set-)?cookie)(\\?[\"']?\s*[:=]\s*)({_QUOTED}|{_REST})", re.MULTILINE
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic|sharedkey)\s+[\w+/=.:~-]{8,}")
_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)


def is_secret(name: str) -> bool:
    """Whether what goes by this name is not to be shown."""
    return NAMED.search(name) is not None


def masked_url(text: str) -> str:
    """A text without who logs in with what in a URL, and without what its parameters give away."""
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


class Mask:
    """Takes secrets out of text.

    Args:
        values: some that are known, to be found wherever they are.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        found = sorted({value.strip() for value in values if len(value.strip()) >= SHORTEST}, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, found))) if found else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._values is not None:
            text = self._values.sub(HIDDEN, text)
        text = _HEADER.sub(rf"\g<1>\g<2>{HIDDEN}", _BLOCK.sub(f"[private key {HIDDEN}]", text))
        text = masked_url(_SCHEME.sub(rf"\g<1> {HIDDEN}", text))
        for form in (_PHRASE, _ASSIGNED, _OPTION):
            text = form.sub(rf"\g<1>{HIDDEN}", text)
        return text

    def plain(self, value: Any) -> Any:
        """The same for a value of JSON."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            hides = {key: is_secret(str(key)) and isinstance(each, str) for key, each in value.items()}
            return {self.text(str(k)): HIDDEN if hides[k] and each else self.plain(each) for k, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(each) for each in value]
        return value


def secrets_in(value: Any, *, inside: bool = False) -> Iterable[str]:
    """The values in nested tables that go by the name of a secret."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from secrets_in(each, inside=inside or is_secret(str(key)))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from secrets_in(each, inside=inside)
    elif inside:
        yield str(value)
