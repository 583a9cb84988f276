"""What the tests with real processes share: a private world for each test, and jobs in it."""

import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `harness`

from harness.etcd import EtcdServer, etcd_server
from harness.job import Launch
from harness.object_servers import (
    GOOGLE_ENVIRON,
    AzureContainer,
    ObjectServer,
    S3AsGoogle,
    S3Bucket,
    address_of,
    as_s3,
    azurite,
    moto,
)
from harness.proxy import Proxy, Rule, proxy
from harness.runtime import Runtime
from harness.zygote import Zygote

FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where what cannot be started here is to be found."""
    parser.addoption("--lustre-dir", help="a directory on a real Lustre, for -m lustre")
    parser.addoption("--no-skips", action="store_true", help="a test that cannot run here is a failure")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember that a test failed, so that `runtime` shows what its agents had to say."""
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep that a test runs in this process (the audit log) is not this user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A server that speaks S3, for all tests; each makes buckets of its own."""
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def _azurite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


def _set_credentials(monkeypatch: pytest.MonkeyPatch, server: ObjectServer) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_bucket(moto_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A new bucket at moto; the environment has credentials for it."""
    _set_credentials(monkeypatch, moto_server)
    return S3Bucket(moto_server.endpoint)


@pytest.fixture
def azure_container(_azurite_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> AzureContainer:
    """A new container at Azurite; the environment has credentials for it."""
    _set_credentials(monkeypatch, _azurite_server)
    return AzureContainer(_azurite_server.endpoint)


@pytest.fixture
def between(moto_server: ObjectServer) -> Iterator[Proxy]:
    """What lies between a store and moto, and does as it is told."""
    with proxy(address_of(moto_server.endpoint)) as found:
        yield found


@pytest.fixture
def google_bucket(moto_server: ObjectServer, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> S3AsGoogle:
    """A new bucket at moto, for a client of Google's through `between`, which translates."""
    _set_credentials(monkeypatch, moto_server)
    for name, value in GOOGLE_ENVIRON.items():
        monkeypatch.setenv(name, value)
    between.rules.append(Rule("", adapt=as_s3))
    return S3AsGoogle(moto_server.endpoint, between.endpoint)


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
