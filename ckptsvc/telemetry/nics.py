"""Metrics of the network cards; `nic` is a card of this node, of which there are a handful."""

from __future__ import annotations

from ckptsvc.telemetry.declaring import Declarations
from ckptsvc.telemetry.labels import NicSignal, NicTrouble

NIC = "cards of this node; removed when a card is gone"


class NicMetrics:
    """See `Declarations` for what each call says."""

    def __init__(self, declare: Declarations) -> None:
        self.nic_sent = declare.counter("ckptsvc_nic_sent_bytes_total", "Bytes sent.", nic=NIC)
        self.nic_received = declare.counter("ckptsvc_nic_received_bytes_total", "Bytes received.", nic=NIC)
        self.nic_events = declare.counter(
            "ckptsvc_nic_events_total", "Signs of trouble a card has counted.", nic=NIC, signal=NicSignal
        )
        self.nic_held = declare.counter(
            "ckptsvc_nic_held_back_seconds_total", "Time a card had to wait.", nic=NIC, signal=NicSignal
        )
        self.nic_link_up = declare.gauge("ckptsvc_nic_link_up", "Whether the link is up.", nic=NIC)
        self.nic_findings = declare.gauge(
            "ckptsvc_nic_findings", "Cards in trouble, in the jobs coordinated here.", kind=NicTrouble
        )
        self.nic_read_failures = declare.counter(
            "ckptsvc_nic_read_failures_total", "Counters that could not be read or understood."
        )
        self.nic_read_seconds = declare.gauge(
            "ckptsvc_nic_read_duration_seconds", "Time the last reading of all cards took."
        )
