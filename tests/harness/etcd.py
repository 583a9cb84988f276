"""A real etcd of one member, on loopback, that a test can kill and start again."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness.job import free_port

PACKAGE = "etcd-server"
INSTALL_TIMEOUT = 60.0


@cache
def program(folder: Path) -> str:
    """Path of the etcd program: the one that is installed, or one unpacked from Debian's package into this folder."""
    installed = shutil.which("etcd")
    if installed:
        return installed
    try:
        for command in (["apt-get", "-qq", "download", PACKAGE], ["sh", "-c", f"dpkg-deb -x {PACKAGE}_*.deb ."]):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error).encode()
        pytest.skip(f"there is no etcd here, and Debian's {PACKAGE} is not to be had: {why.decode()[-200:]}")
    return str(folder / "usr" / "bin" / "etcd")


class EtcdServer:
    """One member; what it knows survives `kill` and `start`.

    Attributes:
        url: of ours (agent.coordination).
        folder: of its data and its log.
        tls: options of etcd.
    """

    def __init__(self, command: str, folder: Path) -> None:
        self._command, self.folder = command, folder
        self._client, self._peer = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"etcd://127.0.0.1:{self._client}"
        self.tls: list[str] = []

    def start(self) -> None:
        """Start it, or start it again; returns when it answers."""
        ours, peer = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._client}", f"http://127.0.0.1:{self._peer}"
        arguments = ["--name", "e", "--data-dir", str(self.folder / "data"), "--log-level", "error"]
        arguments += ["--listen-client-urls", ours, "--advertise-client-urls", ours]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", f"e={peer}", *self.tls]
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen([self._command, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                if self.tls:  # the gateway has no certificate of its own
                    socket.create_connection(("127.0.0.1", self._client)).close()
                else:
                    self.call("kv/range", key="x")
            except urllib.error.HTTPError as refused:
                if refused.code == 400:
                    return  # it answers, but only to those who log in
            except OSError:
                pass
            else:
                return
            assert self._process.poll() is None, (self.folder / "etcd.log").read_text()
            assert time.monotonic() < deadline, "etcd did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def call(self, method: str, token: str = "", **fields: Any) -> dict[str, Any]:
        """One call of its JSON gateway, to set things up by other means than those under test."""
        for name in ("key", "range_end", "value"):
            if name in fields:
                fields[name] = base64.b64encode(fields[name].encode()).decode()
        url = f"http://127.0.0.1:{self._client}/v3/{method}"
        headers = {"Authorization": token} if token else {}
        request = urllib.request.Request(url, json.dumps(fields).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=5) as answer:
            body: dict[str, Any] = json.load(answer)
        return body

    def keys(self) -> list[str]:
        """All keys."""
        found = self.call("kv/range", key="\0", range_end="\0").get("kvs", [])
        return [base64.b64decode(kv["key"]).decode() for kv in found]

    def want_certificates(self) -> None:
        """Start it anew, with TLS both ways: ca.crt, client.crt and client.key are in `folder` then."""
        self.kill()
        make_certificates(self.folder)
        for option, name in (("cert", "server.crt"), ("key", "server.key"), ("trusted-ca", "ca.crt")):
            self.tls += [f"--{option}-file", str(self.folder / name)]
        self.tls += ["--client-cert-auth"]
        self.start()

    def want_login(self, password: str) -> None:
        """From now on only root may speak to it, with this password."""
        self.call("auth/user/add", name="root", password=password)
        self.call("auth/role/add", name="root")
        self.call("auth/user/grant", user="root", role="root")
        self.call("auth/enable")


def make_certificates(folder: Path) -> None:
    """An authority, and what it signed for a server on loopback and a client; the test is skipped without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    run(*new, "-x509", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    for name in ("server", "client"):
        run(*new[:-2], "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run("openssl", "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "extensions", "-out", f"{name}.crt")  # fmt: skip
        (folder / f"{name}.key").chmod(0o600)


@contextlib.contextmanager
def etcd_server(programs: Path, folder: Path) -> Iterator[EtcdServer]:
    """A running etcd; the test is skipped where there is none to be had."""
    server = EtcdServer(program(programs), folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
