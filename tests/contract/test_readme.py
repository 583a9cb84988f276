"""The driver in storage_drivers/README.md is a driver: registered as it says, it passes the suite."""

import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ckptsvc.errors import ConfigError
from ckptsvc.storage import connect
from ckptsvc.storage.testing import StoreTests

README = Path(__file__).parents[2] / "storage_drivers" / "README.md"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Put the module and the metadata that pip would make on the path."""
    source = re.search(r"```python\n(import sqlite3\n.*?)```", README.read_text(), re.DOTALL)[1]
    point = re.search(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert point == '[project.entry-points."ckptsvc.storage"]\nsqlite = "my_package.sqlite_store:connect"\n'
    site = tmp_path_factory.mktemp("site")
    (site / "my_package").mkdir()
    (site / "my_package" / "sqlite_store.py").write_text(source)
    metadata = site / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ckptsvc.storage]\nsqlite = my_package.sqlite_store:connect\n")
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))


class TestReadme(StoreTests):
    @pytest.fixture
    def store(self, quick_place):
        return connect(f"sqlite://{quick_place}/objects.db")

    def _database(self, store):
        return closing(sqlite3.connect(store.url.removeprefix("sqlite://")))

    def raw_read(self, store, key):
        with self._database(store) as database:
            return database.execute("SELECT content FROM objects WHERE key = ?", (key,)).fetchone()[0]

    def raw_write(self, store, key, content):
        with self._database(store) as database, database:
            database.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, 0)", (key, content))

    def test_unknown_options_are_refused(self, store):
        with pytest.raises(ConfigError, match="volume"):
            connect(store.url, {"volume": 1})
