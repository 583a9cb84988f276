"""GlusterFS: two volumes, one whose files lie in pieces on three bricks of which one may be lost, one distributed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from harness.realfs.daemons import Enclosed, need
from harness.runtime import eventually

PROGRAMS = ("glusterd", "gluster", "glusterfs", "unshare", "nsenter", "ip")


class Gluster:
    """One server with six bricks."""

    def __init__(self) -> None:
        need(*PROGRAMS)
        self.daemons = Enclosed("gluster", "/run", "/var/lib/glusterd", "/var/log/glusterfs")
        try:
            self._make()
        except BaseException:
            self.daemons.close()
            raise

    def _make(self) -> None:
        self._start_server()
        bricks = [self.daemons.folder / f"brick-{number}" for number in range(6)]
        places = [f"{Enclosed.ADDRESS}:{brick}/data" for brick in bricks]
        for brick in bricks:
            brick.mkdir()
        self._gluster("volume", "create", "coded", "disperse", "3", "redundancy", "1", *places[:3], "force")
        self._gluster("volume", "create", "spread", *places[3:], "force")
        for volume in ("coded", "spread"):
            self._gluster("volume", "start", volume)

    def _start_server(self) -> None:
        self.daemons.start("glusterd", *self.daemons.inside("glusterd", "-N", "--log-file=-"))

        def answers() -> bool:
            try:
                self._gluster("pool", "list")
            except AssertionError:
                time.sleep(0.5)
                return False
            return True

        self.daemons.wait_for(answers, "glusterd to answer", "glusterd")

    def _gluster(self, *arguments: str) -> str:
        return self.daemons.run(*self.daemons.inside("gluster", "--mode=script", *arguments), timeout=120)

    def mount(self, volume: str, point: Path) -> Path:
        """Mount a volume; returns the mount point."""
        log = f"--log-file={self.daemons.folder}/{volume}-client.log"
        server = (f"--volfile-server={Enclosed.ADDRESS}", f"--volfile-id={volume}")
        client = self.daemons.client("glusterfs", "-N", *server, log, str(point))
        return self.daemons.mount(volume, point, *client)

    def kill_brick(self, number: int) -> None:
        """SIGKILL for the process of one brick."""
        for process in (found := self.daemons.processes(f"--brick-name {self.daemons.folder}/brick-{number}/data")):
            os.kill(process, signal.SIGKILL)
        assert found, f"brick {number} has no process"
        eventually(lambda: not self.daemons.processes(f"brick-{number}/data --"), "the brick to be gone")

    def start_bricks(self, volume: str) -> None:
        """Start the bricks of a volume that have been killed, and have them told what they have missed."""
        self._gluster("volume", "start", volume, "force")

        def heals() -> bool:
            try:
                self._gluster("volume", "heal", volume)
            except AssertionError:  # not before all of them answer
                time.sleep(0.5)
                return False
            return True

        self.daemons.wait_for(heals, "the healing to begin", "glusterd")

    def unhealed(self, volume: str) -> int:
        """Number of entries that a brick has still to be told of."""
        lines = self._gluster("volume", "heal", volume, "info").splitlines()
        counts = [line.rpartition(":")[2].strip() for line in lines if line.startswith("Number of entries")]
        return sum(int(count) if count.isdigit() else 1 for count in counts)

    def close(self) -> None:
        """End it, and leave nothing."""
        self.daemons.close()
