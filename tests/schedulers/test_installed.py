"""What is shipped, in use: the image is built and serves a job, the package is installed into a Debian that runs.

Both take a base of Debian packages and the libraries of constraints.txt from wherever this machine has them: minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.damage import assert_intact
from harness.podman import BASE, IMAGE, RESTRICTED, Podman, podman
from harness.runtime import eventually, tmpfs

import ckptsvc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SOCKETS = "/run/ckptsvc/agent"
TORCH = """
import sys
sys.path.append("/torch")  # after the image's own libraries
exec(open("/train.py").read())
"""


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    with podman(tmp_path_factory.mktemp("podman")) as found:
        yield found


@pytest.fixture(scope="module")
def image(containers: Podman) -> str:
    containers.build(ROOT)
    return IMAGE


def test_the_image_has_the_program_its_checks_and_nothing_of_the_build(containers: Podman, image: str) -> None:
    assert f"version {ckptsvc.__version__}" in containers("run", "--rm", *RESTRICTED, image, "--version")
    (told,) = json.loads(containers("image", "inspect", image))
    assert told["Config"]["User"] == "1000:1000"
    assert told["Config"]["StopSignal"] == "SIGTERM"
    assert f"{SOCKETS}/ready" in told["Healthcheck"]["Test"]
    assert containers("run", "--rm", "--entrypoint", "ls", image, "/opt").split() == ["ckptsvc"]
    assert containers.call("run", "--rm", "--entrypoint", "ls", image, "/etc/pip.conf", "/src").stdout == ""


def test_its_agent_says_what_it_lacks_on_a_file_system_it_may_not_write_to(containers: Podman, image: str) -> None:
    done = containers.call("run", "--rm", *RESTRICTED, image)
    assert done.returncode == 2
    assert f"cannot make {SOCKETS}: Read-only file system" in done.stderr


def test_a_job_beside_its_agent_saves_as_in_a_pod(containers: Podman, image: str, tmp_path: Path) -> None:
    """Sockets, memory, network and process ids are shared; no capability, no writing to the image."""
    torch = pytest.importorskip("torch")
    folders = {tmp_path / "run": "/run/ckptsvc", tmp_path / "checkpoints": "/checkpoints"}
    for folder in folders:
        folder.mkdir()
        os.chown(folder, 0, 1000)
        folder.chmod(0o2777)  # as a volume of Kubernetes with fsGroup
    (tmp_path / "start.py").write_text(TORCH)
    libraries = Path(torch.__file__).parents[1]
    script = ROOT / "tests" / "schedulers" / "train.py"
    with tmpfs(tmp_path / "shm", "512m") as memory:
        memory.chmod(0o1777)
        shared = [f"-v={outside}:{inside}" for outside, inside in {**folders, memory: "/dev/shm"}.items()]
        with containers.started(
            "agent", *RESTRICTED, *shared, "--memory=512m", image, "agent", "--dir", SOCKETS
        ) as agent:
            eventually(lambda: containers.call("healthcheck", "run", agent).returncode == 0, "a good health", 60)
            version = containers("exec", agent, "python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
            if version.strip() != f"{sys.version_info[0]}.{sys.version_info[1]}":
                pytest.skip(f"this torch is not for the image's Python {version}")
            said = containers("run", "--rm", "--network", f"container:{agent}", "--pid", f"container:{agent}", *shared,
                "--cap-drop=all", "--security-opt=no-new-privileges", "--tmpfs=/tmp", f"-v={libraries}:/torch:ro",
                f"-v={script}:/train.py:ro", f"-v={tmp_path / 'start.py'}:/start.py:ro",
                image, "run", "--nnodes=1", "--nproc-per-node=2", "/start.py", "file:///checkpoints/run", "30", "0.1",
            )  # fmt: skip
            assert "finished step=30" in said
            assert assert_intact(tmp_path / "checkpoints" / "run")[0] == 30
            assert "uid=1000" in containers("exec", agent, "id")
            containers("stop", "-t", "30", agent)
            assert containers("inspect", "--format", "{{.State.ExitCode}}", agent).strip() == "0"
            log = containers.call("logs", agent).stderr
            assert "step 30 committed" in log
            assert " stopped" in log
            assert "Traceback" not in log
        assert list(memory.rglob("*.arena")) == []


PROCESSES = """
for each in /proc/[0-9]*; do
    command=$(tr '\\0' ' ' < "$each/cmdline" 2> /dev/null)
    case $command in /opt/ckptsvc/*) echo "$(stat -c %U "$each") $command" ;; esac
done
"""
OWN = "import ckptsvc.rpc.service as s, pathlib; print(s.own_agent(pathlib.Path('/run/ckptsvc')))"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deb")
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--build-constraint", "constraints.txt", "-w", str(folder), "."]
    subprocess.run(wheel, cwd=ROOT, check=True, capture_output=True)
    build = ["sh", "deploy/debian/build.sh", *map(str, folder.glob("*.whl")), " ".join(pip), str(folder)]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, check=True, capture_output=True)
    (found,) = folder.glob("*.deb")
    return found


def test_the_package_is_installed_upgraded_and_gone_without_a_trace(containers: Podman, package: Path) -> None:
    """In a Debian that has been started, with a systemd of its own."""
    with containers.started("debian", "--systemd=always", f"-v={package.parent}:/deb:ro", BASE, "/sbin/init") as debian:

        def sh(command: str) -> str:
            return containers("exec", debian, "sh", "-c", command)

        def main_pid() -> str:
            return sh("systemctl show --value -p MainPID ckptsvc-agent").strip()

        eventually(
            lambda: "running" in containers.call("exec", debian, "systemctl", "is-system-running").stdout, "it", 60
        )
        sh("useradd -m alice; find / -xdev | grep -v /var/log | sort > /before")
        install = f"dpkg -i /deb/{package.name}"
        sh(install)
        assert ckptsvc.__version__ in sh("ckptsvc --version")
        assert sh("dpkg --verify ckptsvc") == ""
        assert sh("systemd-analyze verify --man=no ckptsvc-agent.service ckptsvc-agent@alice.service") == ""
        sh("systemctl enable --now ckptsvc-agent")
        sh("systemctl enable ckptsvc-agent@alice; systemctl --global enable ckptsvc-agent")
        assert sh(f'su alice -c "/opt/ckptsvc/bin/python -c \\"{OWN}\\""').split() == ["/run/ckptsvc/users/1000"]
        assert {line.split()[0] for line in sh(PROCESSES).splitlines()} == {"root", "alice"}
        assert "agent of" in sh("su alice -c 'ckptsvc status'")

        before = main_pid()
        sh(install)  # an upgrade
        eventually(lambda: "begins anew" in sh("journalctl -u ckptsvc-agent"), "the service to make way")
        assert main_pid() == before
        assert sh("systemctl show --value -p ActiveState -p NRestarts ckptsvc-agent").split() == ["0", "active"]

        sh("dpkg --purge ckptsvc")
        eventually(lambda: sh(PROCESSES) == "", "users' agents to be gone")
        assert "ckptsvc" not in sh("systemctl list-units --all --plain --no-legend")
        sh("find / -xdev | grep -v /var/log | sort > /after")
        added = [line for line in sh("diff /before /after || true").splitlines() if line.startswith(">")]
        assert [line for line in added if not line.endswith(("/before", "/after"))] == []
        assert "ckptsvc" not in sh("ls /run /dev/shm /var/log /etc /var/lib")
