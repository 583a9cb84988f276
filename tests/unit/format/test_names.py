from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged
from ckptsvc.format.names import Names, name_hash


def columns(names, hashes=None):
    rows = sorted((name_hash(name.encode()), name.encode()) for name in names)
    flat = np.frombuffer(b"".join(name for _, name in rows), np.uint8)
    ends = np.cumsum([len(name) for _, name in rows]).astype(np.uint64)
    return flat, ends, np.array([h for h, _ in rows] if hashes is None else hashes, np.uint64)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@given(st.lists(texts, unique=True), st.lists(st.text(st.characters(), max_size=6)))
def test_names_are_found_and_others_are_not(stored, others):
    names = Names(*columns(stored), "x")
    assert sorted(name.decode() for name in names) == sorted(stored)
    asked = stored + others
    rows = names.rows(asked)
    assert rows.tolist() == [names.row(name) for name in asked]
    for name, row in zip(asked, rows.tolist(), strict=True):
        assert names.at(row) == name if name in stored else row == -1


def test_a_name_with_the_hash_of_another_is_not_found(monkeypatch):
    names = Names(*columns(["a", "b"]), "x")
    monkeypatch.setattr("ckptsvc.format.names.name_hash", lambda name: name_hash(b"a"))
    assert names.row("a") >= 0
    assert names.row("c") == -1
    assert names.rows(["a", "c"]).tolist() == [names.row("a"), -1]


def test_names_must_match_their_hashes():
    good = columns(["a", "b", "c"])
    Names(*good, "x")
    wrong = good[2].copy()
    wrong[0] -= np.uint64(1)
    with pytest.raises(Damaged, match="hash"):
        Names(good[0], good[1], wrong, "x")
    with pytest.raises(Damaged, match="order"):
        Names(*columns(["a", "b", "c"], good[2][::-1]), "x")
    twice = columns(["a", "a"])
    with pytest.raises(Damaged, match="order"):
        Names(*twice, "x")
