"""Several hosts on one machine, or a skipped test (see ckptsvc.cli.benchmarks.faults.hosts)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ckptsvc.cli.benchmarks.faults.hosts import Hosts


@contextlib.contextmanager
def hosts(count: int, *network: str) -> Iterator[Hosts]:
    """So many hosts; the test is skipped where that is not permitted."""
    import pytest

    made = None
    try:
        made = Hosts(count, *network)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no hosts: {error}")
    try:
        yield made
    finally:
        made.close()
