"""What an agent may take, where both its settings and the system service have said something."""

import types
from pathlib import Path

import msgspec
import pytest

from ckptsvc.agent.process.tenancy import Tenancy


@pytest.fixture
def agent():
    pool = types.SimpleNamespace(limit=1000)
    return types.SimpleNamespace(pool=pool, most_jobs=64, most_ranks=512, workers=types.SimpleNamespace(),
        tier=types.SimpleNamespace(share=None))  # fmt: skip


@pytest.fixture
def tenancy(agent):
    agent.workers.max_write_rate = 100
    return Tenancy(Path("/run/ckptsvc"), agent, agent.workers, lambda: True, agent.tier)


def tell(tenancy, **share):
    tenancy._obey(msgspec.json.encode({"ok": True, "op": "shares", "jobs": 8, "ranks": 16, **share}))


def test_the_smaller_of_both_counts(agent, tenancy):
    tell(tenancy, memory=600, write_rate=0)
    assert (agent.pool.limit, agent.workers.max_write_rate) == (600, 100)
    assert agent.tier.share is None
    tell(tenancy, memory=5000, write_rate=40, local=70)
    assert agent.tier.share == 70
    assert (agent.pool.limit, agent.workers.max_write_rate) == (1000, 40)
    assert (agent.most_jobs, agent.most_ranks) == (8, 16)


def test_settings_read_again_do_not_undo_what_the_service_has_said(agent, tenancy):
    tell(tenancy, memory=600, write_rate=40)
    agent.pool.limit, agent.workers.max_write_rate = 2000, 80  # as agent.reload sets them
    tenancy.settings_changed(2000, 80)
    assert (agent.pool.limit, agent.workers.max_write_rate) == (600, 40)
    tell(tenancy, memory=9000, write_rate=0)
    assert (agent.pool.limit, agent.workers.max_write_rate) == (2000, 80)
    assert (agent.most_jobs, agent.most_ranks) == (8, 16)


def test_before_the_service_has_said_anything_the_settings_count(agent, tenancy):
    agent.pool.limit, agent.workers.max_write_rate = 2000, None
    tenancy.settings_changed(2000, None)
    assert (agent.pool.limit, agent.workers.max_write_rate) == (2000, None)


def test_the_service_hears_where_the_metrics_are_if_it_has_a_token_for_them(tenancy):
    heard = []
    tenancy.page, tenancy.on_scrape = "http://127.0.0.1:4000", heard.append
    share = {"ok": True, "memory": 1, "write_rate": 0, "jobs": 1, "ranks": 1}
    assert tenancy._greeted(msgspec.json.encode(share)) == {}  # one of an earlier version would not understand it
    assert tenancy._greeted(msgspec.json.encode({**share, "scrape": "token"})) == {"page": "http://127.0.0.1:4000"}
    assert heard == ["", "token"]
