"""A protocol double of Lustre: a file system by FUSE that takes and gives layouts as recorded of a real Lustre 2.17.

It is no Lustre. It keeps files in a directory beside, and does with the attribute "lustre.lov" what a client and its
servers do: takes what llite takes, inherits the default of the directory, silently ignores what is set too late,
silently cuts down a number of stripes, makes the later components of a file when they are first written to. FUSE
answers ENOTTY to the ioctls, as every other file system does: the attribute "user.ioctl" stands for
LL_IOC_LOV_SETSTRIPE. The kernel's f_type is FUSE's: tests inject Lustre's.

Run as a program, it serves one mount point:  lustre_double.py MOUNT_POINT FILES SETTINGS_AS_JSON
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import itertools
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE, LIBRARY = "libfuse3-3", "libfuse3.so.3"
INSTALL_TIMEOUT = 60.0

LOV, COUNTS, IOCTL = "lustre.lov", "user.counts", "user.ioctl"
V1, V3, COMPOSITE = 0x0BD10BD0, 0x0BD30BD0, 0x0BD60BD0
RAID0, OVERSTRIPED = 1, 0x200
ALL, MIN_STRIPE, DELAY_CREATE = 0xFFFF, 1 << 16, 0o400 | 0o20000
HIDDEN = "/.fuse_hidden"  # libfuse renames an open file that is unlinked, and unlinks it when it is closed
PLAIN, ENTRY, HEAD, OBJECT = "=IIQQIHH", "=IIQQIIIQI", "=IIIHHHBxHHQ", "=QQII"


class Double:
    """The operations; one thread calls them.

    Args:
        files: where the files are kept.
        osts: how many targets there are.
        refuse: number of the error with which the attribute is refused, 0 for none.
        locked: the ioctl is refused, as by llite.*.enable_setstripe_gid.
    """

    use_ns = True

    def __init__(self, files: str, osts: int = 4, refuse: int = 0, locked: bool = False) -> None:
        self.files, self.osts, self.refuse, self.locked = files, osts, refuse, locked
        self.layouts: dict[int, list[dict[str, Any]]] = {}  # inode -> components; of a directory, its default
        self.counts: Counter[str] = Counter()
        self.next_target = itertools.count()

    def at(self, path: str) -> str:
        return self.files + path

    # --- layouts --------------------------------------------------------------------------------------------

    def parse_one(self, blob: bytes, start: int, end: int) -> dict[str, Any]:
        magic, pattern, _, _, size, count, first = struct.unpack_from(PLAIN, blob)
        if magic not in (V1, V3) or pattern & ~OVERSTRIPED != RAID0 or size % MIN_STRIPE:
            raise OSError(errno.EINVAL, "layout")
        pool = struct.unpack_from("=16s", blob, 32)[0] if magic == V3 else b""
        if start % (size or MIN_STRIPE):
            raise OSError(errno.EINVAL, "a component begins within a stripe")
        return {"pattern": pattern, "size": size, "count": count, "first": first, "pool": pool, "objects": [],
                "start": start, "end": end}  # fmt: skip

    def parse(self, blob: bytes) -> list[dict[str, Any]]:
        """What llite and the servers take for a layout."""
        if len(blob) < 32:
            raise OSError(errno.ERANGE, "layout")
        magic, size = struct.unpack_from("=II", blob)
        if magic != COMPOSITE:
            if len(blob) < (48 if magic == V3 else 32):
                raise OSError(errno.ERANGE, "layout")
            return [self.parse_one(blob, 0, 2**64 - 1)]
        if size > len(blob):
            raise OSError(errno.ERANGE, "layout")
        found: list[dict[str, Any]] = []
        for number in range(struct.unpack_from(HEAD, blob)[4]):
            _, _, start, end, offset, length, *_ = struct.unpack_from(ENTRY, blob, 32 + 48 * number)
            if offset + length > size or start != (found[-1]["end"] if found else 0) or end <= start:
                raise OSError(errno.EINVAL, "component")
            found.append(self.parse_one(blob[offset : offset + length], start, end))
        return found

    def instantiate(self, component: dict[str, Any]) -> None:
        """Give a component its objects, as many as there can be."""
        if component["objects"]:
            return
        component["size"] = component["size"] or 1 << 22
        wanted = component["count"] or 1
        if wanted == ALL or (wanted > self.osts and not component["pattern"] & OVERSTRIPED):
            wanted = self.osts
        begin = next(self.next_target)
        component["count"], component["objects"] = wanted, [(begin + n) % self.osts for n in range(wanted)]

    def image(self, components: list[dict[str, Any]], *, entries: bool = True) -> bytes:
        """What getxattr returns."""
        parts = []
        for each in components:
            magic = V3 if each["pool"] else V1
            part = struct.pack(PLAIN, magic, each["pattern"], 7, 0, each["size"], each["count"], 0) + each["pool"]
            parts.append(part + b"".join(struct.pack(OBJECT, 9, 0, 0, ost) for ost in each["objects"]))
        if len(parts) == 1 and components[0]["end"] == 2**64 - 1:
            return parts[0]
        offset = 32 + 48 * len(parts)
        table = b""
        for number, (each, part) in enumerate(zip(components, parts, strict=True)):
            flags = 0x10 if each["objects"] else 0
            table += struct.pack(ENTRY, number + 1, flags, each["start"], each["end"], offset, len(part), 0, 0, 0)
            offset += len(part)
        return struct.pack(HEAD, COMPOSITE, offset, 3, 0, len(parts), 0, 0, 0, 0, 0) + table + b"".join(parts)

    def default(self, path: str) -> list[dict[str, Any]]:
        """The layout that a new file inherits."""
        template = self.layouts.get(os.stat(self.at(os.path.dirname(path))).st_ino)
        if template is None:
            template = self.parse(struct.pack(PLAIN, V1, RAID0, 0, 0, 1 << 22, 1, 0xFFFF))
        return [dict(each, objects=[]) for each in template]

    def give(self, path: str, components: list[dict[str, Any]]) -> None:
        self.instantiate(components[0])
        self.layouts[os.stat(self.at(path)).st_ino] = components

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        if name == COUNTS:
            self.counts.clear()
            return 0
        self.counts["setxattr"] += 1
        if name not in (LOV, IOCTL):
            raise OSError(errno.EOPNOTSUPP, name)
        if self.refuse or (self.locked and name == IOCTL):
            raise OSError(self.refuse or errno.EACCES, name)
        status = os.lstat(self.at(path))
        if stat.S_ISDIR(status.st_mode):
            self.layouts[status.st_ino] = self.parse(value)
        elif status.st_ino not in self.layouts:
            self.give(path, self.parse(value))
        elif name == IOCTL:
            raise OSError(errno.EEXIST, name)
        return 0  # too late: nothing happens, and nobody is told

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        if name == COUNTS:
            return json.dumps(self.counts).encode()
        if name != LOV:
            raise OSError(errno.ENODATA, name)
        self.counts["getxattr"] += 1
        components = self.layouts.get(os.lstat(self.at(path)).st_ino)
        if components is None:
            raise OSError(errno.ENODATA, name)
        return self.image(components)

    # --- files ----------------------------------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self.at(path)) if fh is None else os.fstat(fh)
        names = ("mode", "nlink", "uid", "gid", "size")
        times = {f"st_{when}time": getattr(status, f"st_{when}time_ns") for when in "acm"}
        return {**{f"st_{name}": getattr(status, f"st_{name}") for name in names}, **times}

    def readdir(self, path: str, fh: int) -> list[str]:
        self.counts["readdir"] += 1
        return [".", "..", *os.listdir(self.at(path))]

    def mknod(self, path: str, mode: int, dev: int) -> int:
        self.counts["mknod"] += 1
        os.mknod(self.at(path), mode, dev)
        self.layouts.pop(os.lstat(self.at(path)).st_ino, None)  # the number may have been another file's
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self.counts["mkdir"] += 1
        os.mkdir(self.at(path), mode)
        inherited = self.layouts.get(os.stat(self.at(os.path.dirname(path))).st_ino)
        self.layouts.pop(os.stat(self.at(path)).st_ino, None)
        if inherited is not None:
            self.layouts[os.stat(self.at(path)).st_ino] = inherited
        return 0

    def unlink(self, path: str) -> int:
        self.counts["unlink"] += HIDDEN not in path
        os.unlink(self.at(path))
        return 0

    def rmdir(self, path: str) -> int:
        self.counts["rmdir"] += 1
        os.rmdir(self.at(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        self.counts["unlink" if HIDDEN in new else "rename"] += 1
        os.rename(self.at(old), self.at(new))
        return 0

    def link(self, target: str, source: str) -> int:
        self.counts["link"] += 1
        os.link(self.at(source), self.at(target))
        return 0

    def open(self, path: str, flags: int) -> int:
        self.counts["open"] += 1
        fd = os.open(self.at(path), flags & (os.O_ACCMODE | os.O_TRUNC))
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and flags & DELAY_CREATE != DELAY_CREATE and os.fstat(fd).st_ino not in self.layouts:
            self.give(path, self.default(path))
        return fd

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        for each in self.layouts.get(os.fstat(fh).st_ino, []):
            if each["start"] < offset + len(data) and offset < each["end"]:
                self.instantiate(each)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self.at(path) if fh is None else fh, length)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self.at(path), ns=times, follow_symlinks=False)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self.counts["fsync"] += 1
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self.counts["fsyncdir"] += 1
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


# --- mounting it ----------------------------------------------------------------------------------------------


@cache
def library(folder: Path) -> str:
    """Path or name of libfuse: the one that is installed, or one unpacked from Debian's package into this folder."""
    if not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0:
        pytest.skip("mounting by FUSE needs /dev/fuse and root")
    if ctypes.util.find_library("fuse3"):
        return LIBRARY
    try:
        for command in (["apt-get", "-qq", "download", PACKAGE], ["sh", "-c", f"dpkg-deb -x {PACKAGE}_*.deb ."]):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error).encode()
        pytest.skip(f"there is no libfuse here, and Debian's {PACKAGE} is not to be had: {why.decode()[-200:]}")
    return str(next(folder.rglob(LIBRARY)))


