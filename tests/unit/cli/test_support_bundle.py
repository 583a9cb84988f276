"""What is collected for others has no secret in it, wherever one was, and misses nothing that was there."""

import json
import os
import tarfile

import pytest
from click.testing import CliRunner

from ckptsvc.agent.audit import AuditLog, Entry
from ckptsvc.cli import bundle_parts, support_bundle
from ckptsvc.cli.masking import Mask, is_secret, masked_url
from ckptsvc.cli.settings import written

PLANTED = {
    where: f"planted-{where}-0123456789abcdef"
    for where in (
        "environment", "table", "nested", "url", "query", "log", "assigned", "quoted", "header", "pem", "password-file",
        "agents-secret", "http-token", "incident", "audit", "aws-log", "azure", "json-log", "default-url",
    )
}  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A user's files with a secret in every place where one can be."""
    for name in [n for n in os.environ if n.startswith(("CKPTSVC_", "XDG_"))]:
        monkeypatch.delenv(name)
    sockets = tmp_path / "run"
    agent = sockets / "node-n1"
    agent.mkdir(parents=True)
    sockets.chmod(0o700)
    (sockets / "secret").write_text(PLANTED["agents-secret"] + "\n")
    (agent / "http-token").write_text(PLANTED["http-token"])
    password = tmp_path / "password"
    password.write_text(PLANTED["password-file"] + "\n")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        [store]
        url = "s3://user:{PLANTED["url"]}@bucket/run?region=x&X-Amz-Signature={PLANTED["query"]}"
        [store.options.s3]
        secret_access_key = "{PLANTED["table"]}"
        region = "here-and-there"
        [store.options.s3.more]
        accountKey = "{PLANTED["nested"]}"
        [etcd]
        user = "ada"
        password_file = "{password}"
        """
    )
    log = [
        f"the environment had {PLANTED['environment']}, the tables {PLANTED['table']} and {PLANTED['nested']}",
        f"opening https://me:{PLANTED['log']}@host/path?sig={PLANTED['query']}&part=1",
        f"password={PLANTED['assigned']} api_key: '{PLANTED['quoted']}'",
        f"Authorization: Bearer {PLANTED['header']}",
        f"AWS_SECRET_ACCESS_KEY={PLANTED['aws-log']}",
        f"AccountName=x;AccountKey={PLANTED['azure']};EndpointSuffix=y",
        json.dumps({"msg": "x", "token": PLANTED["json-log"], "inner": json.dumps({"secret": PLANTED["json-log"]})}),
        f"etcd says no to {PLANTED['password-file']}; proof by {PLANTED['agents-secret']} {PLANTED['http-token']}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{PLANTED['pem']}\n-----END RSA PRIVATE KEY-----",
        "and this is what somebody looks for",
    ]
    (agent / "agent.log").write_text("\n".join(log) + "\n")
    state = tmp_path / "state" / "ckptsvc"
    (state / "incidents").mkdir(parents=True)
    incident = {
        "sentence": f"rank 3 wrote to s3://a:{PLANTED['incident']}@b/c",
        "log_tail": f"token={PLANTED['incident']}",
    }
    (state / "incidents" / "20260101T000000Z-1-1.json").write_text(json.dumps(incident))
    entry = Entry(verb="pause", uid=1, by="ada", node="n1", outcome="done", what=f"passwd: {PLANTED['audit']}")
    AuditLog(state / "audit.jsonl").append(entry)
    monkeypatch.setenv("CKPTSVC_CONFIG", str(config))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(sockets))
    monkeypatch.setenv("MY_SERVICE_TOKEN", PLANTED["environment"])
    monkeypatch.setenv("CKPTSVC_AGENT_COORDINATION", f"etcd://root:{PLANTED['default-url']}@127.0.0.1:1/x")
    return tmp_path


def test_no_secret_is_in_it_and_what_matters_is(planted):
    target = planted / "bundle.tar.gz"
    ended = CliRunner().invoke(support_bundle.command, ["-o", str(target), "--json"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        texts = {m.name.partition("/")[2]: archive.extractfile(m).read().decode() for m in archive.getmembers()}
    found = {(where, name) for where, value in PLANTED.items() for name, text in texts.items() if value in text}
    assert found == set()
    assert "and this is what somebody looks for" in texts["agents/node-n1/agent.log"]
    assert "here-and-there" in texts["settings.toml"]
    assert "MY_SERVICE_TOKEN" not in texts["environment.txt"]
    assert "CKPTSVC_CONFIG" in texts["environment.txt"]
    assert '"grpcio"' in texts["versions.json"]
    assert "rank 3 wrote to s3://...@b/c" in texts["incidents/20260101T000000Z-1-1.json"]
    assert '"pause"' in texts["audit.jsonl"]
    manifest = json.loads(texts["MANIFEST.json"])
    assert {part["name"] for part in manifest["parts"] if part["bytes"]} == texts.keys() - {
        "MANIFEST.json",
        "README.txt",
    }
    assert json.loads(ended.output)["parts"] == manifest["parts"]


def test_it_is_bounded_and_says_what_is_cut(planted, monkeypatch):
    monkeypatch.setattr(bundle_parts, "MAX_PART", 5000)
    (planted / "run" / "node-n1" / "agent.log").write_text("".join(f"line {number}\n" for number in range(10_000)))
    target = planted / "bundle.tar.gz"
    ended = CliRunner().invoke(support_bundle.command, ["-o", str(target), "--json"], catch_exceptions=False)
    parts = {part["name"]: part for part in json.loads(ended.output)["parts"]}
    log = parts["agents/node-n1/agent.log"]
    assert log["cut"]
    assert log["bytes"] <= 5000
    with tarfile.open(target) as archive:
        text = archive.extractfile("bundle/agents/node-n1/agent.log").read().decode()
    assert text.startswith("line ")
    assert text.endswith("line 9999\n")


def test_it_replaces_nothing_and_wrong_settings_do_not_keep_it_from_being_made(planted):
    target = planted / "bundle.tar.gz"
    target.write_text("mine")
    ended = CliRunner().invoke(support_bundle.command, ["-o", str(target)])
    assert "cannot write" in str(ended.exception)
    assert target.read_text() == "mine"
    (planted / "config.toml").write_text("[store]\nurll = 1\n")
    other = planted / "other.tar.gz"
    ended = CliRunner().invoke(support_bundle.command, ["-o", str(other), "--dir", str(planted / "run"), "--json"])
    assert ended.exit_code == 0, ended.exception
    with tarfile.open(other) as archive:
        assert b"they cannot be used" in archive.extractfile("other/settings.toml").read()


@pytest.mark.parametrize(
    "name",
    ["password", "secret_access_key", "accountKey", "sas", "sas_token", "connection_string", "Authorization", "x-sig"],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["region", "endpoint", "signal", "design", "author", "bucket", "sassy"])
def test_other_names(name):
    assert not is_secret(name)


def test_urls_and_tables_of_settings():
    assert masked_url("az://x:y@h/c?sv=1&sig=abc&key=1#f") == "az://...@h/c?sv=1&sig=...&key=...#f"
    assert written("https://h/p?token=abc") == '"https://h/p?token=..."'
    assert written({"a": {"accessKey": "x", "n": ["u:p", 1]}}) == '{"a" = {"accessKey" = "...", "n" = ["u:p", 1]}}'


def test_text_without_secrets_is_left_alone():
    text = "step 120: committed in file:///runs/a?x=1, keys: 3, 12:30:01 error: no space (key_file = '/a/b')"
    assert Mask(["abc"]).text(text) == text
