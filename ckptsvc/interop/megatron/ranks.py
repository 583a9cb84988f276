"""The folders of a classic Megatron checkpoint: one for each model-parallel rank, and who holds what in them.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     ranks of tensor, pipeline (if there are stages) and expert parallelism
                          /distrib_optim.pt       what the distributed optimizer keeps

Names in a file count layers, and experts, from the first that the rank has itself; nothing says how tensor parallelism
divides a tensor: the rules of the family `megatron` do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

from ckptsvc.errors import Damaged, InvalidInput, LayoutError, NotFound
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Held, Placement
from ckptsvc.geometry.reshard import Block
from ckptsvc.geometry.rules import Claim, Local, Rules
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Foreign
from ckptsvc.interop.megatron.files import MEGATRON, is_nothing
from ckptsvc.interop.naming.families import variables
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.interop.torch_format.pickles import Stub
from ckptsvc.types import TensorMeta

MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
EXTRA = "_extra_state"

_FOLDER = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_CHUNK = re.compile(r"model(\d{1,4})?")


class Rank(NamedTuple):
    """One folder.

    Attributes:
        tp, pp, ep: which rank it is.
        folder: its name below the address.
        root: the object in its file.
        chunks: the tensors of each chunk of layers (one, but for interleaved stages), in the order of the model.
        extra: names of `_extra_state` that has something in it.
    """

    tp: int
    pp: int
    ep: int
    folder: str
    root: Mapping[Any, Any]
    chunks: Sequence[Mapping[str, StoredTensor]]
    extra: Sequence[str]


def is_folder(name: str) -> bool:
    """Whether it is called as the folder of a rank."""
    return _FOLDER.fullmatch(name) is not None


def is_chunk(key: Any) -> bool:
    """Whether it is the key of a model, or of a chunk of its layers."""
    return isinstance(key, str) and _CHUNK.fullmatch(key) is not None


def read_ranks(files: Files, folder: str) -> list[Rank]:
    """All ranks, by pipeline stage, then expert, then tensor-parallel rank.

    Raises:
        NotFound, LayoutError: a rank is missing.
        InvalidInput: a pickle names what is not on the list, or it is not of Megatron-Core.
        Damaged: a file is not what it should be.
    """
    found = {name: match.groups() for name in files.children(folder.rstrip("/")) if (match := _FOLDER.fullmatch(name))}
    if len({sum(part is not None for part in parts) for parts in found.values()}) != 1:
        raise LayoutError(f"{files.url}/{folder} has folders of ranks of different layouts, or none")
    read = {name: _rank(files, folder + name) for name in sorted(found)}
    second = _second_is_expert(read, found)
    ranks = []
    for name, (tp, one, two) in found.items():
        pp, ep = (two, one) if second else (one, two)
        ranks.append(read[name]._replace(tp=int(tp), pp=int(pp or 0), ep=int(ep or 0)))
    ranks.sort(key=lambda rank: (rank.pp, rank.ep, rank.tp))
    degrees = [max(getattr(rank, name) for rank in ranks) + 1 for name in ("pp", "ep", "tp")]
    there = {(rank.pp, rank.ep, rank.tp) for rank in ranks}
    if len(there) < degrees[0] * degrees[1] * degrees[2]:
        missing = next(at for at in product(*map(range, degrees)) if at not in there)
        raise LayoutError(
            f"{files.url}/{folder}: the folder of rank pp={missing[0]} ep={missing[1]} tp={missing[2]} is missing,"
            f" of pp={degrees[0]} ep={degrees[1]} tp={degrees[2]}"
        )
    if len({len(rank.chunks) for rank in ranks}) > 1:
        raise LayoutError(f"{files.url}/{folder}: ranks have different numbers of chunks of layers")
    return ranks


def _rank(files: Files, folder: str) -> Rank:
    key = f"{folder}/{MODEL_FILE}"
    try:
        root = read_torch(files, key, allowed=MEGATRON).root
    except NotFound:
        raise NotFound(f"{files.url}/{key} does not exist", hint="a rank has not finished its checkpoint") from None
    models = {k: v for k, v in root.items() if is_chunk(k)} if isinstance(root, dict) else {}
    if not models or not all(isinstance(model, Mapping) for model in models.values()):
        raise Damaged(f"{files.url}/{key} has no model in it")
    chunks: list[dict[str, StoredTensor]] = []
    extra: list[str] = []
    for _, model in sorted(models.items(), key=lambda item: int(item[0][5:] or 0)):
        tensors: dict[str, StoredTensor] = {}
        for name, value in model.items():
            if isinstance(value, Mapping):
                raise InvalidInput(
                    f"{files.url}/{key}: {name!r} of its model is a dict: it was written before Megatron-Core, by a"
                    " model that is not known"
                )
            if str(name).endswith(EXTRA):
                extra += [] if is_nothing(value) else [f"{folder}: {name}"]
            elif isinstance(value, StoredTensor):
                tensors[str(name)] = value
        chunks.append(tensors)
    return Rank(0, 0, 0, folder, root, chunks, extra)


def _second_is_expert(read: Mapping[str, Rank], found: Mapping[str, Sequence[str | None]]) -> bool:
    """Whether the second number is that of experts: there are no pipeline stages, so all have an embedding."""
    if any(parts[1] is None or parts[2] is not None for parts in found.values()):
        return False
    args = argument(next(iter(read.values())).root, "pipeline_model_parallel_size")
    if type(args) is int:
        return args == 1
    later = [name for name, parts in found.items() if int(parts[1] or 0) > 0]
    return bool(later) and all("embedding.word_embeddings.weight" in read[name].chunks[0] for name in later)


def argument(root: Mapping[Any, Any], name: str) -> Any:
    """One of the trainer's arguments, None if it is not there."""
    args = root.get("args")
    return args.get(name) if isinstance(args, Stub | Mapping) else None


