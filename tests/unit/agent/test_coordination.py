"""What agents and etcd tell each other, the files a login is made from, and a coordinator whose time is over."""

import asyncio
import os
import time
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest

from ckptsvc.agent.coordination.elections import holder_of, login_of, value_of
from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.launches import Launcher, Launches
from ckptsvc.agent.local import Local, way_to
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.effects import AllotEpoch, Decision, Send
from ckptsvc.control.election import Holder
from ckptsvc.control.health import Policy
from ckptsvc.control.membership import Job
from ckptsvc.control.redundancy import Protection, Rebuilding
from ckptsvc.control.save import Saves
from ckptsvc.errors import AgentUnavailable, ConfigError, CoordinationUnavailable
from ckptsvc.rpc.etcd import Found, check_reachable, parse_url
from ckptsvc.rpc.trust import BySecret
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import EtcdSettings

NEAR, FAR = parse_url("etcd://127.0.0.1:1"), parse_url("etcd://10.0.0.1:1")
KEY, SECRET = "/ckptsvc/coordinators/0/job", "secret"
TRUST = BySecret(SECRET)


def found(value, lease=9):
    return Found(revision=50, value=value, created=7, lease=lease)


# ---- the key


def test_a_value_is_read_as_it_was_written():
    value = value_of(KEY, "n1", "127.0.0.1:4000", "mark", 9, TRUST)
    assert holder_of(KEY, found(value), TRUST) == Holder(7, "n1", "127.0.0.1:4000", "mark", 9)
    assert holder_of(KEY, Found(revision=50), TRUST) is None
    assert SECRET.encode() not in value


@pytest.mark.parametrize("value", [b"", b"\xff", b"[]", b"{}", b'{"node":1}', b"{" * 9999, b'"' + b"x" * 9999])
def test_nonsense_is_refused(value):
    with pytest.raises(CoordinationUnavailable, match="does not name a coordinator"):
        holder_of(KEY, found(value), TRUST)


def test_only_who_knows_the_secret_can_send_agents_somewhere():
    value = value_of(KEY, "n1", "127.0.0.1:4000", "mark", 9, TRUST)
    elsewhere = msgspec.json.encode(msgspec.json.decode(value) | {"address": "127.0.0.1:666"})
    stale = found(value, lease=10)
    other_job = f"{KEY}2"
    for key, what, trust in ((KEY, found(elsewhere), TRUST), (KEY, stale, TRUST), (other_job, found(value), TRUST),
            (KEY, found(value), BySecret("other"))):  # fmt: skip
        with pytest.raises(CoordinationUnavailable, match="not written by an agent of ours"):
            holder_of(key, what, trust)


def test_an_address_that_is_not_loopback_is_refused():
    value = value_of(KEY, "n1", "10.0.0.1:4000", "mark", 9, TRUST)
    with pytest.raises(CoordinationUnavailable, match="not loopback"):
        holder_of(KEY, found(value), TRUST)


def test_ranks_and_their_launcher_take_part_in_one_election():
    way = way_to("etcd://b:2,a:1/x/", "run@1234abcd")
    assert way == way_to("etcd://a:1,b:2/x", "run") == "etcd://a:1,b:2/x#run"
    assert way_to("10.0.0.1:7", "run") == "10.0.0.1:7"
    assert way_to("", "run") == ""


# ---- logins


@pytest.fixture
def password(tmp_path):
    path = tmp_path / "password"
    path.write_text("top secret\n")
    path.chmod(0o600)
    return path


def test_the_password_is_read_from_a_private_file(password):
    login = login_of(NEAR, EtcdSettings(user="me", password_file=str(password)))
    assert (login.user, login.password, login.tls) == ("me", "top secret", None)
    password.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {password}"):
        login_of(NEAR, EtcdSettings(user="me", password_file=str(password)))


def test_a_password_does_not_go_over_the_network_in_the_clear(password):
    with pytest.raises(ConfigError, match=r"set etcd\.ca_file"):
        login_of(FAR, EtcdSettings(user="me", password_file=str(password)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"user": "me"}, "go together"),
        ({"password_file": "/p"}, "go together"),
        ({"cert_file": "/c"}, "needs etcd.key_file"),
        ({"cert_file": "/c", "key_file": "/k"}, "needs etcd.key_file and etcd.ca_file"),
        ({"ca_file": "/nowhere"}, "etcd.ca_file: /nowhere: No such file"),
        ({"ca_file": "/"}, "etcd.ca_file: /: Is a directory"),
    ],
)
def test_what_is_missing_is_said(settings, words):
    with pytest.raises(ConfigError, match=words):
        login_of(NEAR, EtcdSettings(**settings))


