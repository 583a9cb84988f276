"""What is shipped: the wheel, the Debian package and the container file. What takes long is slow."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ckptsvc

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"
LINTER = Path(sys.prefix) / "containerfile" / "node_modules" / ".bin" / "dockerfile-utils"


def run(*command: str, **environ: str) -> str:
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def instructions() -> list[tuple[str, str]]:
    """Of the container file, lines that go on joined."""
    text = re.sub(r"\\\n\s*", " ", CONTAINERFILE.read_text())
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word.isupper()]


def test_the_container_file_says_what_it_should() -> None:
    told = instructions()
    assert {rest.split()[0] for word, rest in told if word == "FROM"} == {"${BASE}"}
    (base,) = [rest for word, rest in told if word == "ARG"]
    assert re.fullmatch(r"BASE=docker\.io/library/python:\d+\.\d+\.\d+-\S+", base), "a base that does not change"
    last = dict(told)  # the last of each
    assert last["USER"] == "1000:1000"
    assert last["ENTRYPOINT"] == '["ckptsvc"]'
    for word, rest in told:
        if word == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    assert not any(word == "ADD" for word, _ in told)


def test_a_linter_finds_nothing_wrong_with_the_container_file() -> None:
    if not LINTER.exists():
        pytest.skip("needs dockerfile-utils: make test-service installs it")
    assert run(str(LINTER), "lint", str(CONTAINERFILE)) == ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    constraints = str(ROOT / "constraints.txt")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--build-constraint", constraints,
        "-w", str(folder), str(ROOT))  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_has_all_that_the_program_needs(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "ckptsvc", ROOT / "storage_drivers" / "ckptsvc_drivers"):
        for path in source.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{source.name}/{path.relative_to(source)}" in names
    assert {"ckptsvc/py.typed", "ckptsvc_drivers/posix.py", "ckptsvc/rpc/v1/agent_pb2.py"} <= names
    assert not any(name.startswith(("tests/", "storage_drivers/")) for name in names)
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(venv))
    run(str(venv / "bin" / "pip"), "install", "--quiet", "--no-input", "-c", str(ROOT / "constraints.txt"), str(wheel))
    clean = {"PYTHONPATH": "", "HOME": str(tmp_path)}
    assert ckptsvc.__version__ in run(str(venv / "bin" / "ckptsvc"), "--version", **clean)
    code = "import ckptsvc, ckptsvc.agent.server, ckptsvc_drivers.posix; print(ckptsvc.__file__)"
    assert run(str(venv / "bin" / "python"), "-P", "-c", code, **clean).startswith(str(venv))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_debian_package_has_units_settings_and_a_program_that_runs(wheel: Path, tmp_path: Path) -> None:
    for program in ("dpkg-deb", "/usr/bin/python3"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    pip = f"{sys.executable} -m pip"
    run("sh", str(ROOT / "deploy" / "debian" / "build.sh"), str(wheel), pip, str(tmp_path), PYTHONPATH="")
    (package,) = tmp_path.glob("ckptsvc_*.deb")
    listed = run("dpkg-deb", "-c", str(package))
    for path in (
        "./opt/ckptsvc/bin/ckptsvc",
        "./usr/bin/ckptsvc -> /opt/ckptsvc/bin/ckptsvc",
        "./usr/lib/systemd/system/ckptsvc-agent.service",
        "./usr/lib/systemd/system/ckptsvc-agent@.service",
        "./usr/lib/systemd/user/ckptsvc-agent.service",
        "./usr/lib/tmpfiles.d/ckptsvc.conf",
        "./etc/ckptsvc/config.toml",
        "./usr/share/doc/ckptsvc/README.md",
    ):
        assert f" {path}\n" in listed
    assert not re.search(r"^\S+ (?!root/root)", listed, re.MULTILINE)
    assert run("dpkg-deb", "-f", str(package), "Version").strip() == ckptsvc.__version__
    run("dpkg-deb", "-x", str(package), str(tmp_path / "x"))
    opt = tmp_path / "x" / "opt" / "ckptsvc"
    clean = {"PYTHONPATH": "", "HOME": str(tmp_path)}
    said = run(str(opt / "bin" / "python"), "-P", "-m", "ckptsvc.cli.main", "agent", "--check-config",
        CKPTSVC_CONFIG=str(tmp_path / "x" / "etc" / "ckptsvc" / "config.toml"), **clean)  # fmt: skip
    assert "Traceback" not in said
    assert (opt / "bin" / "ckptsvc").read_text().splitlines()[0].startswith("#!/opt/ckptsvc/bin/python")
    for name in ("postinst", "prerm", "postrm"):
        run("sh", "-n", str(ROOT / "deploy" / "debian" / name))
    assert [path.name for path in (opt / "bin").iterdir() if not path.is_symlink()] == ["ckptsvc"]
    assert not list(opt.rglob("direct_url.json")), "it says where the wheel was built"
    if shutil.which("lintian"):
        run("lintian", "--fail-on", "error,warning", str(package))
