"""The agent runs short of things, or is pestered: jobs train on, nothing is lost, and one line of its log says why."""

import collections
import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from harness.damage import assert_intact, steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually, tmpfs
from harness.stored import cli

import ckptsvc
from ckptsvc.rpc.channel import OPTIONS, TOKEN_KEY
from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2


def train(rank: Rank, store: str) -> dict[str, Any]:
    """Steps of 10 ms, a save at each fifth, until the test says to end."""
    tensor = torch.zeros(200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = ckptsvc.attach({"tensor": tensor}, store=store, every=5)
        while not (rank.folder / "go-end").exists():
            tensor += 1
            run.step()
            time.sleep(0.01)
            if run.steps_done % 10 == 0:
                rank.report("stepped", step=run.steps_done)
        saved = run.save(wait=True, timeout=60.0)
        run.close()
    return {"step": run.steps_done, "saved": saved}


def save_some(rank: Rank, store: str) -> None:
    """Three more checkpoints."""
    with ckptsvc.attach({"tensor": torch.zeros(10)}, store=store, every="off") as run:
        for _ in range(3):
            run.step()
            run.save(wait=True, timeout=60.0)


class Pestered:
    """A job that trains while the test does something to its agent."""

    def __init__(self, runtime: Runtime, job: Job, store: Path) -> None:
        self.runtime, self.job, self.store = runtime, job, store
        self.pests = contextlib.ExitStack()  # what pesters the agent until it has ended

    def steps_on(self) -> None:
        """The training goes on."""
        before = self.job.reports("stepped")[-1]["step"]
        self.job.wait_for("stepped", step=before + 30)

    def saves_on(self) -> None:
        """Something that was snapshot from now on is committed."""
        before = self.job.reports("stepped")[-1]["step"]
        eventually(lambda: max(steps(self.store), default=0) > before, f"a step after {before} to be committed", 60)

    def says_once(self, *parts: str) -> None:
        """One line of the agent's log has all of that, and there is no traceback."""

        def found() -> list[str]:
            return [line for line in self.runtime.log().splitlines() if all(part in line for part in parts)]

        eventually(found, f"the log to say {parts}", 30)
        assert len(found()) == 1, found()
        assert "Traceback" not in self.runtime.log()


@pytest.fixture
def pestered(launch: Launch, runtime: Runtime, tmp_path: Path) -> Iterator[Pestered]:
    """At the end all is as if nothing had been."""
    store = tmp_path / "run"
    agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    with contextlib.ExitStack() as pests:
        with launch.plain(1, train, str(store)) as job:
            job.wait_for("stepped", step=10)
            found = Pestered(runtime, job, store)
            pests.push(found.pests)
            found.saves_on()
            yield found
            found.saves_on()
            job.go("end")
            (result,) = job.results()
        assert result["saved"]
        assert assert_intact(store)[0] == result["step"]
        assert [each.pid for each in runtime.agents()] == [agent.pid]
        agent.terminate()
        assert agent.wait(20) == 0


def limited(pid: int, kind: int, most: int) -> contextlib.AbstractContextManager[None]:
    """A process may have so much of it for a while."""

    @contextlib.contextmanager
    def inner() -> Iterator[None]:
        before = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (most, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, kind, before)

    return inner()


def test_no_descriptors_are_left(pestered: Pestered) -> None:
    """A client takes them all; then it is gone, and ranks are let in again."""
    (agent,) = pestered.runtime.agents()
    path = sockets(pestered.runtime.sockets)[1]
    highest = max(int(each.name) for each in Path(f"/proc/{agent.pid}/fd").iterdir())
    with contextlib.ExitStack() as flood, limited(agent.pid, resource.RLIMIT_NOFILE, highest + 20):
        for _ in range(100):
            sock = flood.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(path)
        pestered.says_once("ranks cannot be let in", "Too many open files")
        pestered.steps_on()
    pestered.says_once("ranks can be let in again")


@pytest.mark.slow
def test_no_memory_is_left(pestered: Pestered) -> None:
    """The worker, which takes most, gets none any more, dies of it, and cannot be started: saves fail, one by one."""
    (agent,) = pestered.runtime.agents()
    small = 64 << 20  # an interpreter starts with it, and cannot import what a worker needs
    with limited(agent.pid, resource.RLIMIT_AS, small):
        for worker in pestered.runtime.workers():
            os.kill(worker.pid, 9)
        pestered.steps_on()
        eventually(lambda: "shard not written" in pestered.runtime.log(), "a save to fail", 60)
        said = [line for line in pestered.runtime.log().splitlines() if "shard not written" in line]
        assert "worker" in said[0]


@contextlib.contextmanager
def control_group(most: int) -> Iterator[Path]:
    """A control group whose processes get so many bytes of memory together; with version 1 or 2."""
    places = [
        (kind, Path(where)) for _, where, kind, *_ in map(str.split, Path("/proc/mounts").read_text().splitlines())
    ]
    for kind, above in places:
        group = above / f"ckptsvc-test-{os.getpid()}"
        limit = group / ("memory.max" if kind == "cgroup2" else "memory.limit_in_bytes")
        if kind not in ("cgroup", "cgroup2"):
            continue
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                if limit.exists():
                    limit.write_text(str(most))
                    yield group
                    return
            finally:
                group.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


def ask_for_much(path: str, agent: "subprocess.Popen[bytes]", times: int) -> None:
    """Calls of some megabytes, several at once; they are refused, and there must be memory to find that out."""
    large = agent_pb2.SubmitRequest(slot="s", step=1, aliases={str(each): "a" * 1000 for each in range(3000)})
    data = large.SerializeToString()
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        submit = channel.unary_unary("/ckptsvc.rpc.v1.AgentService/Submit")
        for _ in range(times):
            if agent.poll() is not None:
                return
            for call in [submit.future(data, timeout=5) for _ in range(20)]:
                with contextlib.suppress(grpc.RpcError):
                    call.result()


class Starved(Pestered):
    """The same; its agent may end, and is started again, as a service manager does."""

    def __init__(self, runtime: Runtime, job: Job, store: Path, agent: "subprocess.Popen[bytes]") -> None:
        super().__init__(runtime, job, store)
        self.agent = agent

    def start_again(self) -> None:
        assert self.agent.wait(30) != 0
        self.agent = self.runtime.start_agent()


@pytest.fixture
def starved(launch: Launch, runtime: Runtime, tmp_path: Path) -> Iterator[Starved]:
    store = tmp_path / "run"
    agent = runtime.start_agent()
    with launch.plain(1, train, str(store)) as job:
        job.wait_for("stepped", step=10)
        found = Starved(runtime, job, store, agent)
        found.saves_on()
        committed = set(steps(store))
        yield found
        assert max(committed) in steps(store)
        found.saves_on()
        job.go("end")
        (result,) = job.results()
    assert result["saved"]
    assert assert_intact(store)[0] == result["step"]
    found.agent.terminate()
    assert found.agent.wait(20) == 0


@pytest.mark.slow
def test_the_kernel_kills_the_agent_for_lack_of_memory(starved: Starved) -> None:
    """A limit of its control group, which it reaches; the next one says what has happened."""
    pid = starved.agent.pid
    with control_group(1 << 20) as group:
        (group / "cgroup.procs").write_text(str(pid))
        ask_for_much(sockets(starved.runtime.sockets)[0], starved.agent, 100)
        assert starved.agent.wait(30) == -9
    starved.steps_on()
    starved.start_again()
    starved.says_once(
        f"process {pid}, was killed or broke off; since it began, the kernel has killed", "lack of memory"
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [1 << 20, 16 << 20, 64 << 20])
def test_the_agent_gets_no_memory(starved: Starved, more: int) -> None:
    """Beyond what it has; what it cannot go on without, it ends for (a library of it may abort)."""
    pid = starved.agent.pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ProcessLookupError), limited(pid, resource.RLIMIT_AS, size + more):
        ask_for_much(sockets(starved.runtime.sockets)[0], starved.agent, 10)
        starved.steps_on()
    if starved.agent.poll() is None:
        starved.says_once("the agent gets no memory")
    else:
        starved.start_again()
        starved.says_once(f"process {pid}, was killed or broke off")


