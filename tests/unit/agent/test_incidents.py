"""Incidents that are kept: files that others may have damaged, and a directory that must not grow."""

import asyncio
import json
import os
import random
import stat
import time
from pathlib import Path

import pytest

from ckptsvc.agent import incidents as module
from ckptsvc.agent.incidents import IncidentLog, incidents_directory, moment, name_of, plain
from ckptsvc.config import load
from ckptsvc.errors import CkptsvcError, ConfigError, Damaged, IncompatibleVersion, InvalidInput, NotFound
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import Settings

NAMED = b'{"format": "ckptsvc-incident/1", "incident": {"id": "1-2", "opened": "2026-01-01"'
"""The beginning of a file that is one."""


def incident(number: int = 1, *, second: int = 0, **changes: object) -> pb.Incident:
    fields = {
        "id": f"1-{number}", "job": "gpt", "attempt": 1, "kind": "hung", "opened": f"2026-11-21T14:03:{second:02}Z",
        "sentence": "Rank 1 on node n1 is to blame.", "rank": 1, "node": "n1", "confidence": 0.5, "detected": 3.5,
    }  # fmt: skip
    return pb.Incident(**fields | changes)


def rich() -> pb.Incident:
    """One with something in every field."""
    rank = pb.RankEvidence(
        rank=1, pid=7, phase="step", step=1 << 40, stalled=4.5, state="S", cpu=0.25, waits_in="futex", answers=True,
        enqueued=6, completed=-1, collective="all_reduce", stack="a\nb", native_stack="c", log_tail="naïve \U0001f600",
        notes=["n"], threads=3, resident=1 << 50, groups=[pb.GroupProgress(group="g", enqueued=1, completed=-1)],
        other_stacks="d",
    )  # fmt: skip
    return incident(signals=["s"], actions=["a", "b"], nics=["n"], step=12, notes=["x"], ranks=[rank, rank])


@pytest.fixture
def kept(tmp_path: Path) -> IncidentLog:
    return IncidentLog(tmp_path / "state" / "incidents")


def test_what_is_read_is_what_was_written(kept: IncidentLog) -> None:
    path = kept.write(rich())
    (found,) = kept.newest_first()
    assert found.incident == rich()
    assert found.name == path.stem == name_of(rich())
    assert found.key == f"{name_of(rich()).split('-')[1]}-1-1"
    fields = {field.name for field in pb.Incident.DESCRIPTOR.fields}
    document = json.loads(path.read_bytes())
    assert document == {"format": "ckptsvc-incident/1", "incident": plain(rich())}
    assert set(document["incident"]) == fields
    assert document["incident"]["ranks"][0]["step"] == 1 << 40  # a number, not text


def test_it_is_for_its_user_only(kept: IncidentLog) -> None:
    path = kept.write(rich())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    kept.directory.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users") as refused:
        kept.write(rich())
    assert "agent.incidents_dir" in refused.value.hint


def test_an_incident_that_goes_on_replaces_its_file(kept: IncidentLog) -> None:
    kept.write(incident(actions=["found"]))
    kept.write(incident(actions=["found", "killed"]))
    (found,) = kept.newest_first()
    assert isinstance(found.incident, pb.Incident)
    assert list(found.incident.actions) == ["found", "killed"]
    assert len(os.listdir(kept.directory)) == 1


def test_newest_first_and_found_by_the_end_of_the_name(kept: IncidentLog) -> None:
    for number, second in ((1, 5), (2, 40), (3, 20)):
        kept.write(incident(number, second=second))
    kept.write(incident(1, second=50, job="other"))
    keys = [each.key for each in kept.newest_first()]
    assert [key[7:] for key in keys] == ["1-1", "1-2", "1-3", "1-1"]
    assert kept.find("last").key == keys[0]
    assert kept.find("1-3").key == kept.find(keys[2]).key == keys[2]
    assert kept.find(kept.find("1-2").name).key == keys[1]
    with pytest.raises(InvalidInput, match="2 incidents are called 1-1"):
        kept.find("1-1")
    for nobody in ("1-4", "", "../1-3", "*"):
        with pytest.raises(NotFound):
            kept.find(nobody)


def test_where_none_was_ever_kept_there_are_none(kept: IncidentLog) -> None:
    assert list(kept.newest_first()) == []
    with pytest.raises(NotFound):
        kept.find("last")
    assert not kept.directory.exists()


def test_only_so_many_are_kept_and_no_debris(kept: IncidentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    for number in range(6):
        kept.write(incident(number, second=number))
    old, young = kept.directory / ".a.tmp", kept.directory / ".b.tmp"
    for debris in (old, young):
        debris.touch()
    os.utime(old, (0, time.time() - 2 * module.STALE))
    (kept.directory / "a note of mine.json").write_text("{}")
    kept.write(incident(9, second=30))
    assert [each.key[7:] for each in kept.newest_first()] == ["1-9", "1-5", "1-4"]
    others = {name for name in os.listdir(kept.directory) if not name.startswith("2026")}
    assert others == {".b.tmp", "a note of mine.json"}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Damaged),
        (b"\xff", Damaged),
        (b"[]", Damaged),
        (b"{}", Damaged),
        (b"[" * 100_000, Damaged),
        (b'{"format": "ckptsvc-incident/1"}', Damaged),
        (b'{"format": 1, "incident": {}}', Damaged),
        (b'{"format": "other/1", "incident": {}}', Damaged),
        (b'{"format": "ckptsvc-incident/2", "incident": {}}', IncompatibleVersion),
        (b'{"format": "ckptsvc-incident/1", "incident": []}', Damaged),
        (b'{"format": "ckptsvc-incident/1", "incident": {"id": "1-2"}}', Damaged),
        (NAMED + b', "rank": "one"}}', Damaged),
        (NAMED + b', "rank": 99999999999}}', Damaged),
        (NAMED + b', "confidence": NaN}}', Damaged),
        (NAMED + b', "ranks": [{"cpu": "Infinity"}]}}', Damaged),
        (NAMED + b', "sentence": "\\ud800"}}', Damaged),
        (b" " * (module.MAX_BYTES + 1), Damaged),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_told_and_hides_no_others(kept: IncidentLog, data: bytes, error: type) -> None:
    kept.write(incident(1))
    path = kept.write(incident(2))
    path.write_bytes(data)
    newer, older = kept.newest_first()
    assert type(newer.incident) is error
    assert str(path) in str(newer.incident)
    assert isinstance(older.incident, pb.Incident)


