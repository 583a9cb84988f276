"""`lustre://`: a directory on a Lustre file system, with the layout of large files chosen for them.

The store of `file://`, which does the same on its own where it finds Lustre. This address says that Lustre is what
is expected: where it is something else, `capabilities` and every layout say so, and writes go on all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckptsvc.storage.api import Capabilities, Layout
from ckptsvc_drivers.linux import file_system
from ckptsvc_drivers.lustre_striping import LustreStriping
from ckptsvc_drivers.posix import OPTIONS, PosixStore, parse

__all__ = ["OPTIONS", "connect"]


def connect(url: str, options: Mapping[str, object]) -> LustreStore:
    """Return the store at `lustre:///absolute/path`; see `posix.connect`.

    Raises:
        ConfigError: the URL names a host or no absolute path, or an option is unknown or out of range.
    """
    return LustreStore(*parse(url, options, "lustre"))


class LustreStore(PosixStore):
    """A posix store that says where it is not on Lustre."""

    scheme = "lustre"

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`."""
        found = super().capabilities()
        return msgspec.structs.replace(found, notes=(*found.notes, *filter(None, [self._doubt()])))

    def layout(self, key: str) -> Layout | None:
        """See `Spreading.layout`."""
        doubt = self._doubt()
        return Layout(0, 0, (), doubt) if doubt else super().layout(key)

    def _doubt(self) -> str:
        """Why nothing is striped although the address says Lustre, or ""."""
        if not self._looked or isinstance(self._striping, LustreStriping):
            return ""
        if not self._options.striping:
            return "switched off by the option `striping`"
        return f"{self._root} is not on Lustre but on {file_system(self._root) or 'an unknown file system'}"