def test_a_flood_of_calls_that_are_none(pestered: Pestered) -> None:
    """Malformed and hostile bytes to every method, on both ports, from a seed."""
    rng = random.Random(20)
    seeds = [
        agent_pb2.PrepareRequest(plain_digest="d", generation=1),
        agent_pb2.SubmitRequest(slot="s", step=1, bytes=4096, aliases={"a": "b"}),
        agent_pb2.LaunchRequest(hello=agent_pb2.LauncherHello(job="j", nproc=1, min_nodes=1, max_nodes=1)),
        coordinator_pb2.Report(agent_hello=coordinator_pb2.AgentHello(node="n")),
    ]
    local, address = f"unix:{sockets(pestered.runtime.sockets)[0]}", pestered.runtime.status()["address"]
    for target, file in ((local, agent_pb2), (address, coordinator_pb2)):
        (service,) = file.DESCRIPTOR.services_by_name.values()
        with grpc.insecure_channel(target, options=OPTIONS) as channel:
            for method in service.methods:
                if method.name == "Launch":
                    continue  # see below: a launcher that is one would wait for a coordinator
                for _ in range(20):
                    data = mutated(rng, rng.choice(seeds).SerializeToString())
                    call = channel.unary_unary(f"/{service.full_name}/{method.name}")
                    with contextlib.suppress(grpc.RpcError):
                        call(data, timeout=5, metadata=((TOKEN_KEY, rng.choice(["", "x" * 1000])),))
            for _ in range(20):
                launch = channel.stream_stream(f"/{service.full_name}/Launch")
                with contextlib.suppress(grpc.RpcError):
                    list(launch(iter([rng.randbytes(50)]), timeout=0.5))
    for family, where in ((socket.AF_UNIX, local.removeprefix("unix:")), (socket.AF_INET, endpoint(address))):
        for _ in range(20):  # not even HTTP
            with socket.socket(family) as sock:
                sock.connect(where)
                with contextlib.suppress(OSError):
                    sock.sendall(rng.randbytes(rng.choice([1, 100, 100_000])))
    pestered.steps_on()
    pestered.says_once("requests that make no sense were refused")
    assert pestered.runtime.status()["ranks"]


