"""A node with several users: real user ids, a real service started by root, and processes that belong to the users.

The interpreter, the packages and the sources may lie where only root gets at them (a home, a build's folder). So all of
it runs in a mount namespace of its own, in which they can be read, and in which /etc/passwd knows the users.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness.runtime import FOREIGN, RANK_VARIABLES, eventually

from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc import service

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("unshare", "nsenter", "setpriv", "mount")


class Person(NamedTuple):
    """A user of the node."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


SHARED = 54100
ALICE = Person("ck-alice", 54001, 54001, (54001, SHARED))
BOB = Person("ck-bob", 54002, 54002, (54002,))
DAEMON = Person("ck-daemon", 540, 540, (540,))
STRANGER = Person("", 54999, 54999, (54999,))
PEOPLE = (ALICE, BOB, DAEMON)


class Node:
    """One node; `start` starts its service.

    Attributes:
        directory: of the service.
        environ: of every process of the node.
    """

    def __init__(self, root: Path, arenas: Path, inside: list[str]) -> None:
        self.root, self.arenas, self._inside = root, arenas, inside
        self.directory = root / "service"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and k not in RANK_VARIABLES}
        self.environ = inherited | {
            "CKPTSVC_SYSTEM_DIRECTORY": str(self.directory),
            "CKPTSVC_SYSTEM_AUDIT_FILE": str(root / "state" / "audit.jsonl"),
            "CKPTSVC_ARENA_DIR": str(arenas),
            "CKPTSVC_AGENT_METRICS_LISTEN": "off",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "storage_drivers"))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for person in (*PEOPLE, STRANGER):
            for folder in (self.home(person), self.home(person) / "run"):
                folder.mkdir(mode=0o700)
                os.chown(folder, person.uid, person.gid)
        self.supervisor: subprocess.Popen[bytes] | None = None
        self._spawned: list[subprocess.Popen[str]] = []

    def home(self, person: Person) -> Path:
        """Where a user's files are."""
        return self.root / f"home-{person.uid}"

    def agent_directory(self, person: Person) -> Path:
        """The directory of a user's agent."""
        return service.directory_of(self.directory, person.uid)

    def start(self, **settings: str) -> None:
        """Start the service; settings by "section_key"."""
        given = {f"CKPTSVC_{key.upper()}": value for key, value in settings.items()}
        command = [*self._inside, sys.executable, "-m", "ckptsvc.cli.main", "agent", "--system"]
        with (self.root / "service.log").open("ab") as log:
            self.supervisor = subprocess.Popen(
                command, env=self.environ | given, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        eventually(lambda: self._answers() or self.supervisor.poll() is not None, "the service to start")  # type: ignore[union-attr]

    def _answers(self) -> bool:
        with contextlib.suppress(CkptsvcError):
            return service.is_there(self.directory) and bool(service.ask(self.directory, "agents"))
        return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the service, and it alone; returns its exit status."""
        assert self.supervisor is not None
        self.supervisor.send_signal(number)
        return self.supervisor.wait(20)

    def agents(self) -> dict[int, dict[str, Any]]:
        """What the service says of its agents, by user."""
        return {each["uid"]: each for each in service.ask(self.directory, "agents")["agents"]}

    def spawn(
        self, person: Person, command: list[str], log: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        """Start a program as a user; `close` ends it."""
        become = ["setpriv", f"--reuid={person.uid}", f"--regid={person.gid}"]
        become += [f"--groups={','.join(map(str, person.groups))}", "--"]
        own = {"HOME": str(self.home(person)), "RUNTIME_DIRECTORY": str(self.home(person) / "run")}
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("ab")) if log else subprocess.PIPE
            process = subprocess.Popen(
                [*self._inside, *become, *command], env=self.environ | own | environ, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd="/", text=True,
            )  # fmt: skip
        self._spawned.append(process)
        return process

    def python(self, person: Person, code: str, **environ: str) -> str:
        """What a piece of Python prints that a user runs; fails if it does."""
        process = self.spawn(person, [sys.executable, "-c", code], **environ)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def command(self, person: Person, *arguments: str, **environ: str) -> tuple[int, str]:
        """Exit status and output of a command of ckptsvc's."""
        process = self.spawn(person, [sys.executable, "-m", "ckptsvc.cli.main", *arguments], **environ)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def log(self) -> str:
        """What the service and the agents have logged."""
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')}"
            for path in [self.root / "service.log", *self.directory.glob("users/*/agent.log")]
            if path.exists()
        )

    def processes(self) -> list[int]:
        """All that run on the node."""
        found = []
        mark = f"CKPTSVC_SYSTEM_DIRECTORY={self.directory}".encode()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not folder.name.isdigit() or int(folder.name) == os.getpid():
                    continue
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def close(self) -> list[str]:
        """End everything; returns what should not have been left."""
        problems = []
        for process in self._spawned:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self.supervisor is not None and self.supervisor.poll() is None:
            self.stop()
        self._signal(signal.SIGTERM, "ckptsvc.agent.server")
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.processes(), "all agents to end", 20)
        if left := self.processes():
            problems.append(f"processes were left: {left}")
            self._signal(signal.SIGKILL)
        arenas = [str(path) for path in self.arenas.rglob("*.arena")]
        if arenas:
            problems.append(f"arenas were left: {arenas}")
        for folder in (self.arenas, self.root):
            shutil.rmtree(folder, ignore_errors=True)
        return problems

    def _signal(self, number: int, part: str = "") -> None:
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if part in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, number)


