"""Names, references, and a document with its tensors as one nested dict."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import dense
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsvc.client.state import StateTree
from ckptsvc.errors import Damaged
from ckptsvc.format.document import ArrayRef, assemble, join, references, replace_refs, split
from ckptsvc.format.objects import TensorRef, decode, encode


@given(st.lists(st.text(), min_size=1).filter(lambda keys: keys[0] != ""))  # "" alone is the root
def test_split_is_the_opposite_of_join(keys: list[str]) -> None:
    assert split(join("", *keys)) == keys
    assert join(join("", *keys), 5) == join("", *keys, 5)


def test_json_pointers_as_the_rfc_writes_them() -> None:
    assert join("model", "a/b", "m~n", 0) == "model/a~1b/m~0n/0"
    assert split("~01") == ["~1"]


def test_references_survive_encoding() -> None:
    tree = {"a": [TensorRef("x"), (ArrayRef("y"), 1)], "b": OrderedDict(c=TensorRef("z"))}
    assert decode(encode(tree)) == tree
    assert [ref.name for ref in references(tree)] == ["x", "y", "z"]
    with pytest.raises(Damaged):
        decode(encode(tree).replace(b'"y"', b"[1]"))


def test_replacing_references_copies_containers_and_keeps_their_types() -> None:
    tree = {
        "plain": [1, {2: (3,)}],
        "ordered": OrderedDict(a=TensorRef("x")),
        "default": defaultdict(list, a=TensorRef("x")),
        "counter": Counter("aab"),
    }
    made = replace_refs(tree, lambda ref: ref.name * 2)
    assert made == {**tree, "ordered": OrderedDict(a="xx"), "default": {"a": "xx"}}
    assert [type(made[key]) for key in tree] == [type(value) for value in tree.values()]
    assert made["default"].default_factory is list
    made["plain"].append(5)
    made["counter"]["a"] = 9
    assert tree["plain"] == [1, {2: (3,)}]
    assert tree["counter"]["a"] == 2


def loaded(tree: dict[str, Any]) -> dict[str, Any]:
    saved = dense.save(StateTree(tree, 0, 1))
    return assemble(saved.document(0), saved.tensors, lambda tensor: tensor.numpy())


def test_a_whole_tree() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[1].weight = net[0].weight
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    bare = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1, momentum=0.5)
    net(torch.ones(1)).backward()
    optimizer.step()
    bare.param_groups[0]["params"][0].grad = torch.ones(1)
    bare.step()
    tree = {
        "model": net,
        "opts": [optimizer, bare],
        "arrays": [np.arange(3), {"t": (torch.ones(2), 5)}],
        "plain": {1: "x", "y": None},
    }
    made = loaded(tree)
    assert made.keys() == tree.keys()
    assert made["model"].keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}, "tied weights under both names"
    assert torch.equal(made["model"]["1.weight"], net[0].weight)
    assert made["opts"][0]["param_groups"][0]["lr"] == 0.5
    assert made["opts"][0]["state"]["0.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert made["opts"][1]["state"][0]["momentum_buffer"].tolist() == [1]
    assert isinstance(made["arrays"][0], np.ndarray)
    assert made["arrays"][1]["t"][0].tolist() == [1, 1]
    assert made["arrays"][1]["t"][1] == 5
    assert made["plain"] == tree["plain"]


def test_a_tensor_that_was_not_asked_for_is_none() -> None:
    document = {"a": [TensorRef("a/0"), 1], "@rank": 0, "@rng": {}}
    assert assemble(document, {"@rank/0/objects": 1}, lambda t: t) == {"a": [None, 1]}


@pytest.mark.parametrize("document", [{"a": 3}, {"a": [1]}, {"a": "text"}])
def test_a_document_that_does_not_fit_its_tensors(document: Any) -> None:
    with pytest.raises(Damaged, match="/a/7/x has no place"):
        assemble(document, {"a/7/x": 1}, lambda t: t)
    with pytest.raises(Damaged, match="/a/y has no place"):
        assemble(document, {"a/y": 1}, lambda t: t)
