"""How the workers of an agent share the rate at which the node may write."""

import asyncio
from collections.abc import Callable
from typing import Any

from ckptsvc.agent.worker.worker import Request, Worker
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.config import load
from ckptsvc.settings import Settings


class Writing:
    """A worker whose writes end when the test says so."""

    running = True

    def __init__(self) -> None:
        self.rates: list[float | None] = []
        self.may_end = asyncio.Event()

    async def call(self, op: str, args: dict[str, Any], on_note: Callable[[Any], None] | None = None) -> dict[str, Any]:
        self.rates.append(args["rate"])
        await self.may_end.wait()
        return {}

    async def tell(self, op: str, args: dict[str, Any]) -> None:
        assert op == "rate"
        self.rates.append(args["rate"])


def test_only_those_that_write_share_the_rate_and_hear_of_others_at_once() -> None:
    async def story() -> None:
        workers = Workers(load({}, {"store.max_write_rate": "12MB/s"}, files=[]))
        jobs = {name: Writing() for name in ("a", "b", "idle")}
        workers._by_job |= jobs  # type: ignore[arg-type]

        def begin(name: str) -> asyncio.Future[dict[str, Any]]:
            return asyncio.ensure_future(workers.write(name, "write", {}))

        first = [begin("a"), begin("a")]  # two ranks of one job
        await asyncio.sleep(0)
        second = begin("b")
        for _ in range(3):
            await asyncio.sleep(0)
        assert jobs["a"].rates == [12e6, 12e6, 6e6]
        assert jobs["b"].rates == [6e6]
        jobs["b"].may_end.set()
        await second
        await asyncio.sleep(0)
        assert jobs["a"].rates[3:] == [12e6]
        workers.max_write_rate = 3_000_000  # the service of the node has given it to other users
        await asyncio.sleep(0)
        assert jobs["a"].rates[4:] == [3e6]
        jobs["a"].may_end.set()
        await asyncio.gather(*first)
        workers.max_write_rate = None
        await asyncio.sleep(0)
        assert len(jobs["a"].rates) == 5
        assert jobs["idle"].rates == []

    asyncio.run(story())


def test_a_worker_goes_by_a_new_rate_before_its_turn() -> None:
    worker = Worker(Settings().store, Settings().save)
    worker.expect(Request(1, "rate", {"rate": 5.0}))
    assert worker._rate.limit == 5.0
    worker.expect(Request(2, "digest", {}))
    assert worker._rate.limit == 5.0
    worker.expect(Request(3, "write", {"rate": None, "fill": 0}))
    assert worker._rate.limit is None
