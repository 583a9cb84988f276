"""What tensor-parallel ranks hold, put together again: cut here by torch as DeepSpeed's converter joins it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.geometry.box import Region
from ckptsvc.geometry.reshard import Block
from ckptsvc.interop.deepspeed.cut import Cut, Cuts, places_of_runs, places_of_tensor
from ckptsvc.interop.deepspeed.zero import Run
from ckptsvc.interop.files import open_files
from ckptsvc.interop.logical import Foreign
from ckptsvc.interop.torch_format.file import read_torch
from ckptsvc.types import TensorMeta
from tests.harness.foreign_values import value

FULL = torch.arange(24 * 7, dtype=torch.float32).reshape(24, 7)


def joined(tmp_path: Path, cut: Cut, shards: list[torch.Tensor], *, flat: bool) -> torch.Tensor:
    """The logical tensor, from whole shards or from runs of flattened ones in two data-parallel partitions."""
    torch.save({str(i): shard for i, shard in enumerate(shards)}, tmp_path / "x.pt")
    foreign = Foreign("test", open_files(str(tmp_path)))
    stored = read_torch(foreign.files, "x.pt").root
    for rank in range(len(cut.pieces)):
        tensor = stored[str(rank)]
        if flat:
            key, at = tensor.where
            size = shards[rank].numel()
            half = size // 2 + 1
            runs = [Run(0, half, (key, at)), Run(half, size - half, (key, at + 4 * half))]
            places: Any = places_of_runs(runs, "float32", tensor.shape, cut, rank)
        else:
            places = places_of_tensor(tensor, cut, rank)
        for region, where, block in places:
            add(foreign, cut, region, where, block)
    return value(foreign.seal(), "x")


def add(foreign: Foreign, cut: Cut, region: Region, where: tuple[str, int], block: Block | None) -> None:
    foreign.add(TensorMeta("x", "float32", cut.shape), region, where, block)


def halves(full: torch.Tensor, sizes: list[list[int]], dim: int) -> list[torch.Tensor]:
    """Ranks' shards of a tensor of several parameters, `sizes` saying what each rank has of each."""
    parts = full.split([sum(each) for each in sizes], dim)
    pieces = [part.split(each, dim) for part, each in zip(parts, sizes, strict=True)]
    return [torch.cat([own[rank] for own in pieces], dim).contiguous() for rank in range(len(sizes[0]))]


INFO: list[tuple[str, dict[str, Any], list[torch.Tensor], torch.Tensor]] = [
    ("columns", {"parameter_with_row_parallelism_patterns": ["^x$"]}, list(FULL.split([4, 3], 1)), FULL),
    ("rows", {"tp_replicated_parameter_patterns": ["y"]}, list(FULL.split([10, 8, 6])), FULL),
    ("replicated", {"tp_replicated_parameter_patterns": ["x"]}, [FULL, FULL], FULL),
    ("padded", {"vocabulary_parameter_patterns": ["x"], "original_vocab_size": 22}, list(FULL.split(12)), FULL[:22]),
    ("two", {"parameter_with_2_sub_params_cat_dim_0": ["x"]}, halves(FULL, [[6, 6], [6, 6]], 0), FULL),
    (
        "grouped heads",
        {
            "universal_checkpoint_version": 0.4,
            "parameter_with_sub_params": [{"patterns": ["x"], "shape": ((12, 6, 6), 7), "partition_dim": 0}],
            "sub_param_shard_widths": {"x": [[8, 4], [4, 2], [4, 2]]},
        },
        halves(FULL, [[8, 4], [4, 2], [4, 2]], 0),
        FULL,
    ),
    (
        "fused",
        {"parameter_with_sub_params": [{"patterns": ["x"], "shape": (3, -1), "partition_dim": 0}]},
        halves(FULL, [[4, 4]] * 3, 0),
        FULL,
    ),
]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("info", "shards", "full"), [case[1:] for case in INFO], ids=[case[0] for case in INFO])
def test_shards_are_joined(
    tmp_path: Path, info: dict[str, Any], shards: list[torch.Tensor], full: torch.Tensor, flat: bool
) -> None:
    shards = [shard.contiguous() for shard in shards]
    cut = Cuts(info, "", "here").of("x", [tuple(shard.shape) for shard in shards])
    assert torch.equal(joined(tmp_path, cut, shards, flat=flat), full)


