import subprocess
import sys

import pytest

from ckptsvc.errors import ConfigError
from ckptsvc.settings import StoreSettings
from ckptsvc.storage import Store, canonical, connect, schemes
from ckptsvc.storage.opening import open_store


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a distribution that registers drivers, as pip would: a module and its metadata on the path."""

    def install(name: str, points: dict[str, str], source: str = "") -> None:
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{scheme} = {value}\n" for scheme, value in points.items())
        (metadata / "entry_points.txt").write_text(f"[ckptsvc.storage]\n{lines}")
        (tmp_path / f"{name}.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_a_path_is_a_file_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert canonical("runs/one") == f"file://{tmp_path}/runs/one"
    assert canonical(str(tmp_path / "a" / ".." / "b")) == f"file://{tmp_path}/b"
    assert connect("runs/100%").url == f"file://{tmp_path}/runs/100%"
    assert canonical("FILE:///x") == "file:///x"


def test_connecting_makes_nothing(tmp_path):
    connect(str(tmp_path / "run")).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "memory://", "memory:///../x y"])
def test_bad_addresses(url):
    with pytest.raises(ConfigError):
        connect(url)


@pytest.mark.parametrize(("scheme", "near"), [("flie", "file"), ("memroy", "memory")])
def test_an_unknown_scheme_names_the_nearest(scheme, near):
    with pytest.raises(ConfigError, match=f"did you mean {near}://"):
        connect(f"{scheme}:///x")


def test_an_unknown_scheme_names_all():
    with pytest.raises(ConfigError, match=r"known: .*file.*memory"):
        connect("zzzzzz://x")


def test_options_reach_the_driver():
    assert connect("memory://options", {"capacity": 3}).capabilities()
    with pytest.raises(ConfigError, match="capacity"):
        connect("memory://options", {"capacity": -1})
    with pytest.raises(ConfigError, match="volume"):
        connect("memory://options", {"volume": 1})


def test_a_foreign_driver_is_found(plugin):
    plugin(
        "ckptsvc_test_foreign",
        {"foreign": "ckptsvc_test_foreign:connect"},
        "from ckptsvc.storage import connect as inner\n"
        "def connect(url, options):\n"
        "    return inner('memory://' + url.removeprefix('foreign://'), options)\n",
    )
    store = connect("foreign://x")
    assert isinstance(store, Store)
    assert store.url == "memory://x"
    assert {"file", "memory", "foreign"} <= set(schemes())


def test_a_driver_that_returns_no_store_is_refused(plugin):
    plugin("ckptsvc_test_odd", {"odd": "ckptsvc_test_odd:connect"}, "def connect(url, options):\n    return 5\n")
    with pytest.raises(ConfigError, match="int, which is no store"):
        connect("odd://x")


def test_a_driver_that_cannot_be_loaded_is_named(plugin):
    plugin("ckptsvc_test_broken", {"broken": "ckptsvc_test_broken:connect"}, "import not_installed_anywhere\n")
    with pytest.raises(ConfigError, match=r"ckptsvc_test_broken.*not_installed_anywhere"):
        connect("broken://x")


def test_a_driver_that_can_end_requests_is_told_after_which_time(plugin):
    for name, takes in (("ckptsvc_test_ends", True), ("ckptsvc_test_waits", False)):
        lines = f"TAKES_TIMEOUT = {takes}\ndef connect(url, options):\n    raise ValueError(sorted(options.items()))\n"
        plugin(name, {name.rpartition("_")[2]: f"{name}:connect"}, lines)
    settings = StoreSettings(timeout=7.5, options={"ends": {"a": 1}})
    for url, options, told in (
        ("ends://x", {}, [("a", 1), ("timeout", 7.5)]),
        ("ends://x", {"timeout": 3}, [("a", 1), ("timeout", 3)]),
        ("waits://x", {}, []),
    ):
        with pytest.raises(ValueError) as caught:
            open_store(url, options, settings)
        assert caught.value.args == (told,)


def test_two_drivers_for_a_scheme_are_a_conflict(plugin):
    for name in ("ckptsvc_test_one", "ckptsvc_test_two"):
        plugin(name, {"twice": f"{name}:connect"})
    with pytest.raises(ConfigError, match=r"ckptsvc_test_one.*ckptsvc_test_two|ckptsvc_test_two.*ckptsvc_test_one"):
        connect("twice://x")


def test_built_in_schemes_cannot_be_taken_over(plugin):
    plugin("ckptsvc_test_thief", {"memory": "ckptsvc_test_thief:connect"}, "def connect(url, options):\n    1 / 0\n")
    assert connect("memory://mine").url == "memory://mine"


def test_opening_a_built_in_store_imports_little():
    """No scan of the installed distributions, no numpy, no torch: a worker starts in milliseconds."""
    script = (
        "import sys\n"
        "from ckptsvc.storage import connect\n"
        "connect('memory://x'), connect('/tmp')\n"
        "print(*sorted({'numpy', 'torch', 'pytest', 'stamina', 'asyncio'} & set(sys.modules)))\n"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
