"""Elected coordinators: what control.election decides, done through etcd.

One key for each job, made with a lease. Every agent of the job reads it, waits for it to change, and reads it again:
what an agent believes is always what a quorum has said, never what a watch brought.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import grpc
import msgspec

from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.coordination.uplink import LocalUplink, Uplink
from ckptsvc.agent.local import Local
from ckptsvc.control.election import CANDIDATES_WAIT, RENEWALS, Campaign, Election, Follow, Holder, Lead, Verdict
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, CoordinationUnavailable
from ckptsvc.quantities import parse_address
from ckptsvc.rpc.etcd import Etcd, EtcdUrl, Found, Login, check_reachable, parse_url
from ckptsvc.rpc.trust import Trust, contents
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import EtcdSettings
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

LOOK_EVERY = 10.0
"""Seconds after which the key is read again though nobody has said that it changed."""

RETRY = 0.5
"""Seconds between attempts while etcd does not answer."""

UNWANTED_FOR = 10.0
"""Seconds without anything of a job on this node after which the agent takes no part in its elections any more."""

LIST_PATIENCE = 10.0
"""Seconds a rank that asks for snapshots waits for a coordinator to be there."""

MEASURE_PATIENCE = 2.0
"""Seconds that a node's first look at its network waits for a coordinator to be there."""

MAX_VALUE = 4096
"""Bytes of a key's value that are looked at."""


class _Value(msgspec.Struct, frozen=True):
    """What the key holds, as JSON; `proof` shows that the writer knows the secret of the user's agents."""

    node: str
    address: str
    mark: str
    proof: str


def clock() -> float:
    """Seconds that go on while this process is frozen and while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def login_of(url: EtcdUrl, settings: EtcdSettings) -> Login:
    """Read the files that the settings name.

    Raises:
        ConfigError: one cannot be read, is not private, or a password would go over the network in the clear.
    """
    if bool(settings.user) != bool(settings.password_file):
        raise ConfigError("etcd.user and etcd.password_file go together")
    if bool(settings.cert_file) != bool(settings.key_file) or (settings.cert_file and not settings.ca_file):
        raise ConfigError("etcd.cert_file needs etcd.key_file and etcd.ca_file")
    if settings.user and not settings.ca_file and not url.is_loopback:
        raise ConfigError("etcd.password_file: a password leaves this machine encrypted only", hint="set etcd.ca_file")
    tls = None
    if settings.ca_file:
        chain = contents("etcd.cert_file", settings.cert_file, private=False) if settings.cert_file else None
        key = contents("etcd.key_file", settings.key_file, private=True) if settings.key_file else None
        roots = contents("etcd.ca_file", settings.ca_file, private=False)
        tls = grpc.ssl_channel_credentials(roots, key, chain)
    password = ""
    if settings.password_file:
        raw = contents("etcd.password_file", settings.password_file, private=True)
        try:
            password = raw.decode().rstrip("\r\n")
        except UnicodeError:
            raise ConfigError(f"etcd.password_file: {settings.password_file} is not UTF-8") from None
    return Login(tls, settings.user, password)


def reachable(where: str, settings: EtcdSettings) -> str:
    """The URL of etcd in its normal form, once it has answered: who starts a job hears at once what is wrong.

    Raises:
        ConfigError: it is none, or the settings for it are wrong.
        CoordinationUnavailable: nobody answers there.
    """
    url = parse_url(where)
    asyncio.run(check_reachable(url, login_of(url, settings)))
    return str(url)


class Elections:
    """The elections of all jobs of one agent.

    Args:
        url: the etcd.
        login: how to log in there.
        ttl: seconds a coordinator's lease lives.
        local: the agent's state.
        trust: what the user's agents know each other by.
        address: where other agents reach this one.
        new_shell: makes the coordinator of a term; its second argument says whether it may still decide.
    """

    def __init__(
        self, url: EtcdUrl, login: Login, ttl: float, local: Local, trust: Trust, address: str,
        new_shell: Callable[[int, Callable[[], bool]], CoordinatorShell],
    ) -> None:  # fmt: skip
        self.url, self.ttl, self.local, self.address, self.new_shell = url, ttl, local, address, new_shell
        self.trust, self.etcd = trust, Etcd(url, login)
        self.mark = secrets.token_hex(8)
        self._by_job: dict[str, ElectedUplink] = {}
        local.elect, local.leading = self.uplink, self.shells

    def uplink(self, way: str) -> Uplink:
        """Take part in the election of a job's coordinator; `way` is "URL#job"."""
        url, _, job = way.partition("#")
        if parse_url(url) != self.url:
            raise ConfigError(f"the job elects its coordinator at {url}, this agent at {self.url}",
                hint="the agent was there before, with another agent.coordination")  # fmt: skip
        uplink = self._by_job[job] = ElectedUplink(self, way, job)
        return uplink

    def forget(self, uplink: ElectedUplink) -> None:
        """There is nothing of the job on this node any more."""
        if self._by_job.get(uplink.job) is uplink:
            del self._by_job[uplink.job]
        self.local.hang_up(uplink.way)

    def shells(self) -> list[CoordinatorShell]:
        """The coordinators in this process."""
        return [uplink.shell for uplink in self._by_job.values() if uplink.shell is not None]

    def shell_of(self, job: str, term: int) -> CoordinatorShell:
        """The coordinator of that job and term; AgentUnavailable where it is not in this process."""
        uplink = self._by_job.get(job)
        if uplink is None or uplink.shell is None or uplink.shell.term != term:
            raise AgentUnavailable(f"this agent does not coordinate job {job} in term {term}")
        return uplink.shell

    def status(self) -> list[dict[str, Any]]:
        """Who coordinates each job, as this agent believes."""
        return [uplink.status() for uplink in self._by_job.values()]

    async def close(self) -> None:
        """Hang up; the uplinks have been closed."""
        await self.etcd.close()


