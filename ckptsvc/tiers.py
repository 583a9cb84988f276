"""The settings [tiers]: what is kept of snapshots beside the node's own memory and the store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from ckptsvc.quantities import parse_duration, parse_size

LONGEST_REBUILD = 3600.0
"""Seconds that tiers.rebuild may be."""

SLOWEST_PARTNER = 1 << 20
"""Bytes per second that tiers.partner_rate must be: whoever sends takes one that reads nothing for minutes as gone."""


class TierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[tiers]: what is kept of snapshots beside the node's own memory and the store.

    Attributes:
        partner: what other nodes keep in their memory: "copy" (of all, on one of them), "xor" or "rs" (parity against
            the loss of one node, or of two, of each group), or "off".
        group: the fewest nodes that keep parity for each other.
        domain: this node's failure domain, a word that nodes share which may be lost together; "auto": its switch or
            chassis, where the scheduler or the node's name tells.
        partner_every: every how many snapshots.
        partner_rate: bytes per second that this node reads from others for it; 0: as many as come.
        rebuild: how long a restore waits for what is rebuilt from parity before an older checkpoint has to do.
    """

    partner: Literal["off", "copy", "xor", "rs"] = "off"
    group: Annotated[int, msgspec.Meta(ge=2, le=64)] = 4
    domain: str = "auto"
    partner_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    partner_rate: Annotated[int, parse_size] = 1 << 30
    rebuild: Annotated[float, parse_duration] = 60.0


def problems(tiers: TierSettings) -> Iterator[tuple[str, str]]:
    """What is wrong with them together: key, and the rest of the sentence."""
    if tiers.partner == "rs" and tiers.group < 3:
        yield "tiers.group", f'is {tiers.group}; with tiers.partner = "rs", it takes 3 nodes to lose 2'
    if 0 < tiers.partner_rate < SLOWEST_PARTNER:
        yield "tiers.partner_rate", f"is {tiers.partner_rate} bytes a second, less than 1 MiB and not 0"
    if not 0 <= tiers.rebuild <= LONGEST_REBUILD:
        yield "tiers.rebuild", f"is {tiers.rebuild:g} s, more than {LONGEST_REBUILD:g} s"
