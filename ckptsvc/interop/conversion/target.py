"""Where a conversion writes to, such that what is unfinished never looks whole.

    our own format      shards into the run; the commit record is last
    a local path        files into PATH.partial, which gets its name when all is durable
    any other store     files under their names; those that make the checkpoint complete are last

The records of what is finished (conversion.ledger) are in PATH.convert; in the folder .convert where the target is a
whole bucket or container, because a name with something added to it is another one's; for our own format in a folder of
the run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ckptsvc.errors import CkptsvcError, InvalidInput, SaveFailed, StoreError, StoreFull, StoreUnavailable
from ckptsvc.format.commit import CommitRecord, EpochRecord, epoch_key
from ckptsvc.interop.conversion.lease import Lease
from ckptsvc.interop.conversion.ledger import Ledger, put_same
from ckptsvc.interop.conversion.native import JOB
from ckptsvc.interop.formats import NATIVE
from ckptsvc.interop.outputs import OutputFile, Small
from ckptsvc.pipeline.catalog import Ref, check_exclusive, find, newest_epoch, read_commit, read_epoch
from ckptsvc.pipeline.commit import check_fence
from ckptsvc.storage import Store, canonical
from ckptsvc.storage.opening import open_store

PARTIAL, RECORDS = ".partial", ".convert"
"""What is added to the name of a target for what is unfinished, and for the records of what is finished."""

_RECORD = 64 << 20  # bytes up to which a small file is put if absent


class Target:
    """A place that is being filled.

    Args:
        name: of the format, as in interop.formats.FORMATS.
        place: path or URL.
        step: of a checkpoint of our own.
        block: bytes that a driver of files shall write at a time.
        part: which of how many processes of the conversion this one is; None if it works for one of them.

    Attributes:
        store: where the files go.
        ledger: what is finished.
        url: what is shown to people.

    Raises:
        InvalidInput: a local target of files, or what is beside it, is a symbolic link.
    """

    def __init__(self, name: str, place: str, step: int, block: int, part: tuple[int, int] | None = (0, 1)) -> None:
        url = canonical(place).rstrip("/")
        self.url = url
        self.native = name == NATIVE
        self.local = None if self.native or not url.startswith("file://") else Path(url.removeprefix("file://"))
        if self.local is not None:
            _check_no_links(self.local)
        options = {"block": block} if url.startswith("file://") else {}
        self.store: Store = open_store(f"{url}{PARTIAL}" if self.local else url, options)
        inside = self.native or _is_whole(url)
        self._records = self.store if inside else open_store(f"{url}{RECORDS}")
        self._folder = (f"convert-step-{step:012d}" if self.native else RECORDS) if inside else ""
        self.ledger = Ledger(self._records, self._folder)
        self._lease = Lease(self._records, self._folder, *part) if part else None

    def close(self) -> None:
        """Give back what is open."""
        self.leave()
        self.store.close()
        if self._records is not self.store:
            self._records.close()

    def enter(self) -> None:
        """Keep others from doing the same work, until `leave`.

        Raises:
            RunBusy: others are doing it.
        """
        if self._lease:
            self._lease.take()

    def check_entered(self) -> None:
        """See that nobody took over since.

        Raises:
            SaveFailed: somebody did.
        """
        if self._lease:
            self._lease.check()

    def leave(self) -> None:
        """Let others do the work."""
        if self._lease:
            self._lease.release()
            self._remove_folder()

    def check_free(self) -> None:
        """See that nothing else is there, and nobody else writes there.

        Raises:
            InvalidInput: something is.
        """
        if self.native:
            self._check_run()
        elif self.local is not None:
            for place in (self.local, Path(f"{self.local}{PARTIAL}")):
                if _is_something(place):
                    raise InvalidInput(f"{place} is there already", hint="choose another target, or remove it")
        elif any(not name.startswith(".") for name in self.store.children()):
            raise InvalidInput(f"{self.url} is not empty", hint="choose another target")

    def check_name(self) -> None:
        """See that a target that is under way can get its name: nothing else has got it meanwhile.

        Raises:
            InvalidInput: something has.
        """
        if self.local is None or not _is_something(self.local):
            return
        partial = Path(f"{self.local}{PARTIAL}")
        parts = partial.iterdir() if self.local.is_file() and partial.is_dir() else ()
        if not any(os.path.samefile(part, self.local) for part in parts):  # one that has both names is ours
            raise InvalidInput(
                f"{self.local} has appeared since this conversion began", hint="remove it, or choose another target"
            )

    def is_there(self) -> bool:
        """Whether a local target has its name."""
        return self.local is not None and _is_something(self.local) and not Path(f"{self.local}{PARTIAL}").exists()

    def is_renamed(self) -> bool:
        """Whether the target was completed, and only its records are left to be removed."""
        return self.is_there() and self.ledger.is_renaming()

    def completed(self, writer: str, step: int) -> Ref | None:
        """The checkpoint of our own that this very conversion has made before, if there is one."""
        if not self.native:
            return None
        for ref, commit in find(self.store, step):
            if isinstance(commit, CommitRecord) and commit.writer == writer:
                return ref
        return None

    def check_space(self, nbytes: int) -> None:
        """See that so many bytes more have room; a quota is not seen, and only local file systems are asked.

        Raises:
            StoreFull: they have not.
        """
        if not self.url.startswith("file://"):
            return
        place = Path(self.url.removeprefix("file://"))
        while not place.exists():
            place = place.parent
        vfs = os.statvfs(place)
        free = vfs.f_bavail * vfs.f_frsize
        if nbytes > free:
            raise StoreFull(
                f"{self.url}: {nbytes} bytes are to be written, and {free} are free",
                hint="free some, or choose another",
            )

    def complete(self, smalls: Sequence[Small], files: Sequence[OutputFile], ref: Ref | None) -> None:
        """Write the last files and make the target what it shall be.

        Args:
            smalls: in their order.
            files: all others.
            ref: the checkpoint of our own that they are.

        Raises:
            Fenced: a job took the run over meanwhile.
            SaveFailed: somebody else wrote the last file, or removed one of the others.
        """
        if ref is not None:
            check_fence(self.store, JOB, ref.epoch)
        sizes = {file.key: file.nbytes for file in files}
        last = smalls[-1] if smalls and self.local is None else None  # it makes the target whole
        for small in smalls:
            if small is last:
                self.check_there(sizes, ref)
            if small is smalls[-1] and small.data and len(small.data) <= _RECORD:
                put_same(self.store, small.key, small.data)
            else:
                self.store.write(small.key, memoryview(small.data), len(small.data))
            sizes[small.key] = len(small.data)
        if self.local is not None:
            for entry in list(self.store.list()):  # what interrupted writes have left
                if entry.key not in sizes:
                    self.store.delete(entry.key)
            self.check_there(sizes)
            self.ledger.note_renaming()
            _rename(self.local, single=files[0].key if len(files) == 1 and not smalls else "")
        self.forget()

    def check_there(self, sizes: Mapping[str, int], ref: Ref | None = None) -> None:
        """See that files are there in full size: `sizes` in bytes by key, all below `ref` where one is given.

        Raises:
            SaveFailed: one is not.
        """
        there = {entry.key: entry.size for entry in self.store.list(ref.name if ref else "")}
        gone = [key for key, nbytes in sizes.items() if there.get(key) != nbytes]
        if gone:
            raise SaveFailed(
                f"{len(gone)} of {len(sizes)} files of {self.url} are missing or cut short, for example {min(gone)}",
                hint="does somebody else write there? the same command again makes them again",
            )

    def is_made(self, writer: str, ref: Ref | None, sizes: Mapping[str, int]) -> bool:
        """Whether the target is complete.

        Args:
            writer: identity of the conversion.
            ref: of the checkpoint of our own that it makes.
            sizes: of its files of tensors, in bytes by key.
        """
        if ref is not None:
            commit = read_commit(self.store, ref)
            return commit is not None and commit.writer == writer
        if self.local is not None:
            return self.is_there()
        try:
            self.check_there(sizes)
        except SaveFailed:
            return False
        return True

    def forget(self) -> None:
        """Remove the records: the target is complete, or what was done is thrown away."""
        self.ledger.forget(keep=self._lease.key if self._lease else "")
        self._remove_folder()

    def discard(self, ref: Ref | None) -> None:
        """Throw away what an unfinished conversion has done; `ref` is the checkpoint of our own that it made."""
        plan = self.ledger.read()
        if ref is not None:
            if read_commit(self.store, ref) is None:
                self._delete(ref.name)
        elif plan is not None:  # without one the files could be anybody's
            self._delete("")
        self.forget()

    def _delete(self, prefix: str) -> None:
        for entry in list(self.store.list(prefix)):
            if not (self._folder and entry.key.startswith(f"{self._folder}/")):  # `forget` removes the records
                self.store.delete(entry.key)

    def _remove_folder(self) -> None:
        """Remove the folder of the records if it is empty."""
        if self.local is not None:
            with suppress(OSError):
                os.rmdir(f"{self.local}{RECORDS}")

    def take_epoch(self, owner: str, created: str) -> int:
        """Take the epoch behind the newest one, whose owner was looked at: no job can come between unseen.

        Args:
            owner: identity of the conversion.
            created: ISO 8601.

        Raises:
            InvalidInput: it is the run of a job.
            StoreUnavailable: others take one after the other.
            StoreError: as `catalog.check_exclusive`.
        """
        check_exclusive(self.store)
        for _ in range(100):
            epoch = self._check_run() + 1
            record = EpochRecord(epoch=epoch, job=JOB, attempt=0, owner=owner, created=created)
            key = epoch_key(epoch)
            if self.store.put_if_absent(key, record.encode()) or read_epoch(self.store, epoch).owner == owner:
                return epoch
        raise StoreUnavailable(f"{self.url}: a hundred other conversions took epochs meanwhile")

    def _check_run(self) -> int:
        """The newest epoch of the run, 0 for none, if it is no job's."""
        newest = newest_epoch(self.store)
        if not newest:
            return 0
        try:
            owner = read_epoch(self.store, newest).job
        except CkptsvcError:
            owner = "?"
        if owner != JOB:
            raise InvalidInput(
                f"{self.url} is the run of job {owner}, which could not save there any more",
                hint="convert into a new folder; a job resumes from it with init_from",
            )
        return newest


