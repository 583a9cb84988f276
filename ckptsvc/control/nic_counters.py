"""The counters of a network card that decide, what they say, and how far one has risen between two readings.

A Cassini 1 exposes 1,890 of them, a Cassini 2 1,922, each a file whose reading costs a register access over PCIe. The
tables below are all that is read; with them a fault names its card, the rest serves the vendor.

Sources: file formats and widths from HPE's cxi driver, counter tables and retry handler (HewlettPackard/shs-cxi-driver,
shs-cassini-headers, shs-libcxi; Slingshot 12), the clock of 1 GHz from its cxi_stat; InfiniBand from the kernel's
Documentation/ABI/stable/sysfs-class-infiniband and the PMA chapter of the InfiniBand specification.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ckptsvc.errors import InvalidInput
from ckptsvc.telemetry import NicSignal

CYCLE = 1e-9
"""Seconds of one clock of a Cassini."""

WORD = 4.0
"""Bytes that one count of InfiniBand's data counters stands for."""

FASTEST = 1e12
"""Counts per second that no counter of the tables can reach: 400 Gb/s are 5e10 bytes, a clock has 1e9 cycles."""

CLOCK_SLACK = 0.5
"""Seconds, and share, by which a card's time stamps may differ from ours; beyond, somebody has set the clock."""


@dataclass(frozen=True, slots=True)
class Counter:
    """One file.

    Attributes:
        file: its path below the directory of its table.
        signal: what it adds to.
        says: what it counts, and what a rise means.
        bits: its width; it wraps there.
        unit: what one count is worth: bytes, seconds of a cycle, or 1 event.
        ceiling: where it stands still instead of wrapping; 0 where it wraps.
        stamp: it is not a count but a time: any new one is one event.
    """

    file: str
    signal: NicSignal
    says: str
    bits: int = 56
    unit: float = 1.0
    ceiling: int = 0
    stamp: bool = False


_S = NicSignal
_TELEMETRY = "telemetry/"
_IB = "counters/"
_HW = "hw_counters/"


def _held_back(file: str, number: int, signal: NicSignal, says: str) -> tuple[Counter, ...]:
    """Clock cycles, counted for each priority or flow-control entry apart."""
    return tuple(Counter(f"{_TELEMETRY}{file}{index}", signal, says, unit=CYCLE) for index in range(number))


CASSINI: tuple[Counter, ...] = (
    Counter(_TELEMETRY + "hni_sts_tx_ok_octets", _S.SENT, "bytes sent; none while the job's other cards send: silent"),
    Counter(_TELEMETRY + "hni_sts_rx_ok_octets", _S.RECEIVED, "bytes received; likewise"),
    Counter(_TELEMETRY + "pct_spt_timeouts", _S.TIMEOUTS, "packets without an answer for 1.07 s or more: the hang"),
    Counter(_TELEMETRY + "pct_sct_timeouts", _S.TIMEOUTS, "closings of connections without an answer: the hang, later"),
    # The cards that talk to a sick one count these. They are its victims: nobody is named by them.
    Counter(_TELEMETRY + "pct_tct_timeouts", _S.PEER_TIMEOUTS, "connections whose sender was silent for 34 s"),
    Counter(_TELEMETRY + "pct_retry_srb_requests", _S.RETRIES, "packets sent again after a timeout"),
    Counter(_TELEMETRY + "pct_rsp_err_rcvd", _S.FAILURES, "requests that ended in an error: the job is about to abort"),
    Counter(_TELEMETRY + "pct_no_tct_nacks", _S.EXHAUSTED, "refused, no connection left: slow receiver, many senders"),
    Counter(_TELEMETRY + "pct_no_trs_nacks", _S.EXHAUSTED, "refused, no place for results left: likewise"),
    Counter(_TELEMETRY + "pct_no_mst_nacks", _S.EXHAUSTED, "refused, no message state left: likewise"),
    Counter(_TELEMETRY + "pct_resource_busy", _S.EXHAUSTED, "refused, resources busy: likewise"),
    *_held_back("hni_tx_paused_", 8, _S.PAUSED_TX, "cycles the network let it wait: congestion"),
    *_held_back("hni_rx_paused_", 8, _S.PAUSED_RX, "cycles it let the network wait: its host is slow"),
    Counter(_TELEMETRY + "hni_rx_paused_std", _S.PAUSED_RX, "the same, without priorities", unit=CYCLE),
    *_held_back("oxe_stall_fgfc_blk_", 4, _S.STALLED, "cycles a switch's flow control held it back: a path in trouble"),
    Counter(_TELEMETRY + "hni_pcs_uncorrected_cw", _S.UNCORRECTED, "codewords beyond repair: a bad cable or optic"),
    Counter(_TELEMETRY + "hni_llr_tx_replay_event", _S.REPLAYS, "frames sent again on the link: the same, hidden"),
    Counter(_TELEMETRY + "hni_llr_rx_replay_event", _S.REPLAYS, "frames received again on the link: likewise"),
    *(
        Counter(f"link_restarts/time_{slot}", _S.FLAPS, "when the link came up again by itself", bits=64, stamp=True)
        for slot in range(10)
    ),
)
"""Below /sys/class/cxi/<card>/device."""

