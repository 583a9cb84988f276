"""For root: what a command shows of another user, shown by a process that is that user.

It reads his files with his rights, so a link or a pipe of his making leads nowhere that he could not go himself. What
it says is his word: of a bounded size, waited for a bounded time, and no more than text at root's terminal.
"""

from __future__ import annotations

import json
import os
import pwd
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import click
import msgspec

from ckptsvc.agent.supervisor import records
from ckptsvc.agent.supervisor.supervisor import environment_of
from ckptsvc.cli.terminal import Screen, emit, note, printable
from ckptsvc.config import load
from ckptsvc.errors import EXIT_STATUS, AgentUnavailable, InvalidInput, NotFound
from ckptsvc.rpc import service
from ckptsvc.rpc.accounts import Account, account_of

PARTLY_DONE = 3
"""Exit status where there is something wrong with one of several users."""

MOST = 80 << 20
"""Bytes that are taken of one user."""

PATIENCE = 60.0
"""Seconds for one user; his files may be on a server that hangs, and he may stop the process."""

BECOME = (sys.executable, "-P", "-m", "ckptsvc.agent.supervisor.become")
COMMAND = (sys.executable, "-P", "-m", "ckptsvc.cli.main")
_SETTING, _PASSED = "CKPTSVC_", ("CKPTSVC_CONFIG", "CKPTSVC_SYSTEM_")
_OURS = ("user", "all_users", "as_json")


