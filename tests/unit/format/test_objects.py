from __future__ import annotations

import enum
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput, UnsupportedObject
from ckptsvc.format import objects
from ckptsvc.format.objects import Opaque, TensorRef, decode, encode, register_codec

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),  # with lone surrogates
    st.binary(),
    st.binary().map(bytearray),
    st.builds(TensorRef, st.text(st.characters(codec="utf-8"), min_size=1)),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
    st.floats().map(np.float64),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.text(st.characters(codec="utf-8")).map(np.str_),
    st.lists(st.floats(width=32)).map(lambda values: np.array(values, np.float32)),
)
hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers(), st.text())
)
keys = st.sampled_from(["!", "v", "a", "~/"]) | hashable


def containers(inner):
    pairs = st.lists(st.tuples(keys, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.sets(hashable, max_size=4),
        st.frozensets(hashable, max_size=4),
        pairs.map(OrderedDict),
        pairs.map(lambda items: defaultdict(list, items)),
        st.lists(hashable).map(Counter),
        st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 5)),
    )


trees = st.recursive(scalars, containers, max_leaves=12)


def same(a, b):
    """Equal with equal types all the way down, NaN being itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float | complex | np.generic):
        return repr(a) == repr(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return (
            len(a) == len(b)
            and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
            and getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        )
    if isinstance(a, list | tuple | deque):
        lengths = len(a) == len(b) and getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return lengths and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return same(sorted(map(repr, a)), sorted(map(repr, b)))
    return a == b


@given(trees)
def test_trees_come_back_with_their_types(tree):
    assert same(decode(encode(tree)), tree)


@given(st.integers(0, 2**64))
def test_random_states_come_back(seed):
    states = {
        "python": random.Random(seed).getstate(),
        "legacy": np.random.RandomState(seed % 2**32).get_state(legacy=False),
        "numpy": np.random.default_rng(seed).bit_generator.state,
    }
    assert same(decode(encode(states)), states)


def test_the_document_is_what_the_specification_says():
    tree = {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "w": TensorRef("model/w"),
        "best": math.inf,
        "seen": {3: None},
        "!": True,
        "big": 2**64,
        "a": np.arange(2, dtype=np.int16),
    }
    assert json.loads(encode(tree)) == {
        "format": "1.0",
        "tree": {
            "!": "dict",
            "v": [
                ["lr", 0.1],
                ["betas", {"!": "tuple", "v": [0.9, 0.999]}],
                ["w", {"!": "tensor", "v": "model/w"}],
                ["best", {"!": "float", "v": "inf"}],
                ["seen", {"!": "dict", "v": [[3, None]]}],
                ["!", True],
                ["big", {"!": "int", "v": "0x10000000000000000"}],
                ["a", {"!": "numpy.ndarray", "v": ["<i2", [2], "AAABAA=="]}],
            ],
        },
    }
    assert encode({"a": [1, None, "x"]}) == b'{"format":"1.0","tree":{"a":[1,null,"x"]}}'


def test_equal_sets_are_equal_bytes():
    one, other = {0}, {8}
    one.add(8)
    other.add(0)
    assert list(one) != list(other)  # the order of insertion shows
    assert encode(one) == encode(other)


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Half(float):
    pass


Point = namedtuple("Point", "x y")  # noqa: PYI024


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (object(), "object"),
        (Colour.RED, "Colour"),
        (Name("x"), "Name"),
        (Half(0.5), "Half"),
        (Point(1, 2), "Point"),
        (lambda: 0, "function"),
        (type, "type"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (slice(3), "slice"),
    ],
)
def test_other_types_are_refused_with_path_and_type(value, type_name):
    with pytest.raises(UnsupportedObject, match=rf"^/optimizer/a~1b/3: .*{type_name}.*codec"):
        encode({"optimizer": {"a/b": [0, 1, 2, value]}})


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (object(), "/"),
        ({"a": (1, object())}, "/a/1"),
        ({"a": {2: object()}}, "/a/2"),
        ({"a": {object(): 1}}, "/a/<object"),
        ({"a": defaultdict(lambda: 0)}, "/a: a defaultdict with the factory"),
        ({"a": np.array([None])}, "/a: a NumPy value of dtype object"),
        ({"a": np.zeros(1, np.longdouble)[0]}, "/a: a NumPy value of dtype"),
        (deque([object()]), "/0"),
        (OrderedDict(x={"!": [object()]}), "/x/!/0"),
    ],
)
def test_the_path_leads_to_the_object(tree, path):
    with pytest.raises(UnsupportedObject) as caught:
        encode(tree)
    assert str(caught.value).startswith(path)


def test_a_cycle_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(UnsupportedObject, match="levels deep"):
        encode({"loop": loop})


class Money:
    def __init__(self, cents):
        if not isinstance(cents, int):
            raise TypeError("cents are whole")
        self.cents = cents


@pytest.fixture
def _money(monkeypatch):
    monkeypatch.setattr(objects, "_codec_of_type", {})
    monkeypatch.setattr(objects, "_codec_of_tag", {})
    register_codec(Money, "test.Money", lambda money: {"cents": money.cents}, lambda value: Money(value["cents"]))


@pytest.mark.usefixtures("_money")
def test_a_registered_type_comes_back():
    document = encode([Money(5), {"deep": (Money(6),)}])
    first, second = decode(document)
    assert (first.cents, second["deep"][0].cents) == (5, 6)
    register_codec(Money, "test.Money", lambda money: money.cents, Money)  # registering again replaces
    assert decode(encode(Money(7))).cents == 7


@pytest.mark.usefixtures("_money")
def test_a_codec_that_fails_is_reported():
    register_codec(Money, "test.Money", lambda money: 1 // 0, Money)
    with pytest.raises(UnsupportedObject, match=r"^/0: the codec for .*Money failed: .*zero"):
        encode([Money(1)])
    register_codec(Money, "test.Money", lambda money: object(), Money)
    with pytest.raises(UnsupportedObject, match=r"^/0: .*object"):
        encode([Money(1)])
    with pytest.raises(Damaged, match="cents are whole"):
        decode(b'{"format":"1.0","tree":{"!":"test.Money","v":0.5}}')


@pytest.mark.usefixtures("_money")
@pytest.mark.parametrize(
    ("cls", "tag"), [(int, "test.int"), (np.float64, "test.f"), (Colour, "Colour"), (Colour, "test.Money")]
)
def test_what_cannot_be_registered(cls, tag):
    with pytest.raises(InvalidInput):
        register_codec(cls, tag, int, int)


def test_a_value_without_codec_is_refused_or_kept_as_it_is():
    document = b'{"format":"1.0","tree":[{"!":"nobody.knows","v":{"!":"tuple","v":["float32"]}}]}'
    with pytest.raises(UnsupportedObject, match=r"nobody\.knows"):
        decode(document)
    kept = decode(document, strict=False)
    assert kept == [Opaque("nobody.knows", ("float32",))]
    assert encode(kept) == document


def tagged(tag, value):
    return {"!": tag, "v": value}


@pytest.mark.parametrize(
    "tree",
    [
        {"!": "tuple"},
        {"!": "tuple", "v": [], "w": 1},
        {"!": "tuple", "w": []},
        {"!": 3, "v": []},
        tagged("tuple", {}),
        tagged("tuple", "ab"),
        tagged("set", [[1]]),
        tagged("set", None),
        tagged("dict", [[1]]),
        tagged("dict", [[1, 2, 3]]),
        tagged("dict", [[[1], 2]]),
        tagged("dict", {"a": 1}),
        tagged("int", "0x"),
        tagged("int", 5),
        tagged("int", "z"),
        tagged("float", "1.0"),
        tagged("float", []),
        tagged("str", "!!!"),
        tagged("str", "/w=="),
        tagged("bytes", "AB=="),
        tagged("bytearray", 3),
        tagged("complex", [1.0]),
        tagged("complex", ["1", "2"]),
        tagged("range", [1, 2, 0]),
        tagged("range", [1, 2, "3"]),
        tagged("range", [True, 2, 3]),
        tagged("deque", [1, [1, 2]]),
        tagged("deque", [-1, []]),
        tagged("deque", ["1", []]),
        tagged("deque", []),
        tagged("defaultdict", ["eval", []]),
        tagged("defaultdict", [["int"], []]),
        tagged("defaultdict", [None, 3]),
        tagged("OrderedDict", 3),
        tagged("Counter", [[{"a": 1}, 1]]),
        tagged("tensor", ""),
        tagged("tensor", 3),
        tagged("tensor", "x" * 4097),
        tagged("numpy.ndarray", ["|O", [1], "AAAAAAAAAAA="]),
        tagged("numpy.scalar", 3),
    ],
)
def test_a_tagged_value_that_is_not_what_its_tag_says_is_damage(tree):
    with pytest.raises(Damaged, match="my document"):
        decode(json.dumps({"format": "1.0", "tree": tree}).encode(), "my document")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tree":1}',
        b'{"format":"1.0"}',
        b"[" * 100_000,
        b'{"a":"\xff"}',
        b'{"format":"1.0","tree":NaN}',
    ],
)
def test_what_is_no_document_is_damage(data):
    with pytest.raises(Damaged):
        decode(data)


def test_a_newer_major_version_is_refused():
    with pytest.raises(IncompatibleVersion):
        decode(b'{"format":"3.0","forest":[]}')


def survives(kit, data):
    """Decoded or refused as damage; a tag without a codec is kept."""
    return kit.survives(lambda document: decode(document, strict=False), data)


SAMPLE = {
    "a": [1, -2.5, None, "é", (1, {2, 3})],
    "b": {1: b"xy"},
    "n": np.arange(3),
    "q": deque([1], 2),
    "t": TensorRef("t"),
}


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    survives(kit, data.draw(kit.damaged(encode(SAMPLE))))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
            st.builds(tagged, st.sampled_from(sorted(objects._DECODERS)), inner),
            st.builds(lambda tag, *v: tagged(tag, list(v)), st.sampled_from(sorted(objects._DECODERS)), inner, inner),
        ),
        max_leaves=10,
    )
)
def test_any_json_comes_out_as_a_tree_or_as_damage(kit, tree):
    survives(kit, json.dumps({"format": "1.0", "tree": tree}).encode())
