"""Checkpoints of our own format as `Logical`s, and any `Logical` as one of them.

Reading, options: `step=N` takes the newest checkpoint of that step, `name=step-...` that one; the newest otherwise.
Writing, options:

    shards=N      files of tensors; without it one for every GiB, at most 1024: enough for many readers, writers and
                  workers to be at work at once on a parallel file system, few enough to list
    step=N        the step it is saved as; without it that of the source

A checkpoint has as many shards as ranks, each with the plain values of its rank. Where the source has more ranks than
there are files, the others get a small file each; where it has fewer, rank r gets the values of rank r modulo that
number, as a job of another size would on restoring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptsvc.errors import ConfigError, NoCheckpoint
from ckptsvc.format.checksum import EXTENT, Digests, digest64, digest128
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import COMMIT, CommitRecord, index_name, parse_checkpoint_name, shard_name
from ckptsvc.format.index import Index, IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.objects import decode, encode
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate, objects_name
from ckptsvc.geometry.box import Box, Region
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Logical, Note
from ckptsvc.interop.options import known
from ckptsvc.interop.outputs import Fill, Output, OutputFile, Small
from ckptsvc.pipeline.catalog import Checkpoint, Ref, find, open_checkpoint
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.storage.opening import open_apart
from ckptsvc.types import DTYPES, TensorMeta

JOB = "convert"
"""The name of the job that conversions save as: one for all, so that they do not fence each other off."""

SHARD_BYTES = 1 << 30
MAX_FILES = 1024

DOCUMENTS = 64
"""Documents of plain values that are read and kept at a time."""


class NativeLogical:
    """A committed checkpoint; every byte is verified as it is read. See `interop.logical.Logical`."""

    def __init__(self, checkpoint: Checkpoint, *, close: Callable[[], None] = lambda: None) -> None:
        """`close` is called when it is closed."""
        self.checkpoint = checkpoint
        self.notes: list[Note] = []
        self.source = StoreSource(checkpoint)
        self._index = checkpoint.index
        self._documents: dict[int, dict[str, Any]] = {}
        self.close = close
        self.touching, self.meta, self.resolve = self._index.touching, self._index.meta, self._index.resolve
        self.shard_name = self._index.shard_name

    @property
    def origin(self) -> str:
        """See Logical."""
        return f"{self.checkpoint.store.url}/{self.checkpoint.ref.name}"

    @property
    def identity(self) -> str:
        """What tells it from every other checkpoint."""
        return self.checkpoint.commit.index_digest

    @property
    def step(self) -> int:
        """See Logical."""
        return self._index.info.step

    @property
    def world_size(self) -> int:
        """See Logical."""
        return self._index.info.world_size

    @property
    def aliases(self) -> Mapping[str, str]:
        """See Logical."""
        return self._index.info.aliases

    @property
    def extent(self) -> int:
        """See Catalogue."""
        return self._index.extent

    def names(self) -> list[str]:
        """See Logical; tensors of single ranks ("@rank/...") are among them, their documents are not."""
        documents = {objects_name(rank) for rank in range(self.world_size)}
        return [name for name in self._index.names() if name not in documents]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def document(self, rank: int = 0) -> dict[str, Any]:
        """See Logical; values without a codec here come as `format.objects.Opaque`."""
        if rank not in self._documents:
            first = rank - rank % DOCUMENTS
            names = [objects_name(r) for r in range(first, min(first + DOCUMENTS, self.world_size))]
            metas = [self._index.meta(name) for name in names]
            wants = [Want(m.name, m.dtype, m.shape, Box.full(m.shape)) for m in metas]
            found = read_arrays(self._index, self.source, wants)
            self._documents = {
                first + i: decode(data.tobytes(), f"{self.origin}: {name}", strict=False)
                for i, (data, name) in enumerate(zip(found, names, strict=True))
            }
        return self._documents[rank]


# ---- reading


def detect_native(files: Files) -> bool:
    """Whether there are folders of checkpoints, or this is one."""
    if getattr(files, "only", ""):  # a file that lies beside checkpoints is none
        return False
    return COMMIT in files.children() or any(parse_checkpoint_name(name) for name in files.children())


def read_native(files: Files, origin: str, options: Mapping[str, str]) -> Logical:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NoCheckpoint, Damaged, IncompatibleVersion, StoreError: as `client.reading.load`.
        ConfigError: an option is unknown or no number.
    """
    known(options, ("step", "name"))
    url = files.url
    files.close()
    above, _, last = url.rstrip("/").rpartition("/")
    name = options.get("name")
    if parse_checkpoint_name(last):
        url, name = above or "/", last
    step = _number(options, "step")
    store = open_apart(url)
    try:
        found = find(store, step, name)
        if not found:
            raise _nothing(store.url, step, name)
        ref, commit = found[0]
        if not isinstance(commit, CommitRecord):
            raise commit
        return NativeLogical(open_checkpoint(store, ref, commit), close=store.close)
    except BaseException:
        store.close()
        raise


