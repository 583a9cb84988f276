"""A systemd of a test's own: the first process of namespaces of its own, in a control group of its own.

It knows only the units that the test gives it, and shares the files of this machine but /run, so that agents which it
starts serve jobs that run outside. Needs root, systemd and cgroup 2; the test is skipped where it cannot be started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.runtime import eventually

SYSTEMD = Path("/usr/lib/systemd/systemd")
BOOT = r"""
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount --bind /dev/null /dev/console
mkdir -p /run/systemd/system
cp -r "$1/." /run/systemd/system/
export container=unshare SYSTEMD_UNIT_PATH=/run/systemd/system
exec /usr/lib/systemd/systemd --system --unit=test.target --log-target=console --log-color=0 --show-status=0
"""
TARGET = "[Unit]\nDefaultDependencies=no\n"


class Systemd:
    """One that runs; `pid` is its process as this machine sees it."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl with it; returns what it prints."""
        command = ["nsenter", "-t", str(self.pid), "-a", "systemctl", "--no-pager", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert not check or done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.log()}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace")


def _hierarchy() -> Path | None:
    """Where cgroup 2 is mounted here."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


@contextlib.contextmanager
def systemd(units: dict[str, str], folder: Path) -> Iterator[Systemd]:
    """Start one that has these units (by path below /run/systemd/system)."""
    above = _hierarchy()
    if os.geteuid() != 0 or not SYSTEMD.exists() or above is None:
        pytest.skip("needs root, systemd and cgroup 2")
    for name, text in {**units, "test.target": TARGET}.items():
        path = folder / "units" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    group = above / f"ckptsvc-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    log, pid = folder / "systemd.log", folder / "pid"
    boot = f'echo $BASHPID > {group}/cgroup.procs; exec unshare -f -p -m -u -C --kill-child bash -c "$0" bash "$1"'
    with log.open("wb") as output:
        outer = subprocess.Popen(
            ["bash", "-c", boot, BOOT, str(folder / "units")], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def inner() -> int:
            if outer.poll() is not None:
                pytest.skip(f"systemd does not start here: {log.read_text()[-300:]}")
            found = children.read_text().split()
            name = Path(f"/proc/{found[0]}/comm").read_text().strip() if found else ""
            return int(found[0]) if name == "systemd" else 0

        running = Systemd(eventually(inner, "systemd"), log)
        pid.write_text(str(running.pid))
        eventually(lambda: "test.target" in running.systemctl("list-units", check=False), "systemd to answer")
        yield running
    finally:
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)  # all in its process namespace go with it
        outer.kill()
        outer.wait()
        eventually(lambda: _removed(group), "its control groups to be empty")


def _removed(group: Path) -> bool:
    """Remove a control group and those below."""
    try:
        for path in sorted(group.rglob("*/"), reverse=True):
            if path.is_dir():
                path.rmdir()
        group.rmdir()
    except OSError:
        return False
    return True