def _is_whole(url: str) -> bool:
    """Whether a URL names a bucket or container, and nothing in it."""
    scheme, _, place = url.partition("://")
    return scheme != "file" and place.count("/") < (2 if scheme == "daos" else 1)


def _check_no_links(target: Path) -> None:
    """A rename would replace a link, and what it leads to would stay as it is."""
    for suffix in ("", PARTIAL, RECORDS):
        place = f"{target}{suffix}"
        if os.path.islink(place):
            raise InvalidInput(f"{place} is a symbolic link", hint="name the place that it leads to")


def _is_something(place: Path) -> bool:
    return any(place.iterdir()) if place.is_dir() else place.exists()


def _rename(target: Path, single: str) -> None:
    """PATH.partial becomes PATH; a format of one file becomes a file if PATH has its suffix."""
    partial = Path(f"{target}{PARTIAL}")
    as_file = bool(single) and "/" not in single and target.suffix == Path(single).suffix != ""
    try:
        if as_file:
            _rename_file(partial / single, target)
        else:
            os.rename(partial, target)
        parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        if as_file:
            partial.rmdir()
    except OSError as error:
        if target.exists() and not partial.exists():
            return  # another process of this conversion did it
        raise StoreError(f"{partial} cannot be renamed to {target}: {error.strerror}") from error


def _rename_file(source: Path, target: Path) -> None:
    """Give a file its name without replacing one that is there: rename(2) would."""
    try:
        os.link(source, target)
    except FileExistsError:
        if not os.path.samefile(source, target):  # otherwise the last try got as far as this
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or os.path.lexists(target):
            raise
        os.rename(source, target)  # a file system without hard links
        return
    source.unlink()
