"""Who may give orders to an agent, by what it is known who he is, and what is taken down of it."""

import asyncio
import grp
import json
import os
import pwd
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from ckptsvc.agent.orders import callers
from ckptsvc.agent.orders.callers import Callers
from ckptsvc.errors import CkptsvcError, InvalidInput, NodeUnfit, NotFound, StoreDenied
from ckptsvc.rpc.accounts import account_of, is_listed
from ckptsvc.rpc.channel import FOR_KEY, TOKEN_KEY, error_of
from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.rpc.proof import CHALLENGE
from ckptsvc.rpc.roles import ROLES, VERBS, Role
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2

STRANGER = 54321
"""A user id that nobody has."""


def test_every_method_of_every_service_is_for_a_declared_role_and_no_other_is_in_the_table():
    files = agent_pb2, coordinator_pb2, health_pb2, reflection_pb2
    services = [s for file in files for s in file.DESCRIPTOR.services_by_name.values()]
    assert len(services) == 4
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    methods |= {CHALLENGE}  # it has no messages, and is in no descriptor
    newer = {"/grpc.health.v1.Health/List"}  # which older releases of grpcio-health-checking have not
    assert methods - ROLES.keys() == set()
    assert ROLES.keys() - methods <= newer
    assert methods >= VERBS
    assert all(ROLES[method] is Role.OPERATOR for method in VERBS)


def test_ranks_and_launchers_are_the_owners_alone():
    for name in ("Prepare", "Submit", "Acquire", "Leave", "Launch", "ListSnapshots"):
        assert ROLES[f"/ckptsvc.rpc.v1.AgentService/{name}"] is Role.USER


# ---- tokens


def test_the_owner_has_every_role_and_root_gives_orders_only():
    callers = Callers()
    own = callers.of([(TOKEN_KEY, asyncio.run(callers.admit(os.geteuid(), 1)))])
    assert own is not None
    assert own.roles == frozenset(Role)
    with pytest.raises(StoreDenied, match="serves user"):
        asyncio.run(callers.admit(STRANGER, 1))


def test_operators_are_named_or_are_in_a_group():
    nobody = pwd.getpwnam("nobody")
    group = grp.getgrgid(nobody.pw_gid).gr_name

    def is_operator(uid, operators):
        return is_listed(account_of(uid), operators)

    assert is_operator(nobody.pw_uid, ["nobody"])
    assert is_operator(nobody.pw_uid, [f"@{group}"])
    assert not is_operator(nobody.pw_uid, ["@no-such-group", "somebody", group + "x"])
    assert not is_operator(STRANGER, ["nobody", f"@{group}"])
    assert not is_operator(nobody.pw_uid, [])


def test_a_token_is_good_while_its_connection_lasts():
    callers = Callers()
    token = asyncio.run(callers.admit(os.geteuid(), 1))
    callers.dismiss(token)
    assert callers.of([(TOKEN_KEY, token)]) is None
    assert callers.of([]) is None


def test_accounts_that_do_not_answer_hold_up_neither_the_agent_nor_its_owner(monkeypatch):
    answering = threading.Event()
    monkeypatch.setattr(callers, "user_name", lambda uid: answering.wait(60) and "never")
    monkeypatch.setattr(callers, "LOOK_UP", 0.05)

    async def story():
        own = Callers(["@operators"])
        asked = asyncio.ensure_future(own.admit(os.geteuid(), 1))
        await asyncio.sleep(0)
        assert not asked.done()  # and the loop goes on
        caller = own.of([(TOKEN_KEY, await asked)])
        assert (caller.name, caller.roles) == (str(os.geteuid()), frozenset(Role))
        with pytest.raises(StoreDenied, match=f"not {STRANGER}"):
            await own.admit(STRANGER, 1)

    try:
        asyncio.run(story())
    finally:
        answering.set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root passes orders on")
