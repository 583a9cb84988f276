"""MooseFS: a master, three chunk servers, two copies of each chunk."""

from __future__ import annotations

from pathlib import Path

from harness.realfs.daemons import Enclosed, need

PROGRAMS = ("mfsmaster", "mfschunkserver", "mfsmount", "mfssetgoal", "unshare", "nsenter", "ip")

CLIENTS = 9421
"""Port on which clients reach the master."""

MASTER = """\
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = {folder}/master
EXPORTS_FILENAME = {folder}/exports
TOPOLOGY_FILENAME = {folder}/none
IPMAP_FILENAME = {folder}/none
MATOML_LISTEN_HOST = {address}
MATOCS_LISTEN_HOST = {address}
MATOCL_LISTEN_HOST = {address}
"""

CHUNK_SERVER = """\
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = {folder}/server-{number}
HDD_CONF_FILENAME = {folder}/disks-{number}
MASTER_HOST = {address}
CSSERV_LISTEN_HOST = {address}
CSSERV_LISTEN_PORT = {port}
HDD_LEAVE_SPACE_DEFAULT = 256MiB
"""


class MooseFS:
    """One installation."""

    SERVERS = 3

    def __init__(self) -> None:
        need(*PROGRAMS)
        self.daemons = Enclosed("moosefs")
        try:
            self._make()
        except BaseException:
            self.daemons.close()
            raise

    def _make(self) -> None:
        folder, address = self.daemons.folder, Enclosed.ADDRESS
        (folder / "master").mkdir()
        (folder / "none").touch()
        (folder / "master" / "metadata.mfs").write_bytes(b"MFSM NEW")  # an empty file system
        (folder / "exports").write_text("* / rw,alldirs,admin,maproot=0:0\n* . rw\n")
        (folder / "master.cfg").write_text(MASTER.format(folder=folder, address=address))
        self._start("mfsmaster", "master")
        self.daemons.wait_for(lambda: self.daemons.listens(CLIENTS), "the master to listen", "master")
        for number in range(self.SERVERS):
            (folder / f"server-{number}").mkdir()
            (folder / f"disk-{number}").mkdir()
            (folder / f"disks-{number}").write_text(f"{folder}/disk-{number}\n")
            settings = CHUNK_SERVER.format(folder=folder, address=address, number=number, port=9500 + number)
            (folder / f"server-{number}.cfg").write_text(settings)
            self._start("mfschunkserver", f"server-{number}")

    def _start(self, program: str, name: str) -> None:
        command = self.daemons.inside(program, "-f", "-c", f"{self.daemons.folder}/{name}.cfg", "start")
        self.daemons.start(name, *command)

    def mount(self, point: Path) -> Path:
        """Mount it; returns the mount point."""
        client = self.daemons.client("mfsmount", "-f", "-H", Enclosed.ADDRESS, str(point))
        self.daemons.mount("client", point, *client)
        self.daemons.run(*self.daemons.client("mfssetgoal", "-r", "2", str(point)))
        return point

    def close(self) -> None:
        """End it, and leave nothing."""
        self.daemons.close()
