"""`ckptsvc config`: what is in force, where it came from, and what there is to set."""

import json
import tomllib

import pytest
from harness.stored import cli
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.cli.config import markdown
from ckptsvc.cli.settings import sections, values, written
from ckptsvc.config import load

SOME = {
    "agent": {"listen": "[::1]:7070", "metrics_listen": "off"},
    "arena": {"limit": "37%", "slots": 3},
    "save": {"every": 250, "extent": "64KiB", "deadline": "1500ms", "timeout": "1h30min"},
    "launch": {"preload": ["torch", "numpy"], "grow": "off", "standby": False},
    "health": {"factor": 2.5, "automatic": "never"},
}


@pytest.fixture
def some(tmp_path, monkeypatch):
    path = tmp_path / "some.toml"
    path.write_text(
        "\n".join(f"[{s}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in t.items()) for s, t in SOME.items())
    )
    monkeypatch.setenv("CKPTSVC_CONFIG", str(path))
    return path


def test_what_is_shown_is_a_settings_file_that_gives_the_same(some, tmp_path):
    status, out, _ = cli("config", "show", "--origin")
    assert status == 0
    again = tmp_path / "again.toml"
    again.write_text(out)
    shown, asked = load({}, files=[again]), load({}, files=[some])
    assert [row[:2] for row in values(shown)] == [row[:2] for row in values(asked)]
    assert shown.save == asked.save
    assert shown.launch == asked.launch


def test_where_a_value_came_from(some, monkeypatch):
    monkeypatch.setenv("CKPTSVC_SAVE_KEEP", "5")
    _, out, _ = cli("config", "show", "save", "--json")
    origins = {each["key"]: each["origin"] for each in json.loads(out)["settings"]}
    assert origins["save.keep"] == "CKPTSVC_SAVE_KEEP"
    assert origins["save.every"] == str(some)
    assert origins["save.early_cores"] == "default"
    _, out, _ = cli("config", "show", "--changed", "--json")
    assert "save.early_cores" not in out
    assert "save.keep" in out


def test_an_unknown_name_is_refused():
    status, _, err = cli("config", "show", "save.evry")
    assert (status, "save.evry" in err, "did you mean save.every?" in err) == (2, True, True)
    status, _, err = cli("staus")
    assert (status, "No such command 'staus': did you mean 'status'?" in err) == (2, True)
    status, _, err = cli("zzzz")
    assert (status, "No such command 'zzzz'." in err) == (2, True)


def test_files_are_checked_before_anything_is_started(some, tmp_path):
    assert cli("config", "check")[0] == 0
    assert cli("agent", "--check-config")[0] == 0
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[save]\nevry = "10min"\n')
    status, _, err = cli("config", "check", wrong)
    assert (status, "save.evry" in err, "save.every" in err) == (2, True, True)
    wrong.write_text('[store.options.s3]\nregoin = "eu-west-1"\n')
    status, _, err = cli("config", "check", wrong)
    assert (status, "store.options.s3.regoin" in err, "did you mean region?" in err) == (2, True, True)


@given(st.floats(0.001, 1e7), st.integers(0, 1 << 50))
def test_durations_and_sizes_are_read_back_as_they_were(seconds, nbytes):
    seconds = round(seconds, 3)
    file = {"health": {"floor": seconds}, "launch": {"standby_memory": nbytes}}
    shown = load({}, {"health.floor": file["health"]["floor"], "launch.standby_memory": nbytes}, files=[])
    rows = dict(row[:2] for row in values(shown))
    again = load(
        {}, {key: tomllib.loads(f"v = {rows[key]}")["v"] for key in ("health.floor", "launch.standby_memory")}, files=[]
    )
    assert again.launch.standby_memory == nbytes
    assert again.health.floor == pytest.approx(seconds, rel=1e-5)


def test_secrets_in_a_table_are_not_shown():
    text = written({"region": "eu", "secret_access_key": "abc", "password": "abc", "nested": {"token": "abc"}})
    assert "abc" not in text
    assert "eu" in text


def test_everything_that_can_be_set_is_described():
    text = markdown()
    for name, about, settings in sections():
        assert f"## [{name}]" in text
        assert about
        for setting in settings:
            assert setting.about, f"{setting.key} has no line under Attributes"
