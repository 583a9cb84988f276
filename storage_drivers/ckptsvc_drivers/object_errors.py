"""What went wrong at an object store, in the words of ours. obstore tells it as text.

That text is never passed on whole: it repeats addresses with signatures in their queries.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ckptsvc.errors import CkptsvcError, Damaged, NotFound, StoreDenied, StoreError, StoreFull, StoreUnavailable

_STATUS = re.compile(r"status(?: code)?: (\d{3})\b")
_CODE = re.compile(r"<Code>\s*(\w{1,60})\s*</Code>")
_SEARCH_FOR_CREDENTIALS = re.compile(r"/latest/(?:api|meta-data)|/metadata/|metadata\.google|/oauth2/|sts\.|/v2/cred")
_CERTIFICATE = re.compile(r"invalid peer certificate|UnknownIssuer|CertificateError|certificate verify", re.IGNORECASE)
_QUERY = re.compile(r"\?[^\s,]*")

_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "AllAccessDisabled"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "AuthenticationExpired"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_BUSY = {"SlowDown", "ServerBusy", "RequestTimeout", "InternalError", "OperationTimedOut", "ServiceUnavailable"}
_FULL = {"QuotaExceeded", "EntityTooLarge", "InsufficientAccountResources", "TooManyBuckets"}


class Facts(NamedTuple):
    """What is known of a failure: the HTTP status (0: no answer) and the server's word for it ("": none)."""

    status: int
    code: str


def facts_of(error: BaseException) -> Facts:
    """What an exception of obstore's tells."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    return Facts(int(status[1]) if status else 0, code[1] if code else "")


def translate(error: BaseException, where: str) -> CkptsvcError:
    """Return the error of ours for an exception of obstore's that met an operation on `where`."""
    if isinstance(error, CkptsvcError):
        return error
    text, facts = str(error), facts_of(error)
    if facts.status == 0 and _SEARCH_FOR_CREDENTIALS.search(text):
        hint = "set them in the environment or a profile, or give the instance or the workload a role"
        return StoreDenied(f"{where}: no credentials were found", hint=hint)
    if isinstance(error, FileNotFoundError) and facts.code not in _NO_BUCKET:
        return NotFound(f"{where}: no such object")
    if type(error).__name__ in ("UnauthenticatedError", "PermissionDeniedError") and facts.status == 0:
        return StoreDenied(f"{where}: the credentials cannot be used", hint=_first_line(text))
    if facts.status or facts.code:
        return of_answer(facts, where)
    if "Wanted range starting at" in text:  # obstore has noticed it, not the server
        return Damaged(f"{where} ends before what is wanted")
    if _CERTIFICATE.search(text):
        return StoreDenied(f"{where}: the server's certificate is not trusted", hint="set the option ca_file")
    if "error sending request" in text or "error decoding response" in text or "imed out" in text or "HTTP" in text:
        if "builder error" in text:  # http:// where it is not allowed
            return StoreError(f"{where}: the request cannot be made", hint="is the endpoint right?")
        return StoreUnavailable(f"{where}: no answer, or the connection broke")
    return StoreError(f"{where}: {_first_line(text)}")


def of_answer(facts: Facts, where: str) -> CkptsvcError:
    """Return the error of ours for what a server answered."""
    status, code = facts
    what = f"{where}: the server answers {' '.join(str(fact) for fact in facts if fact)}"
    if code in _NO_BUCKET:
        return StoreError(f"{where}: there is no such bucket", hint="make it first")
    if code in _EXPIRED:
        return StoreDenied(f"{where}: the credentials have expired", hint="renew them")
    if code in _CLOCK:
        return StoreDenied(f"{where}: the server refuses the time of the request", hint="set this machine's clock")
    if code in _FULL or status == 507:
        return StoreFull(what, hint="free some space or raise the quota")
    if status in (401, 403):
        return StoreDenied(what, hint="check the credentials, and what they allow")
    if status == 404:
        return NotFound(f"{where}: no such object")
    if status == 416:
        return Damaged(f"{where} ends before what is wanted")
    if status in (408, 409, 429) or status >= 500 or code in _BUSY:
        return StoreUnavailable(what)
    return StoreError(what)


def _first_line(text: str) -> str:
    return _QUERY.sub("", text.partition("\n")[0])[:200]
