"""What each user of one service may take: memory, ranks, bandwidth, and the space of a store."""

import os
import signal
import urllib.error
import urllib.parse
import urllib.request

import pytest
from harness.runtime import eventually
from harness.users import ALICE, BOB, Node, Person, as_user
from harness.users_jobs import UsersJob, rank_of, register, registration

from ckptsvc.cli.agents import ask as ask_agent
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.dial import safe_target
from ckptsvc.rpc.identity import IdentityClient

ROOT = Person("root", 0, 0, (0,))


class TestShares:
    def test_of_ranks_and_jobs_are_kept_by_each_users_agent(self, divided: Node) -> None:
        def register_many() -> list[str]:
            said, held = [], []
            for job, rank in (("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 0)):
                identity = IdentityClient(str(divided.agent_directory(ALICE) / "identity.sock"))
                held.append(identity)
                try:
                    _, fd = identity.call(registration(job=job, rank=rank, world_size=8))
                    os.close(fd)
                    said.append("ok")
                except CkptsvcError as error:
                    said.append(f"{error.code}: {error.what}")
            return said

        said = as_user(ALICE, register_many)
        jobs, ranks = "this agent has 2 jobs already", "3 ranks are registered with this agent already"
        # At last a rank comes anew that is there already: it takes its own place.
        assert said == ["ok", "ok", f"limit-reached: {jobs}", "ok", f"limit-reached: {ranks}", "ok"]
        assert as_user(BOB, lambda: register(divided, BOB)) == "ok"
        eventually(lambda: divided.agents()[ALICE.uid]["ranks"] == 0, "all ranks to be gone")
        # What is remembered of jobs whose ranks have died makes room.
        assert as_user(ALICE, lambda: register(divided, ALICE, "d")) == "ok"

    def test_of_memory_and_bandwidth_follow_the_users_who_have_something_to_do(self, divided: Node) -> None:
        def shares() -> set[tuple[int, int]]:
            found = set()
            for person in (ALICE, BOB):
                with safe_target(divided.agent_directory(person), person.uid) as target:
                    status = ask_agent(divided.agent_directory(person), target)
                found.add((status["arena_limit"] >> 20, status["max_write_rate"] >> 20))
            return found

        ranks = []
        for person, share in ((ALICE, (48, 100)), (BOB, (32, 50))):
            ranks.append(rank_of(divided, person))
            eventually(lambda who=person: divided.agents()[who.uid]["ranks"] == 1, "the rank to be counted")
            eventually(lambda now=share: shares() == {now}, f"{share} MiB for each")
        for rank in ranks:
            rank.kill()
        eventually(lambda: shares() == {(48, 100)}, "all of it to be had again")


def rate_of(node: Node, person: Person, saves: UsersJob) -> float:
    """Bytes per second at which a user's agent writes, by its own account: what it has written, and waited for that.

    From the second save on that begins now: the first may have begun at another rate.
    """

    def account() -> tuple[float, float]:
        with safe_target(node.agent_directory(person), person.uid) as target:
            address = ask_agent(node.agent_directory(person), target)["metrics"]
        token = (node.agent_directory(person) / "http-token").read_text().strip()
        request = urllib.request.Request(f"http://{address}/metrics", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
        values = {name: float(value) for name, _, value in lines if not name.startswith("#")}
        (written,) = [v for name, v in values.items() if name.startswith("ckptsvc_written_bytes_total")]
        return written, values["ckptsvc_write_held_back_seconds_total"]

    begun = saves.reports("saved")[-1]["step"]
    saves.wait_for_save(begun + 2)
    before = account()
    saves.wait_for_save(begun + 6)
    after = account()
    return (after[0] - before[0]) / (after[1] - before[1])


class TestTheRateOfWrites:
    @pytest.mark.slow
    def test_is_divided_among_users_and_of_one_user_among_his_jobs_that_write(self, node: Node) -> None:
        node.start(store_max_write_rate="2MiB/s", agent_metrics_listen="127.0.0.1:0")

        def job(person: Person, name: str) -> UsersJob:
            begun = UsersJob(node, person, node.home(person) / f"run-{name}", 0, function="write_much", name=name)
            begun.wait_for_save(1)
            return begun

        def about(rate: float, person: Person, saves: UsersJob) -> bool:
            return 0.9 * rate < rate_of(node, person, saves) <= 1.02 * rate

        hers = job(ALICE, "a")
        assert about(2 << 20, ALICE, hers)
        idle = UsersJob(node, ALICE, node.home(ALICE) / "idle", 1, patient=True, name="idle")
        idle.wait_for_save(1)
        os.kill(idle.reports("saved")[-1]["pid"], signal.SIGSTOP)  # it is there, and writes nothing
        assert about(2 << 20, ALICE, hers)
        his = job(BOB, "b")
        assert about(1 << 20, ALICE, hers)
        assert about(1 << 20, BOB, his)
        for each in (hers, his):
            (each.folder / "go-end").touch()
            assert each.process.wait(60) == 0


class TestTheShareOfMemory:
    @pytest.mark.slow
    def test_is_all_that_a_real_snapshot_gets(self, node: Node) -> None:
        node.start(arena_limit="64MiB", system_user_memory="25%")
        hers = UsersJob(node, ALICE, node.home(ALICE) / "run", 0, function="save_too_much")
        assert "takes the job beyond its share, 16 MiB" in hers.result()["why"]
        his = UsersJob(node, BOB, node.home(BOB) / "run", 2)
        assert his.result()["steps"] == 2


class TestSpaceInAStore:
    """Workers write as the user: what a file system does not give him, they do not get."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            pytest.param("size=2m", "No space left on device", id="full"),
            pytest.param("size=64m,usrquota_block_hardlimit=2m", "Disk quota exceeded", id="quota"),
        ],
    )
    def test_that_a_user_has_used_up_costs_him_saves_and_nobody_else(self, node: Node, options: str, why: str) -> None:
        place = node.root / "small"
        place.mkdir()
        mounted = node.spawn(ROOT, ["mount", "-t", "tmpfs", "-o", f"mode=1777,{options}", "tmpfs", str(place)])
        said, _ = mounted.communicate(timeout=20)
        if mounted.returncode:
            pytest.skip(f"no such file system (quotas need CONFIG_TMPFS_QUOTA): {said.strip()}")
        node.start()
        hers = UsersJob(node, ALICE, place / "hers", 1, patient=True)
        hers.wait_for_save(1)
        fill = f"""
with open({str(place / "ballast")!r}, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        print(error)
"""
        assert why in node.python(ALICE, fill)
        eventually(lambda: any(why in line["why"] for line in hers.reports("failed")), "a save to fail")
        his = UsersJob(node, BOB, (place if "quota" in options else node.home(BOB)) / "his", 2)
        assert his.result()["steps"] == 2
        failed = len(hers.reports("failed"))
        eventually(lambda: len(hers.reports("failed")) > failed, "the training to go on")
        before = max(line["step"] for line in hers.reports("saved"))
        assert node.python(ALICE, f"import os; os.unlink({str(place / 'ballast')!r})") == ""
        hers.wait_for_save(before + 1)
        (hers.folder / "go-end").touch()
        assert hers.result()["skipped"] == 0