def _nothing(url: str, step: int | None, name: str | None) -> Exception:
    what = name or ("checkpoint" if step is None else f"checkpoint of step {step}")
    return NoCheckpoint(f"{url} has no committed {what}", hint="`ckptsvc ls` lists what there is")


# ---- writing


Holding = Callable[[int], Iterable[tuple[str, Region]]]
"""What a rank stores: names and regions; over all ranks every element of every tensor, each once."""


class Naming(NamedTuple):
    """What a checkpoint is called, the same whenever the conversion is resumed.

    Attributes:
        run: URL of the run.
        ref: the checkpoint.
        created: ISO 8601.
        writer: 16 or more hexadecimal digits that stand for the conversion.
    """

    run: str
    ref: Ref
    created: str
    writer: str


def write_native(
    logical: Logical,
    options: Mapping[str, str],
    naming: Naming,
    holding: Holding | None = None,
    ranks: int = 0,
) -> Output:
    """The files of a checkpoint of our own.

    Args:
        logical: what it holds.
        options: see the module.
        naming: what it is called.
        holding: what each of `ranks` ranks stores; None cuts the tensors, as they lie in the source, into `shards`
            files of about the same size.
        ranks: of `holding`.

    Raises:
        ConfigError: an option is unknown or no number.
        InvalidInput, LayoutError: the parts cannot be stored, or do not cover the tensors.
    """
    known(options, ("shards", "step"))
    metas = [logical.meta(name) for name in logical.names()]
    in_order = [meta for _, meta in sorted(_positions(logical, metas))]
    notes = []
    if holding is None:
        files = _cut(in_order, _number(options, "shards"))
        files += [[] for _ in range(logical.world_size - len(files))]
    else:
        places = {meta.name: (number, meta) for number, meta in enumerate(in_order)}
        files = [_held(holding(rank), places) for rank in range(ranks)]
        if ranks < logical.world_size:
            notes.append(Note("lost", f"the plain values of ranks {ranks} to {logical.world_size - 1}"))
    world = len(files)
    shards = [_shard(logical, rank, world, parts, naming) for rank, parts in enumerate(files)]
    info = IndexInfo(
        step=naming.ref.step, epoch=naming.ref.epoch, attempt=0, job=JOB, world_size=world, created=naming.created,
        extent=EXTENT, aliases=dict(logical.aliases),
    )  # fmt: skip
    return Output(
        [file for file, _ in shards],
        lambda digests: _commit(info, [_recorded(*shard, digests) for shard in shards], naming),
        notes=notes,
        facts={"ranks": world},
    )


def step_of(logical: Logical, options: Mapping[str, str]) -> int:
    """The step that a checkpoint is saved as; see the options of the module."""
    given = _number(options, "step")
    return logical.step if given is None else given


def _positions(logical: Logical, metas: Iterable[TensorMeta]) -> Iterable[tuple[tuple[int, int, int, str], TensorMeta]]:
    """Tensors with the place of their first region in the source, wide elements first: so the shards are read in order.

    Elements of one width are kept together because a shard stores them so (see format.shard).
    """
    for meta in metas:
        stored = logical.touching(meta.name, [Box((0,) * len(meta.shape), tuple(min(n, 1) for n in meta.shape))])
        place = min(((s.shard, s.offset) for s in stored), default=(0, 0))
        yield (-DTYPES[meta.dtype].itemsize, *place, meta.name), meta