class ElectedUplink:
    """The way to whoever coordinates a job now. Without one, reports are dropped: a new coordinator hears all anew."""

    def __init__(self, elections: Elections, way: str, job: str) -> None:
        self.way, self.job = way, job
        self.shell: CoordinatorShell | None = None
        self._all, self._local = elections, elections.local
        self._election = Election(job, elections.mark)
        self._key = f"{elections.url.prefix}/coordinators/{os.geteuid()}/{quote(job, safe='')}"
        self._inner: Uplink | None = None
        self._there = asyncio.Event()  # there is an inner uplink
        self._leads = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None
        self._problem = ""
        self._unwanted_since: float | None = None
        self._tasks = [asyncio.ensure_future(self._run()), asyncio.ensure_future(self._renew())]

    @property
    def is_connected(self) -> bool:
        """Whether there is a coordinator, and it can be reached."""
        return self._inner is not None and self._inner.is_connected

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator, if there is one."""
        if self._inner is not None:
            self._inner.report(report)

    async def list_complete(self, job: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of a job in memory, newest first."""
        try:
            await asyncio.wait_for(self._there.wait(), LIST_PATIENCE)
        except TimeoutError:
            raise CoordinationUnavailable(f"job {self.job} has no coordinator", hint=self._problem) from None
        assert self._inner is not None
        return await self._inner.list_complete(job)

    async def measure(self) -> float:
        """Bytes per second to the coordinator's node and back."""
        try:
            await asyncio.wait_for(self._there.wait(), MEASURE_PATIENCE)
        except TimeoutError:
            return 0.0
        return await self._inner.measure() if self._inner is not None else 0.0

    def status(self) -> dict[str, Any]:
        """Who coordinates, for the status document."""
        holder = self._election.holder
        return {
            "job": self.job,
            "coordinator": holder.node if holder else "",
            "address": holder.address if holder else "",
            "term": self._election.term,
            "here": self.shell is not None,
            "refused": self._election.refused,
            "problem": self._problem,
        }

    async def close(self) -> None:
        """Take no part any more; a coordinator in this process gives its lease back, so that another takes over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        tenure, shell = self._election.tenure, self._take_shell()
        if shell is not None:
            await shell.stop()
        if self._inner is not None:
            await self._inner.close()
        if tenure is not None:
            await self._revoke(tenure.lease)

    # ---- the election ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while self._is_wanted():
            try:
                await self._look()
            except CkptsvcError as error:
                self._complain(error)
                await asyncio.sleep(RETRY)
            except Exception:
                logger.exception("the election of job %s failed", self.job)
                await asyncio.sleep(RETRY)
        self._all.forget(self)

    def _complain(self, error: CkptsvcError) -> None:
        """Keep the problem for `status`, and log it when it is another one than before."""
        if self._problem != str(error):
            log(logger, logging.WARNING, Event.COORDINATOR_UNKNOWN, "%s: %s", error.code, error, job=self.job)
        self._problem = str(error)

    def _is_wanted(self) -> bool:
        if self._local.concerns(self.way):
            self._unwanted_since = None
        elif self._unwanted_since is None:
            self._unwanted_since = clock()
        return self._unwanted_since is None or clock() - self._unwanted_since < UNWANTED_FOR

    async def _look(self) -> None:
        """Read the key, do what follows from it, and wait until it changes."""
        found = await self._all.etcd.get(self._key)
        holder = holder_of(self._key, found, self._all.trust)
        self._problem = ""
        stand = self._do(self._election.seen(holder, clock()))
        if stand and self._local.concerns(self.way):
            await self._campaign()
        else:
            await self._all.etcd.changed(self._key, found.revision, LOOK_EVERY)

    async def _campaign(self) -> None:
        etcd, here = self._all.etcd, self._all
        await asyncio.sleep(random.uniform(0, CANDIDATES_WAIT))
        if (await etcd.get(self._key)).value is not None:
            return  # another was faster
        asked_at = clock()
        granted = await etcd.grant(here.ttl)
        value = value_of(self._key, self._local.name, here.address, here.mark, granted.lease, here.trust)
        term = 0
        try:
            term = await etcd.create(self._key, value, granted.lease)
        finally:
            if not term:
                await self._revoke(granted.lease)
        if term:
            holder = Holder(term, self._local.name, here.address, here.mark, granted.lease)
            self._do(self._election.won(holder, granted.ttl, asked_at, clock()))

    async def _renew(self) -> None:
        while True:
            await self._leads.wait()
            tenure, asked_at = self._election.tenure, clock()
            if tenure is None:
                self._leads.clear()
                continue
            wait = tenure.ttl / RENEWALS
            try:
                ttl = await self._all.etcd.keep_alive(tenure.lease)
                self._do(self._election.renewed(tenure.lease, ttl, asked_at, clock()))
            except CkptsvcError as error:
                self._complain(error)
                self._do(self._election.tick(clock()))
                wait = RETRY / 2
            except Exception:
                logger.exception("job %s: the lease is not renewed", self.job)
                self._do(self._election.tick(clock()))
            await asyncio.sleep(wait)

    def _do(self, verdict: Verdict) -> bool:
        """Take the steps; returns whether to stand for election."""
        for reason in verdict.reasons:
            log(logger, logging.INFO, Event.COORDINATOR_CHOSEN, reason, job=self.job)
        campaign = False
        for step in verdict.steps:
            if isinstance(step, Lead):
                self._lead(step.term)
            elif isinstance(step, Follow):
                self._follow(step.holder)
            elif isinstance(step, Campaign):
                self._switch(None)
                campaign = True
            else:
                self._switch(None)
                shell = self._take_shell()
                if shell is not None:
                    self._local.spawn(shell.stop())
                self._local.spawn(self._revoke(step.lease))
        return campaign

    def _lead(self, term: int) -> None:
        self._local.metrics.coordinator_changes.inc()
        self.shell = self._all.new_shell(term, lambda: self._election.may_act(term, clock()))
        self._ticking = asyncio.ensure_future(self.shell.run())
        self._switch(LocalUplink(self._local.hello(self.job, term), self.shell, self._obey))
        for report in self._local.resync(self.way):
            self.report(report)
        self._leads.set()

    def _follow(self, holder: Holder) -> None:
        self._local.metrics.coordinator_changes.inc()
        hello = self._local.hello(self.job, holder.term)
        self._switch(self._local.dial(hello, holder.address, self._obey, self.way))

    def _switch(self, inner: Uplink | None) -> None:
        before, self._inner = self._inner, inner
        if before is not None:
            self._local.spawn(before.close())
        if inner is None:
            self._there.clear()
        else:
            self._there.set()

    def _take_shell(self) -> CoordinatorShell | None:
        shell, ticking, self.shell, self._ticking = self.shell, self._ticking, None, None
        if ticking is not None:
            ticking.cancel()
        return shell

    async def _revoke(self, lease: int) -> None:
        try:
            await self._all.etcd.revoke(lease)
        except CkptsvcError as error:
            logger.debug("a lease was not given back, it will end by itself: %s", error)

    def _obey(self, order: pb.Order) -> None:
        if self._election.admits(order.term):
            self._local.on_order(order)
            return
        self._local.metrics.orders_refused.inc()
        logger.warning("job %s: refused an order of term %d; term %d runs", self.job, order.term, self._election.term)


def value_of(key: str, node: str, address: str, mark: str, lease: int, trust: Trust) -> bytes:
    """What a coordinator writes into its key."""
    return msgspec.json.encode(_Value(node, address, mark, trust.seal(key, node, address, mark, str(lease))))


def holder_of(key: str, found: Found, trust: Trust) -> Holder | None:
    """Who holds the key; on one host, it must have been written by one who knows the secret.

    That keeps out what other users of the same etcd write there. It is no more than a hint, for who may write may also
    write again what he has read: whoever listens at the address has to prove himself (rpc.trust), and an agent that was
    a coordinator says that it is not in this term.

    Raises:
        CoordinationUnavailable: it makes no sense, is not one of ours, or names a place that agents do not listen at.
    """
    if found.value is None:
        return None
    try:
        value = msgspec.json.decode(found.value[:MAX_VALUE], type=_Value)
        address = parse_address(value.address)
        if not (value.node + value.address + value.mark).isprintable():
            raise ConfigError("there are no such names")
    except (msgspec.MsgspecError, UnicodeError, ConfigError):
        raise CoordinationUnavailable(
            f"{key} in etcd does not name a coordinator", hint="is the prefix ours?"
        ) from None
    if not trust.is_sealed(value.proof, key, value.node, value.address, value.mark, str(found.lease)):
        raise CoordinationUnavailable(f"{key} in etcd was not written by an agent of ours",
            hint="it may be another user's, or of another host: see the secret in agent.socket_dir")  # fmt: skip
    try:
        trust.spelled(str(address))
    except ConfigError as error:
        raise CoordinationUnavailable(f"{key} in etcd names {address}: {error.what}") from None
    return Holder(found.created, value.node[:256], str(address), value.mark, found.lease)