@contextlib.contextmanager
def node_of_users() -> Iterator[Node]:
    """A node; the test is skipped where this process is not root or may make no namespace."""
    if os.geteuid() != 0:
        pytest.skip("several users: needs root")
    for program in PROGRAMS:
        if shutil.which(program) is None:
            pytest.skip(f"several users: needs {program}")
    root = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
    root.chmod(0o755)
    arenas = Path(tempfile.mkdtemp(prefix="ck-", dir="/dev/shm"))
    arenas.chmod(0o1777)
    with _namespace(root) as inside:
        node = Node(root, arenas, inside)
        try:
            yield node
        finally:
            log = node.log()
            problems = node.close()
            print(log)
            assert not problems, "\n".join(problems)


@contextlib.contextmanager
def _namespace(root: Path) -> Iterator[list[str]]:
    """The command by which others run in it."""
    commands = [*opened_for_users(root), "echo ready", "exec cat"]
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(commands)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin
    assert holder.stdout
    assert holder.stderr
    try:
        if holder.stdout.readline() != "ready\n":
            shutil.rmtree(root, ignore_errors=True)
            pytest.skip(f"several users: no mount namespace can be had here: {holder.stderr.read().strip()}")
        yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]
    finally:
        holder.stdin.close()
        holder.wait(10)
        for stream in (holder.stdout, holder.stderr):
            stream.close()


def opened_for_users(root: Path) -> list[str]:
    """Commands after which the people exist, and can read what a node needs."""
    return [*_accounts(root), *_opened(root)]


def _accounts(root: Path) -> Iterator[str]:
    """Commands that make /etc/passwd and /etc/group know the people."""
    users = [f"{p.name}:x:{p.uid}:{p.gid}::{root}/home-{p.uid}:/bin/sh" for p in PEOPLE]
    groups = [f"{p.name}:x:{p.gid}:" for p in PEOPLE]
    groups.append(f"ck-shared:x:{SHARED}:{','.join(p.name for p in PEOPLE if SHARED in p.groups)}")
    for name, lines in (("passwd", users), ("group", groups)):
        made = root / name
        made.write_text(Path("/etc", name).read_text() + "\n".join(lines) + "\n")
        yield f"mount --bind {made} /etc/{name}"


def _opened(root: Path) -> Iterator[str]:
    """Commands that leave of each folder that keeps others out no more than what is needed, for all to read."""
    needed = {str(Path(path).resolve()) for path in (sys.base_prefix, sys.prefix, ROOT)}
    needed = {path for path in needed if not any(path != other and path.startswith(f"{other}/") for other in needed)}
    for number, path in enumerate(sorted(needed)):
        yield f"mkdir {root}/{number}"
        yield f"mount --bind {shlex.quote(path)} {root}/{number}"
    closed = {cover for path in needed if (cover := _closed(Path(path))) is not None}
    for cover in sorted(closed):
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(cover))}"
    for number, path in enumerate(sorted(needed)):
        if _closed(Path(path)) is not None:
            yield f"mkdir -p {shlex.quote(path)}"
            yield f"mount --bind {root}/{number} {shlex.quote(path)}"


def _closed(path: Path) -> Path | None:
    """The uppermost folder above a path that keeps others out."""
    return next((folder for folder in (*reversed(path.parents), path) if not folder.stat().st_mode & 0o001), None)


def as_user(person: Person, act: Callable[[], Any]) -> Any:
    """What a function returns (as JSON) in a process of a user's, forked from this one; an error is raised here."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(person.groups)
            os.setresgid(person.gid, person.gid, person.gid)
            os.setresuid(person.uid, person.uid, person.uid)
            said = json.dumps({"result": act()})
        except BaseException:
            said = json.dumps({"error": traceback.format_exc()})
        with contextlib.suppress(OSError), open(writing, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    found = json.loads(text)
    assert "error" not in found, found.get("error")
    return found["result"]


def ids_of(pid: int) -> dict[str, str]:
    """Lines of /proc/PID/status, by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def wait_until_gone(pid: int) -> None:
    """Wait for the end of a process that may be nobody's child here."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and ids_of(pid)["State"][0] != "Z":
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.02)
