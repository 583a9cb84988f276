"""`ckptsvc certs`: certificates for agents on several hosts, where nobody else makes them."""

from __future__ import annotations

import getpass
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from ckptsvc.cli.terminal import Screen, age, duration, emit, note, printable
from ckptsvc.config import load, private_directory
from ckptsvc.errors import ConfigError, InvalidInput
from ckptsvc.rpc.certificates import Pair, identity_of, issue, make_authority, name_of
from ckptsvc.rpc.trust import contents

CA, CA_KEY, CERT, KEY = "ca.pem", "ca.key", "cert.pem", "key.pem"
"""Names of the files."""

PARTLY_DONE = 3


@click.group()
def command() -> None:
    """Make and show the certificates by which agents of several hosts know each other.

    \b
    A site that has an authority uses that one: an agent's certificate needs
    the subject alternative name DNS:<user>.user.ckptsvc, and the usages
    clientAuth and serverAuth. For a cluster of your own:
    \b
        ckptsvc certs init ~/authority
        ckptsvc certs issue ~/authority --out ~/.config/ckptsvc/tls
    \b
    and, where all nodes read it (~/.config/ckptsvc/config.toml):
    \b
        [tls]
        ca_file = "/home/me/.config/ckptsvc/tls/ca.pem"
        cert_file = "/home/me/.config/ckptsvc/tls/cert.pem"
        key_file = "/home/me/.config/ckptsvc/tls/key.pem"
    """  # noqa: D301  \b is click's


@command.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="ckptsvc", show_default=True, help="What the authority is called.")
@click.option("--days", type=click.FloatRange(0, 36500, min_open=True), default=365.0, show_default=True)
def init(directory: Path, name: str, days: float) -> None:
    """Make an authority in DIRECTORY; whoever can read it there can be any user."""
    private_directory(directory.absolute())
    made = make_authority(name, days)
    _write_new(directory / CA_KEY, made.key, private=True)
    _write_new(directory / CA, made.certificate, private=False)
    note(f"{directory / CA}: an authority for {duration(days * 86400)}; keep {directory / CA_KEY} to yourself")


@command.command("issue")
@click.argument("authority", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--user", default=getpass.getuser, show_default="you", help="Whose agents they are for.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of the files.")
@click.option("--days", type=click.FloatRange(0, 36500, min_open=True), default=30.0, show_default=True)
def issue_one(authority: Path, user: str, out: Path, days: float) -> None:
    """Make a certificate for the agents of a user, or renew it: agents that run take note.

    \b
    Writes ca.pem, cert.pem and key.pem, key and certificate each at once.
    """  # noqa: D301  \b is click's
    name = name_of(user)
    given = Pair(_contents(authority / CA), contents("the authority's key", str(authority / CA_KEY), private=True))
    made = issue(given, user, days)
    private_directory(out.absolute())
    _replace(out / CA, given.certificate, private=False)
    _replace(out / KEY, made.key, private=True)
    _replace(out / CERT, made.certificate, private=False)
    note(f"{out / CERT}: {name}, for {duration(days * 86400)}")


@command.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def show(files: tuple[Path, ...], as_json: bool) -> int:
    """Show whose certificates these are and until when; default: tls.cert_file.

    \b
    JSON: {"certificates": [{"file", "name", "not_before", "not_after",
      "issuer", "valid"}]}; times in ISO 8601.
    Exit status: 0; 3 one of them is not valid now.
    """  # noqa: D301  \b is click's
    settings = load(os.environ).tls
    if not files and not settings.is_set:
        raise InvalidInput("no certificate is set", hint="give a file, or set tls.cert_file")
    rows = []
    for path in files or (Path(settings.cert_file),):
        key = None if files else contents("tls.key_file", settings.key_file, private=True)
        found = identity_of(_contents(path), key, str(path))
        valid = found.not_before <= time.time() < found.not_after
        rows.append((path, found, valid))
    if as_json:
        emit({"certificates": [{"file": str(path), "name": found.name, "not_before": _iso(found.not_before),
            "not_after": _iso(found.not_after), "issuer": found.issuer, "valid": valid}
            for path, found, valid in rows]})  # fmt: skip
    else:
        screen = Screen()
        for path, found, valid in rows:
            screen.line(f"{printable(str(path))}: {screen.paint(found.name, 'head')}, signed by {found.issuer}")
            until = f"until {_iso(found.not_after)}"
            left = duration(found.not_after - time.time())
            if valid:
                screen.line(f"  {screen.paint('valid', 'good')} {until}, {left} more")
            elif time.time() < found.not_before:
                screen.line(f"  {screen.paint('not valid before', 'bad')} {_iso(found.not_before)}")
            else:
                past = datetime.fromtimestamp(found.not_after, UTC)
                screen.line(f"  {screen.paint('expired', 'bad')} {age(past)} ago, {until}")
    return 0 if all(valid for _, _, valid in rows) else PARTLY_DONE


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _write_new(path: Path, data: bytes, *, private: bool) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600 if private else 0o644)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="another directory, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, data: bytes, *, private: bool) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    _write_new(fresh, data, private=private)
    fresh.replace(path)
