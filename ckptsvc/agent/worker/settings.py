"""What an agent tells its I/O workers of the settings: a file that has got a mistake since must not stop the saves."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckptsvc.config import load
from ckptsvc.settings import LogSettings, SaveSettings, Settings, StoreSettings

VARIABLE = "CKPTSVC_WORKER"


class Told(msgspec.Struct, frozen=True):
    """What a worker is to know of the settings."""

    store: StoreSettings
    save: SaveSettings
    log: LogSettings


def told(settings: Settings) -> dict[str, str]:
    """For the environment of a worker, which nobody reads who may not read the settings."""
    return {VARIABLE: msgspec.json.encode(Told(settings.store, settings.save, settings.log)).decode()}


def heard(environ: Mapping[str, str]) -> Told:
    """What its agent has told this worker; one that is started by hand reads the settings."""
    if text := environ.get(VARIABLE):
        return msgspec.json.decode(text, type=Told)
    settings = load(environ)
    return Told(settings.store, settings.save, settings.log)
