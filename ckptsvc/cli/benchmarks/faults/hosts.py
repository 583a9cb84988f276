"""Several hosts on one machine: network namespaces on a bridge, each with an address and a link that can be cut.

The addresses are 127.77.0.1, .2, ...: loopback addresses, for there agents may listen without certificates, but routed
over the bridge like any other (route_localnet). All is gone when the last process of the namespaces has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

HOLD = ["sh", "-c", "echo ready; exec cat"]
"""A process that keeps its namespace alive until its standard input is closed."""


LOOPBACK_OVER_THE_BRIDGE = (
    "ip link set lo up && ip route del local 127.0.0.0/8 dev lo table local",
    "sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv4.conf.eth0.route_localnet=1",
)


class Hosts:
    """The hosts, numbered from 1.

    Args:
        count: how many.
        network: the first three bytes of their addresses.

    Raises:
        PermissionError: namespaces are not permitted, or cannot be set up.
        FileNotFoundError: a program that is needed is not there: unshare, nsenter, ip or sysctl.
    """

    def __init__(self, count: int, network: str = "127.77.0") -> None:
        self._network = network
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            self._set_up(count)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._holders) - 1

    def _set_up(self, count: int) -> None:
        bridge = self._hold()
        _in(bridge, "ip link add bridge0 type bridge && ip link set bridge0 up")
        for number in range(1, count + 1):
            host, link = self._hold(), f"link{number}"
            _in(bridge, f"ip link add {link} type veth peer name eth0 netns {host}")
            _in(bridge, f"ip link set {link} master bridge0 up")
            _in(
                host,
                *(LOOPBACK_OVER_THE_BRIDGE if self._network.startswith("127.") else ("ip link set lo up",)),
                f"ip link set eth0 up && ip addr add {self.address(number)}/24 dev eth0",
            )

    def _hold(self) -> int:
        """A new namespace; returns the process that keeps it."""
        holder = subprocess.Popen(["unshare", "--net", *HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise PermissionError("network namespaces are not permitted here")
        return holder.pid

    def address(self, number: int) -> str:
        """Where a host can be reached."""
        return f"{self._network}.{number}"

    def on(self, number: int) -> list[str]:
        """What to put before a command so that it runs on a host."""
        return ["nsenter", f"--net=/proc/{self._holders[number].pid}/ns/net"]

    def cut(self, number: int) -> None:
        """Cut the link of a host: nothing comes through, and nobody is told."""
        _in(self._holders[0].pid, f"ip link set link{number} down")

    def mend(self, number: int) -> None:
        """Mend it again."""
        _in(self._holders[0].pid, f"ip link set link{number} up")

    def slow(self, number: int, rate: str) -> None:
        """Let no more than so much through to a host ("4mbit")."""
        limit = f"tc qdisc add dev link{number} root tbf rate {rate} burst 32kb latency 400ms"
        _in(self._holders[0].pid, limit)

    def mend_all(self) -> None:
        """Mend every link."""
        for number in range(1, len(self._holders)):
            self.mend(number)

    def processes(self, number: int) -> list[int]:
        """All processes on a host."""
        holder = self._holders[number].pid
        there = os.stat(f"/proc/{holder}/ns/net").st_ino
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and int(folder.name) != holder and os.stat(folder / "ns/net").st_ino == there:
                    found.append(int(folder.name))
        return found

    def kill(self, number: int) -> None:
        """SIGKILL for every process on a host; its kernel lives on."""
        for pid in self.processes(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the namespaces."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
            for pipe in (holder.stdin, holder.stdout):
                if pipe is not None:
                    pipe.close()


def _in(pid: int, *commands: str) -> None:
    ended = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", " && ".join(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise PermissionError(f"network namespaces cannot be set up here: {ended.stderr.strip()}")
