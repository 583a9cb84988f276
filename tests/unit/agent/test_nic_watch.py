"""The watch in a real agent, and its threads."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from harness.fake_nics import Cassini, Port
from harness.runtime import eventually
from prometheus_client.parser import text_string_to_metric_families

from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.watching import nic_watch
from ckptsvc.agent.watching.nic_watch import Hand, NicWatch
from ckptsvc.agent.watching.nics import read
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.health import Policy
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.settings import NicsSettings
from ckptsvc.telemetry import Metrics

# ---- a thread that may hang


def test_a_hand_answers_and_goes_on():
    async def ask_twice():
        answers = iter([1, 2])
        hand = Hand(lambda: next(answers), "test")
        found = [await hand.ask(), await hand.ask()]
        hand.close()
        return found

    assert asyncio.run(ask_twice()) == [1, 2]


def test_a_hand_that_hangs_is_asked_once_and_hinders_nobody():
    async def ask_often():
        release, calls = threading.Event(), []

        def work():
            calls.append(threading.current_thread().daemon)
            release.wait(30)
            return "late"

        hand = Hand(work, "test")
        began = hand.ask()
        for _ in range(5):
            assert hand.ask() is began
            await asyncio.wait([began], timeout=0.01)
        assert not began.done()
        release.set()
        hand.close()
        return await began, calls

    assert asyncio.run(ask_often()) == ("late", [True])


# ---- the watch, without an agent


class Watching:
    """A watch with one job's rank on the node, and what it reports."""

    def __init__(self, root):
        self.reports = []
        self.local = SimpleNamespace(name="n0", metrics=Metrics("test"), sessions={}, jobs={"job": None})
        self.local.report = lambda job, report: self.reports.append(report.nic_summary)
        shell = CoordinatorShell(Workers(), 100.0, Policy())
        self.local.cores = lambda: [shell.core]
        self.watch = NicWatch(self.local, NicsSettings(root=str(root)))

    def attach(self, attempt):
        self.local.sessions = {"token": SimpleNamespace(reg=SimpleNamespace(job="job", attempt=attempt))}

    async def until(self, condition, seconds=20.0):
        """Run the watch until something is true."""
        running = asyncio.ensure_future(self.watch.run())
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            assert not running.done(), running.exception()
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def soon(monkeypatch):
    """A second is a twentieth of one."""
    monkeypatch.setattr(nic_watch, "EVERY", 0.05)
    monkeypatch.setattr(nic_watch, "SEARCH_EVERY", 0.2)
    monkeypatch.setattr(nic_watch, "UNANSWERED", 0.15)


def test_a_card_that_hangs_does_not_keep_the_others_from_being_read(tmp_path, monkeypatch, soon):
    for name in ("cxi0", "cxi1"):
        Cassini(name).write(tmp_path, 1e9)
    release = threading.Event()

    def hanging(place, skip):
        if place.nic == "cxi0":
            release.wait(60)
        return read(place, skip)

    monkeypatch.setattr(nic_watch, "read", hanging)
    monkeypatch.setattr(nic_watch, "DEADLINE", 0.05)
    watching = Watching(tmp_path)
    asyncio.run(watching.until(lambda: any(reading.link for reading in watching.watch.readings)))
    assert [(reading.nic, reading.link) for reading in watching.watch.readings] == [("cxi0", ""), ("cxi1", "up")]
    release.set()


def test_a_retry_handler_that_hangs_counts_as_none(tmp_path, monkeypatch, soon):
    Cassini().write(tmp_path, 1e9)
    release = threading.Event()
    state = {"hangs": False}

    def hanging(place, skip):
        if place.is_handler and state["hangs"]:
            release.wait(60)
        return read(place, skip)

    monkeypatch.setattr(nic_watch, "read", hanging)
    monkeypatch.setattr(nic_watch, "DEADLINE", 0.05)
    watching = Watching(tmp_path)
    asyncio.run(watching.until(lambda: watching.watch.readings))
    state["hangs"] = True
    asyncio.run(watching.until(lambda: watching.watch.readings[0].handler_absent))
    release.set()


def test_cards_come_and_go_while_the_agent_runs(tmp_path, soon):
    watching = Watching(tmp_path)
    first, second = Cassini("cxi0"), Cassini("cxi1")
    first.write(tmp_path, 1e9)
    asyncio.run(watching.until(lambda: set(watching.watch.cards) == {"cxi0"}))
    second.write(tmp_path, 1e9)
    Port().write(tmp_path)
    asyncio.run(watching.until(lambda: set(watching.watch.cards) == {"cxi0", "cxi1", "mlx5_0:1"}))
    first.remove(tmp_path)
    asyncio.run(watching.until(lambda: any(reading.gone for reading in watching.watch.readings)))
    assert [reading.nic for reading in watching.watch.readings if reading.gone] == ["cxi0"]
    second.remove(tmp_path)
    (Port().directory(tmp_path).parent).rename(tmp_path / "unplugged")
    asyncio.run(watching.until(lambda: all(reading.gone for reading in watching.watch.readings)))


