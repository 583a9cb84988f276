"""What the tests with real processes share: a private world for each test, and jobs in it."""

import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `harness`

from harness.etcd import EtcdServer, etcd_server
from harness.job import Launch
from harness.runtime import Runtime
from harness.zygote import Zygote

FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where what cannot be started here is to be found."""
    parser.addoption("--lustre-dir", help="a directory on a real Lustre, for -m lustre")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember that a test failed, so that `runtime` shows what its agents had to say."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def _zygote() -> Iterator[Callable[[], Zygote]]:
    """Starts the zygote when the first rank is wanted."""
    started: list[Zygote] = []

    def get() -> Zygote:
        if not started:
            started.append(Zygote())
        return started[0]

    yield get
    for zygote in started:
        zygote.close()


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """Private sockets and arenas. The test fails that leaves a process or an arena behind."""
    private = Runtime()
    yield private
    if request.node.stash.get(FAILED, False):
        print(f"--- agents\n{private.log()}")
    problems = private.close()
    assert not problems, "\n".join(problems)


@pytest.fixture
def launch(runtime: Runtime, tmp_path: Path, _zygote: Callable[[], Zygote]) -> Launch:
    """Starts jobs in the private runtime."""
    return Launch(runtime, tmp_path / "jobs", _zygote)


@pytest.fixture(scope="session")
def _programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are unpacked that are not installed."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def etcd(tmp_path: Path, _programs: Path) -> Iterator[EtcdServer]:
    """A real etcd of the test's own; the test is skipped where there is none to be had."""
    folder = tmp_path / "etcd"
    folder.mkdir()
    with etcd_server(_programs, folder) as server:
        yield server


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks a real checkpoint of another framework (tests/data/README.md) once; tests must not change it."""
    unpacked: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in unpacked:
            unpacked[name] = tmp_path_factory.mktemp(name)
            with tarfile.open(Path(__file__).parent / "data" / "foreign" / f"{name}.tar.xz") as archive:
                archive.extractall(unpacked[name], filter="data")
        return unpacked[name]

    return get
