"""Traces of saves and restarts for OpenTelemetry, where `traces.endpoint` is set.

    save        from when the first rank has copied to the end of the save, on the agent that coordinates
      shard       one rank's part, on its node: stage (the rank copies), write (to the store, until it is durable)
      commit      index (written), record
    restart     from the fault to the first step of the next attempt
      detection, evidence, stop, start, restore, first-step

Agents send each what they have seen. That it comes together is a matter of its ids: those of a trace and of its spans
are digests of what they are about (job, epoch and step; job and attempt), so nothing has to be passed along, and all
agents choose the same traces where only a share of them is wanted.

Nothing waits for a collector: what does not fit into the queue, or is not taken, is lost, and that is said once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptsvc.errors import ConfigError
from ckptsvc.settings import TraceSettings
from ckptsvc.telemetry.logs import masked

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("ckptsvc.agent")

QUEUE = 2048
"""Spans that wait to be sent."""

EVERY = 1.0
"""Seconds between two batches."""

TIMEOUT = 5.0
"""Seconds a collector has to take one."""

CLOSING = 2.0
"""Seconds that the end of an agent waits for the last one."""


About = Mapping[str, str | int]
"""Attributes of a span; they become `ckptsvc.<name>`."""


class Trace(NamedTuple):
    """What spans belong together; `root` is the name of the outermost."""

    root: str
    key: str

    @staticmethod
    def save(job: str, epoch: int, step: int) -> Trace:
        """The trace of one save."""
        return Trace("save", f"{job}\0{epoch}\0{step}")

    @staticmethod
    def restart(job: str, attempt: int) -> Trace:
        """The trace of the restart that the attempt began with."""
        return Trace("restart", f"{job}\0{attempt}")

    @property
    def id(self) -> int:
        """128 bits, the same on every node."""
        return self._digest(16)

    def span_id(self, name: str, rank: int | None) -> int:
        """64 bits: of the span of that name, of a rank or of the whole job."""
        return self._digest(8, name, "" if rank is None else str(rank))

    def _digest(self, size: int, *parts: str) -> int:
        text = "\0".join(("ckptsvc", self.root, self.key, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest()) or 1


class Traces:
    """Takes spans; this one drops them all, for agents without a collector."""

    is_on = False

    def add(
        self, trace: Trace, name: str, begin: float, end: float, *, parent: str = "", rank: int | None = None,
        error: str = "", about: About = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Send one span.

        Args:
            trace: that it belongs to; the span with the name of its root is the outermost.
            name: of the span, once in a trace and rank.
            begin: in seconds of CLOCK_MONOTONIC.
            end: the same.
            parent: the span around it, of the same rank if that is no root; "" means the root.
            rank: that it is about.
            error: why what it is about has failed.
            about: further attributes.
        """

    def close(self) -> None:
        """Send what is left, or give it up."""


class Collected(Traces):
    """Sends spans to a collector, from a thread of its own."""

    is_on = True

    def __init__(self, settings: TraceSettings, node: str, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)  # it says the same again and again
        self._limit = int(settings.ratio * (1 << 64))
        self._resource = Resource(
            {"service.name": "ckptsvc", "service.version": version, "service.instance.id": node, "host.name": node}
        )
        self._processor = BatchSpanProcessor(
            _exporter(settings),
            max_queue_size=QUEUE,
            schedule_delay_millis=EVERY * 1000,
            max_export_batch_size=QUEUE // 4,
        )

    def add(
        self, trace: Trace, name: str, begin: float, end: float, *, parent: str = "", rank: int | None = None,
        error: str = "", about: About = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """See `Traces.add`."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        if trace.id & ((1 << 64) - 1) >= self._limit:
            return

        def context(name: str, rank: int | None) -> SpanContext:
            sampled = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(trace.id, trace.span_id(name, rank), is_remote=False, trace_flags=sampled)

        inner = rank if parent else None
        since = time.time_ns() - time.monotonic_ns()  # asked every time: clocks are set
        attributes: dict[str, Any] = {
            f"ckptsvc.{key}": masked(value) if isinstance(value, str) else value for key, value in about.items()
        }
        if rank is not None:
            attributes["ckptsvc.rank"] = rank
        span = ReadableSpan(
            name,
            context=context(name, rank),
            parent=None if name == trace.root else context(parent or trace.root, inner),
            resource=self._resource,
            attributes=attributes,
            status=Status(StatusCode.ERROR, masked(error)) if error else Status(StatusCode.OK),
            start_time=since + int(begin * 1e9),
            end_time=since + int(max(begin, end) * 1e9),
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """See `Traces.close`."""
        closing = threading.Thread(target=self._processor.shutdown, name="ckptsvc-traces", daemon=True)
        closing.start()
        closing.join(CLOSING)


def _exporter(settings: TraceSettings) -> SpanExporter:
    """OTLP over gRPC; says once that a collector takes nothing, and once that it does again."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Exporter(SpanExporter):
        """What it is asked to send, `inner` sends."""

        def __init__(self, inner: SpanExporter) -> None:
            self.inner, self.lost = inner, 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            """Send a batch."""
            try:
                result = self.inner.export(spans)
            except Exception as error:  # noqa: BLE001  whatever it is, no save may hear of it
                logger.debug("traces: %s", error)
                result = SpanExportResult.FAILURE
            if result is SpanExportResult.SUCCESS:
                if self.lost:
                    logger.info("traces are taken again; %d spans were lost", self.lost)
                self.lost = 0
            else:
                if not self.lost:
                    logger.warning("%s takes no traces; nothing else waits for it", settings.endpoint)
                self.lost += len(spans)
            return result

        def shutdown(self) -> None:
            """Hang up."""
            self.inner.shutdown()

    insecure = settings.endpoint.startswith("http://")
    return Exporter(OTLPSpanExporter(settings.endpoint, insecure, _credentials(settings), timeout=TIMEOUT))


def _credentials(settings: TraceSettings) -> Any:
    """Who is trusted to sign the collector's certificate; None: whom the system trusts."""
    if not settings.ca_file:
        return None
    import grpc

    try:
        return grpc.ssl_channel_credentials(Path(settings.ca_file).read_bytes())
    except OSError as error:
        raise ConfigError(f"traces.ca_file: {settings.ca_file}: {error.strerror}") from None


def check_traces(settings: TraceSettings) -> None:
    """See that spans could go where the settings say.

    Raises:
        ConfigError: that is no endpoint, or what it takes is not installed or cannot be read.
    """
    if not settings.endpoint:
        return
    scheme, _, rest = settings.endpoint.partition("://")
    if scheme not in ("http", "https") or not rest:
        raise ConfigError(f"traces.endpoint is {settings.endpoint!r}", hint="http://host:4317, or https://")
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter
        import opentelemetry.sdk.resources  # noqa: F401
    except ImportError as error:
        what = f"traces.endpoint is set, and OpenTelemetry is not installed ({error.name})"
        raise ConfigError(what, hint="pip install 'ckptsvc[traces]'") from None
    _credentials(settings)


def start_traces(settings: TraceSettings, node: str, version: str) -> Traces:
    """Where spans go, as the settings say.

    Raises:
        ConfigError: that is no endpoint, or what it takes is not installed.
    """
    check_traces(settings)
    return Collected(settings, node, version) if settings.endpoint else Traces()