def test_a_strided_shard_is_seen_through_its_strides(tmp_path: Path) -> None:
    shards = [part.t().contiguous().t() for part in FULL.split(12)]
    cut = Cuts({}, "x:0", "here").of("x", [(12, 7), (12, 7)])
    assert torch.equal(joined(tmp_path, cut, shards, flat=False), FULL)


def piece(shape: list[int], source: list[Any], dest: list[Any], **more: Any) -> dict[str, Any]:
    return {"shape": shape, "source": source, "dest": dest, "locations": [0], **more}


def affine(pieces: list[list[dict[str, Any]]], version: int = 1) -> dict[str, Any]:
    ranks = {rank: {"shard_shape": [12, 7], "pieces": own} for rank, own in enumerate(pieces)}
    return {"affine_map": {"version": version, "params": {"^x$": {"logical_shape": [24, 7], "ranks": ranks}}}}


@pytest.mark.parametrize("flat", [False, True])
def test_an_affine_map_is_followed(tmp_path: Path, flat: bool) -> None:
    # rank 0 has rows 6:12 and 0:6, rank 1 the rest in blocks that end at a column
    mine = [piece([6, 7], [42, [7, 1]], [0, [7, 1]]), piece([6, 7], [0, [7, 1]], [42, [7, 1]])]
    other = [piece([12, 3], [84, [7, 1]], [0, [7, 1]]), piece([12, 4], [87, [7, 1]], [3, [7, 1]])]
    cut = Cuts(affine([mine, other]), "", "here").of("x", [(12, 7), (12, 7)])
    shards = [torch.cat([FULL[6:12], FULL[:6]]), FULL[12:].contiguous()]
    assert torch.equal(joined(tmp_path, cut, shards, flat=flat), FULL)


def test_what_cannot_be_followed_is_refused() -> None:
    shapes = [(12, 7), (12, 7)]
    scaled = [piece([12, 7], [0, [7, 1]], [0, [7, 1]], scale=0.5)]
    skewed = [piece([12, 7], [0, [8, 1]], [0, [7, 1]])]
    for info, match in (
        (affine([scaled, scaled]), "multiplied by 0.5"),
        (affine([skewed, skewed]), "no box"),
        ({}, "nothing says how 2 tensor-parallel ranks"),
        ({"pipeline_replicated_parameter_patterns": ["x"]}, "nothing says"),
        ({"tp_replicated_parameter_patterns": ["y"], "autotp_unsupported_parameter_patterns": {"x": "odd"}}, "odd"),
        ({"parameter_with_sub_params": [{"patterns": ["x"], "shape": (5, -1), "partition_dim": 0}]}, "divided by 2"),
    ):
        with pytest.raises(LayoutError, match=match):
            Cuts(info, "", "here").of("x", shapes)
    with pytest.raises(Damaged, match="version 1"):
        Cuts(affine([], version=2), "", "here")
    with pytest.raises(Damaged, match="no pattern"):
        Cuts({"tp_replicated_parameter_patterns": ["("]}, "", "here").of("x", shapes)


def test_rules_of_the_user_go_first() -> None:
    cuts = Cuts({"tp_replicated_parameter_patterns": ["x"]}, "a.*:1,*.bias:-", "here")
    assert cuts.of("a.weight", [(2, 3), (2, 4)]).shape == (2, 7)
    assert cuts.of("b.bias", [(5,), (5,)]).is_replicated
    with pytest.raises(LayoutError, match="same in all ranks"):
        cuts.of("b.bias", [(5,), (6,)])
    with pytest.raises(LayoutError, match="do not fit together"):
        cuts.of("a.weight", [(2, 3), (3, 3)])
    with pytest.raises(InvalidInput, match="PATTERN:DIMENSION"):
        Cuts({}, "a", "here")
