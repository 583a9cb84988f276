"""Metrics of the jobs that an agent coordinates: what happened to them, what it cost, what was left for training."""

from __future__ import annotations

from ckptsvc.telemetry.declaring import LATENCIES, Declarations
from ckptsvc.telemetry.labels import Cause, Detection, IncidentKind, Restart, Share

JOB = "jobs coordinated here; removed when the coordinator forgets them"


class JobMetrics:
    """See `Declarations` for what each call says."""

    def __init__(self, declare: Declarations) -> None:
        self.restarts = declare.counter("ckptsvc_restarts_total", "Restarts of the jobs coordinated here.", cause=Cause)
        self.incidents = declare.counter(
            "ckptsvc_incidents_total",
            "Incidents of the jobs coordinated here, by what each was first taken for.",
            kind=IncidentKind,
        )
        self.detection = declare.histogram(
            "ckptsvc_detection_duration_seconds",
            "From a fault to the first sign of it, and from there to the decision to restart.",
            LATENCIES,
            phase=Detection,
        )
        self.restart = declare.histogram(
            "ckptsvc_restart_duration_seconds",
            "The parts of a restart, from the decision to the first step of the next attempt.",
            LATENCIES,
            phase=Restart,
        )
        self.job_time = declare.counter(
            "ckptsvc_job_time_seconds_total",
            "What the time of a job coordinated here went into.",
            job=JOB,
            cause=Share,
        )
        self.goodput = declare.gauge(
            "ckptsvc_job_goodput_ratio", "Share of that time in which steps were done for the first time.", job=JOB
        )