def test_root_passes_an_order_on_for_somebody():
    callers = Callers()
    token = asyncio.run(callers.admit(0, 1))
    claim = json.dumps({"uid": 1000, "name": "ada"})
    caller = callers.of([(TOKEN_KEY, token), (FOR_KEY, claim)])
    assert caller is not None
    assert (caller.uid, caller.name, caller.via) == (1000, "ada", "root")
    assert callers.of([(TOKEN_KEY, token), (FOR_KEY, "{")]) is None


# ---- a real agent


def call(agent, method, request, token=None, metadata=()):
    stub = agent_pb2_grpc.AgentServiceStub(agent.channel)
    said = (*metadata, *(((TOKEN_KEY, token),) if token else ()))
    try:
        return getattr(stub, method)(request, timeout=10.0, metadata=said)
    except grpc.RpcError as failure:
        raise error_of(failure) from None


def audit_of(runtime):
    path = Path(runtime.environ["HOME"], ".local/state/ckptsvc/audit.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def me(agent):
    identity = IdentityClient(agent.identity_path)
    yield identity.call({"op": "caller"})[0]["token"]
    identity.close()


@pytest.fixture
def agent(start):
    return start()


def test_orders_want_to_know_who_gives_them(agent, me, runtime):
    with pytest.raises(StoreDenied, match="needs to know who calls"):
        call(agent, "Pause", agent_pb2.VerbRequest(job="job"))
    with pytest.raises(StoreDenied, match="needs to know who calls"):
        call(agent, "Drain", agent_pb2.VerbRequest(), "0" * 32)
    rank = agent.register()
    with pytest.raises(StoreDenied, match="needs to know who calls"):
        call(agent, "Pause", agent_pb2.VerbRequest(), rank.token)
    with pytest.raises(NotFound, match="knows no job"):
        call(agent, "Pause", agent_pb2.VerbRequest(job="other"), me)
    status = call(agent, "GetStatus", agent_pb2.GetStatusRequest())  # as it always was
    assert json.loads(status.json)["jobs"] == ["job"]
    lines = [(line["verb"], line["user"], line["outcome"]) for line in audit_of(runtime)]
    assert lines.count(("pause", "unknown", "refused")) == 2
    assert ("drain", "unknown", "refused") in lines
    assert lines[-1] == ("pause", pwd.getpwuid(os.geteuid()).pw_name, "failed")


def test_who_gives_an_order_is_told_that_it_cannot_be_taken_down(agent, me, runtime):
    Path(runtime.environ["HOME"], ".local/state/ckptsvc/audit.jsonl").mkdir(parents=True)
    drained = call(agent, "Drain", agent_pb2.VerbRequest(no_wait=True), me)
    assert drained.what[-1].startswith("this is not in the audit log: ")
    assert runtime.log().count("the audit log") == 1


def test_a_method_without_a_role_is_for_nobody(agent):
    with pytest.raises(grpc.RpcError) as refused:
        agent.channel.unary_unary("/ckptsvc.rpc.v1.AgentService/Shutdown")(b"", timeout=10)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_what_makes_no_sense_is_refused(agent, me):
    agent.register()
    for request, why in (
        (agent_pb2.VerbRequest(job="job", reason="x" * 301), "a reason"),
        (agent_pb2.VerbRequest(job="j" * 300), "a job's name"),
        (agent_pb2.VerbRequest(job="job", seconds=-1.0), "a time"),
        (agent_pb2.VerbRequest(job="job", seconds=float("nan")), "a time"),
        (agent_pb2.VerbRequest(node="../etc"), "not the name of a node"),
    ):
        with pytest.raises(InvalidInput, match=why):
            call(agent, "Pause", request, me)
    for message in ({"op": "caller", "uid": 0}, {"op": "caller", "name": "root"}):
        identity = IdentityClient(agent.identity_path)
        with pytest.raises(CkptsvcError, match="malformed"):
            identity.call(message)
        identity.close()


def test_a_drained_node_takes_no_new_jobs_until_it_is_undrained_even_through_a_restart(agent, me, start, runtime):
    rank = agent.register()
    drained = call(agent, "Drain", agent_pb2.VerbRequest(reason="a fan", no_wait=True), me)
    assert not drained.done
    with pytest.raises(NodeUnfit, match="takes no new jobs: drained by"):
        agent.register(job="another")
    again = agent.register(rank=0)  # of the job that runs here
    again.close()
    rank.identity.close()
    agent.process.kill()
    agent.process.wait()
    agent = start()
    with pytest.raises(NodeUnfit, match="takes no new jobs"):
        agent.register(job="another")
    identity = IdentityClient(agent.identity_path)
    token = identity.call({"op": "caller"})[0]["token"]
    assert call(agent, "Undrain", agent_pb2.VerbRequest(), token).done
    agent.register(job="another")
    identity.close()
    assert [(line["verb"], line["outcome"]) for line in audit_of(runtime)] == [("drain", "begun"), ("undrain", "done")]


def test_a_node_whose_agent_no_coordinator_hears_is_not_drained(agent, me, runtime):
    agent.register()
    with pytest.raises(NotFound, match="no agent of node n9 is connected"):
        call(agent, "Drain", agent_pb2.VerbRequest(node="n9"), me)
    assert [(line["verb"], line["outcome"]) for line in audit_of(runtime)] == [("drain", "failed")]


AS_ANOTHER = """
import json, os, sys, grpc
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc
identity_path, grpc_path, uid, gid = sys.argv[1:]
os.setgroups([]), os.setgid(int(gid)), os.setuid(int(uid))  # all that only root can read has been read
answers = {}
identity = IdentityClient(identity_path)
try:
    token = identity.call({"op": "caller"})[0]["token"]
    answers["token"] = "given"
except CkptsvcError as error:
    answers["token"], token = error.code, ""
with grpc.insecure_channel(f"unix:{grpc_path}", options=OPTIONS) as channel:
    stub = agent_pb2_grpc.AgentServiceStub(channel)
    calls = {"Include": agent_pb2.VerbRequest(node="n9"), "Leave": agent_pb2.LeaveRequest(),
             "Prepare": agent_pb2.PrepareRequest()}
    for name, request in calls.items():
        try:
            getattr(stub, name)(request, timeout=10, metadata=(("ckptsvc-token", token),))
            answers[name] = "done"
        except grpc.RpcError as failure:
            answers[name] = error_of(failure).code
print(json.dumps(answers))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's id")
@pytest.mark.parametrize("operators", ["", "nobody"])
def test_another_user_gives_no_orders_unless_he_operates_the_machine(start, runtime, operators):
    nobody = pwd.getpwnam("nobody")
    runtime.environ["CKPTSVC_SYSTEM_OPERATORS"] = operators
    agent = start()
    rank = agent.register()
    paths = sockets(agent.directory)
    for folder in (runtime.root, runtime.sockets, agent.directory):  # as if its owner had made a mistake
        folder.chmod(0o711)
    for path in paths:
        os.chmod(path, 0o666)
    command = [sys.executable, "-c", AS_ANOTHER, paths[1], paths[0], str(nobody.pw_uid), str(nobody.pw_gid)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answers = json.loads(ended.stdout)
    if operators:
        assert answers == {"token": "given", "Include": "done", "Leave": "store-denied", "Prepare": "store-denied"}
    else:
        assert answers == {
            "token": "store-denied", "Include": "store-denied", "Leave": "agent-unavailable",
            "Prepare": "agent-unavailable",
        }  # fmt: skip
    lines = [(line["verb"], line["user"], line["outcome"]) for line in audit_of(runtime)]
    if operators:
        assert ("include", "nobody", "done") in lines
        assert ("leave", "nobody", "refused") in lines
    else:
        assert ("call", "nobody", "refused") in lines
    assert rank.call("Leave", agent_pb2.LeaveRequest()) is not None
