"""Which agent an order goes to, what is said of it, and what the audit log shows."""

import json
import time
from pathlib import Path

import pytest
from harness.stored import cli

from ckptsvc.agent.orders.audit import AuditLog, Entry
from ckptsvc.cli import orders
from ckptsvc.cli.agents import Answer
from ckptsvc.cli.orders import PARTLY_DONE, of_job, of_node, tell
from ckptsvc.errors import EXIT_STATUS, InvalidInput, NotFound
from ckptsvc.rpc.v1.agent_pb2 import VerbRequest, VerbResponse


def agent(node, *jobs):
    return Answer(Path(f"/run/{node}"), {"node": node, "jobs": list(jobs)})


AGENTS = [agent("n0", "gpt", "bert"), agent("n1", "gpt")]


def test_a_job_is_found_by_either_of_its_names():
    assert of_job(AGENTS, "gpt") == (AGENTS[0], "gpt")
    assert of_job(AGENTS, "bert@12ab") == (AGENTS[0], "bert@12ab")
    assert of_job([agent("n0"), agent("n1", "gpt")], None) == (agent("n1", "gpt"), "gpt")


def test_which_job_is_asked_where_there_are_several():
    with pytest.raises(InvalidInput, match="which job") as error:
        of_job(AGENTS, None)
    assert error.value.hint == "there are: bert, gpt"
    with pytest.raises(NotFound, match="no agent of this node has a job 'x'"):
        of_job(AGENTS, "x")
    with pytest.raises(NotFound, match="no agent of this node has a job"):
        of_job([agent("n0")], None)


def test_a_job_that_several_users_say_they_have_is_not_guessed():
    ours, theirs = agent("n0", "gpt")._replace(user="ada", uid=7), agent("n0", "gpt")._replace(user="bob\x1b", uid=8)
    for job in (None, "gpt", "gpt@12ab"):
        with pytest.raises(
            InvalidInput, match=r"several users say that they have a job 'gpt.*': ada, bob\\x1b"
        ) as error:
            of_job([theirs, ours], job)
        assert error.value.hint == "--user says whose is meant"
    assert of_job([theirs], "gpt") == (theirs, "gpt")


def test_where_an_agent_of_a_user_says_it_is_does_not_lead_orders_astray():
    honest, liar = agent("n0")._replace(user="ada", uid=7), agent("n9")._replace(user="bob", uid=8)
    silent = Answer(Path("/run/c"), None, NotFound("gone"), "eve", 9)
    for node in (None, "n0", "n9", "n1"):
        assert of_node([honest, liar, silent], node, None) == [honest, liar]


def test_a_node_is_ordered_about_through_its_own_agents_or_any():
    assert of_node(AGENTS, "n1", None) == [AGENTS[1]]
    assert of_node(AGENTS, "elsewhere", None) == AGENTS
    assert of_node(AGENTS, "elsewhere", "bert") == [AGENTS[0]]
    assert of_node(AGENTS[:1], None, None) == AGENTS[:1]
    with pytest.raises(InvalidInput, match="which node"):
        of_node(AGENTS, None, None)


@pytest.fixture
def asked(monkeypatch):
    """Agents n0, whose coordinator knows n0 and n1, and n2; lists who is asked for what."""
    found = []

    def give(answer, method, request, timeout):
        found.append((answer.status["node"], request.node))
        if answer.status["node"] == "n2" and request.node != "n2":
            raise NotFound("no agent of that node is connected with this coordinator")
        return VerbResponse(done=request.node != "n9", left=["so"] if request.node == "n9" else [])

    monkeypatch.setattr(orders, "give", give)
    monkeypatch.setattr(orders, "_agents", lambda directory: [agent("n2"), agent("n0", "gpt")])
    return found


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["n0"], 0, "n0 may be switched off\n"),
        (["n1"], 0, "before n1 is switched off: `ckptsvc drain` there, which asks for all its jobs\n"),
        (["n0", "--job", "gpt"], 0, "before n0 is switched off: `ckptsvc drain` there, which asks for all its jobs\n"),
        (["n9"], PARTLY_DONE, "not done: so\nn9 may not be switched off yet\n"),
    ],
)
def test_a_node_may_be_switched_off_once_its_own_agents_have_asked_for_all_its_jobs(asked, arguments, status, said):
    assert cli("drain", *arguments) == (status, "", said)


