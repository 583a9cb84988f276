"""`ckptsvc://` for fsspec: whatever opens files through fsspec opens a run's tensors as files, without a copy on disk.

    ckptsvc://STORE!/CHECKPOINT/PATH

    ckptsvc:///scratch/run!/latest/model/layer.weight.npy
    ckptsvc://s3://bucket/run!/step-000000000100.e00007/checkpoint.json
    ckptsvc:///scratch/run!/100/

STORE is the address of a run, as everywhere; CHECKPOINT is "latest", a step, or a name. What lies below is said in
`fsspec_tree`. Everything read is verified against the checkpoint's checksums, and nothing can be written.

    with fsspec.open("ckptsvc:///scratch/run!/latest/model/w.npy") as file:
        array = numpy.load(file)
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ckptsvc.format.commit import parse_checkpoint_name
from ckptsvc.integrations.fsspec_tree import File, Tree
from ckptsvc.pipeline.catalog import find, list_refs, open_checkpoint, read_commit
from ckptsvc.storage import connect

PROTOCOL = "ckptsvc"
LATEST = "latest"
_STEP_DIGITS = 18

_PREFIX = f"{PROTOCOL}://"
_SEPARATOR = "!/"  # between the address of the store and the path in it
_BLOCK = 16 << 20  # bytes read ahead: a few extents, so that few are read twice


class CheckpointFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The checkpoints of one run.

    An instance looks once which checkpoint is the latest, and keeps to it until `invalidate_cache`; instances are not
    shared, so that each `fsspec.open` finds the latest of its time.

    Args:
        store: address of the run.
        store_options: settings of the store's driver.
        storage_options: of fsspec.
    """

    protocol: ClassVar[str] = PROTOCOL
    root_marker: ClassVar[str] = ""
    cachable: ClassVar[bool] = False

    def __init__(self, store: str, store_options: Mapping[str, Any] | None = None, **storage_options: Any) -> None:
        super().__init__(store=store, store_options=store_options, **storage_options)
        self._store = connect(store, store_options)
        weakref.finalize(self, self._store.close)
        self._address, self._lock = store, threading.Lock()
        self._trees: dict[str, Tree] = {}

    # --- addresses ------------------------------------------------------------------------------------------

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        path = os.fspath(path)
        if path.startswith(_PREFIX):
            path = path.removeprefix(_PREFIX).partition(_SEPARATOR)[2]
        return path.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        store, _, _ = path.removeprefix(_PREFIX).partition(_SEPARATOR)
        return {"store": store.removesuffix("!")}

    def unstrip_protocol(self, name: str) -> str:
        """The whole address of a path."""
        return f"{_PREFIX}{self._address}{_SEPARATOR}{self._strip_protocol(name)}"

    # --- checkpoints ----------------------------------------------------------------------------------------

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget which checkpoint is the latest, and what was in those looked at."""
        with self._lock:
            self._trees.clear()
        super().invalidate_cache(path)

    def _tree(self, which: str) -> Tree:
        """The files of a checkpoint; FileNotFoundError where there is none, Damaged where it cannot be trusted."""
        with self._lock:
            if which not in self._trees:
                self._trees[which] = self._open_tree(which)
            return self._trees[which]

    def _open_tree(self, which: str) -> Tree:
        parsed, step = parse_checkpoint_name(which), which.isascii() and which.isdecimal()
        for ref in list_refs(self._store) if parsed or step or which == LATEST else ():
            if which == LATEST or which == ref.name or (step and len(which) <= _STEP_DIGITS and int(which) == ref.step):
                commit = read_commit(self._store, ref)
                if commit is not None:
                    return Tree(open_checkpoint(self._store, ref, commit))
        raise _missing(which)

    def _split(self, path: str) -> tuple[str, str]:
        which, _, rest = self._strip_protocol(path).partition("/")
        return which, rest

    def _file(self, path: str) -> tuple[Tree, File]:
        which, rest = self._split(path)
        tree = self._tree(which)
        if rest in tree.files:
            return tree, tree.files[rest]
        if rest in tree.directories:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise _missing(path)

    # --- what fsspec asks -----------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The files and directories in a directory, or a file itself."""
        which, rest = self._split(path)
        if not which:
            found = [self._directory(ref.name) for ref, _ in find(self._store)]
        else:
            tree, base = self._tree(which), f"{rest}/" if rest else ""
            names = sorted(tree.directories.get(rest, ()))
            if rest in tree.files:
                found = [self._describe(which, rest, tree)]
            elif rest in tree.directories:
                found = [self._describe(which, f"{base}{name}", tree) for name in names]
            else:
                raise _missing(path)
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size and type; of a tensor its dtype and shape too."""
        which, rest = self._split(path)
        if not which:
            return self._directory("")
        return self._describe(which, rest, self._tree(which))

    def _describe(self, which: str, rest: str, tree: Tree) -> dict[str, Any]:
        path = f"{which}/{rest}".rstrip("/")
        if rest in tree.directories:
            return self._directory(path)
        if rest not in tree.files:
            raise _missing(path)
        file = tree.files[rest]
        about = {"created": tree.checkpoint.commit.created, **file.details()}
        return {"name": path, "size": file.size, "type": "file", **about}

    def _directory(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": 0, "type": "directory"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes of a file, or a range of them, assembled and verified; negative numbers count from its end."""
        _, file = self._file(path)
        first, last, _ = slice(start, end).indices(file.size)
        return file.read(first, last) if first < last else b""

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> AbstractBufferedFile:
        if mode != "rb":
            self._refuse()
        self._file(path)
        given = {"block_size": block_size or _BLOCK, "cache_options": cache_options}
        return AbstractBufferedFile(self, path, mode, **given, **kwargs)

    def created(self, path: str) -> Any:
        """When the checkpoint was committed."""
        from datetime import datetime

        return datetime.fromisoformat(self._file(path)[0].checkpoint.commit.created)

    modified = created

    def checksum(self, path: str) -> int:
        """The same for as long as the content is."""
        tree, _ = self._file(path)
        return hash((tree.checkpoint.commit.index_digest, self._split(path)[1]))

    # --- what it does not do --------------------------------------------------------------------------------

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.EROFS, f"a committed checkpoint does not change: {os.strerror(errno.EROFS)}")

    pipe_file = put_file = cp_file = mkdir = makedirs = rmdir = rm = rm_file = touch = mv = _rm = _refuse


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
