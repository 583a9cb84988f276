"""Bytes read are counted where they are read, and what was read is looked at."""

from pathlib import Path

import pytest

from ckptsvc.cli.benchmarks import reshard
from ckptsvc.cli.benchmarks.reshard import CASES, matrices, read_checkpoint, write_checkpoint
from ckptsvc.client.group import Alone
from ckptsvc.errors import Damaged
from ckptsvc.geometry.box import Box, FlatRange

METAS = matrices(6 << 20)
NEEDED = sum(reshard._nbytes(meta) for meta in METAS)


def test_the_matrices_have_about_the_size_asked_for() -> None:
    assert pytest.approx(6 << 20, rel=0.01) == NEEDED


@pytest.mark.parametrize("case", CASES)
def test_every_case_reads_what_is_needed_and_hardly_more(case: str, tmp_path: Path) -> None:
    stored, wanted = CASES[case]
    url = f"file://{tmp_path}"
    write_checkpoint(url, METAS, stored, 3)
    found = read_checkpoint(url, METAS, wanted, Alone())
    there = sum(path.stat().st_size for path in tmp_path.glob("step-*/*"))
    assert NEEDED < found["read"] <= there, "headers and index are read too, and nothing twice"


def test_a_part_costs_a_part(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_checkpoint(url, METAS, reshard.rows, 3)
    half = read_checkpoint(url, METAS, lambda shape, rank, ranks: Box((0, 0), (shape[0] // 2, shape[1])), Alone())
    assert NEEDED / 2 < half["read"] < NEEDED * 0.75


def test_wrong_bytes_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}"
    write_checkpoint(url, METAS, reshard.rows, 3)
    content = reshard.content
    monkeypatch.setattr(reshard, "content", lambda meta, region: content(meta, region) + 1)
    with pytest.raises(Damaged, match="is not what was written"):
        read_checkpoint(url, METAS, reshard.columns, Alone())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("layout", [reshard.rows, reshard.columns, reshard.grid, reshard.flat])
def test_a_layout_gives_every_element_to_one_rank(layout, ranks: int) -> None:
    shape = (7, 10)
    regions = [layout(shape, rank, ranks) for rank in range(ranks)]
    assert sum(region.size for region in regions) == 70
    flat = [r for r in regions if isinstance(r, FlatRange)]
    boxes = [r for r in regions if isinstance(r, Box)]
    assert sorted(i for r in flat for i in range(r.start, r.stop)) == (list(range(70)) if flat else [])
    assert not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i] if not a.is_empty)
