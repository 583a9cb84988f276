"""What is collected for others has no secret in it, wherever one was, and misses nothing that was there."""

import json
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from ckptsvc.agent.orders.audit import AuditLog, Entry
from ckptsvc.cli import bundle_parts, support_bundle
from ckptsvc.cli.masking import Mask, is_secret, masked_url
from ckptsvc.cli.settings import written
from ckptsvc.errors import InvalidInput
from ckptsvc.settings import AgentSettings, Settings

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


def test_the_journal_of_the_units_is_in_it_bounded_and_without_secrets(planted, monkeypatch):
    programs = planted / "bin"
    programs.mkdir()
    script = programs / "journalctl"
    script.write_text(
        f"""#!/bin/sh
        [ "$1" = --user ] && {{ echo "No journal files were found." >&2; exit 1; }}
        echo "$@"; echo "password={PLANTED["assigned"]}"; echo "the service of this node listens"
        """
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    found = {part.name: part for part in bundle_parts.parts(planted / "run", os.environ)}
    text = found["journal.txt"].data.decode()
    assert "--unit ckptsvc-agent* --lines 10000" in text
    assert "the service of this node listens" in text
    assert PLANTED["assigned"] not in text
    assert (found["journal-user.txt"].data, found["journal-user.txt"].problem) == (b"", "No journal files were found.")
    script.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(bundle_parts, "JOURNAL_TIME", 0.1)
    found = {part.name: part for part in bundle_parts.parts(planted / "run", os.environ)}
    assert found["journal.txt"].problem == "journalctl does not answer"


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


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("run --api-key sk-abc123def --steps 3", "run --api-key ... --steps 3"),
        ("run --password hunter2xx", "run --password ..."),
        ('["run", "--password", "hunter2xx", "--steps", "3"]', '["run", "--password", "...", "--steps", "3"]'),
        ("x-api-key: abc", "x-api-key: ..."),
        ("Cookie: a=hunter2; b=hunter3\nHost: x", "Cookie: ...\nHost: x"),
        ('set-cookie: sid="hunter2"; Path=/', "set-cookie: ..."),
        ("Authorization: Token abc", "Authorization: ..."),
        ('{"msg": "Authorization: Token abc", "step": 3}', '{"msg": "Authorization: ...", "step": 3}'),
        ('{"Authorization": "Token abc", "step": 3}', '{"Authorization": ..., "step": 3}'),
        ("password: my pass phrase\nstep 3", "password: ...\nstep 3"),
        ("password=a,bcd step=3", "password=... step=3"),
        ("password=a,bcd,step=3", "password=...,step=3"),
        ("password=a)b;cd}e", "password=..."),
        ("open https://user:pa/ss@host/x", "open https://...@host/x"),
        ("open https://user:p@ss@host/x", "open https://...@host/x"),
        ("proxy-authorization=Digest u, r, n", "proxy-authorization=..."),
    ],
)
def test_secrets_in_all_shapes(text, without):
    assert Mask().text(text) == without


def test_a_long_text_is_looked_through_in_one_go():
    for part in (
        "secret",
        "0",
        "_-",
        "a=",
        "://",
        "://a:",
        "Cookie: ",
        "--token ",
        "password: ",
        '"',
        "a=,b",
        "pwd=,,",
    ):
        Mask().text(part * (300_000 // len(part)))  # it would not end


def test_text_without_secrets_is_left_alone():
    for text in (
        "file:///runs/gpt@12ab/step-3",
        "s3://bucket/gpt@12ab",
        "run --keys 3 --author x",
        "a cookie, a token",
    ):
        assert Mask().text(text) == text
    text = "step 120: committed in file:///runs/a?x=1, keys: 3, 12:30:01 error: no space (key_file = '/a/b')"
    assert Mask(["abc"]).text(text) == text


# ---- what is no business of the bundle's


def of_agent(directory, address):
    return bundle_parts.Answer(directory, {"metrics": address})


@pytest.fixture
def asked():
    """What is asked for, with the headers, by whoever comes to a port; and the port."""
    seen = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"up 1\n")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield seen, server.server_address[1]
        server.shutdown()
        thread.join()


def test_the_token_of_the_agents_is_shown_on_loopback_and_agents_of_jobs_share_it(tmp_path, asked):
    seen, port = asked
    job = tmp_path / "job-x"
    job.mkdir()
    (tmp_path / "http-token").write_text("shared-token\n")
    assert bundle_parts._metrics(of_agent(job, f"127.0.0.1:{port}"), Settings()) == "up 1\n"
    assert seen == [("/metrics", "Bearer shared-token")]
    (job / "http-token").write_text("named-token-of-the-job\n")
    (job / "http-token").chmod(0o600)
    settings = Settings(agent=AgentSettings(http_token_file=str(job / "http-token")))
    assert bundle_parts._metrics(of_agent(tmp_path, f"localhost:{port}"), settings) == "up 1\n"
    assert seen[1:] == [("/metrics", "Bearer named-token-of-the-job")]
    with pytest.raises(OSError, match="not on loopback"):
        bundle_parts._metrics(of_agent(job, f"0.0.0.0:{port}"), Settings())
    with pytest.raises(InvalidInput):
        bundle_parts._metrics(of_agent(job, f"127.0.0.1:{port}@example.org:1"), Settings())
    assert len(seen) == 2


def test_a_link_in_place_of_a_token_is_not_followed(tmp_path, asked):
    seen, port = asked
    (tmp_path / "keep-out").write_text("nobody-elses-secret\n")
    agent = tmp_path / "run" / "job-x"
    agent.mkdir(parents=True)
    (agent / "http-token").symlink_to(tmp_path / "keep-out")
    bundle_parts._metrics(of_agent(agent, f"127.0.0.1:{port}"), Settings())
    assert seen == [("/metrics", None)]


@pytest.mark.timeout(60)
def test_pipes_in_place_of_secrets_hold_nobody_up(planted, monkeypatch):
    os.mkfifo(planted / "run" / "node-n1" / "secret")
    (planted / "password").unlink()
    os.mkfifo(planted / "password")
    monkeypatch.setattr(bundle_parts, "PATIENCE", 0.1)
    found = {part.name: part for part in bundle_parts.parts(planted / "run", os.environ)}
    assert b"and this is what somebody looks for" in found["agents/node-n1/agent.log"].data


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(planted):
    os.chown(planted / "run", 54321, 54321)
    with pytest.raises(InvalidInput, match="belongs to user 54321"):
        next(bundle_parts.parts(planted / "run", os.environ))
    (planted / "link").symlink_to(planted / "run")
    with pytest.raises(InvalidInput, match="belongs to user 54321"):
        next(bundle_parts.parts(planted / "link", os.environ))


def test_a_directory_to_which_others_may_write_is_refused(planted):
    (planted / "run").chmod(0o770)
    with pytest.raises(InvalidInput, match="others may write to"):
        next(bundle_parts.parts(planted / "run", os.environ))