CASSINI_LINK = ("port/link", "port/0/link/state")
"""The state of the link, "up" when well: Cassini 1, Cassini 2."""

HANDLER: tuple[Counter, ...] = (
    Counter("connections_cancelled", _S.FAILURES, "connections given up after the last retry: fatal for it", bits=32),
    Counter("pkts_cancelled_o", _S.FAILURES, "ordered packets given up: likewise", bits=32),
    Counter("pkts_cancelled_u", _S.FAILURES, "unordered packets given up: likewise", bits=32),
)
"""Below /run/cxi/<card>, which the retry handler of the card serves as long as it lives; without it packets that are
lost stay lost. It prints its unsigned 32-bit counts as signed numbers."""

INFINIBAND: tuple[Counter, ...] = (
    Counter(_IB + "port_xmit_data", _S.SENT, "words sent", bits=64, unit=WORD, ceiling=2**32 - 1),
    Counter(_IB + "port_rcv_data", _S.RECEIVED, "words received", bits=64, unit=WORD, ceiling=2**32 - 1),
    Counter(_HW + "local_ack_timeout_err", _S.TIMEOUTS, "requests without an answer in time: the hang", bits=32),
    Counter(_HW + "packet_seq_err", _S.RETRIES, "requests refused out of sequence: packets were lost", bits=32),
    Counter(_HW + "rnr_nak_retry_err", _S.RETRIES, "requests the peer was not ready for", bits=32),
    Counter(_HW + "out_of_buffer", _S.EXHAUSTED, "dropped, nobody had asked for them: slow receiver", bits=32),
    Counter(_IB + "symbol_error", _S.UNCORRECTED, "symbols beyond repair: a bad cable", bits=64, ceiling=2**16 - 1),
    Counter(_IB + "port_rcv_errors", _S.UNCORRECTED, "packets that arrived broken", bits=64, ceiling=2**16 - 1),
    Counter(_IB + "local_link_integrity_errors", _S.REPLAYS, "retries on the link", bits=64, ceiling=15),
    Counter(_IB + "link_error_recovery", _S.FLAPS, "times the link was trained again", bits=64, ceiling=255),
    Counter(_IB + "link_downed", _S.FLAPS, "times the link went down", bits=64, ceiling=255),
    Counter(_IB + "port_xmit_wait", _S.WAITS, "ticks with data and no credit: congestion", bits=64, ceiling=2**32 - 1),
    Counter(_HW + "np_cnp_sent", _S.MARKS, "congestion notifications sent: it receives too much", bits=64),
    Counter(_HW + "rp_cnp_handled", _S.MARKS, "congestion notifications obeyed: it sends too much", bits=64),
)
"""Below /sys/class/infiniband/<device>/ports/<port>. Newer cards count in 64 bits; older ones stop at the ceiling."""

INFINIBAND_LINK = ("state",)
"""The state of the port, "4: ACTIVE" when well."""

LINK_UP = ("up", "4: ACTIVE")

BY_FILE: dict[str, Counter] = {counter.file: counter for counter in (*CASSINI, *HANDLER, *INFINIBAND)}

_VALUE = re.compile(rb"(-?[0-9]{1,20})(?:@([0-9]{1,12})\.([0-9]{9}))?\s*")


class Value(NamedTuple):
    """What a file said: the number, and at which nanosecond of CLOCK_REALTIME it was read, where it says so."""

    number: int
    stamp: int | None = None


def parse(text: bytes) -> Value:
    """Read "123", "-1" or "123@1743569213.088677609", with a line end.

    Raises:
        InvalidInput: it is neither.
    """
    match = _VALUE.fullmatch(text)
    if match is None:
        raise InvalidInput(f"{text[:40]!r} is not a counter")
    number, seconds, nanoseconds = match.groups()
    return Value(int(number), int(seconds) * 1_000_000_000 + int(nanoseconds) if seconds else None)


def elapsed(before: Value, after: Value, waited: float) -> float:
    """Seconds between two readings: by the driver's own stamps, unless the clock was set in between.

    Args:
        before: the earlier reading.
        after: the later one.
        waited: seconds between them by a monotonic clock, which includes what the reading itself took.
    """
    if before.stamp is None or after.stamp is None:
        return waited
    seconds = (after.stamp - before.stamp) / 1e9
    believed = seconds > 0 and abs(seconds - waited) <= max(CLOCK_SLACK, CLOCK_SLACK * waited)
    return seconds if believed else waited


def rise(counter: Counter, before: int, after: int, seconds: float) -> int | None:
    """Counts added between two readings; None where that cannot be known.

    A counter that falls from the last quarter of its range to the first has wrapped; one that falls otherwise was
    reset and shows what came since. One that stands at its ceiling says nothing any more.
    """
    size = 1 << counter.bits
    old, new = before % size, after % size
    if counter.stamp:
        return int(new not in (old, 0))
    if new == old == counter.ceiling:
        return None if counter.ceiling else 0
    if new < old:
        wrapped = size - old + new
        told = old >= size - size // 4 and new < size // 4 and not counter.ceiling
        risen = wrapped if told and wrapped <= FASTEST * seconds else new
    else:
        risen = new - old
    return risen if risen <= FASTEST * seconds else None
