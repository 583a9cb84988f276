"""Nodes with a service for many users."""

from collections.abc import Iterator

import pytest
from harness.users import ALICE, BOB, Node, node_of_users
from harness.users_jobs import ask


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A node whose service lasts for all tests that do it no harm."""
    with node_of_users() as node:
        node.start(system_operators="ck-daemon")
        for person in (ALICE, BOB):
            ask(node, person)
        yield node


@pytest.fixture(scope="class")
def divided() -> Iterator[Node]:
    """A node on which each user may have little."""
    with node_of_users() as node:
        node.start(system_user_ranks="3", system_user_jobs="2", arena_limit="64MiB", system_user_memory="75%",
            store_max_write_rate="100MiB/s")  # fmt: skip
        for person in (ALICE, BOB):
            ask(node, person)
        yield node


@pytest.fixture
def node() -> Iterator[Node]:
    """A node of the test's own; the service is not started."""
    with node_of_users() as own:
        yield own