def test_a_node_that_nobody_knows_is_an_error(asked, monkeypatch):
    monkeypatch.setattr(orders, "_agents", lambda directory: [agent("n2")])
    status, _, said = cli("drain", "n7")
    assert status == EXIT_STATUS[NotFound.code]
    assert "no agent of that node is connected" in said
    assert "switched off" not in said


def test_what_is_left_is_said_and_shows_in_the_exit_status(capsys):
    done = VerbResponse(done=True, what=["step 7 is committed"], step=7, bytes=3 << 20, seconds=0.5)
    assert tell("Checkpoint", VerbRequest(job="gpt"), [done], as_json=False) == 0
    assert capsys.readouterr().err.splitlines() == ["step 7 is committed", "3.0 MiB in 0.5 s"]
    some = VerbResponse(what=["one"], left=["another \x1b[2J"])
    assert tell("Drain", VerbRequest(node="n1"), [done, some], as_json=False) == PARTLY_DONE
    assert "not done: another \\x1b[2J" in capsys.readouterr().err
    assert tell("Drain", VerbRequest(node="n1"), [done, some], as_json=True) == PARTLY_DONE
    said = json.loads(capsys.readouterr().out)
    assert (said["done"], said["what"], said["left"]) == (False, ["step 7 is committed", "one"], ["another \x1b[2J"])


def test_errors_say_nothing_to_the_terminal(tmp_path):
    status, _, err = cli("audit", "--file", tmp_path / "\x1b]0;owned\x07")
    assert (status, "\x1b" in err, "\\x1b]0;owned\\x07" in err) == (10, False, True)


@pytest.fixture
def log(tmp_path):
    found = AuditLog(tmp_path / "audit.jsonl")
    for days, verb, outcome in ((9, "pause", "done"), (2, "drain", "failed"), (0, "resume", "refused")):
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86400 - 60))
        found.append(
            Entry(
                time=when, verb=verb, job="gpt", uid=7, by="ada", node="n0", asked_on="n3", outcome=outcome, what="so"
            )
        )
    return found.path


def test_the_audit_log_from_a_time_on(log):
    def verbs(*arguments):
        status, out, _ = cli("audit", "--file", log, "--json", *arguments)
        assert status == 0
        return [entry["verb"] for entry in json.loads(out)["entries"]]

    assert verbs() == ["pause", "drain", "resume"]
    assert verbs("--since", "3d") == ["drain", "resume"]
    assert verbs("--since", "1h") == ["resume"]
    assert verbs("--since", time.strftime("%Y-%m-%d", time.localtime(time.time() - 86400))) == ["resume"]
    assert verbs("--verb", "pause") == ["pause"]
    status, _, err = cli("audit", "--file", log, "--since", "whenever")
    assert (status, "neither a time span nor a date" in err) == (2, True)


def test_the_audit_log_for_people(log):
    with log.open("a") as file:
        file.write("nonsense\n")
    status, out, err = cli("audit", "--file", log)
    assert status == 3
    assert "lines that are not understood: 1" in err
    assert "n0 (asked on n3)" in out
    assert cli("audit", "--file", log.parent / "none")[0] == 10


def test_commands_that_need_no_agent_are_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path / "run"))
    assert cli("exclude", "n7", "--reason", "a fan")[0] == 0
    assert "excluded" in cli("nodes")[1]
    assert cli("include", "n7")[0] == 0
    _, out, _ = cli("audit", "--json")
    entries = json.loads(out)["entries"]
    assert [(e["verb"], e["target"], e["outcome"]) for e in entries] == [
        ("exclude", "n7", "done"),
        ("include", "n7", "done"),
    ]
    (tmp_path / "ckptsvc" / "audit.jsonl").chmod(0o644)
    status, _, err = cli("exclude", "n7")
    assert (status, "not in the audit log" in err) == (0, True)
