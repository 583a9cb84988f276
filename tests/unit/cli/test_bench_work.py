"""What is measured of a system is what it did: systems that take a known time, waste a known time, or fail."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ckptsvc.cli.benchmarks import work
from ckptsvc.cli.benchmarks.spec import Results, Spec
from ckptsvc.cli.benchmarks.work import ComputeLoop, measure_overlap, measure_save


class Pretended:
    """A system that blocks for `save` seconds and is durable `finish` seconds later."""

    name = "pretended"

    def __init__(self, save: float = 0.0, finish: float = 0.0, burn: float = 0.0, fails: str = "") -> None:
        self.times, self.burn, self.fails = (save, finish), burn, fails
        self.saves = self.discarded = self.updates = 0
        self.closed = False

    def save(self) -> None:
        self.saves += 1
        if self.fails:
            raise RuntimeError(self.fails)
        time.sleep(self.times[0])

    def finish(self) -> None:
        time.sleep(self.times[1])
        if self.burn:
            code = f"import os\nwhile sum(os.times()[:2]) < {self.burn}: pass"
            subprocess.run([sys.executable, "-c", code], check=True)

    def before_update(self) -> None:
        self.updates += 1

    def discard_older(self) -> None:
        self.discarded += 1

    def load(self) -> None:
        pass

    def files(self) -> Sequence[Path]:
        return []

    def processes(self) -> Sequence[int]:
        return []

    def close(self) -> None:
        self.closed = True


def test_a_save_is_timed_to_the_return_and_to_the_end() -> None:
    found = measure_save(Pretended(save=0.1, finish=0.2))
    assert 0.1 <= found["blocked"] < 0.19
    assert 0.3 <= found["durable"] < 0.6
    assert found["cpu"] < 0.1, "sleeping takes no CPU time"


def test_cpu_time_of_processes_that_a_save_has_started_counts() -> None:
    assert measure_save(Pretended(burn=0.3))["cpu"] >= 0.25


def test_the_time_a_loop_is_blocked_is_lost() -> None:
    found = measure_overlap(Pretended(save=1.0, finish=0.3), ComputeLoop(), base=0.2)
    assert 1.0 <= found["blocked"] < 1.5
    assert found["durable"] >= 1.3
    assert found["lost"] > 0.3, "the loop stood still for 1 s"


@pytest.mark.slow  # it compares times
def test_a_loop_that_goes_on_at_its_speed_loses_less_than_one_that_is_held_up() -> None:
    loop = ComputeLoop()
    free = measure_overlap(Pretended(finish=0.3), loop, base=0.3)["lost"]
    assert free < measure_overlap(Pretended(save=0.6, finish=0.3), loop, base=0.3)["lost"]


def test_what_fails_in_the_background_is_raised() -> None:
    class Fails(Pretended):
        def finish(self) -> None:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        measure_overlap(Fails(), ComputeLoop(), base=0.01)


def spec(repeat: int = 2) -> Spec:
    return Spec(workload="save", nbytes=1 << 20, repeat=repeat, store="", directory="")


def test_systems_take_turns_and_the_first_repetition_is_kept_apart() -> None:
    results, first, second = Results(), Pretended(), Pretended()
    second.name = "second"
    order: list[str] = []
    shares: list[float] = []

    def measure(system) -> dict[str, float]:
        order.append(system.name)
        return {"seconds": float(len(order))}

    limits = order.append
    work._take_turns(spec(), results, [first, second], measure, shares.append, lambda n: limits(f"limits {n}"))
    one = ["pretended", "second"]
    assert order == ["limits 0", *one, "limits 1", *one, "limits 2", *one]
    assert results.warm_up == {"pretended": {"seconds": 2.0}, "second": {"seconds": 3.0}}
    assert results.samples["second"] == [{"seconds": 6.0}, {"seconds": 9.0}]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    assert (first.discarded, first.closed, second.closed) == (3, True, True)


def test_a_peer_that_fails_is_reported_and_drops_out() -> None:
    results, bad, good = Results(), Pretended(fails="Too many open files"), Pretended()
    bad.name = "bad"
    work._take_turns(spec(), results, [bad, good], measure_save, lambda share: None)
    assert results.unavailable == {"bad": "failed: RuntimeError: Too many open files"}
    assert bad.saves == 1
    assert set(results.samples) == {"pretended"}
    assert len(results.samples["pretended"]) == 2


def test_a_restore_that_brings_back_something_else_is_no_result() -> None:
    tree = work.large_state(1 << 20)
    with pytest.raises(work.Damaged):
        work._timed_load(tree, lambda: None)


def test_peers_need_to_be_installed_and_a_directory() -> None:
    results = Results()
    here = Spec(workload="save", nbytes=0, repeat=1, store="s3://x", directory="", peers=("dcp",))
    assert work._peers(here, {}, results) == []
    assert "directory" in results.unavailable["dcp"]
