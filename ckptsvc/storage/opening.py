"""Stores opened as the settings of this process say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ckptsvc.config import load
from ckptsvc.settings import StoreSettings
from ckptsvc.storage.apart import Apart
from ckptsvc.storage.api import Store
from ckptsvc.storage.registry import canonical, connect, survives_fork, takes_timeout


def open_store(url: str, options: Mapping[str, Any] | None = None, settings: StoreSettings | None = None) -> Store:
    """Open the store at `url` with the options that `[store.options.SCHEME]` sets for its kind.

    A driver that can end a request which takes too long gets `store.timeout` as its option `timeout`.

    Args:
        url: as `connect` takes it.
        options: further ones, which win.
        settings: where they are; None reads those of this process.

    Raises:
        ConfigError, StoreError: as `connect` and `config.load`.
    """
    return connect(url, _options(url, options, settings))


def open_apart(url: str, options: Mapping[str, Any] | None = None, settings: StoreSettings | None = None) -> Store:
    """The same for a process that forks: a store whose client would not survive that runs in a process of its own."""
    if survives_fork(url):
        return open_store(url, options, settings)
    return Apart(url, _options(url, options, settings))


def _options(url: str, options: Mapping[str, Any] | None, settings: StoreSettings | None) -> dict[str, Any]:
    settings = settings or load(os.environ).store
    table = settings.options.get(canonical(url).partition("://")[0], {})
    timeout = {"timeout": settings.timeout} if takes_timeout(url) else {}
    return {**timeout, **table, **(options or {})}
