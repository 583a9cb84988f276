"""Containers of a test's own: podman with its images, settings and state in a folder, and a Debian to begin with.

No registry is asked: the base image is this machine's Debian, made by mmdebstrap from the mirrors that apt knows. Needs
root, podman, runc and mmdebstrap; the test is skipped where they are not, or where no container can be started.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BASE = "localhost/base"
PACKAGES = "python3-venv,ca-certificates,systemd-sysv,dbus"
IMAGE = "localhost/ckptsvc"
LOCKS = Path("/dev/shm/libpod_lock")
RESTRICTED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")
"""As a Kubernetes has it that is strict (and deploy/kubernetes)."""

_SETTINGS = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
netns = "none"
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


class Podman:
    """One that has its own images."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files, processes = (min(resource.getrlimit(each)[1], 4096) if resource.getrlimit(each)[1] > 0 else 4096
            for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))  # fmt: skip
        settings = folder / "containers.conf"
        settings.write_text(_SETTINGS.format(files=files, processes=processes))
        self._environ = os.environ | {"CONTAINERS_CONF": str(settings)}
        self._command = ["podman", "--root", str(folder / "images"), "--runroot", str(folder / "run")]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run podman; whatever comes of it."""
        command = [*self._command, *arguments]
        return subprocess.run(
            command, env=self._environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def __call__(self, *arguments: str) -> str:
        """Run podman, which must succeed; returns what it prints."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def build(self, root: Path) -> None:
        """The image, from the container file; pip gets at packages as it does on this machine."""
        options = ["-v", "/etc/ssl/certs:/etc/ssl/certs:ro"]
        if Path("/etc/pip.conf").exists():
            options += ["--secret", "id=pip.conf,src=/etc/pip.conf"]
        self("build", "--format=docker", "--isolation=chroot", "--network=host", "--pull=never", *options,
            "--build-arg", f"BASE={BASE}", "-f", str(root / "deploy" / "container" / "Containerfile"),
            "-t", IMAGE, str(root))  # fmt: skip

    @contextlib.contextmanager
    def started(self, name: str, *arguments: str) -> Iterator[str]:
        """A container that runs, until the end."""
        self("run", "-d", "--name", name, *arguments)
        try:
            yield name
        finally:
            self.call("rm", "-f", "-t", "2", name)


@contextlib.contextmanager
def podman(folder: Path) -> Iterator[Podman]:
    """One with the base image."""
    absent = [program for program in ("podman", "runc", "mmdebstrap") if shutil.which(program) is None]
    if os.geteuid() != 0 or absent:
        pytest.skip(f"needs root and {', '.join(absent) or 'nothing else'}: make test-service installs it")
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    tree = folder / "base.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(tree)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no Debian can be had here: {made.stderr[-300:]}")
    parents, had_locks = _parents(), LOCKS.exists()
    found = Podman(folder)
    try:
        found("import", str(tree), BASE)
        tree.unlink()
        tried = found.call("run", "--rm", BASE, "true")
        if tried.returncode:
            pytest.skip(f"no container can be started here: {tried.stderr[-300:]}")
        yield found
    finally:
        found.call("rm", "--all", "--force", "-t", "2")
        found.call("system", "reset", "--force")
        for group in _parents() - parents:
            for each in sorted((path for path in group.rglob("*/") if path.is_dir()), reverse=True):
                each.rmdir()
            group.rmdir()
        if not had_locks:
            LOCKS.unlink(missing_ok=True)


def _parents() -> set[Path]:
    """What podman leaves of control groups."""
    return {path for path in Path("/sys/fs/cgroup").glob("**/libpod_parent") if path.is_dir()}
