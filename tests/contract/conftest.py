"""File systems to test stores on."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.realfs.ceph import Ceph

from ckptsvc.storage import Store, connect


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where `store` keeps its objects; not made yet."""
    return tmp_path / "run"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    """A posix store below the test's own directory."""
    store = connect(str(root))
    yield store
    store.close()


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory on the tmpfs of /dev/shm."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    path = Path(tempfile.mkdtemp(prefix="ckptsvc-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def quick_place(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory where a sync costs nothing, if there is one: for what does not depend on the disk."""
    return request.getfixturevalue("shared_memory") if os.access("/dev/shm", os.W_OK) else tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 12 MiB of its own, to be filled or remounted."""
    path = tmp_path / "small"
    path.mkdir()
    mount(path, "-t", "tmpfs", "-o", "size=12m", "ckptsvc-test")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A Ceph cluster, which takes half a minute to start."""
    cluster = Ceph()
    yield cluster
    cluster.close()


def mount(path: Path, *arguments: str) -> None:
    """Call mount(8); skip the test where that is not permitted."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount(8)")
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
