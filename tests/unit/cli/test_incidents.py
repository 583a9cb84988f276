"""`ckptsvc incidents`: what is kept, as a person and as a program sees it."""

import json
from pathlib import Path

import pytest
from harness.stored import cli

from ckptsvc.agent.incidents import IncidentLog, plain
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def write(directory: Path, number: int = 1, **changes: object) -> tuple[str, pb.Incident]:
    """Keep an incident; returns what people call it."""
    rank = pb.RankEvidence(
        rank=3, step=7, state="T", enqueued=-1, stack="a.py:1 f\nb.py:2 g", log_tail="\x1b[31mlast words",
        notes=["py-spy is not installed on this node"],
    )  # fmt: skip
    fields = {
        "id": f"1-{number}", "job": "gpt", "attempt": 1, "kind": "hung", "opened": f"2026-11-21T14:03:{number:02}Z",
        "sentence": "Rank 3 on node n1 is to blame: it is stopped (95 % sure).", "rank": 3, "node": "n1",
        "confidence": 0.95, "step": 7, "detected": 4.2, "actions": ["+0.1 s SIGKILL to rank 3"], "ranks": [rank],
    }  # fmt: skip
    incident = pb.Incident(**fields | changes)
    return IncidentLog(directory).write(incident).stem.partition("-")[2], incident


def test_the_list_is_newest_first(tmp_path: Path) -> None:
    first, _ = write(tmp_path / "i")
    second, _ = write(tmp_path / "i", 2, sentence="", kind="node-lost", job="bert")
    status, out, err = cli("incidents", "--dir", tmp_path / "i")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{second}  ")
    assert lines[0].endswith("ago  node-lost  job bert, attempt 1")
    assert lines[1:2] + lines[3:] == [
        "    Nobody could be named.", "    Rank 3 on node n1 is to blame: it is stopped (95 % sure).",
    ]  # fmt: skip
    assert lines[2].startswith(f"{first}  ")


def test_one_opens_with_the_sentence(tmp_path: Path) -> None:
    key, _ = write(tmp_path / "i")
    status, out, err = cli("incidents", key, "--dir", tmp_path / "i")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "Rank 3 on node n1 is to blame: it is stopped (95 % sure).",
        "",
        f"incident {key}",
        "job gpt, attempt 1, step 7",
        "kind hung",
        "to blame rank 3",
        "node n1",
        "sure to 95 %",
        "opened 2026-11-21 14:03:01 UTC",
        "known after 4.2 s from the last sign of life",
        "",
        "what was done",
        "- +0.1 s SIGKILL to rank 3",
        "",
        "what the ranks were doing",
        "RANKS STEP PHASE QUIET FOR STATE CPU COLLECTIVES ANSWERS WAITS IN",
        "3 7 - 0.0 s stopped 0 % - no -",
        "",
        "where they were",
        "rank 3 (to blame)",
        "a.py:1 f",
        "b.py:2 g",
        "",
        "the last output of rank 3",
        "last words",
        "",
        "remarks, and what could not be found out",
        "- rank 3: py-spy is not installed on this node",
    ]
    for name in ("last", "1-1"):
        assert cli("incidents", name, "--dir", tmp_path / "i").out == out


def test_json(tmp_path: Path) -> None:
    key, incident = write(tmp_path)
    (name,) = (path.stem for path in tmp_path.glob("*.json"))
    summary = {"id": key, "name": name, "job": "gpt", "attempt": 1, "kind": "hung", "opened": incident.opened,
        "sentence": incident.sentence, "rank": 3, "node": "n1", "confidence": 0.95, "step": 7}  # fmt: skip
    assert json.loads(cli("incidents", "--dir", tmp_path, "--json").out) == {
        "directory": str(tmp_path), "incidents": [summary], "unusable": [],
    }  # fmt: skip
    assert json.loads(cli("incidents", "last", "--dir", tmp_path, "--json").out) == {
        "name": name, "incident": plain(incident),
    }  # fmt: skip


def test_a_page(tmp_path: Path) -> None:
    key, _ = write(tmp_path / "i")
    target = tmp_path / "report.html"
    status, out, err = cli("incidents", "last", "--dir", tmp_path / "i", "--html", target)
    assert (status, out, err) == (0, "", f"wrote {target}\n")
    assert f"<dd>{key}</dd>" in target.read_text()
    assert "Rank 3 on node n1" in cli("incidents", "last", "--dir", tmp_path / "i", "--html", target, "--json").out


def test_the_default_directory_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "STATE_DIRECTORY", "CKPTSVC_AGENT_INCIDENTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, err = cli("incidents")
    assert (status, out, err) == (0, "", f"no incidents in {tmp_path}/.local/state/ckptsvc/incidents\n")
    write(tmp_path / ".local/state/ckptsvc/incidents")
    assert "Rank 3 on node n1" in cli("incidents").out
    monkeypatch.setenv("CKPTSVC_AGENT_INCIDENTS_DIR", str(tmp_path / "other"))
    assert cli("incidents").out == ""


def test_damaged_files_are_told_and_hide_no_others(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, 2)
    damaged = sorted(tmp_path.glob("*.json"))[1]
    damaged.write_text("{")
    status, out, err = cli("incidents", "--dir", tmp_path)
    assert (status, out.count("Rank 3")) == (3, 1)
    assert err == f"{damaged}: this is no incident: JSONDecodeError\n"
    found = json.loads(cli("incidents", "--dir", tmp_path, "--json").out)
    assert [each["code"] for each in found["unusable"]] == ["damaged"]
    assert cli("incidents", "last", "--dir", tmp_path).status == 12


def test_what_is_asked_for_in_vain(tmp_path: Path) -> None:
    write(tmp_path / "i")
    for arguments, expected, words in (
        (["9-9"], 10, "no incident '9-9'"),
        (["--html", tmp_path / "x.html"], 2, "which incident"),
        (["last", "--html", tmp_path / "no" / "x.html"], 2, "No such file"),
    ):
        status, out, err = cli("incidents", *arguments, "--dir", tmp_path / "i")
        assert (status, out) == (expected, "")
        assert words in err
        assert "Traceback" not in err


def test_a_directory_that_is_not_there_is_no_directory_without_incidents(tmp_path: Path) -> None:
    status, _, err = cli("incidents", "--dir", tmp_path / "nope")
    assert (status, f"there is no directory {tmp_path / 'nope'}" in err) == (10, True)
    (tmp_path / "empty").mkdir()
    status, _, err = cli("incidents", "--dir", tmp_path / "empty")
    assert (status, "no incidents in" in err) == (0, True)