def test_tls_both_ways(etcd):
    """With both certificates in, with none or only one not; and never without encryption."""
    etcd.want_certificates()
    url = parse_url(etcd.url)
    ca, cert, key = (str(etcd.folder / name) for name in ("ca.crt", "client.crt", "client.key"))

    def attempt(settings):
        deadline = time.monotonic() + 20
        while True:
            try:
                return asyncio.run(check_reachable(url, login_of(url, settings)))
            except CoordinationUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    attempt(EtcdSettings(ca_file=ca, cert_file=cert, key_file=key))
    for settings in (EtcdSettings(ca_file=ca), EtcdSettings(), EtcdSettings(ca_file=cert)):
        with pytest.raises(CoordinationUnavailable):
            asyncio.run(check_reachable(url, login_of(url, settings)))
    os.chmod(key, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        login_of(url, EtcdSettings(ca_file=ca, cert_file=cert, key_file=key))


# ---- what a new coordinator hears


def test_a_stop_asked_for_while_nobody_coordinated_is_the_last_thing_a_new_coordinator_hears():
    """After the ranks: a job that nobody knows yet cannot be stopped."""
    local = Local("n1", SimpleNamespace(arenas={}), None, None, BySecret(""))
    launches, stop = Launches(local), pb.Report(stop_requested=pb.StopRequested(job="run", reason="SIGTERM"))
    launches._by_job["run"] = Launcher(agent_pb2.LauncherHello(job="run"), "way", stop=stop)
    launches._by_job["other"] = Launcher(agent_pb2.LauncherHello(job="other"), "another way", stop=stop)
    session = SimpleNamespace(reg=SimpleNamespace(job="run@1", attempt=1), announced=None)
    local.jobs["run@1"] = LocalJob("run@1", "way", "store")
    local.sessions["token"] = session
    session.reg = Registration(op="register", job="run@1", store="store", attempt=1, rank=0, world_size=1)
    kinds = [report.WhichOneof("event") for report in local.resync("way")]
    assert kinds == ["node_joined", "rank_joined", "stop_requested"]


@pytest.mark.parametrize(("greeted", "connected"), [(False, False), (False, True), (True, False)])
def test_it_hears_whether_another_may_have_heard_of_a_launcher(greeted, connected):
    """By this agent, or by one that the launcher knew before."""
    local = Local("n1", SimpleNamespace(arenas={}), None, None, BySecret(""))
    launches, hello = Launches(local), agent_pb2.LauncherHello(job="run", again=greeted)
    launcher = launches._by_job["run"] = Launcher(hello, "way", told=hello.again)
    told = []
    launches._introduce(launcher, SimpleNamespace(is_connected=connected, report=told.append))
    for _ in range(2):
        told += local.resync("way")
    assert [report.node_joined.again for report in told] == [greeted, greeted or connected, True]


# ---- the shell of an elected coordinator


def test_every_order_carries_the_term():
    async def story():
        shell, orders = CoordinatorShell(Workers(), 10.0, Policy(), term=7), []
        shell.attend("n1", orders.append)
        shell._execute(Decision([Send("n1", pb.Order(job="job"))]))
        return orders

    assert [order.term for order in asyncio.run(story())] == [7]


def test_nothing_is_done_once_the_lease_may_have_ended_even_what_was_decided_before():
    async def story():
        alive, asked = [True], []
        workers = Workers()
        workers.of = lambda job: asked.append(job)  # it would fail, and that would be seen
        shell, orders = CoordinatorShell(workers, 10.0, Policy(), term=7, may_act=lambda: alive[0]), []
        shell.attend("n1", orders.append)
        shell._execute(Decision([AllotEpoch("job", 1, 0, "store")]))  # begins at the loop's next turn
        alive[0] = False
        shell._execute(Decision([Send("n1", pb.Order(job="job")), AllotEpoch("job", 1, 0, "store")]))
        await asyncio.sleep(0.05)
        await shell.stop()
        return orders, asked, shell.dropped

    assert asyncio.run(story()) == ([None], [], 3)  # None: there will be no more


def test_who_waits_for_a_rebuild_hears_that_the_coordinator_has_stepped_down():
    async def ask():
        shell = CoordinatorShell(Workers(), 10.0, Policy(), term=7)
        shell.core.jobs["job"] = Job("job", "", Saves("job", 10.0))
        shell.core.redundancy.jobs["job"] = Protection(
            rebuilding={(1, 10): Rebuilding(0.0, Counter(n1=1), frozenset())}
        )
        ranks = [asyncio.ensure_future(shell.list_complete("job")) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(rank.done() for rank in ranks)
        await shell.stop()
        for rank in ranks:
            with pytest.raises(AgentUnavailable, match="not coordinated here any more"):
                await asyncio.wait_for(rank, 10.0)

    asyncio.run(ask())