def test_damage_anywhere_never_ends_the_reader(kept: IncidentLog) -> None:
    path = kept.write(rich())
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        (found,) = kept.newest_first()
        assert isinstance(found.incident, pb.Incident | CkptsvcError)


def test_a_pipe_or_a_directory_of_that_name_is_not_waited_for(kept: IncidentLog) -> None:
    path = kept.write(incident(1))
    path.unlink()
    os.mkfifo(path)
    assert isinstance(next(kept.newest_first()).incident, Damaged)
    path.unlink()
    path.mkdir()
    assert isinstance(next(kept.newest_first()).incident, Damaged)


@pytest.mark.parametrize(
    "changes",
    [{"id": ""}, {"id": "../../x"}, {"id": "a/b"}, {"id": "x" * 65}, {"id": ".x"}, {"opened": ""}, {"opened": "soon"},
        {"opened": "2026-11-21T14:03:00Z/../.."}, {"confidence": float("nan")}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_and_leaves_nothing(kept: IncidentLog, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        kept.write(incident(**changes))
    assert not kept.directory.exists() or os.listdir(kept.directory) == []


def test_of_too_much_evidence_the_culprits_stays(kept: IncidentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 200_000)
    large = incident(rank=40)
    for rank in range(50):
        large.ranks.add(rank=rank, stack="s" * 100, log_tail="l" * 10_000, other_stacks="o" * 10_000)
    kept.write(large)
    (found,) = kept.newest_first()
    assert isinstance(found.incident, pb.Incident)
    assert found.incident.ranks[0] == large.ranks[40]
    assert len(found.incident.ranks) == 50
    assert {rank.log_tail for rank in found.incident.ranks[1:]} == {""}
    assert found.incident.ranks[1].stack == "s" * 100
    assert found.incident.notes
    for rank in range(50, 3000):
        large.ranks.add(rank=rank, stack="s" * 100)
    kept.write(large)
    (found,) = kept.newest_first()
    assert isinstance(found.incident, pb.Incident)
    assert [rank.rank for rank in found.incident.ranks[:2]] == [40, 0]
    assert found.incident.notes[-1] == "the evidence of 2900 ranks was left out: there was too much"


class TestRecording:
    def test_beside_the_loop(self, kept: IncidentLog) -> None:
        path = asyncio.run(kept.record(rich()))
        assert path is not None
        assert kept.find("last").incident == rich()

    def test_what_is_said_first_is_written_first(self, kept: IncidentLog) -> None:
        async def many() -> None:
            growing = incident()
            records = []
            for number in range(20):
                growing.actions.append(str(number))
                records.append(asyncio.ensure_future(kept.record(growing)))
                await asyncio.sleep(0)
            await asyncio.gather(*records)

        asyncio.run(many())
        found = kept.find("last").incident
        assert isinstance(found, pb.Incident)
        assert len(found.actions) == 20

    def test_a_failure_is_logged_and_ends_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        assert asyncio.run(IncidentLog(tmp_path / "file" / "in").record(rich())) is None
        assert asyncio.run(IncidentLog(tmp_path / "in").record(incident(id="/"))) is None
        monkeypatch.setattr(module, "_encoded", lambda incident: time.sleep(1) or b"")
        assert asyncio.run(IncidentLog(tmp_path / "in").record(rich(), 0.05)) is None
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
        assert "no answer" in caplog.text


def test_where_they_are_kept(tmp_path: Path) -> None:
    def place(environ: dict[str, str], settings: Settings | None = None) -> str:
        return str(incidents_directory(settings or Settings(), environ))

    home = {"HOME": "/home/ada"}
    assert place(home) == "/home/ada/.local/state/ckptsvc/incidents"
    assert place(home | {"XDG_STATE_HOME": "/s"}) == "/s/ckptsvc/incidents"
    assert place(home | {"XDG_STATE_HOME": "relative"}) == place(home)
    assert place(home | {"STATE_DIRECTORY": "/var/lib/ckptsvc:/x"}) == "/var/lib/ckptsvc/incidents"
    assert place({}, load({"CKPTSVC_AGENT_INCIDENTS_DIR": "/i"}, files=[])) == "/i"
    for environ in ({}, {"HOME": ""}, {"HOME": "here"}):
        with pytest.raises(ConfigError, match="no place for incidents"):
            place(environ)
    with pytest.raises(ConfigError, match="not an absolute path"):
        load({"CKPTSVC_AGENT_INCIDENTS_DIR": "here"}, files=[])


def test_moments() -> None:
    assert moment("2026-11-21T14:03:11+02:00") == moment("2026-11-21T12:03:11Z") == moment("2026-11-21T12:03:11")
    for text in ("", "now", "0001-01-01T00:00:00+14:00", "2026-13-01"):
        assert moment(text) is None
