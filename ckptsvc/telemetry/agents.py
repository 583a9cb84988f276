"""Metrics of the agent itself: whom it serves, whom it follows, whom it refuses."""

from __future__ import annotations

from ckptsvc.telemetry.declaring import Declarations


class AgentMetrics:
    """See `Declarations` for what each call says."""

    def __init__(self, declare: Declarations) -> None:
        self.sessions = declare.gauge("ckptsvc_sessions", "Training processes registered here.")
        self.heartbeat_age = declare.gauge("ckptsvc_rank_heartbeat_age_seconds", "Age of the oldest local heartbeat.")
        self.coordinator_changes = declare.counter(
            "ckptsvc_coordinator_changes_total", "Elected coordinators this agent has taken note of."
        )
        self.orders_refused = declare.counter(
            "ckptsvc_orders_refused_total", "Orders of a term or an attempt that is over, or that cannot be."
        )
        self.certificate_expiry = declare.gauge(
            "ckptsvc_certificate_expiry_timestamp_seconds",
            "Until when the agent's certificate is valid; 0 where it has none.",
        )
        self.calls_refused = declare.counter(
            "ckptsvc_calls_refused_total", "Calls by who is no agent of this user, or says what cannot be."
        )
        self.build = declare.gauge(
            "ckptsvc_build_info", "What is running; always 1.", version="one: that of this agent"
        )
