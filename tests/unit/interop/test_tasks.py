"""What is made together, and in which steps."""

import numpy as np
from harness.declared import Arrays, columns, rows

from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.conversion import tasks
from ckptsvc.interop.conversion.tasks import Task, share, steps
from ckptsvc.interop.outputs import Fill, OutputFile


def test_files_with_columns_of_a_tensor_are_made_together() -> None:
    source = Arrays({"w": np.zeros((400, 100), np.float32), "v": np.zeros((400, 100), np.float32)})
    found = tasks.tasks([*columns(source, "w", 3), *rows(source, "v", 2), *columns(source, "w", 2, "more")], source)
    assert [[file.key for file in group] for task in found for group in task.groups] == [
        ["w0", "w1", "w2", "more0", "more1"],
        ["v0"],
        ["v1"],
    ]


def test_copies_of_a_large_region_are_made_together_and_small_ones_are_not() -> None:
    source = Arrays({"large": np.zeros(300_000, np.float32), "small": np.zeros(10, np.float32)})
    for name, together in (("large", 1), ("small", 2)):
        whole = Box.full(source.meta(name).shape)
        files = [OutputFile(f"{i}", 1_200_000, fills=[Fill(0, name, whole, "float32")]) for i in range(2)]
        assert sum(len(task.groups) for task in tasks.tasks(files, source)) == together


def test_every_worker_has_about_the_same_and_nothing_is_left_out() -> None:
    every = [Task(n, ([OutputFile(str(n), size)],)) for n, size in enumerate([900, 5, 300, 300, 300, 0, 80])]
    shares = [share(every, number, 3) for number in range(3)]
    assert sorted(task.number for mine in shares for task in mine) == list(range(7))
    assert max(sum(task.nbytes for task in mine) for mine in shares) == 900
    assert share(every, 0, 1) == every


def test_steps_fill_every_file_in_order_within_their_size() -> None:
    """Two regions of one tensor that lie one after the other in a file, though their rows interleave."""
    source = Arrays({"w": np.zeros((64, 32), np.float32), "x": np.zeros(7, np.float32)})
    fills = [
        Fill(100, "w", Box((0, 0), (64, 8)), "float64"),
        Fill(100 + 4096, "w", Box((0, 20), (64, 4)), "float32"),
        Fill(100 + 4096 + 1024 + 3, "w", FlatRange(50, 200), "float32"),
        Fill(6023, "x", Box((0,), (7,)), "float32"),
        Fill(6051, "none", Box((0,), (0,)), "float32"),
    ]
    file = OutputFile("f", 6100, fills=fills)
    total, final, filled = 0, 0, np.zeros(file.nbytes, np.uint8)
    for step in steps([file], source, 600):
        assert step.nbytes <= 600 + 100 + 49 + 3  # fixed bytes beside
        total += step.nbytes
        for piece in step.pieces:
            width = 8 if piece.dtype == "float64" else 4
            filled[piece.offset : piece.offset + piece.want.region.size * width] += 1
        ((_, now),) = step.finals
        assert now >= final
        final = now
        held = filled[100:final].astype(bool)
        gaps = {at for a, b in ((5220, 5223), (6051, 6100)) for at in range(a, b)}
        assert all(held[i] or 100 + i in gaps for i in range(len(held)))
    assert (total, final) == (6100, 6100)
    assert filled.max() == 1
    assert filled.sum() == 4096 + 1024 + 800 + 28


def test_files_that_contradict_each_other_are_made_one_after_the_other() -> None:
    source = Arrays({"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)})
    whole = Box((0,), (4,))
    files = [
        OutputFile(x + y, 32, fills=[Fill(0, x, whole, "float32"), Fill(16, y, whole, "float32")])
        for x, y in ("ab", "ba")
    ]
    order = [(p.file, p.want.name) for step in steps(files, source, 1000) for p in step.pieces]
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