def test_what_cannot_be_read_is_said_once(tmp_path, soon, caplog):
    caplog.set_level("WARNING", "ckptsvc.agent")
    card = Cassini()
    card.write(tmp_path, 1e9)
    (card.device(tmp_path) / "telemetry/pct_spt_timeouts").unlink()
    (card.device(tmp_path) / "telemetry/hni_tx_paused_0").write_text("?\n")
    watching = Watching(tmp_path)
    failures = "ckptsvc_nic_read_failures_total"
    asyncio.run(watching.until(lambda: watching.local.metrics.registry.get_sample_value(failures) > 3))
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 45 counters of cxi0 cannot be read (")
    assert "pct_spt_timeouts: is not there" in record.getMessage()


def test_a_summary_at_the_beginning_of_each_attempt_and_when_there_is_news(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(NicWatch, "_is_our_turn", lambda self: False)
    card = Cassini()
    card.write(tmp_path, 1e9)
    watching = Watching(tmp_path)
    asyncio.run(watching.until(lambda: watching.watch.readings))
    assert watching.reports == [], "there is no job"
    for attempt in (1, 2):
        watching.attach(attempt)
        asyncio.run(watching.until(lambda: watching.reports))
        asyncio.run(watching.until(lambda: watching.watch.readings))
        summary = watching.reports[0]
        assert (summary.job, summary.node, summary.attempt) == ("job", "n0", attempt)
        assert [nic.nic for nic in summary.nics] == ["cxi0"]
        watching.reports.clear()
    card.count("pct_spt_timeouts", 64)
    card.write(tmp_path, 1e9 + 1)
    asyncio.run(watching.until(lambda: any(report.nics[0].timeouts == 64 for report in watching.reports)))


def test_nothing_runs_where_it_is_switched_off(tmp_path):
    Cassini().write(tmp_path, 1e9)
    watching = Watching(tmp_path)
    watching.watch = NicWatch(watching.local, NicsSettings(enabled=False, root=str(tmp_path)))
    before = threading.active_count()

    async def a_while():
        running = asyncio.ensure_future(watching.watch.run())
        await asyncio.sleep(0.1)
        assert threading.active_count() == before
        running.cancel()

    asyncio.run(a_while())
    assert watching.watch.cards == {}


# ---- in real agents


def status(agent):
    import json

    return json.loads(agent.call("GetStatus", agent_pb2.GetStatusRequest()).json)


def test_two_real_agents_name_the_sick_card_to_the_coordinator(start, runtime, tmp_path):
    """Two nodes of two cards; the coordinator, on one, names the card of the other, in the status and the metrics."""
    cards = {}
    agents = []
    for node in ("n0", "n1"):
        root = tmp_path / node
        cards[node] = [Cassini("cxi0", 1, whole=True), Cassini("cxi1", 2, whole=True)]
        for card in cards[node]:
            card.write(root, time.time())
        runtime.environ["CKPTSVC_NICS_ROOT"] = str(root)
        agents.append(start(node, "--name", node, "--metrics-listen", "127.0.0.1:0"))
    first, second = agents
    address = (first.directory / "ready").read_text().splitlines()[1]
    first.register(world_size=2)
    second.register(world_size=2, rank=1, coordinator=address)
    eventually(
        lambda: status(first)["coordinates"] and status(first)["coordinates"][0]["live_ranks"] == 2, "both ranks"
    )

    def named():
        for node, own in cards.items():
            for card in own:
                card.move(1e9, 1e9)
                card.count("oxe_stall_fgfc_blk_0", (0.4 if (node, card.name) == ("n1", "cxi1") else 0.001) * 1e8)
                if (node, card.name) == ("n1", "cxi1"):
                    card.count("pct_spt_timeouts", 64)
                card.write(tmp_path / node, time.time())
        time.sleep(0.1)
        return status(first)["coordinates"][0]["nics"]

    worst = eventually(named, "the card to be named")[0]
    assert worst.startswith("cxi1 on n1: ")
    assert "packets got no answer" in worst
    assert [(nic["nic"], nic["family"], nic["link"]) for nic in status(second)["nics"]] == [
        ("cxi0", "cxi", "up"), ("cxi1", "cxi", "up")]  # fmt: skip
    metrics = (first.directory / "ready").read_text().splitlines()[2]

    def findings():
        families = {f.name: f for f in text_string_to_metric_families(runtime.metrics(metrics))}
        return {sample.labels["kind"]: sample.value for sample in families["ckptsvc_nic_findings"].samples}

    eventually(lambda: findings()["timeouts"] == 1, "the metric")
