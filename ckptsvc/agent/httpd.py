"""The agent's HTTP port: Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address


def start_metrics(address: Address, registry: CollectorRegistry) -> tuple[str, Callable[[], None]]:
    """Serve /metrics in a thread; returns the address in use and a function that stops it.

    Raises:
        ConfigError: that is not possible; as a rule the port is in use.
    """
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"agent.metrics_listen: {address}: {why}", hint='another port, or "off"') from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"{address.host}:{server.server_port}", close
