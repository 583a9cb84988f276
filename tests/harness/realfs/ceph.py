"""A Ceph cluster of one node on loopback: monitor, manager, object server, CephFS, and RGW, which speaks S3."""

from __future__ import annotations

import json
import socket
import uuid
from contextlib import closing
from pathlib import Path

from harness.job import free_port
from harness.realfs.daemons import Daemons, need

PROGRAMS = (
    "ceph",
    "ceph-mon",
    "ceph-mgr",
    "ceph-osd",
    "ceph-mds",
    "ceph-fuse",
    "radosgw",
    "radosgw-admin",
    "monmaptool",
)
DISK = 8 << 30
"""Bytes of the object server's (sparse) disk."""

CONFIGURATION = """\
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/keyring
run_dir = {folder}
admin_socket = {folder}/$name.$pid.asok
log_file = {folder}/$name.log
log_to_stderr = false
crash_dir = {folder}/crash
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data = {folder}/mon
mgr_data = {folder}/mgr
mds_data = {folder}/mds
osd_data = {folder}/osd
osd_objectstore = bluestore
bluestore_block_create = true
bluestore_block_size = {disk}
osd_memory_target = 939524096
osd_memory_target_autotune = false

[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
rgw_data = {folder}/rgw
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
"""
# RGW keeps what was overwritten for two hours by default, and such a small disk would be full

CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mds", "allow *", "mgr", "allow *"),
    "mgr.x": ("mon", "allow profile mgr", "osd", "allow *", "mds", "allow *"),
    "mds.a": ("mon", "allow profile mds", "osd", "allow *", "mds", "allow", "mgr", "allow profile mds"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd"),
    "client.rgw.a": ("mon", "allow rwx", "osd", "allow rwx", "mgr", "allow rw"),
}


class Ceph:
    """One cluster.

    Attributes:
        endpoint: of S3.
        environ: the credentials for it, as AWS's clients take them.
    """

    ACCESS, SECRET = "ckptsvc-test", "not-a-secret-outside-of-this-test"

    def __init__(self) -> None:
        need(*PROGRAMS)
        self.daemons = Daemons("ceph")
        self.folder = self.daemons.folder
        self._conf = str(self.folder / "ceph.conf")
        self._rgw_port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._rgw_port}"
        self.environ = {"AWS_ACCESS_KEY_ID": self.ACCESS, "AWS_SECRET_ACCESS_KEY": self.SECRET}
        try:
            self._make()
        except BaseException:
            self.daemons.close()
            raise

    def _make(self) -> None:
        fsid, mon, mon_v1 = str(uuid.uuid4()), free_port(), free_port()
        Path(self._conf).write_text(
            CONFIGURATION.format(fsid=fsid, folder=self.folder, mon=mon, mon_v1=mon_v1, rgw=self._rgw_port, disk=DISK)
        )
        for name in ("mon", "mgr", "mds", "osd", "rgw", "crash"):
            (self.folder / name).mkdir()
        run, keyring, monmap = self.daemons.run, str(self.folder / "keyring"), str(self.folder / "monmap")
        run("ceph-authtool", "--create-keyring", keyring)
        for entity, caps in CAPS.items():
            given = [word for kind, cap in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", kind, cap)]
            run("ceph-authtool", keyring, "--gen-key", "-n", entity, *given)
        address = f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]"
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        run("ceph-mon", "-c", self._conf, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self.start("mon")
        self.ceph("auth", "import", "-i", keyring)
        self.start("mgr")
        disk = str(uuid.uuid4())
        self.ceph("osd", "new", disk, "0")
        run("ceph-osd", "-c", self._conf, "-i", "0", "--mkfs", "--osd-uuid", disk)
        self.start("osd")
        for pool in ("meta", "data", "default.rgw.buckets.data"):
            self.ceph("osd", "pool", "create", pool, "16", "16")
        self.ceph("fs", "new", "fs", "meta", "data")
        self.ceph("fs", "set", "fs", "session_timeout", "30")  # the least: how long a dead client's files are locked
        self.start("mds")
        self.start("rgw")
        user = ("user", "create", "--uid=test", "--display-name=test")
        self.admin(*user, f"--access-key={self.ACCESS}", f"--secret-key={self.SECRET}")

    def ceph(self, *arguments: str) -> str:
        """Ask the cluster; returns its answer."""
        return self.daemons.run("ceph", "-c", self._conf, "--connect-timeout", "60", *arguments)

    def start(self, name: str) -> None:
        """Start one of the daemons, or start it again; returns when it serves."""
        program, entity = {
            "mon": ("ceph-mon", "mon.a"),
            "mgr": ("ceph-mgr", "mgr.x"),
            "osd": ("ceph-osd", "osd.0"),
            "mds": ("ceph-mds", "mds.a"),
            "rgw": ("radosgw", "client.rgw.a"),
        }[name]
        self.daemons.start(name, program, "-c", self._conf, "-n", entity, "-f")
        if name == "osd":
            self.daemons.wait_for(self._disk_is_up, "the object server to be up", name)
        if name == "rgw":
            self.daemons.wait_for(lambda: answers(self._rgw_port), "RGW to answer", name)

    def _disk_is_up(self) -> bool:
        return bool(json.loads(self.ceph("osd", "stat", "-f", "json"))["num_up_osds"])

    def kill(self, name: str) -> None:
        """SIGKILL for one of the daemons."""
        self.daemons.kill(name)

    def admin(self, *arguments: str) -> str:
        """Ask for something of RGW's administration; returns the answer."""
        return self.daemons.run("radosgw-admin", "-c", self._conf, "-n", "client.rgw.a", *arguments)

    def mount(self, point: Path) -> Path:
        """Mount CephFS; returns the mount point."""
        return self.daemons.mount("fuse", point, *self.client(point))

    def client(self, point: Path) -> tuple[str, ...]:
        """The command that serves CephFS on a mount point."""
        return ("ceph-fuse", "-c", self._conf, "-n", "client.admin", "-f", str(point))

    def close(self) -> None:
        """End it, and leave nothing."""
        self.daemons.close()


def answers(port: int) -> bool:
    """Whether something listens there."""
    with closing(socket.socket()) as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
