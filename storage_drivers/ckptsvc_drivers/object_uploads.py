"""Multipart uploads at S3 that nobody will finish: to find them, and to abort them.

A writer that was killed leaves one; its parts are seen in no listing of objects and are paid for until somebody aborts
it. obstore has no calls for that, so the requests are made here, with addresses that obstore has signed (AWS Signature
Version 4, "query string authentication"). It signs the name of an object below an endpoint: the endpoint given to it
is the bucket with the query of the request, and the name ends up as the value of `x-id`, which S3 takes from its own
clients as the name of the operation.

Azure forgets blocks that were never committed after a week. At Google a lifecycle rule
(AbortIncompleteMultipartUpload) has to do it.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.client import HTTPException
from urllib.parse import quote, urlencode, urlsplit, urlunsplit
from xml.etree import ElementTree

from ckptsvc.errors import NotFound, StoreError, StoreUnavailable
from ckptsvc.storage.api import Entry
from ckptsvc.storage.arguments import is_key
from ckptsvc_drivers.object_clients import Clients
from ckptsvc_drivers.object_errors import Facts, facts_of, of_answer
from ckptsvc_drivers.object_names import Upload, key_of, name_of

_VALID = timedelta(minutes=10)
_LONGEST_ANSWER = 16 << 20
_PAGES = 10_000


def unfinished(clients: Clients, prefix: str = "", timeout: float | None = None) -> Iterator[tuple[Upload, Entry]]:
    """Yield every upload below a prefix (whole parts) and, as a listing shows it, its temporary key and start.

    Raises:
        StoreError: the store cannot be asked.
    """
    place = clients.place
    if place.scheme != "s3" or clients.options.anonymous:
        return
    name = name_of(place.prefix, prefix)
    query = {"uploads": "", "prefix": name}
    for _ in range(_PAGES):
        page = _parsed(_ask(clients, "GET", "", query, timeout), place.url)
        for found in page.iterfind("{*}Upload"):
            key = key_of(place.prefix, found.findtext("{*}Key", ""))
            if key is None or not (not prefix or key == prefix or key.startswith(f"{prefix}/")):
                continue
            upload = Upload(key, found.findtext("{*}UploadId", ""))
            if upload.id and is_key(upload.temporary):
                yield upload, Entry(upload.temporary, 0, _time(found.findtext("{*}Initiated", "")))
        if page.findtext("{*}IsTruncated", "false").strip() != "true":
            return
        query["key-marker"] = page.findtext("{*}NextKeyMarker", "")
        query["upload-id-marker"] = page.findtext("{*}NextUploadIdMarker", "")


def abort(clients: Clients, upload: Upload, timeout: float | None = None) -> None:
    """Abort an upload; no error where there is none. Parts still on their way may outlive it: look again later."""
    name = name_of(clients.place.prefix, upload.key)
    try:
        _ask(clients, "DELETE", name, {"uploadId": upload.id}, timeout)
    except NotFound:
        return


def _ask(clients: Clients, method: str, name: str, query: dict[str, str], timeout: float | None) -> bytes:
    where = f"{clients.place.url}: {method} of unfinished uploads"
    request = urllib.request.Request(_signed(clients, method, name, query), method=method)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=clients.tls())]
    try:
        answer = urllib.request.build_opener(*handlers).open(request, timeout=timeout or clients.options.timeout)
        with answer:
            content: bytes = answer.read(_LONGEST_ANSWER)
            return content
    except urllib.error.HTTPError as error:
        with error:
            code = facts_of(ValueError(error.read(4096).decode("utf-8", "replace"))).code
        raise of_answer(Facts(error.code, code), where) from None
    except (OSError, HTTPException) as error:
        raise StoreUnavailable(f"{where}: {type(error).__name__}: no answer") from None


def _signed(clients: Clients, method: str, name: str, query: dict[str, str]) -> str:
    """An address with a signature for a request to the bucket ("") or to an object, valid for some minutes."""
    import obstore

    example = obstore.sign(clients.plain, "GET", "x", _VALID)
    scheme, server, path, _, _ = urlsplit(example)
    path = path.removesuffix("/x") + (f"/{quote(name, safe='/~')}" if name else "")
    asked = urlencode(query, quote_via=quote) + "&x-id="
    client = clients.for_query(urlunsplit((scheme, server, path or "/", asked, "")))
    return obstore.sign(client, "DELETE" if method == "DELETE" else "GET", "uploads", _VALID)


def _parsed(document: bytes, where: str) -> ElementTree.Element:
    if b"<!DOCTYPE" in document or b"<!ENTITY" in document:  # S3 sends none; what they can ask for is not to be done
        raise StoreError(f"{where}: the list of unfinished uploads is not what S3 sends")
    try:
        return ElementTree.fromstring(document)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: strange encodings
        raise StoreError(f"{where}: the list of unfinished uploads cannot be read: {error}") from None


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return datetime.now().timestamp()  # unknown: as young as can be, so that nobody takes it for abandoned