@contextlib.contextmanager
def mounted(programs: Path, folder: Path, **settings: Any) -> Iterator[Path]:
    """The double on a mount point below `folder`; `settings` are those of `Double`."""
    path = library(programs)
    point, files = folder / "lustre", folder / "files"
    point.mkdir()
    files.mkdir()
    command = [sys.executable, __file__, str(point), str(files), json.dumps(settings)]
    log = folder / "double.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "FUSE_LIBRARY_PATH": path})
    try:
        while not point.is_mount():
            if process.poll() is not None:
                text = log.read_text()
                if "mount failed" in text or "not permitted" in text:
                    pytest.skip(f"mounting by FUSE is not permitted here: {text.strip()[-200:]}")
                raise AssertionError(text)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        yield point
    finally:
        subprocess.run(["umount", *([] if process.poll() is None else ["-l"]), str(point)], check=False)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", str(point)], check=False)
        shutil.rmtree(files)


def counts(point: Path) -> dict[str, int]:
    """How often each operation has been called since `forget`."""
    return json.loads(os.getxattr(point, COUNTS))


def forget(point: Path) -> None:
    """Count from zero."""
    os.setxattr(point, COUNTS, b"0")


def main() -> None:
    import mfusepy  # here: it looks for libfuse when it is imported

    point, files, settings = sys.argv[1:]
    double = Double(files, **json.loads(settings))
    # every name and attribute is asked for anew, so that what is counted is what was called
    mfusepy.FUSE(double, point, foreground=True, nothreads=True, fsname="double")


if __name__ == "__main__":
    main()