class Said(NamedTuple):
    """What the process of one user said: its exit status, and both of its outputs."""

    account: Account
    status: int
    out: bytes
    err: str


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --user and --all-users; it asks `wanted` first."""
    command = click.option("--user", metavar="NAME", expose_value=False, callback=_keep,
        help="For root: of that user, with his rights.")(command)  # fmt: skip
    return click.option("--all-users", is_flag=True, expose_value=False, callback=_keep,
        help="For root: of all users of this node's service.")(command)  # fmt: skip


def _keep(context: click.Context, option: click.Parameter, value: object) -> None:
    context.meta[f"ckptsvc.{option.name}"] = value


def wanted() -> list[Account]:
    """Whose files the command that runs is about, where that was said.

    Raises:
        InvalidInput: this is not root.
        NotFound: there is no such user.
        AgentUnavailable: nobody has had an agent of this node's service.
    """
    meta = click.get_current_context().meta
    name, every = meta.get("ckptsvc.user"), meta.get("ckptsvc.all_users")
    if name is None and not every:
        return []
    if os.geteuid() != 0:
        raise InvalidInput("only root looks into the files of others", hint="sudo ckptsvc ...")
    if name is not None:
        return [_account(name)]
    directory = Path(load(os.environ).system.directory)
    try:
        numbers = sorted(int(name) for name in os.listdir(directory / records.RECORDS) if name.isdecimal())
    except OSError as error:
        raise AgentUnavailable(f"no service for all users has run in {directory}: {error.strerror}") from None
    found = [account for account in map(account_of, numbers) if account.name]
    if not found:
        raise AgentUnavailable("nobody has had an agent of this node's service yet")
    return found


def audit_file() -> Path | None:
    """Where it is taken down what root orders of users' agents, whose own audit logs are theirs to edit; None: nowhere.

    Only root has such a file.
    """
    given = load(os.environ).system.audit_file if os.geteuid() == 0 else ""
    return Path(given) if given else None


def _account(name: str) -> Account:
    try:
        return account_of(pwd.getpwnam(name).pw_uid)
    except KeyError:
        account = account_of(int(name)) if name.isdecimal() and int(name) < 1 << 32 else None
    if account is None or not account.name:
        raise NotFound(f"this node has no user {printable(name)!r}")
    return account


def show(accounts: list[Account], as_json: bool) -> int:
    """Show what the command that runs says to each of them; returns the exit status."""
    ended = [ask(account, *arguments(*(["--json"] if as_json else []))) for account in accounts]
    if as_json:
        emit({"users": [_plain(said) for said in ended]})
    for said in ended if not as_json else ():
        screen = Screen()
        screen.line(screen.paint(f"user {printable(said.account.name)}", "head"))
        for line in said.out.decode("utf-8", "replace").splitlines():
            screen.line(f"  {printable(line)}")  # the margin is root's: no line of one user's begins another's
        for line in said.err.splitlines():
            note(f"  {printable(line)}")
    if len(ended) == 1:
        return ended[0].status
    nothing_there = (0, EXIT_STATUS[NotFound.code])
    return 0 if all(said.status in nothing_there for said in ended) else PARTLY_DONE


def _plain(said: Said) -> dict[str, Any]:
    fields = {"user": said.account.name, "uid": said.account.uid, "status": said.status, "said": said.err}
    try:
        found = fields | {"result": msgspec.json.decode(said.out or b"null")}
        json.dumps({"users": [found]}, allow_nan=False)  # what can be read is not always to be written: one too deep
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return fields | {"result": None}
    return found


def arguments(*more: str) -> list[str]:
    """The command that runs, with what it was given, but for what says whose; and with more flags."""
    context = click.get_current_context()
    given, names = [str(context.info_name), *more], list[str]()
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in _OURS or value in (None, False):
            continue
        if isinstance(parameter, click.Argument):
            names.append(str(value))
        elif value is True:
            given.append(parameter.opts[-1])
        else:
            given += [parameter.opts[-1], str(value)]
    return [*given, *(["--", *names] if names else [])]


def ask(account: Account, *words: str) -> Said:
    """Run a command of ours as a user, and take what it says; where that cannot be done, it is an error of his."""
    become = (*BECOME, str(account.uid), str(account.gid), ",".join(map(str, account.groups)))
    try:
        process = subprocess.Popen(
            [*become, *COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd="/", env=_environment(account), start_new_session=True, umask=0o077,
        )  # fmt: skip
    except OSError as error:
        problem = f"error: cannot become user {account.name}: {error.strerror}\n"
        return Said(account, EXIT_STATUS[AgentUnavailable.code], b"", problem)
    assert process.stdout
    assert process.stderr
    with process.stdout as out, process.stderr as err:
        texts, problem = _read(out, err)
    if problem:
        process.kill()
    try:
        status = process.wait(5.0)
    except subprocess.TimeoutExpired:  # whom its user traces, he reaps first
        status, problem = 1, problem or "it does not end"
    told = texts[1].decode("utf-8", "replace") + (f"error: of user {account.name}: {problem}\n" if problem else "")
    return Said(account, status if status > 0 else int(bool(status or problem)), texts[0], told)


def _environment(account: Account) -> dict[str, str]:
    """That of the user's agent, as far as it can be known; of root's own settings, only where the others are."""
    system = load(os.environ).system
    given = {
        name: value for name, value in os.environ.items() if not name.startswith(_SETTING) or name.startswith(_PASSED)
    }
    mine = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name}
    mine |= {name: os.environ[name] for name in ("COLUMNS",) if name in os.environ}
    directory = Path(system.directory)
    if service.is_there(directory):
        mine["CKPTSVC_AGENT_SOCKET_DIR"] = str(service.directory_of(directory, account.uid))
    # Not what `system.environment` lists: what this shell has of that is root's, and users read it in /proc.
    return environment_of(given, ()) | mine


def _read(out: IO[bytes], err: IO[bytes]) -> tuple[list[bytes], str]:
    """Both to their ends, and why that was not waited for, or ""."""
    texts, until = [bytearray(), bytearray()], time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as ready:
        for number, stream in enumerate((out, err)):
            ready.register(stream, selectors.EVENT_READ, number)
        while ready.get_map():
            left = until - time.monotonic()
            if left <= 0 or sum(map(len, texts)) > MOST:
                return [bytes(text) for text in texts], "it takes too long" if left <= 0 else "it says too much"
            for key, _ in ready.select(left):
                data = os.read(key.fd, 1 << 16)
                texts[key.data] += data
                if not data:
                    ready.unregister(key.fileobj)
    return [bytes(text) for text in texts], ""
