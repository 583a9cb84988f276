"""Sources and their order, refusals, units, and the private directory."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc import config, quantities
from ckptsvc import settings as settings_of
from ckptsvc.config import load
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address, Every, Limit

MIB = 1024**2


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(**arguments: object) -> str:
    with pytest.raises(ConfigError) as error:
        load(**{"environ": {}, "files": []} | arguments)  # type: ignore[arg-type]
    return str(error.value)


# ---- sources


def test_defaults_need_nothing() -> None:
    settings = load({}, files=[])
    assert settings.save.every == Every(0, 600.0)
    assert settings.arena == settings_of.ArenaSettings()
    assert set(settings.origin.values()) == {"default"}


def test_later_sources_win_and_say_so(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", "[save]\nkeep = 4\nthreads = 5\ntimeout = '20min'\nevery = 7\n")
    second = write(tmp_path / "b.toml", "[save]\nthreads = 6\ntimeout = 60\nevery = 8\n")
    settings = load({"CKPTSVC_SAVE_TIMEOUT": "90s", "CKPTSVC_SAVE_EVERY": "9"}, {"save.every": "10"}, [first, second])
    save = settings.save
    assert (save.keep, save.threads, save.timeout, save.every) == (4, 6, 90.0, Every(10, 0.0))
    origins = [settings.origin[f"save.{key}"] for key in ("keep", "threads", "timeout", "every", "extent")]
    assert origins == [str(first), str(second), "CKPTSVC_SAVE_TIMEOUT", "argument", "default"]


def test_the_files_that_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = write(tmp_path / "etc.toml", "")
    user = write(tmp_path / "xdg" / "ckptsvc" / "config.toml", "")
    home = write(tmp_path / ".config" / "ckptsvc" / "config.toml", "")
    monkeypatch.setattr(config, "SYSTEM_FILE", system)
    named = tmp_path / "not-there.toml"
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path), "CKPTSVC_CONFIG": str(named)}
    assert config.config_files(environ) == [system, user, named]
    assert config.config_files({"HOME": str(tmp_path)}) == [system, home]
    assert config.config_files({"XDG_CONFIG_HOME": "relative"}) == [system]
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "none")
    assert config.config_files({}) == []
    with pytest.raises(ConfigError, match="not-there"):
        load(environ)


def test_every_setting_has_its_variable() -> None:
    values = {
        "agent.socket_dir": "/run/x",
        "agent.listen": "0.0.0.0:7070",
        "agent.metrics_listen": "off",
        "agent.http_token_file": "/etc/token",
        "agent.name": "n1",
        "agent.coordinator": "[::1]:9",
        "agent.coordination": "etcd://a:1",
        "log.format": "json",
        "log.level": "debug",
        "traces.endpoint": "http://collector:4317",
        "traces.ratio": "0.25",
        "traces.ca_file": "/etc/ca.pem",
        "agent.incidents_dir": "/var/lib/ckptsvc/incidents",
        "agent.audit_file": "/var/log/ckptsvc/audit.jsonl",
        "arena.dir": "/mnt/shm",
        "arena.limit": "25%",
        "arena.slots": "3",
        "save.every": "100",
        "save.keep": "2",
        "save.extent": "4MiB",
        "save.threads": "8",
        "save.deadline": "0",
        "save.timeout": "1h",
        "save.early_cores": "1",
        "save.incremental": "true",
        "save.full_every": "4",
        "save.compression": "auto",
        "save.compression_level": "3",
        "scheduler.margin": "off",
        "scheduler.drain": "true",
        "launch.standby": "false",
        "launch.preload": "torch, transformers.models",
        "launch.standby_memory": "1GiB",
        "launch.preflight": "false",
        "launch.grow": "90s",
        "launch.crash_loop": "0",
        "launch.state": "/shared/state",
        "store.url": "memory://x",
        "store.retries": "0",
        "store.timeout": "500ms",
        "store.options": '{"s3": {"region": "eu-west-1"}}',
        "store.max_write_rate": "2GB/s",
        "tiers.local": "file:///local/nvme",
        "tiers.local_keep": "3",
        "tiers.local_limit": "2GiB",
        "tiers.durable_every": "4",
        "tiers.durable_backlog": "1",
        "health.enabled": "false",
        "health.automatic": "never",
        "health.floor": "2s",
        "health.factor": "4",
        "health.startup": "20min",
        "health.confirm": "5min",
        "health.give_up": "1h",
        "retention.every": "6h",
        "retention.best": "3",
        "retention.metric": "val_loss",
        "retention.order": "highest",
        "retention.age": "7d",
        "retention.rate": "20",
        "nics.enabled": "false",
        "nics.root": "/host",
        "tls.ca_file": "/ca",
        "tls.cert_file": "/cert",
        "tls.key_file": "/key",
        "tiers.partner": "xor",
        "tiers.group": "8",
        "tiers.domain": "rack-7",
        "tiers.partner_every": "2",
        "tiers.replicas": "false",
        "tiers.partner_rate": "500MB",
        "tiers.rebuild": "2min",
        "etcd.ttl": "5s",
        "etcd.user": "root",
        "etcd.password_file": "/p",
        "etcd.ca_file": "/ca",
        "etcd.cert_file": "/cert",
        "etcd.key_file": "/key",
        "arena.job_limit": "50%",
        "system.directory": "/run/c",
        "system.users": "alice,@physics",
        "system.min_uid": "500",
        "system.operators": "@wheel",
        "system.metrics_group": "prometheus",
        "system.audit_file": "/var/log/a",
        "system.max_users": "9",
        "system.user_memory": "8GiB",
        "system.user_jobs": "3",
        "system.user_ranks": "96",
        "system.linger": "5min",
        "system.umask": "027",
        "system.environment": "HTTPS_PROXY",
    }
    settings = load({f"CKPTSVC_{key.replace('.', '_').upper()}": value for key, value in values.items()}, files=[])
    assert set(settings.origin) == set(values)
    assert "default" not in settings.origin.values()
    assert settings.agent == settings_of.AgentSettings(
        socket_dir="/run/x",
        listen=Address("0.0.0.0", 7070),
        metrics_listen=None,
        http_token_file="/etc/token",
        name="n1",
        coordinator=Address("::1", 9),
        coordination="etcd://a:1",
        incidents_dir="/var/lib/ckptsvc/incidents",
        audit_file="/var/log/ckptsvc/audit.jsonl",
    )
    assert settings.arena == settings_of.ArenaSettings(
        dir="/mnt/shm", limit=Limit(0, 0.25), slots=3, job_limit=Limit(0, 0.5)
    )
    assert settings.system == settings_of.SystemSettings(
        directory="/run/c", users=("alice", "@physics"), min_uid=500, operators=("@wheel",), max_users=9,
        metrics_group="prometheus", audit_file="/var/log/a",
        user_memory=Limit(8 << 30, 0.0), user_jobs=3, user_ranks=96, linger=300.0, umask=0o27,
        environment=("HTTPS_PROXY",),
    )  # fmt: skip
    assert settings.save == settings_of.SaveSettings(
        every=Every(100, 0.0), keep=2, extent=4 * MIB, threads=8, deadline=0.0, timeout=3600.0, early_cores=1,
        incremental=True, full_every=4, compression="auto", compression_level=3,
    )  # fmt: skip
    assert settings.retention == settings_of.RetentionSettings(
        every=Every(0, 21600.0), best=3, metric="val_loss", order="highest", age=604800.0, rate=20.0
    )
    assert settings.scheduler == settings_of.SchedulerSettings(margin=None, drain=True)
    assert settings.store == settings_of.StoreSettings(
        url="memory://x", retries=0, timeout=0.5, max_write_rate=2 * 10**9, options={"s3": {"region": "eu-west-1"}}
    )
    assert settings.tiers == settings_of.TierSettings(
        partner="xor",
        group=8,
        domain="rack-7",
        partner_every=2,
        partner_rate=500_000_000,
        rebuild=120.0,
        local="/local/nvme",
        local_keep=3,
        local_limit=Limit(2048 * MIB, 0.0),
        durable_every=4,
        durable_backlog=1,
    )
    assert settings.health == settings_of.HealthSettings(
        enabled=False, automatic="never", floor=2.0, factor=4.0, startup=1200.0, confirm=300.0, give_up=3600.0
    )
    assert settings.nics == settings_of.NicsSettings(enabled=False, root="/host")
    assert settings.launch == settings_of.LaunchSettings(
        standby=False,
        preload=("torch", "transformers.models"),
        standby_memory=1024 * MIB,
        preflight=False,
        grow=90.0,
        crash_loop=0,
        state="/shared/state",
    )


@pytest.mark.parametrize("value", ["torch;os", "1torch", "a..b", "../x"])
def test_names_of_modules_are_names(value: str) -> None:
    with pytest.raises(ConfigError, match="a list of modules"):
        load({"CKPTSVC_LAUNCH_PRELOAD": value}, files=[])


def test_no_module_need_be_preloaded() -> None:
    assert load({}, {"launch.preload": []}, []).launch.preload == ()


def test_an_argument_that_was_not_given_changes_nothing() -> None:
    assert load({"CKPTSVC_SAVE_KEEP": "7"}, {"save.keep": None}, []).save.keep == 7


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load({}, files=[]).save.keep = 1  # type: ignore[misc]


def test_every_field_is_described() -> None:
    for section, struct in config._SECTIONS.items():
        for field in msgspec.structs.fields(struct):
            assert f"\n        {field.name}: " in f"{struct.__doc__}", f"{section}.{field.name}"


# ---- refusals


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[save]\nevrey = 3", ["save.evrey", "save.every"]),
        ("[sav]\nevery = 3", ["sav", "save"]),
        ("every = 3", ["every"]),
        ("save = 3", ["[save]"]),
        ("[save", ["table"]),
        ("[save]\nkeep = 'many'", ["save.keep", "'many'", "int"]),
        ("[save]\nkeep = true", ["save.keep"]),
        ("[save]\nkeep = -1", ["save.keep", ">= 0"]),
        ("[save]\nextent = 5000", ["save.extent", "4096"]),
        ("[save]\nextent = 0", ["save.extent"]),
        ('[save]\nextent = "65MiB"', ["save.extent", "67108864"]),
        ("[store]\ntimeout = 0", ["store.timeout", "3600"]),
        ('[store]\ntimeout = "2h"', ["store.timeout", "7200 s"]),
        ("[save]\ndeadline = '1h'", ["save.deadline", "save.timeout"]),
        ("[save]\nevery = 1.5", ["save.every", "10min"]),
        ("[agent]\nlisten = 'off'", ["agent.listen", "127.0.0.1:0"]),
        ("[agent]\nsocket_dir = 'here'", ["agent.socket_dir", "absolute"]),
        ("[arena]\ndir = 'here'", ["arena.dir", "absolute"]),
        ("[nics]\nroot = 'here'", ["nics.root", "absolute"]),
        ("[etcd]\nttl = '1s'", ["etcd.ttl", "2 to 60"]),
        ("[nics]\nenabled = 'perhaps'", ["nics.enabled", "perhaps"]),
        ("[arena]\nlimit = '150%'", ["arena.limit", "50%"]),
        ("[scheduler]\nmargin = 'soon'", ["scheduler.margin", "90s"]),
        ("[scheduler]\ndrain = 'maybe'", ["scheduler.drain", "'maybe'"]),
        ("[store]\nurl = 3", ["store.url"]),
        ("[health]\nautomatic = 'yes'", ["health.automatic", "'yes'", "one of launched, always, never"]),
        ("[health]\nfloor = 0", ["health.floor", "health.enabled"]),
        ("[health]\nfactor = 0.5", ["health.factor", ">= 1"]),
        ("[retention]\nbest = 3", ["retention.best", "retention.metric"]),
        ("[retention]\nevery = 0", ["retention.every", "10min"]),
        ("[retention]\norder = 'up'", ["retention.order", "lowest, highest"]),
        ("[origin]\nx = 'y'", ["origin"]),
    ],
)
def test_a_wrong_file_is_refused_by_place_key_and_remedy(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "wrong.toml", text)
    message = refusal(files=[path])
    assert all(word in message for word in [str(path), *words]), message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    assert str(path) in refusal(files=[path])
    assert str(tmp_path) in refusal(files=[tmp_path])


def test_an_unknown_argument_is_refused() -> None:
    assert "save.keep" in refusal(overrides={"save.kep": 3})


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("CKPTSVC_SAVE_EVRY", "CKPTSVC_SAVE_EVERY"),
        ("CKPTSVC_SAVE_ANYTHING", "CKPTSVC_SAVE_"),
        ("CKPTSVC_STORE", "CKPTSVC_STORE_URL"),
        ("CKPTSVC_SAVES_EVERY", "CKPTSVC_SAVE_EVERY"),
        ("CKPTSVC_STORAGE_URL", "CKPTSVC_STORE_URL"),
    ],
)
def test_a_mistaken_variable_is_refused_with_the_nearest(variable: str, nearest: str) -> None:
    message = refusal(environ={variable: "1"})
    assert variable in message
    assert nearest in message.replace(variable, "", 1)


def test_variables_of_others_are_let_pass() -> None:
    others = [
        *config.OTHER_VARIABLES,
        "CKPTSVC_ROOT",
        "CKPTSVC_VERSION",
        "CKPTSVC_SERVICE_HOST",
        "CKPTSVC_AGENT_SERVICE_PORT_GRPC",
        "CKPTSVC_AGENT_PORT",
        "CKPTSVC_STORE_PORT_9000_TCP_ADDR",
        "OTHER_SAVE_EVERY",
    ]
    assert load(dict.fromkeys(others, "tcp://10.0.0.1:1"), files=[]) == load({}, files=[])


# ---- units


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("1B", 1),
        ("8GiB", 8 * 1024**3),
        (" 8 gib ", 8 * 1024**3),
        ("1.5 TB", 1_500_000_000_000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1PiB", 1024**5),
    ],
)
def test_sizes(value: object, nbytes: int) -> None:
    assert quantities.parse_size(value) == nbytes


@pytest.mark.parametrize(
    "value", ["", "GiB", "8G", "8 giga", "-1", -1, True, 1.5, "0.3B", "1e9", "8GiB 1", None, "9" * 400]
)
def test_not_sizes(value: object) -> None:
    with pytest.raises(ConfigError, match="8GiB"):
        quantities.parse_size(value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (0.25, 0.25),
        ("90", 90.0),
        ("90s", 90.0),
        ("10 min", 600.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("500ms", 0.5),
        ("1h30min", 5400.0),
        ("1h 30min 2s", 5402.0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert quantities.parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "min",
        "10m",
        "10 minutes",
        "-5s",
        -5,
        "1h30",
        "1 30",
        True,
        None,
        "inf",
        float("nan"),
        float("inf"),
    ],
)
def test_not_durations(value: object) -> None:
    with pytest.raises(ConfigError, match="10min"):
        quantities.parse_duration(value)


def test_intervals() -> None:
    assert quantities.parse_every(500) == quantities.parse_every("500") == Every(500, 0.0)
    assert quantities.parse_every("10min") == Every(0, 600.0)
    assert quantities.parse_every("off") is None
    for wrong in (0, "0", "0s", -3, True, None, 1.5, [], "often"):
        with pytest.raises(ConfigError):
            quantities.parse_every(wrong)


def test_limits() -> None:
    assert quantities.parse_limit("50%").of(1000) == 500
    assert quantities.parse_limit("8MiB").of(1000) == 8 * MIB
    for wrong in ("0%", "101%", 0, "0", "-5%", "half"):
        with pytest.raises(ConfigError):
            quantities.parse_limit(wrong)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "node-7.cluster:65535", "[::1]:7070"])
def test_addresses_go_there_and_back(text: str) -> None:
    assert str(quantities.parse_address(text)) == text


@pytest.mark.parametrize("wrong", ["", "host", ":80", "host:", "host:65536", "::1:80", "a b:1", "host:1:2", 80, None])
def test_not_addresses(wrong: object) -> None:
    with pytest.raises(ConfigError):
        quantities.parse_address(wrong)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.integers())


@given(st.sampled_from(sorted(config._FIELDS)), SCALARS)
def test_any_value_is_taken_or_refused_by_its_key(key: str, value: object) -> None:
    try:
        settings = load({}, {key: value}, [])
    except ConfigError as error:
        message = str(error)
    else:
        message = settings.origin[key] + key
    assert key in message


# ---- the private directory


def test_systemds_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert config.runtime_dir({"RUNTIME_DIRECTORY": f"{tmp_path}:/run/other"}) == tmp_path
    with pytest.raises(ConfigError, match="RUNTIME_DIRECTORY"):
        config.runtime_dir({"RUNTIME_DIRECTORY": str(tmp_path / "missing")})


def test_run_user_is_used_only_if_somebody_made_ours_there(tmp_path: Path) -> None:
    uid = os.geteuid()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run" / "user" / str(uid)).mkdir(parents=True)
    fallback = config.runtime_dir({}, root=tmp_path)
    assert fallback == tmp_path / "tmp" / f"ckptsvc-{uid}"
    assert fallback.stat().st_mode & 0o777 == 0o700
    assert config.runtime_dir({"TMPDIR": "/elsewhere"}, root=tmp_path) == fallback, "made once, found again"
    ours = tmp_path / "run" / "user" / str(uid) / "ckptsvc"
    ours.mkdir(mode=0o700)
    assert config.runtime_dir({}, root=tmp_path) == ours


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "ckptsvc-12345").mkdir(parents=True, mode=0o700)
    with pytest.raises(ConfigError, match=f"belongs to user {os.geteuid()}"):
        config.runtime_dir({}, uid=12345, root=tmp_path)


def test_a_link_a_file_and_an_open_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    place = tmp_path / "tmp" / f"ckptsvc-{os.geteuid()}"
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    place.symlink_to(target)
    with pytest.raises(ConfigError, match="not a directory"):
        config.runtime_dir({}, root=tmp_path)
    place.unlink()
    place.touch()
    with pytest.raises(ConfigError, match="not a directory"):
        config.runtime_dir({}, root=tmp_path)
    place.unlink()
    place.mkdir()
    place.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        config.runtime_dir({}, root=tmp_path)


def test_no_place_at_all_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RUNTIME_DIRECTORY"):
        config.runtime_dir({}, root=tmp_path / "missing")


class TestTablesOfOptions:
    @pytest.mark.parametrize("text", ['{"s3": {"part": 8}}', "s3 = {part = 8}", "s3.part = 8"])
    def test_they_are_a_line_of_json_or_toml(self, text: str) -> None:
        assert load({"CKPTSVC_STORE_OPTIONS": text}, files=[]).store.options == {"s3": {"part": 8}}

    def test_or_tables_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text('[store.options.s3]\npart = 8\n[store.options.az]\naccount = "a"\n')
        assert load({}, files=[tmp_path / "c.toml"]).store.options == {"s3": {"part": 8}, "az": {"account": "a"}}

    @pytest.mark.parametrize("text", ["8", "part = 8", '{"s3": 8}', "{", "[]", "s3 = {"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"store\.options"):
            load({"CKPTSVC_STORE_OPTIONS": text}, files=[])


@pytest.mark.parametrize(
    ("text", "rate"), [("2GB/s", 2 * 10**9), ("512 MiB/s", 512 * MIB), ("1000", 1000), (4096, 4096), ("off", None)]
)
def test_rates(text: object, rate: int | None) -> None:
    assert quantities.parse_rate_or_off(text) == rate
    assert load({}, {"store.max_write_rate": text}, []).store.max_write_rate == rate


@pytest.mark.parametrize("text", ["fast", "0", "2GB/min", "-1", True, 1.5, "/s", ""])
def test_what_is_no_rate(text: object) -> None:
    with pytest.raises(ConfigError, match="rate"):
        quantities.parse_rate_or_off(text)


@pytest.mark.parametrize("text", ["nvme", "./nvme", "s3://bucket", "file://nvme", "/a\0b", 3, None])
def test_what_is_no_directory_of_the_node(text: object) -> None:
    with pytest.raises(ConfigError, match="directory"):
        quantities.parse_directory_or_off(text)
    assert quantities.parse_directory_or_off("off") == ""


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"tiers.partner": "rs", "tiers.group": 2}, "tiers.group"),
        ({"tiers.partner_rate": "1KiB"}, "tiers.partner_rate"),
        ({"tiers.rebuild": "2h"}, "tiers.rebuild"),
        ({"tiers.partner": "mirror"}, "tiers.partner"),
        ({"tiers.partner": "xor", "tiers.replicas": True}, "tiers.replicas"),
        ({"tiers.partner": "copy", "tiers.partner_every": 2, "tiers.replicas": True}, "tiers.replicas"),
        ({"tiers.group": 1}, "tiers.group"),
    ],
)
def test_tiers_that_cannot_be_are_refused_by_key(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load({}, values, files=[])
    assert load({}, {"tiers.partner": "rs", "tiers.group": 3, "tiers.partner_rate": 0}, files=[]).tiers.group == 3


# ---- accounts, variables, umask


def test_accounts_are_names_numbers_and_groups() -> None:
    assert quantities.parse_accounts(" alice, 1000,@ck-users ,,") == ("alice", "1000", "@ck-users")
    assert quantities.parse_accounts(["a.b@realm", "DOM\\u$"]) == ("a.b@realm", "DOM\\u$")
    assert quantities.parse_variables("A, _b2") == ("A", "_b2")
    for bad in ("a b", "@", "-x", "a:b", "a/../b", 7, ["a", 1], {"a": 1}):
        with pytest.raises(ConfigError):
            quantities.parse_accounts(bad)
    for bad in ("A=1", "2A", "A-B", 7):
        with pytest.raises(ConfigError):
            quantities.parse_variables(bad)


def test_a_umask_is_octal_and_leaves_the_owner_alone() -> None:
    assert [quantities.parse_umask(text) for text in ("022", "077", "0", "0o027", "7")] == [0o22, 0o77, 0, 0o27, 7]
    for bad in ("0700", "888", "", 18, "0x1f", None, "-1"):
        with pytest.raises(ConfigError):
            quantities.parse_umask(bad)


def test_certificates_may_be_named_by_user() -> None:
    given = {"tls.ca_file": "/etc/ca.pem", "tls.cert_file": "/etc/{user}.pem", "tls.key_file": "/home/{user}/key.pem"}
    own = load({}, given, []).tls.of("alice")
    assert (own.ca_file, own.cert_file, own.key_file) == ("/etc/ca.pem", "/etc/alice.pem", "/home/alice/key.pem")
