"""From the address of a store to the store: the scheme of the URL chooses the driver.

A driver is a function `connect(url, options) -> Store`, registered under its scheme in the entry-point group
`ckptsvc.storage` of any installed distribution.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from ckptsvc.errors import ConfigError
from ckptsvc.storage.api import Store

GROUP = "ckptsvc.storage"
"""The entry-point group."""

BUILT_IN: dict[str, str] = {
    "az": "ckptsvc_drivers.object:connect",
    "daos": "ckptsvc_drivers.daos:connect",
    "file": "ckptsvc_drivers.posix:connect",
    "fsspec": "ckptsvc_drivers.fsspec_store:connect",  # fsspec+PROTOCOL://
    "gs": "ckptsvc_drivers.object:connect",
    "lustre": "ckptsvc_drivers.lustre:connect",
    "memory": "ckptsvc_drivers.memory:connect",
    "s3": "ckptsvc_drivers.object:connect",
}
"""The drivers that ship with ckptsvc, named here as well as in the package's metadata so that a start needs
no scan of every installed distribution, and so that no other distribution can take these schemes over."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def connect(url: str, options: Mapping[str, Any] | None = None) -> Store:
    """Open the store at `url`.

    Args:
        url: `scheme://...`, or a path, which stands for `file://` and the absolute path.
        options: settings of the driver; each driver says which it knows.

    Raises:
        ConfigError: no driver for the scheme, a driver that cannot be loaded, a bad address or option.
        StoreError: the store refused.
    """
    url = canonical(url)
    scheme = url.partition("://")[0]
    check_options(scheme, options or {})
    store = _driver_of(scheme)(url, options or {})
    if not isinstance(store, Store):
        raise ConfigError(f"the driver for {scheme}:// returned a {type(store).__qualname__}, which is no store")
    return store


def canonical(url: str) -> str:
    """Return `url` with its scheme in lower case, and a path as a `file://` address.

    Raises:
        ConfigError: it is empty.
    """
    if not url:
        raise ConfigError("the address of the store is empty", hint="give a directory or scheme://...")
    if match := _SCHEME.match(url):
        return match[0].lower() + url[match.end() :]
    return "file://" + os.path.abspath(url)


def schemes() -> list[str]:
    """Return every scheme that some installed driver serves, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def survives_fork(url: str) -> bool:
    """Whether a forked child may use the stores of this driver: its module says `FORK_SAFE = False` if not.

    Raises:
        ConfigError: no driver for the scheme, or one that cannot be loaded.
    """
    return _says(url, "FORK_SAFE", otherwise=True)


def takes_timeout(url: str) -> bool:
    """Whether this driver ends requests that take too long: its module says `TAKES_TIMEOUT = True` if so.

    Its option `timeout` is then how many seconds one may take.

    Raises:
        ConfigError: no driver for the scheme, or one that cannot be loaded.
    """
    return _says(url, "TAKES_TIMEOUT", otherwise=False)


def check_options(scheme: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the driver of a scheme does not know: its module says which those are, as `OPTIONS`.

    Raises:
        ConfigError: it does not know one (the nearest that it does is named), one is out of range, or there is no such
            driver.
    """
    known = getattr(sys.modules.get(_driver_of(scheme).__module__), "OPTIONS", None)
    if known is None:
        return
    names = [field.encode_name for field in msgspec.structs.fields(known)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.5)
            raise ConfigError(
                f"store.options.{scheme}.{name}: there is no such option",
                hint=f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}",
            )
    try:
        msgspec.convert(dict(options), known, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"store.options.{scheme}: {error}") from None


def _driver_of(scheme: str) -> Callable[[str, Mapping[str, Any]], object]:
    return _driver("fsspec" if scheme.startswith("fsspec+") else scheme)


def _says(url: str, name: str, *, otherwise: bool) -> bool:
    scheme = canonical(url).partition("://")[0]
    driver = _driver_of(scheme)
    return bool(getattr(sys.modules.get(driver.__module__), name, otherwise))


def _driver(scheme: str) -> Callable[[str, Mapping[str, Any]], object]:
    if scheme in BUILT_IN:
        module, _, name = BUILT_IN[scheme].partition(":")
        found: Callable[[str, Mapping[str, Any]], object] = getattr(importlib.import_module(module), name)
        return found
    points = tuple(entry_points(group=GROUP, name=scheme))
    if not points:
        near = difflib.get_close_matches(scheme, schemes(), n=1)
        raise ConfigError(
            f"no driver for {scheme}:// is installed",
            hint=f"did you mean {near[0]}://?" if near else f"known: {', '.join(schemes())}",
        )
    if len({point.value for point in points}) > 1:
        raise ConfigError(f"several drivers for {scheme}:// are installed: {', '.join(map(_origin, points))}")
    try:
        loaded: Callable[[str, Mapping[str, Any]], object] = points[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the driver for {scheme}:// cannot be loaded: {_origin(points[0])}: {error}") from error
    return loaded


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name if point.dist else 'an unknown distribution'}"
