"""What an agent needs to start: found out by the agent itself, and beforehand by `ckptsvc agent --check-config`.

An agent that makes way for its successor has that command run first (process.trial): what would end the successor's
start must not end the service. Nothing is made, opened or listened at here.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ckptsvc.agent.coordination.elections import login_of
from ckptsvc.agent.http.access import http_token, require_certificates
from ckptsvc.config import check_place, limit_on
from ckptsvc.errors import ConfigError
from ckptsvc.rpc.accounts import user_name
from ckptsvc.rpc.etcd import EtcdUrl, Login, parse_url
from ckptsvc.rpc.secret import require_loopback
from ckptsvc.rpc.trust import ByCertificate
from ckptsvc.settings import Settings
from ckptsvc.storage.registry import check_options
from ckptsvc.telemetry.traces import check_traces


@dataclass(frozen=True, slots=True)
class Ground:
    """What has been found.

    Attributes:
        certificates: what agents of several hosts know each other by; None: all are on this one.
        etcd: where coordinators are elected, and how to log in there; None: they are not.
        arena_bytes: what all arenas together may take.
    """

    certificates: ByCertificate | None
    etcd: tuple[EtcdUrl, Login] | None
    arena_bytes: int


def ground_of(
    settings: Settings, environ: Mapping[str, str], on_expiry: Callable[[float], None] = lambda when: None
) -> Ground:
    """Whether an agent can start with these settings, here and as this user.

    Args:
        settings: the settings.
        environ: of the process.
        on_expiry: told until when the certificate is valid, now and whenever there is another one.

    Raises:
        ConfigError: it cannot; says which setting is wrong.
    """
    arena_bytes = check_node(settings)
    agent, certificates = settings.agent, None
    if settings.tls.is_set:
        tls = settings.tls.of(user_name(os.geteuid()))
        certificates = ByCertificate(tls.ca_file, tls.cert_file, tls.key_file, on_expiry)
    if agent.metrics_listen is not None and agent.http_token_file:
        http_token(settings, environ)
    etcd = (url := parse_url(agent.coordination), login_of(url, settings.etcd)) if agent.coordination else None
    return Ground(certificates, etcd, arena_bytes)


def check_node(settings: Settings) -> int:
    """That part of it which is the same for all users of a node; returns the bytes that all arenas may take.

    Raises:
        ConfigError: as `ground_of`.
    """
    agent = settings.agent
    if not settings.tls.is_set:
        require_loopback(agent.listen.host, f"agent.listen is {agent.listen}")
    if agent.metrics_listen is not None:
        require_certificates(agent.metrics_listen, there=settings.tls.is_set)
    if agent.coordination:
        parse_url(agent.coordination)
    check_traces(settings.traces)
    for scheme, options in settings.store.options.items():
        check_options(scheme, options)
    arena_bytes = limit_on(settings.arena.limit, settings.arena.dir, "arena.dir")
    if not os.access(settings.arena.dir, os.W_OK | os.X_OK):
        raise ConfigError(f"arena.dir: {settings.arena.dir}: user {user_name(os.geteuid())} may not write there")
    return arena_bytes


def remarks(settings: Settings) -> Iterator[str]:
    """What keeps no agent from starting, and is a mistake all the same, as a rule."""
    if settings.tiers.local:  # an agent does without it: see `LocalTier.open`
        try:
            check_place(settings.tiers.local, "tiers.local")
        except ConfigError as error:
            yield f"{error.what} ({error.hint}): it is not used"
    for key, names in (("users", settings.system.users), ("operators", settings.system.operators)):
        for name in names:
            if not _is_known(name):
                yield f"system.{key}: this node knows no {'group' if name[0] == '@' else 'user'} {name.lstrip('@')}"


def _is_known(name: str) -> bool:
    with suppress(KeyError):
        if name.startswith("@"):
            grp.getgrnam(name[1:])
        elif not name.isdecimal():  # a number needs no name
            pwd.getpwnam(name)
        return True
    return False
