"""`ckptsvc support-bundle`: what somebody else needs to find out what went wrong, in one file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from ckptsvc.cli import others
from ckptsvc.cli.agents import agent_directory
from ckptsvc.cli.bundle_parts import Part, parts
from ckptsvc.cli.terminal import Screen, emit, note, printable, size
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.accounts import Account

MAX_BYTES = 64 << 20
"""Bytes of all parts together; what comes after is left out, and named as such."""

README = """What `ckptsvc support-bundle` has collected on {host} at {when}.

Secrets are taken out: values under such names in settings and documents, credentials in URLs, private keys, and the
values of known ones (environment, store.options, password files) wherever they occur. Names of users, hosts, jobs and
files are in it. Look through it before you hand it on. MANIFEST.json lists all parts, and what could not be had.
"""


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.tar.gz",
    help="Where to; default: ckptsvc-support-HOST-TIME.tar.gz here.")  # fmt: skip
@click.option("--dir", "directory", type=click.Path(path_type=Path),
    help="Directory of the sockets; default: as for `ckptsvc agent`.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@others.options
def command(output: Path | None, directory: Path | None, as_json: bool) -> int:
    """Collect logs, settings, metrics, versions, status and incidents of this user's agents on this node, in one file.

    Secrets are left out. Nothing is sent anywhere, nothing is asked of stores or of other nodes, and no agent has to
    run. The file can be read by you alone. "-" is standard output. Root's own has what the node's service says as well;
    with --user or --all-users root gets a file for each, made with the rights of that user.

    \b
    JSON: {"file", "bytes", "parts": [{"name", "about", "bytes", "cut",
      "problem"}]}; for others {"users": [{"user", "uid", "file", "bytes"}]}
    cut says that only the end of it is there; problem why it is not, or null.
    """  # noqa: D301  \b is click's
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if accounts := others.wanted():
        return _of_others(accounts, output, when, as_json)
    path = output or Path(f"ckptsvc-support-{socket.gethostname()}-{when}.tar.gz")
    collected = list(parts(directory or agent_directory(), os.environ))
    if str(path) == "-":
        _pack(sys.stdout.buffer, f"ckptsvc-support-{socket.gethostname()}-{when}", _contents(collected, when)[0])
        return 0
    contents, kept = _contents(collected, when)
    with _made(path) as file:
        _pack(file, path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar"), contents)
    nbytes = path.stat().st_size
    if as_json:
        emit({"file": str(path), "bytes": nbytes, "parts": kept})
        return 0
    rows = []
    for part in kept:
        said = part["problem"] or part["about"] + (" (its end)" if part["cut"] else "")
        rows.append([printable(part["name"]), size(part["bytes"]), printable(said)])

    def style(row: int, column: str) -> str:
        return "doubt" if kept[row]["problem"] and column == "ABOUT" else ""

    Screen().table(["PART", "SIZE", "ABOUT"], rows, right=("SIZE",), fold="ABOUT", style=style)
    note(f"wrote {printable(str(path))}, {size(nbytes)}; look through it before you hand it on")
    return 0


def _of_others(accounts: list[Account], output: Path | None, when: str, as_json: bool) -> int:
    """A file for each user, which his own process has made and root puts down; returns the exit status."""
    if output is not None and len(accounts) > 1:
        raise InvalidInput("one file cannot be for several users", hint="leave -o out, or name one user with --user")
    wrote: list[dict[str, Any]] = []
    failed = False
    for account in accounts:
        said = others.ask(account, "support-bundle", "--output", "-")
        failed = failed or said.status != 0
        if said.err:
            note(printable(f"user {account.name}"))
        for line in said.err.splitlines():
            note(f"  {printable(line)}")
        if said.status != 0:
            continue
        path = output or Path(f"ckptsvc-support-{socket.gethostname()}-{when}-{account.uid}.tar.gz")
        try:
            with _made(path) as file:
                file.write(said.out)
        except InvalidInput as error:  # a file of that name may be one user's doing, and is no reason to leave out all
            if len(accounts) == 1:
                raise
            failed = True
            note(printable(f"error: of user {account.name}: {error.what}"))
            continue
        wrote.append({"user": account.name, "uid": account.uid, "file": str(path), "bytes": len(said.out)})
    if as_json:
        emit({"users": wrote})
    else:
        for each in wrote:
            note(printable(f"wrote {each['file']}, {size(each['bytes'])}, of user {each['user']}"))
    return others.PARTLY_DONE if failed else 0


@contextlib.contextmanager
def _made(path: Path) -> Iterator[BinaryIO]:
    """A new file for its owner alone.

    Raises:
        InvalidInput: it cannot be written, or there is one of that name.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}", hint="-o FILE takes another one") from error


def _contents(collected: list[Part], when: str) -> tuple[list[tuple[str, bytes]], list[dict[str, Any]]]:
    """The files in it, and what MANIFEST.json says of them."""
    kept: list[dict[str, Any]] = []
    contents: list[tuple[str, bytes]] = []
    left = MAX_BYTES
    for part in collected:
        problem, data = part.problem, part.data
        if len(data) > left:
            problem, data = "left out: the bundle would be too large", b""
        left -= len(data)
        said = {"name": part.name, "about": part.about, "bytes": len(data), "cut": part.cut, "problem": problem or None}
        kept.append(said)
        if data:
            contents.append((part.name, data))
    manifest = {"created": when, "host": socket.gethostname(), "parts": kept}
    contents.insert(0, ("MANIFEST.json", json.dumps(manifest, indent=1).encode()))
    contents.insert(0, ("README.txt", README.format(host=socket.gethostname(), when=when).encode()))
    return contents, kept


def _pack(file: BinaryIO, folder: str, contents: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=file, mode="w|gz") as archive:
        for name, data in contents:
            about = tarfile.TarInfo(f"{folder}/{name}")
            about.size, about.mtime, about.mode = len(data), int(time.time()), 0o600
            archive.addfile(about, io.BytesIO(data))