def test_a_flood_of_calls_that_are_good(pestered: Pestered) -> None:
    """A program of the user asks how things are, and says who it is, as fast as it can."""
    grpc_path, identity_path = sockets(pestered.runtime.sockets)
    over, answers = threading.Event(), collections.Counter[str]()

    def ask() -> None:
        client = IdentityClient(identity_path)
        metadata = ((TOKEN_KEY, client.call({"op": "caller"})[0]["token"]),)
        with grpc.insecure_channel(f"unix:{grpc_path}", options=OPTIONS) as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            while not over.is_set():
                asked = [stub.GetStatus.future(agent_pb2.GetStatusRequest(), metadata=metadata) for _ in range(100)]
                answers["status"] += sum(bool(json.loads(each.result().json)["ranks"]) for each in asked)
        client.close()

    def introduce() -> None:
        while not over.is_set():
            client = IdentityClient(identity_path)
            answers["caller"] += bool(client.call({"op": "caller"})[0]["token"])
            client.close()

    with ThreadPoolExecutor(5) as pool:
        flood = [pool.submit(each) for each in (ask, ask, ask, introduce, introduce)]
        try:
            pestered.steps_on()
            pestered.saves_on()
            eventually(lambda: min(answers["status"], answers["caller"]) > 500, "a flood", 60)
            assert pestered.runtime.status(timeout=20)["ranks"], "somebody else asks"
            pestered.steps_on()
        finally:
            over.set()
        for each in flood:
            each.result(60)
    log = pestered.runtime.log()
    assert "Traceback" not in log
    assert not any(word in log for word in ("stalled", "skipped", "died"))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of a message are others, and it is longer or shorter."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found[: rng.randrange(1, len(found) + 1)]) + rng.randbytes(rng.choice([0, 0, 3, 70_000]))


def endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(request: pytest.FixtureRequest, runtime: Runtime, tmp_path: Path) -> SetClock:
    """Puts the clock of programs that are started from now on so many years forward: agents, or what the test says.

    A program that has gRPC may not start with such a clock, which is Python's alone: deadlines go by the machine's.
    """
    offset = tmp_path / "offset"
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import sys, time
        real = time.time
        if any({getattr(request, "param", "agent")!r} in each for each in sys.orig_argv):
            time.time = lambda: real() + float(open({str(offset)!r}).read())
        """)
    )
    runtime.environ["PYTHONPATH"] = f"{tmp_path}:{runtime.environ['PYTHONPATH']}"

    def put(years: float) -> None:
        (tmp_path / "offset.new").write_text(str(years * 365 * 86400))
        (tmp_path / "offset.new").rename(offset)

    put(0)
    return put


@pytest.mark.slow
def test_a_clock_that_jumps(launch: Launch, runtime: Runtime, tmp_path: Path, set_clock: SetClock) -> None:
    """Ten years forward, and back: what decides here is a clock that does not, also over what is old."""
    store = tmp_path / "run"
    runtime.environ |= {"CKPTSVC_SAVE_KEEP": "1", "CKPTSVC_RETENTION_AGE": "7d"}
    agent = runtime.start_agent()
    with launch.plain(1, train, str(store)) as job:
        job.wait_for("stepped", step=10)
        pestered = Pestered(runtime, job, store)
        pestered.saves_on()
        started = runtime.status()["started"]
        for years, said in ((10, 1), (-10, 1), (0, 2)):
            set_clock(years)
            way = "forward" if years >= 0 else "back"
            eventually(lambda way=way, said=said: runtime.log().count(f" d {way}: ") == said, "it to be said")
            pestered.saves_on()
        assert runtime.status()["started"] == started
        assert [rank["phase"] for rank in runtime.status()["ranks"]] == ["step"]
        job.go("end")
        (result,) = job.results()
    assert result["saved"]
    assert assert_intact(store)[0] == result["step"]
    assert "removed step" not in runtime.log()
    assert not any(word in runtime.log() for word in ("Traceback", "died", "stalled", "skipped"))
    agent.terminate()
    assert agent.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("set_clock", ["ckptsvc.agent.worker.worker"], indirect=True)
def test_a_clock_that_is_wrong_from_the_start_makes_nothing_old(
    launch: Launch, runtime: Runtime, tmp_path: Path, set_clock: SetClock
) -> None:
    """Some jobs, one after another, on nodes whose clock is right, then far ahead, twice, then right again."""
    store, before = tmp_path / "run", set[int]()
    runtime.environ |= {"CKPTSVC_SAVE_KEEP": "1", "CKPTSVC_RETENTION_AGE": "7d"}
    agent = runtime.start_agent()
    for years in (0, 10, 10, 0):
        set_clock(years)
        launch.plain(1, save_some, str(store)).results()
        assert before < set(steps(store))
        before = set(steps(store))
    assert "removed step" not in runtime.log()
    years_of = {each["created"][:4] for each in json.loads(cli("ls", store, "--json").out)["checkpoints"]}
    assert len(years_of) == 2
    agent.terminate()
    assert agent.wait(20) == 0


@pytest.mark.slow
def test_the_partition_of_the_log_is_full(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with tmpfs(tmp_path / "log", "1m") as partition:
        log = partition / "agent.log"
        with log.open("ab") as output:
            command = [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--dir", str(runtime.sockets)]
            agent = subprocess.Popen(command, env=runtime.environ, stdout=output, stderr=output)
        eventually((runtime.sockets / "ready").exists, "the agent")
        with launch.plain(1, train, str(store)) as job:
            job.wait_for("stepped", step=10)
            pestered = Pestered(runtime, job, store)
            with contextlib.suppress(OSError), (partition / "ballast").open("wb") as ballast:
                while True:
                    ballast.write(bytes(4096))
            eventually(lambda: log.stat().st_size % 4096 == 0, "the last page of the log to be full")
            pestered.saves_on()
            pestered.steps_on()
            (partition / "ballast").unlink()
            eventually(lambda: "lost or late: " in log.read_text(), "the log to say what it lacks")
            assert log.read_text().count("were lost or late") == 1
            job.go("end")
            (result,) = job.results()
        agent.terminate()
        assert agent.wait(20) == 0
        assert "Traceback" not in log.read_text()
    assert assert_intact(store)[0] == result["step"]


@pytest.mark.slow
def test_the_disk_of_what_it_keeps_is_full_under_a_job(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    """A rank dies and people give orders while neither incidents, nor nodes, nor orders can be taken down."""
    store = tmp_path / "run"
    options = ["--max-restarts", "3", "--rdzv-id", "gpt", "--no-preflight", "--no-standby"]

    def ordered(*arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "ckptsvc.cli.main", *arguments]
        said = subprocess.run(command, env=runtime.environ, capture_output=True, text=True, check=False, timeout=60)
        assert said.returncode == status, said.stderr
        return said.stdout + said.stderr

    with tmpfs(tmp_path / "state", "64k") as state:
        runtime.environ["XDG_STATE_HOME"], nodes = str(state), state / "ckptsvc" / "nodes.json"
        with launch.service(1, train, str(store), options=options) as job:
            job.wait_for("stepped", step=10)
            pestered = Pestered(runtime, job, store)
            pestered.saves_on()
            ordered("exclude", "n9", "--reason", "a fan")
            listed = eventually(lambda: nodes.exists() and nodes.read_text(), "the list of nodes")
            (state / "ckptsvc" / "audit.jsonl").unlink()  # its last page would have room
            with (state / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            job.kill()
            job.wait_for("stepped", attempt=2)
            assert "not in the audit log: [Errno 28] No space left on device" in ordered("pause", "gpt")
            ordered("resume", "gpt")
            excluded = ordered("exclude", "n8", status=4)
            assert "n8 is excluded, for as long as this coordinator lives: the list could not be written" in excluded
            pestered.saves_on()
            pestered.says_once("is not kept in", "No space left on device")
            pestered.says_once("the audit log", "cannot be written: [Errno 28] No space left on device")
            pestered.says_once("the list of nodes that have failed", "No space left on device")
            assert nodes.read_text() == listed
            (state / "ballast").unlink()
            assert "audit log" not in ordered("exclude", "n7")
            eventually(lambda: "n7" in nodes.read_text(), "the list to be written again")
            assert {"n8", "n9"} <= json.loads(nodes.read_text())["words"].keys()
            job.go("end")
            (result,) = job.results()
    assert result["saved"]
    assert assert_intact(store)[0] == result["step"]


def test_the_disk_of_its_sockets_and_of_its_incidents_is_full(runtime: Runtime, tmp_path: Path) -> None:
    """An agent that cannot start there says so in one line; once there is room, it starts."""
    with tmpfs(tmp_path / "run", "64k") as full:
        runtime.environ |= {"CKPTSVC_AGENT_INCIDENTS_DIR": str(full / "incidents")}
        directory = full / "agent"
        directory.mkdir(mode=0o700)
        with contextlib.suppress(OSError), (full / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        command = [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--dir", str(directory)]
        done = subprocess.run(command, env=runtime.environ, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert f"the agent in {directory} cannot go on: No space left on device" in done.stderr
        (full / "ballast").unlink()
        agent = runtime.start_agent("--linger", "60s", directory=directory)
        assert runtime.status(directory)["ranks"] == []
        agent.terminate()
        assert agent.wait(20) == 0


def test_a_scraper_that_never_sends_and_one_that_never_reads(pestered: Pestered) -> None:
    """They know the token, ask for large pages, and let them lie; others are answered, and the agent ends in time."""
    runtime = pestered.runtime
    address = runtime.status()["metrics"]
    token = (runtime.sockets / "http-token").read_text().strip()
    rest = f" HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\r\n"
    asked = ["", "GET /metr", *(f"GET {path}{rest}" for path in ("/", "/metrics", "/events"))]
    for number in range(40):
        sock = pestered.pests.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # the kernel takes little for whoever does not read
        sock.connect(endpoint(address))
        with contextlib.suppress(ConnectionError):
            sock.sendall(asked[number % 5].encode())
    eventually(lambda: len(unread(endpoint(address)[1])) >= 16, "pages that nobody reads")
    pestered.steps_on()
    pestered.saves_on()
    assert "ckptsvc_sessions 1" in runtime.metrics(address)
    assert runtime.status()["ranks"]
    assert len(unread(endpoint(address)[1])) >= 16, "they still lie there"


def unread(port: int) -> list[str]:
    """Connections of a port of this host whose other end has not taken all that was sent (proc(5), net/tcp)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[2] for row in rows if row[1].endswith(f":{port:04X}") and int(row[4].partition(":")[0], 16)]
