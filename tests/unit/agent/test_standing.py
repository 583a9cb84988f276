"""Orders that an agent keeps: what a rank finds on its page, and what a coordinator hears."""

import os
import time

import pytest

from ckptsvc.agent.identity import Registration
from ckptsvc.agent.orders.standing import MAX_BYTES, MAX_JOBS, StandingOrders
from ckptsvc.agent.sessions import Session
from ckptsvc.errors import NodeUnfit
from ckptsvc.rpc.identity import PAGE_BYTES, Page
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def pausing(step, *, paused=True, version=1, attempt=1, job="gpt@1", left=0.0):
    return pb.Pausing(job=job, version=version, paused=paused, attempt=attempt, step=step, left=left, by="ada")


@pytest.fixture
def session():
    made = []

    def open_(attempt=1, epoch=0):
        reg = Registration(op="register", job="gpt@1", store="s", attempt=attempt, epoch=epoch, rank=0, world_size=1)
        made.append(Session.open(reg, os.getpid()))
        return made[-1]

    yield open_
    for each in made:
        os.close(each.pidfd), os.close(each.page_fd)


def saved(session, steps=range(1, 40)):
    return [step for step in steps if not session.page.is_paused(step)]


def test_a_pause_and_its_end_are_each_from_a_step_on(session):
    orders, rank = StandingOrders(), session()
    orders.apply(rank)
    assert saved(rank) == list(range(1, 40))
    orders.take(pausing(10))
    orders.apply(rank)
    assert saved(rank) == list(range(1, 10))
    orders.take(pausing(20, paused=False, version=2))
    orders.apply(rank)
    assert saved(rank) == [*range(1, 10), *range(20, 40)]
    orders.take(pausing(30, version=3))
    orders.apply(rank)
    assert saved(rank, range(25, 40)) == list(range(25, 30))
    orders.take(pausing(1, version=3))  # it has gone back to a checkpoint
    orders.apply(rank)
    assert saved(rank) == []


def test_ranks_that_register_with_the_next_agent_find_the_same(session, tmp_path):
    StandingOrders(tmp_path / "orders.json").take(pausing(10))
    again = StandingOrders(tmp_path / "orders.json")
    same, later = session(), session(attempt=2)
    again.apply(same)
    again.apply(later)
    assert saved(same) == list(range(1, 10))
    assert saved(later) == []
    again.take(pausing(20, paused=False, version=2))
    third = StandingOrders(tmp_path / "orders.json")
    same, later = session(epoch=1), session(attempt=2)
    third.apply(same)
    third.apply(later)
    assert saved(same) == list(range(20, 40))
    assert saved(later) == list(range(1, 40))


def test_new_processes_under_the_same_attempt_number_leave_nothing_out_after_it_is_resumed(session):
    orders, rank = StandingOrders(), session()
    orders.take(pausing(20, paused=False, version=2))
    orders.apply(rank)
    assert saved(rank) == list(range(1, 40))


def test_a_job_that_was_resumed_and_goes_back_leaves_nothing_out(session):
    orders, rank = StandingOrders(), session()
    for told in (pausing(10), pausing(20, paused=False, version=2), pausing(1, paused=False, version=2)):
        orders.take(told)
        orders.apply(rank)
    assert saved(rank) == list(range(1, 40))


def test_a_pause_whose_time_is_over_holds_nobody(session, monkeypatch):
    orders, rank = StandingOrders(), session()
    orders.take(pausing(10, left=60.0))
    (told,) = orders.report("gpt@1")
    assert 55 < told.pausing.left <= 60
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    orders.apply(rank)
    assert saved(rank) == list(range(1, 40))


def test_an_older_word_does_not_count(session):
    orders, rank = StandingOrders(), session()
    orders.take(pausing(20, paused=False, version=5))
    orders.take(pausing(10, version=4))
    orders.apply(rank)
    assert [report.pausing.version for report in orders.report("gpt@1")] == [5]


def test_what_is_over_is_forgotten(tmp_path):
    orders = StandingOrders(tmp_path / "orders.json")
    for job in ("gpt@1", "gpt@2", "bert"):
        orders.take(pausing(10, job=job))
    orders.forget("gpt")
    assert [each["job"] for each in StandingOrders(tmp_path / "orders.json").paused()] == ["bert"]
    for number in range(MAX_JOBS + 9):
        orders.take(pausing(10, job=str(number)))
    assert len(list(orders.paused())) == MAX_JOBS


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"pausing": 7}', "[" * 100_000, "\xff"])
def test_a_node_whose_orders_cannot_be_read_takes_no_new_jobs_until_somebody_says_so(tmp_path, text):
    (tmp_path / "orders.json").write_text(text)
    orders = StandingOrders(tmp_path / "orders.json")
    assert "cannot be read" in orders.vacated
    with pytest.raises(NodeUnfit, match="cannot be read"):
        orders.check_open()
    orders.vacate("")
    StandingOrders(tmp_path / "orders.json").check_open()


def test_a_drained_node_stays_so_whatever_is_said_of_jobs(tmp_path):
    orders = StandingOrders(tmp_path / "orders.json")
    orders.vacate("a fan")
    for number in range(9):
        order = pausing(10, job=str(number))
        order.reason = "\0" * (MAX_BYTES // 30)  # six characters each in the file
        orders.take(order)
    again = StandingOrders(tmp_path / "orders.json")
    assert again.vacated == "a fan"
    assert [each["job"] for each in again.paused()] == ["5", "6", "7", "8"]


def test_a_directory_that_takes_no_file_stops_nothing(tmp_path, caplog):
    orders = StandingOrders(tmp_path / "nowhere" / "orders.json")
    orders.vacate("a fan")
    assert orders.vacated == "a fan"
    assert "not kept for the next agent" in caplog.text


def test_a_rank_takes_its_pause_along_to_an_agent_that_knows_of_none():
    older, newer, knowing = (Page(memoryview(bytearray(PAGE_BYTES))) for _ in range(3))
    older.put("paused", 10)
    newer.carry(older)
    assert newer.is_paused(10)
    knowing.put("paused", 5)
    knowing.put("resumed", 8)
    knowing.carry(older)
    assert not knowing.is_paused(10)
