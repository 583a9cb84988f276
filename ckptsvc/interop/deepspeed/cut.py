"""How tensor parallelism cut DeepSpeed's parameters: from what the checkpoint says of it, or from the user.

`universal_checkpoint_info` in the model states (DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py` and `affine.py`):

    affine_map {version 1, params {regex: {logical_shape, ranks {r: {shard_shape, pieces [...]}}}}}
        a piece {shape, source [offset, strides], dest [offset, strides]} says as_strided(full) == as_strided(shard)
    *_patterns                    regexes for re.match: replicated, row parallel (dimension 1), vocabulary, ...
    parameter_with_sub_params     [{patterns, shape, partition_dim}]: several parameters in one, each cut on its own
    otherwise                     dimension 0

Nothing is concluded from shapes.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, FlatRange, Region, fits, flat_to_boxes
from ckptsvc.geometry.reshard import Block
from ckptsvc.interop.deepspeed.files import Shape
from ckptsvc.interop.deepspeed.zero import Run
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.types import DTYPES

Place = tuple[Region, tuple[str, int], Block | None]
"""A stored part of a logical tensor: which, file and byte, and how it is seen there."""

REPLICATED = "-"
"""In the option `tp_dims`: every rank has all of it."""

_TP_KEYS = (
    "tp_replicated_parameter_patterns",
    "parameter_with_row_parallelism_patterns",
    "vocabulary_parameter_patterns",
    "parameter_with_2_sub_params_cat_dim_0",
    "parameter_with_sub_params",
    "parameter_to_average_patterns",
    "affine_map",
)


class Cut(NamedTuple):
    """A logical tensor in the tensor-parallel ranks of a stage.

    Attributes:
        shape: the logical shape.
        pieces: for each rank that is read, the boxes of the logical tensor with the boxes of the rank's tensor.
    """

    shape: Shape
    pieces: Sequence[Sequence[tuple[Box, Box]]]

    @property
    def is_replicated(self) -> bool:
        """Whether the first rank has all of it."""
        return len(self.pieces) == 1


def uncut(shape: Shape) -> Cut:
    """A tensor that the first rank has whole."""
    return Cut(shape, [[(Box.full(shape), Box.full(shape))]])


def along(shapes: Sequence[Shape], dim: int, what: str) -> Cut:
    """The ranks' tensors follow each other in one dimension."""
    first = shapes[0]
    if not 0 <= dim < len(first):
        raise LayoutError(f"{what} has {len(first)} dimensions and is said to be cut in dimension {dim}")
    if any((*s[:dim], *s[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for s in shapes):
        raise LayoutError(f"{what}: shapes {[list(s) for s in shapes[:4]]} do not fit together in dimension {dim}")
    return stacked([[shape[dim] for shape in shapes]], first, dim, what)


def stacked(widths: Sequence[Sequence[int]], shape: Shape, dim: int, what: str) -> Cut:
    """Several parameters in one, each cut in the same dimension.

    Args:
        widths: for each sub-parameter the extent that each rank has of it.
        shape: of one rank's tensor; its extent in `dim` does not matter.
        dim: the dimension.
        what: for messages.
    """
    total = sum(map(sum, widths))
    ranks = len(widths[0])
    if any(len(each) != ranks for each in widths):
        raise LayoutError(f"{what}: its sub-parameters are cut for different numbers of ranks")
    pieces: list[list[tuple[Box, Box]]] = [[] for _ in range(ranks)]
    places = [0] * ranks
    at = 0
    for each in widths:
        for rank, width in enumerate(each):
            extent = (*shape[:dim], width, *shape[dim + 1 :])
            zero = [0] * len(shape)
            pieces[rank].append((_moved(zero, dim, at, extent), _moved(zero, dim, places[rank], extent)))
            at += width
            places[rank] += width
    return Cut((*shape[:dim], total, *shape[dim + 1 :]), pieces)


def _moved(zero: Sequence[int], dim: int, by: int, extent: Shape) -> Box:
    return Box((*zero[:dim], by, *zero[dim + 1 :]), extent)


def cropped(cut: Cut, rows: int) -> Cut:
    """Without the rows beyond those that are wanted: padding of a vocabulary."""
    inside = Box((0,) * len(cut.shape), (min(rows, cut.shape[0]), *cut.shape[1:]))
    pieces = []
    for each in cut.pieces:
        kept = []
        for full, local in each:
            if (part := full.intersect(inside)) is not None:
                kept.append((part, Box(local.origin, part.shape)))
        pieces.append(kept)
    return Cut(inside.shape, pieces)


class Cuts:
    """Answers how a parameter was cut."""

    def __init__(self, info: Mapping[Any, Any], dims: str, where: str) -> None:
        """
        Args:
            info: `universal_checkpoint_info`, empty if there is none.
            dims: the option `tp_dims`, "PATTERN:DIM,...", DIM a number or "-".
            where: for messages.

        Raises:
            InvalidInput: the option cannot be understood.
            Damaged: the info cannot.
        """
        self._info, self._where = info, where
        self._dims = list(parse_dims(dims))
        self._knows = any(info.get(key) for key in _TP_KEYS)
        affine = info.get("affine_map") or {}
        if not isinstance(affine, Mapping) or affine.get("version", 1) != 1:
            raise Damaged(f"{where}: its affine map is not of version 1")
        self._affine = {pattern: _compiled(pattern, where) for pattern in affine.get("params") or {}}
        self._patterns: dict[str, list[re.Pattern[str]]] = {}

    def of(self, name: str, shapes: Sequence[Shape]) -> Cut:
        """The cut of a parameter, given its shape in every rank.

        Raises:
            LayoutError: nothing says how it was cut, or what says so contradicts the shapes.
        """
        what = f"{self._where}: {name[:200]}"
        if len(shapes) == 1:
            return uncut(shapes[0])
        for pattern, dim in self._dims:
            if fnmatch.fnmatchcase(name, pattern):
                return self._replicated(shapes, what) if dim is None else along(shapes, dim, what)
        for pattern, compiled in self._affine.items():
            if compiled.match(name):
                return _affine_cut(self._info["affine_map"]["params"][pattern], shapes, what)
        if not self._knows:
            raise LayoutError(
                f"{what}: nothing says how {len(shapes)} tensor-parallel ranks divide it",
                hint="the checkpoint has no universal_checkpoint_info; give the option tp_dims=PATTERN:DIM,...",
            )
        cut = self._by_patterns(name, shapes, what)
        if self._has(name, "vocabulary_parameter_patterns"):
            rows = self._info.get("original_vocab_size")
            if type(rows) is not int or rows < 0:
                raise Damaged(f"{what} is padded and the original size of the vocabulary is {str(rows)[:80]!r}")
            cut = cropped(cut, rows)
        return cut

    def is_claimed(self, name: str) -> bool:
        """Whether the user says how a tensor is cut."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self._dims)

    def _by_patterns(self, name: str, shapes: Sequence[Shape], what: str) -> Cut:
        unsupported = self._info.get("autotp_unsupported_parameter_patterns") or {}
        if any(_compiled(pattern, what).match(name) for pattern in unsupported):
            raise LayoutError(f"{what}: DeepSpeed did not write down how it is cut: {str(unsupported)[:200]}")
        for key in ("tp_replicated_parameter_patterns", "parameter_to_average_patterns"):
            if self._has(name, key):
                return self._replicated(shapes, what)
        if self._has(name, "parameter_with_2_sub_params_cat_dim_0"):
            if any(len(shape) < 1 or shape[0] % 2 for shape in shapes):
                raise LayoutError(f"{what} is said to be two parameters in one, and its first dimension is odd")
            return stacked([[shape[0] // 2 for shape in shapes]] * 2, shapes[0], 0, what)
        for entry in self._info.get("parameter_with_sub_params") or ():
            for pattern in _field(entry, "patterns", what) or ():
                if _compiled(pattern, what).match(name):
                    return self._sub_params(entry, pattern, shapes, what)
        return along(shapes, 1 if self._has(name, "parameter_with_row_parallelism_patterns") else 0, what)

    def _sub_params(self, entry: Any, pattern: str, shapes: Sequence[Shape], what: str) -> Cut:
        dim, spec = _field(entry, "partition_dim", what), _field(entry, "shape", what)
        ranks, ndim = len(shapes), len(shapes[0])
        if type(dim) is not int or not isinstance(spec, tuple | list) or not 0 <= dim < ndim or len(spec) != ndim:
            raise LayoutError(f"{what} of {ndim} dimensions is said to be parameters of shape {str(spec)[:80]}")
        widths = (self._info.get("sub_param_shard_widths") or {}).get(pattern)
        if widths is None:
            total = sum(shape[dim] for shape in shapes)
            sizes = spec[dim] if isinstance(spec[dim], tuple | list) else [total // max(spec[dim], 1)] * spec[dim]
            if sum(sizes) != total or any(size % ranks for size in sizes):
                raise LayoutError(f"{what}: parameters of {str(sizes)[:80]} rows cannot be divided by {ranks} ranks")
            widths = [[size // ranks] * ranks for size in sizes]
        if not all(type(n) is int and n >= 0 for each in widths for n in each):
            raise Damaged(f"{what}: its sub-parameters are {str(widths)[:80]}")
        cut = stacked(widths, shapes[0], dim, what)
        held = [sum(each[rank] for each in widths) for rank in range(ranks)] if len(widths[0]) == ranks else []
        if held != [shape[dim] for shape in shapes]:
            raise LayoutError(f"{what}: its sub-parameters {str(widths)[:80]} are not the shapes {str(shapes)[:80]}")
        return cut

    def _replicated(self, shapes: Sequence[Shape], what: str) -> Cut:
        if any(shape != shapes[0] for shape in shapes):
            raise LayoutError(f"{what} is said to be the same in all ranks, and has the shapes {str(shapes)[:80]}")
        return uncut(shapes[0])

    def _has(self, name: str, key: str) -> bool:
        if key not in self._patterns:
            found = self._info.get(key) or []
            if not isinstance(found, list | tuple):
                raise Damaged(f"{self._where}: {key} is no list")
            self._patterns[key] = [_compiled(pattern, self._where) for pattern in found]
        return any(pattern.match(name) for pattern in self._patterns[key])


def parse_dims(option: str) -> Iterator[tuple[str, int | None]]:
    """The rules of `tp_dims`: (glob, dimension or None if replicated)."""
    for rule in filter(None, option.split(",")):
        pattern, _, dim = rule.rpartition(":")
        if not pattern or not (dim == REPLICATED or dim.isdecimal()):
            raise InvalidInput(f"tp_dims: {rule[:200]!r} is not PATTERN:DIMENSION")
        yield pattern, None if dim == REPLICATED else int(dim)


def _compiled(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError):
        raise Damaged(f"{where}: {str(pattern)[:200]!r} is no pattern") from None


def _field(entry: Any, name: str, what: str) -> Any:
    if not isinstance(entry, Mapping):
        raise Damaged(f"{what}: its sub-parameters are described by {str(entry)[:80]!r}")
    return entry.get(name)


def _affine_cut(entry: Any, shapes: Sequence[Shape], what: str) -> Cut:
    try:
        logical = tuple(int(n) for n in entry["logical_shape"])
        pieces = []
        for rank, shape in enumerate(shapes):
            held = entry["ranks"].get(rank) or entry["ranks"][str(rank)]
            if tuple(held["shard_shape"]) != shape:
                raise LayoutError(f"{what} is {list(shape)} in rank {rank}, and {held['shard_shape']} by its map")
            pieces.append([_affine_piece(piece, logical, shape, what) for piece in held["pieces"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LayoutError):
            raise
        raise Damaged(f"{what}: its affine map cannot be read: {error!r}") from None
    return Cut(logical, pieces)


def _affine_piece(piece: Mapping[str, Any], logical: Shape, local: Shape, what: str) -> tuple[Box, Box]:
    if piece.get("scale", 1.0) != 1.0:
        raise LayoutError(f"{what}: ranks hold it multiplied by {piece['scale']}, which is not undone here")
    shape = tuple(int(n) for n in piece["shape"])
    full = _strided_box(shape, piece["source"], logical, what)
    return full, _strided_box(shape, piece["dest"], local, what)


def _strided_box(shape: Shape, place: Sequence[Any], outer: Shape, what: str) -> Box:
    """The box that `as_strided(shape, strides, offset)` is of a row-major array; LayoutError if it is none."""
    offset, strides = place
    steps = [math.prod(outer[d + 1 :]) for d in range(len(outer))]
    origin, rest = [], int(offset)
    for step in steps:
        origin.append(rest // step if step else 0)
        rest -= origin[-1] * step
    box = Box(tuple(origin), shape)
    same = len(shape) == len(outer) == len(strides) and all(
        n <= 1 or stride == step for n, stride, step in zip(shape, strides, steps, strict=True)
    )
    if not same or not (fits(box, outer) or box.is_empty):
        raise LayoutError(f"{what}: a piece of its affine map is no box: {shape}, {offset}, {list(strides)}")
    return box


# ---- from what is stored to parts of the logical tensor -----------------------------------------------------------


def places_of_runs(runs: Sequence[Run], dtype: str, shape: Shape, cut: Cut, rank: int) -> Iterator[Place]:
    """Where runs of a rank's flattened tensor are in the logical tensor.

    Args:
        runs: what is stored.
        dtype: element type.
        shape: of the rank's tensor.
        cut: how the ranks divide the logical tensor.
        rank: which rank.
    """
    for run in runs:
        if cut.is_replicated and cut.shape == shape:
            yield FlatRange(run.start, run.length), run.where, None
            continue
        key, at = run.where
        for box in flat_to_boxes(shape, run.start, run.length):
            yield from _through(cut.pieces[rank], box, (key, at), lambda inside: inside)
            at += box.size * DTYPES[dtype].itemsize


def places_of_tensor(tensor: StoredTensor, cut: Cut, rank: int) -> Iterator[Place]:
    """Where a rank's whole tensor is in the logical tensor."""
    seen = tensor.block()
    box = Box.full(tensor.shape)
    if cut.is_replicated and cut.shape == tensor.shape:
        yield box, tensor.where, seen
    else:
        yield from _through(cut.pieces[rank], box, tensor.where, lambda block: _inside(seen, block))


def _inside(outer: Block | None, block: Block | None) -> Block | None:
    """A block of what is itself seen through a block."""
    if outer is None or block is None:
        return outer or block
    return Block(outer.shape, outer.inside(block.box), outer.order)


def _through(
    pieces: Sequence[tuple[Box, Box]], stored: Box, where: tuple[str, int], seen: Callable[[Block | None], Block | None]
) -> Iterator[Place]:
    """The parts of a stored box of a rank's tensor, as boxes of the logical tensor."""
    for full, local in pieces:
        common = stored.intersect(local)
        if common is None:
            continue
        shift = common.relative_to(local.origin).origin
        region = Box(tuple(a + b for a, b in zip(full.origin, shift, strict=True)), common.shape)
        inside = common.relative_to(stored.origin)
        block = None if common == stored else Block(stored.shape, inside, tuple(range(stored.ndim)))
        yield region, where, seen(block)