def _cut(metas: Sequence[TensorMeta], shards: int | None) -> list[list[Part]]:
    """The tensors in order, in files of about one size; a large one is cut between rows."""
    total = sum(map(_nbytes, metas))
    count = min(max(-(-total // SHARD_BYTES), 1), MAX_FILES) if shards is None else shards
    if not 1 <= count <= 1 << 20:
        raise ConfigError(f"shards={count} is out of range")
    share = max(-(-total // count), 1)
    files: list[list[Part]] = [[] for _ in range(count)]
    position = 0
    for meta in metas:
        nbytes = _nbytes(meta)
        if nbytes < max(share // 16, 1) or not meta.shape or meta.shape[0] < 2:
            files[min((position + nbytes // 2) // share, count - 1)].append(Part(meta, Box.full(meta.shape)))
        else:
            row = nbytes // meta.shape[0]
            start = 0
            while start < meta.shape[0]:
                number = min((position + start * row + row // 2) // share, count - 1)
                room = (number + 1) * share - position - start * row
                stop = meta.shape[0] if number == count - 1 else start + max((room + row // 2) // row, 1)
                stop = min(stop, meta.shape[0])
                region = Box((start, *(0 for _ in meta.shape[1:])), (stop - start, *meta.shape[1:]))
                files[number].append(Part(meta, region))
                start = stop
        position += nbytes
    return files


def _held(parts: Iterable[tuple[str, Region]], places: Mapping[str, tuple[int, TensorMeta]]) -> list[Part]:
    """The parts of a rank in the order of the tensors, which all ranks have in common."""
    ordered = sorted(((*places[name], region) for name, region in parts), key=lambda part: part[0])
    return [Part(meta, region) for _, meta, region in ordered]


def _nbytes(meta: TensorMeta) -> int:
    return prod(meta.shape) * DTYPES[meta.dtype].itemsize


class _Shard(NamedTuple):
    """A shard as it is reported; everything about it but its digests."""

    name: str
    rank: int
    nbytes: int
    columns: Columns


def _shard(logical: Logical, rank: int, world: int, parts: Sequence[Part], naming: Naming) -> tuple[OutputFile, _Shard]:
    document = encode(logical.document(rank % logical.world_size))
    template = ShardTemplate(parts)
    info = ShardInfo(
        run=naming.run, job=JOB, step=naming.ref.step, epoch=naming.ref.epoch, attempt=0, rank=rank, world_size=world
    )
    name = shard_name(rank, digest64(f"{naming.writer}/{rank}".encode())[:8])
    key, nbytes = f"{naming.ref.name}/{name}", template.total(len(document))
    fixed = [(0, template.header(info, len(document))), (template.objects_offset, document)]
    entries = sorted(template.entries, key=lambda entry: (entry.offset, entry.nbytes))
    fills = [Fill(entry.offset, entry.meta.name, entry.region, entry.meta.dtype) for entry in entries]
    columns = Columns.from_entries(template.entries, template.objects_offset, template.structure)
    return OutputFile(key, nbytes, fixed, fills, rank=rank), _Shard(name, rank, nbytes, columns)


def _recorded(file: OutputFile, shard: _Shard, digests: Mapping[str, Digests]) -> ShardRecord:
    return ShardRecord(shard.name, shard.rank, shard.nbytes, digests[file.key], shard.columns)


def _commit(info: IndexInfo, records: Sequence[ShardRecord], naming: Naming) -> list[Small]:
    """Index and commit record."""
    index = Index.build(info, records)
    index.check_cover()
    image = index.encode()
    name = index_name(digest64(naming.writer.encode())[:8])
    record = CommitRecord(
        step=info.step, epoch=info.epoch, attempt=info.attempt, job=info.job, writer=naming.writer, index=name,
        index_bytes=len(image), index_digest=digest128(image), shards=len(records),
        bytes=sum(each.nbytes for each in records), world_size=info.world_size, created=info.created,
    )  # fmt: skip
    folder = naming.ref.name
    return [Small(f"{folder}/{name}", image), Small(f"{folder}/{COMMIT}", record.encode())]


def _number(options: Mapping[str, str], name: str) -> int | None:
    if name not in options:
        return None
    try:
        value = int(options[name])
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"{name}={options[name]!r} is no number from 0 on")
    return value