class Ranks:
    """What ranks hold of the tensors of the whole model.

    Attributes:
        ranks: as `read_ranks` gives them.
        placement: the tensors under the layout of the ranks.
        dtypes: element type of every parameter.
        interleaved: whether stages hold several chunks of layers.
    """

    def __init__(self, ranks: Sequence[Rank], rules: Rules, origin: str) -> None:
        """Find out the shapes of the whole tensors.

        Raises:
            LayoutError: no rule takes a tensor, or ranks contradict each other.
        """
        self.ranks, self._rules, self._origin = ranks, rules, origin
        last = ranks[-1]
        self._chunks = len(last.chunks)
        self.interleaved = self._chunks > 1
        self._tp, self._pp, self._ep = last.tp + 1, last.pp + 1, last.ep + 1
        self.dtypes: dict[str, str] = {}
        self._claims: dict[str, Claim] = {}
        self._experts = 0
        layers = self._counted()
        self._offsets = [0, *accumulate(layers)]
        shapes = self._shapes()
        parallel = Parallel(
            dp=self._ep, tp=self._tp, pp=self._pp, vpp=self._chunks, ep=self._ep, etp=self._tp, stages=tuple(layers)
        )
        known = variables({}, shapes) | reading(self._tp)
        entries = [Entry(name, name, shape, 1) for name, shape in shapes.items()]
        self.placement = Placement(rules, parallel, entries, known | {"layers": sum(layers)}).check()
        self.shapes = shapes

    def held(self, rank: Rank) -> dict[tuple[int, str], Held]:
        """What a rank holds, by chunk and the name in its file.

        Raises:
            LayoutError: its file has something else.
        """
        number = self.placement.parallel.rank(dp=rank.ep, tp=rank.tp, pp=rank.pp)
        held = {(h.chunk, h.name): h for h in self.placement.held(number)}
        for c, tensors in enumerate(rank.chunks):
            for name, tensor in tensors.items():
                mine = held.get((c, name))
                if mine is None or mine.local.shape != tensor.shape:
                    expected = "nothing of it" if mine is None else list(mine.local.shape)
                    raise LayoutError(
                        f"{self._origin}: {rank.folder} has {name} {list(tensor.shape)}, and {expected} is expected of"
                        " that rank",
                    )
        return held

    def _claim(self, name: str) -> Claim:
        if name not in self._claims:
            claims = self._rules.claims(name)
            if len(claims) != 1:
                raise LayoutError(
                    f"{self._origin}: {len(claims) or 'no'} rules take {name[:200]}",
                    hint="rules of your own: the option rules=FILE",
                )
            self._claims[name] = claims[0]
        return self._claims[name]

    def _counted(self) -> list[int]:
        """Layers of each chunk, in the order of the model; and how many experts a rank has."""
        layers = [0] * (self._pp * self._chunks)
        for rank in self.ranks:
            for c, tensors in enumerate(rank.chunks):
                for name in tensors:
                    claim = self._claim(name)
                    at = c * self._pp + rank.pp
                    layers[at] = max(layers[at], 0 if claim.layer is None else claim.layer + 1)
                    self._experts = max(self._experts, 0 if claim.expert is None else claim.expert + 1)
        if max(layers) > 1 << 20 or self._experts > 1 << 20:
            raise LayoutError(f"{self._origin} has names with numbers of layers or experts that cannot be")
        return layers

    def _shapes(self) -> dict[str, Shape]:
        """Shapes of the whole tensors, under the names of the whole model, in its order."""
        shapes: dict[str, Shape] = {}
        for c, rank in product(range(self._chunks), self.ranks):
            for name, tensor in rank.chunks[c].items():
                claim = self._claim(name)
                values = dict(claim.values)
                if claim.layer is not None:
                    values["layer"] = str(claim.layer + self._offsets[c * self._pp + rank.pp])
                if claim.expert is not None:
                    values["expert"] = str(claim.expert + rank.ep * self._experts)
                whole = claim.pattern.fill(values)
                shape = self._whole(name, claim, tensor.shape)
                if (
                    shapes.setdefault(whole, shape) != shape
                    or self.dtypes.setdefault(whole, tensor.dtype) != tensor.dtype
                ):
                    raise LayoutError(f"{self._origin}: ranks have {whole} in different shapes or element types")
        return shapes

    def _whole(self, name: str, claim: Claim, local: Shape) -> Shape:
        shape = list(local)
        for dim, times in ((claim.rule.cut, self._tp), (claim.rule.experts, self._ep)):
            if dim is not None and dim >= len(shape):
                raise LayoutError(
                    f"{self._origin}: {name} {list(local)} has no dimension {dim}, which {claim.rule} cuts"
                )
            if dim is not None:
                shape[dim] *= times
        return tuple(shape)


def reading(tp: int) -> dict[str, int]:
    """Variables for files that are read: there every rank has an equal share, heads and padding are as they are."""
    return {"vocab_multiple": 1, "kv_heads": tp, "heads": tp}


def add_local(foreign: Foreign, name: str, shape: Shape, local: Local, stored: StoredTensor) -> None:
    """Add what a rank's local tensor is of the whole one.

    Raises:
        LayoutError: the tensor in the file has another shape.
    """
    if stored.shape != local.shape:
        raise LayoutError(
            f"{foreign.origin}: {name} is {list(stored.shape)} in {stored.storage.key}, and {list(local.shape)} is the"
            " shape of its parameter there"
        )
    meta = TensorMeta(name, stored.dtype, shape)
    inner = stored.block() or Block(local.shape, Box.full(local.shape), tuple(range(len(local.shape))))
    for piece in local.pieces:
        whole = piece.local == Box.full(local.shape) and stored.is_contiguous()
        block = None if whole else Block(inner.shape, inner.inside(piece.local), inner.order)
        foreign.add(meta, piece.box, stored.where, block)
