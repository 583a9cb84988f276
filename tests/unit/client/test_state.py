"""The state tree in one process: modules, values, objects, generators; bit-for-bit resumes; what is refused."""

import random
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, Self

import dense
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptsvc.client.parts import DTYPE_NAMES
from ckptsvc.client.state import StateTree
from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput, LayoutError, UnsupportedObject
from ckptsvc.format.objects import encode
from ckptsvc.types import TensorMeta


def tree(**values: Any) -> StateTree:
    return StateTree(values, 0, 1)


def names(state: StateTree) -> list[str]:
    return [part.meta.name for part in state.capture().parts]


def linear(fill: float, *size: int) -> nn.Linear:
    module = nn.Linear(*(size or (2, 2)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(fill)
    return module


# ---- a whole program


class Program:
    """A small training program with everything in it: dropout, batch norm, a scheduler, a shuffling loader."""

    def __init__(self, seed: int, workers: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=40)
        data = torch.arange(96.0).reshape(24, 4) / 96
        self.loader = StatefulDataLoader(data, batch_size=4, shuffle=True, num_workers=workers)
        self.ema = torch.zeros(())
        self.state = tree(
            model=self.net,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            loader=self.loader,
            ema=self.ema,
        )

        self._batches = self._endless()

    def _endless(self) -> Iterator[Tensor]:
        while True:
            yield from self.loader

    def train(self, steps: int) -> list[float]:
        """Trains on, over as many epochs as it takes; returns the losses."""
        losses: list[float] = []
        for _ in range(steps):
            batch = next(self._batches)
            loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
            loss = loss * random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.ema.mul_(0.9).add_(0.1 * loss.detach())
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("steps", [0, 3, 6, 8])
def test_a_program_goes_on_bit_for_bit(steps: int) -> None:
    """Steps: before the first, in an epoch, at the end of one, in the next."""
    program = Program(seed=1)
    if steps:
        program.train(steps)
    saved = dense.save(program.state)
    expected = program.train(10)
    again = Program(seed=2)
    random.seed(5)
    np.random.seed(5)
    dense.restore(again.state, saved)
    assert again.train(10) == expected
    assert again.scheduler.get_last_lr() == program.scheduler.get_last_lr()
    assert torch.equal(again.ema, program.ema)
    assert dense.save(again.state).documents == dense.save(program.state).documents


def test_a_loader_with_workers() -> None:
    program = Program(seed=1, workers=2)
    program.train(2)
    saved = dense.save(program.state)
    expected = program.train(3)
    again = Program(seed=2, workers=2)
    dense.restore(again.state, saved)
    assert again.train(3) == expected
    for each in (program, again):
        each.loader._iterator._shutdown_workers()  # left to the garbage collector it takes 5 s a worker


def test_capturing_changes_nothing() -> None:
    def run(capture: bool) -> tuple[list[float], list[bytes], int]:
        random.seed(3)
        np.random.seed(3)
        program = Program(seed=3)
        losses = []
        for _ in range(3):
            if capture:
                program.state.capture()
            losses += program.train(2)
            if capture:
                program.state.capture()
                program.state.capture()
        tensors = [dense.raw(t) for t in dense.save(program.state).tensors.values()]
        return losses, tensors, hash(random.getstate())

    assert run(True) == run(False)


# ---- modules


def test_names_are_those_of_the_bare_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert names(tree(**{"a/b": net})) == [
        "a~1b/0.weight",
        "a~1b/0.bias",
        "a~1b/1.weight",
        "a~1b/1.bias",
        "a~1b/1.running_mean",
        "a~1b/1.running_var",
        "a~1b/1.num_batches_tracked",
    ]
    splittable = [part.splittable for part in tree(net=net).capture().parts]
    assert splittable == [True] * 4 + [False] * 3


def test_restored_in_place() -> None:
    net, target = linear(1), linear(2)
    saved = dense.save(tree(m=net))
    state = tree(m=target)
    addresses = [p.data_ptr() for p in target.parameters()]
    wanted = state.targets(saved.metas, saved.document(0))
    assert [p.tensor.data_ptr() for p in wanted.parts] == addresses
    dense.restore(state, saved)
    assert [p.data_ptr() for p in target.parameters()] == addresses
    assert torch.equal(target.weight, net.weight)


@pytest.mark.parametrize("frozen", [nn.ReLU(), nn.Sequential()])
def test_a_module_without_state(frozen: nn.Module) -> None:
    state = tree(m=frozen)
    assert state.capture().parts == ()
    dense.restore(state, dense.save(state))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    itemsize = torch.empty((), dtype=dtype).element_size()
    pattern = torch.randint(0, 2 if dtype == torch.bool else 256, (6, itemsize), dtype=torch.uint8)

    class Holder(nn.Module):
        def __init__(self, data: Tensor) -> None:
            super().__init__()
            self.register_buffer("full", data.clone().view(dtype).reshape(2, 3))
            self.register_buffer("scalar", data[:1].clone().view(dtype).reshape(()))
            self.register_buffer("empty", data[:0].clone().view(dtype).reshape(0, 5))
            self.register_buffer("strided", data.clone().view(dtype).reshape(2, 3).t())

    saved = dense.save(tree(m=Holder(pattern)))
    assert {meta.dtype for meta in saved.metas.values()} == {DTYPE_NAMES[dtype]}
    assert dense.raw(saved.tensors["m/full"]) == pattern.numpy().tobytes()
    holder = Holder(torch.zeros_like(pattern))
    state = tree(m=holder)
    dense.restore(state, saved)
    assert dense.save(state).bits() == saved.bits()


def test_nan_and_negative_zero_keep_their_bits() -> None:
    special = torch.tensor([0x7FC12345, 0x7F800001, -0x80000000, 0x00000001]).to(torch.int32).view(torch.float32)
    module = linear(0, 4, 1)
    with torch.no_grad():
        dense.bits(module.weight)[0] = dense.bits(special)
    other = linear(1, 4, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    saved = dense.save(tree(m=module, o=torch.optim.SGD(module.parameters(), lr=0.1)))
    dense.restore(tree(m=other, o=optimizer), saved)
    assert dense.raw(other.weight) == dense.raw(special)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.none = nn.Parameter(torch.empty(0))
        self.nothing = nn.Parameter(torch.empty(0))
        if tied:
            self.second.weight = self.first.weight


def test_tied_weights_are_stored_once() -> None:
    state = tree(m=Tied(True))
    capture = state.capture()
    assert capture.aliases == {"m/second.weight": "m/first.weight"}
    assert names(state) == ["m/none", "m/nothing", "m/first.weight"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_tied_or_not_before_and_after(before: bool, after: bool) -> None:
    net, other = Tied(before), Tied(after)
    saved = dense.save(tree(m=net))
    dense.restore(tree(m=other), saved)
    assert torch.equal(other.first.weight, net.first.weight)
    assert torch.equal(other.second.weight, (net.first if after else net.second).weight)
    assert (other.second.weight is other.first.weight) == after


def test_memory_that_is_seen_in_another_way_is_not_an_alias() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(6.0)
            self.register_buffer("flat", base)
            self.register_buffer("square", base.view(2, 3))
            self.register_buffer("turned", base.view(3, 2).t())
            self.register_buffer("whole", base.view(torch.int32))

    assert tree(m=Views()).capture().aliases == {}


def test_the_same_module_twice_is_stored_once() -> None:
    net = nn.Sequential(linear(1), linear(2))
    capture = tree(model=net, part=net[1]).capture()
    assert capture.aliases == {"part/weight": "model/1.weight", "part/bias": "model/1.bias"}


class Extra(nn.Module):
    """Extra state of a kind of its own, and a count of the times it was set."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.empty = nn.Parameter(torch.zeros(0))
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    ("saved_value", "live_value"),
    [
        (7, 0),
        ({"scale": 2.0, "history": [1, 2]}, None),
        (torch.arange(5.0), torch.zeros(2)),
        (torch.arange(5.0), torch.zeros(0)),
        (torch.zeros(0), torch.zeros(2)),
        (torch.arange(5.0), 3),
        (3, torch.arange(5.0)),
        ({"amax": torch.arange(4.0), "n": 2}, {}),
    ],
    ids=repr,
)
def test_extra_state(saved_value: Any, live_value: Any) -> None:
    module = nn.Sequential(Extra(live_value))
    state = tree(m=module)
    dense.restore(state, dense.save(tree(m=nn.Sequential(Extra(saved_value)))))
    restored = encode(module[0].value) if not isinstance(saved_value, Tensor | dict) else None
    if isinstance(saved_value, Tensor):
        assert torch.equal(module[0].value, saved_value)
    elif isinstance(saved_value, dict):
        assert module[0].value.keys() == saved_value.keys()
        assert all(torch.equal(torch.as_tensor(module[0].value[k]), torch.as_tensor(v)) for k, v in saved_value.items())
    else:
        assert restored == encode(saved_value)
    module[0].value = 11
    assert state.capture().objects["m"] == {"0._extra_state": 11}, "read anew every time"


def test_a_module_with_a_state_dict_of_its_own() -> None:
    class Doubling(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([value]))

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "twice"] = self.weight.detach() * 2

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
            with torch.no_grad():
                self.weight.copy_(state_dict[prefix + "twice"] / 2)

    module = Doubling(1.5)
    state = tree(m=module)
    saved = dense.save(state)
    assert saved.tensors["m/twice"].tolist() == [3.0]
    with torch.no_grad():
        module.weight.fill_(9)
    assert dense.save(state).tensors["m/twice"].tolist() == [18.0], "walked again every time"
    dense.restore(state, saved)
    assert module.weight.tolist() == [1.5]


# ---- values


def test_users_own_tensors_and_arrays_are_filled_in_place() -> None:
    tensor, array = torch.arange(3.0), np.arange(4)
    nested = {
        "list": [torch.ones(2), ("x", np.float32(0.5))],
        3: 4,
        "turned": torch.arange(4.0).view(2, 2).t(),
    }
    values = {"t": tensor, "a": array, "n": nested, "plain": 0.3}
    state = StateTree(values, 0, 1)
    saved = dense.save(state)
    assert all(not part.splittable for part in state.capture().parts)
    tensor.zero_()
    array[:] = 0
    nested["list"][0].zero_()
    nested["turned"].zero_()
    values["plain"] = 99
    restored = dense.restore(state, saved)
    assert restored["t"] is tensor
    assert restored["a"] is array
    assert restored["n"]["list"][0] is nested["list"][0]
    assert tensor.tolist() == [0, 1, 2]
    assert array.tolist() == [0, 1, 2, 3]
    assert nested["turned"].tolist() == [[0, 2], [1, 3]]
    assert restored["n"][3] == 4
    assert restored["n"]["list"][1] == ("x", np.float32(0.5))
    assert type(restored["n"]["list"][1][1]) is np.float32
    assert restored["plain"] == 0.3


def test_values_are_read_at_every_capture_and_not_shared() -> None:
    history = [1]
    values: dict[str, Any] = {"best": 0.5, "history": history}
    state = StateTree(values, 0, 1)
    first = state.capture()
    values["best"] = 0.7
    history.append(2)
    second = state.capture()
    assert (first.objects["best"], first.objects["history"]) == (0.5, [1])
    assert (second.objects["best"], second.objects["history"]) == (0.7, [1, 2])


def test_arrays_that_cannot_be_filled_in_place_come_back_new() -> None:
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    backwards = np.arange(3)[::-1]
    words = np.array(["a", "bc"])
    saved = dense.save(tree(frozen=frozen, backwards=backwards, words=words))
    other = np.zeros(3)
    other.flags.writeable = False
    state = tree(frozen=other, backwards=np.zeros(3, dtype=int)[::-1], words=np.array(["", ""]))
    restored = dense.restore(state, saved)
    assert restored["frozen"].tolist() == [0, 1, 2]
    assert restored["backwards"].tolist() == [2, 1, 0]
    assert restored["words"].tolist() == ["a", "bc"]
    assert other.tolist() == [0, 0, 0]


def test_a_list_that_has_grown_comes_back_whole() -> None:
    saved = dense.save(tree(snapshots=[torch.ones(1), torch.ones(2), np.ones(3)]))
    first = torch.zeros(1)
    restored = dense.restore(tree(snapshots=[first]), saved)["snapshots"]
    assert restored[0] is first
    assert [type(item) for item in restored] == [Tensor, Tensor, np.ndarray]
    assert [len(item) for item in restored] == [1, 2, 3]


def test_plain_containers_keep_their_types() -> None:
    value = OrderedDict(b=[1, (2, {3})], a=Counter("xxy"), c={1.5: None, (1, 2): b"\x00"})
    assert repr(dense.restore(tree(v=None), dense.save(tree(v=value)))["v"]) == repr(value)


def test_what_the_checkpoint_lacks_stays_if_not_strict() -> None:
    saved = dense.save(tree(m=linear(1), old=torch.ones(2)))
    module, extra, kept = linear(2), linear(3), torch.full((2,), 5.0)
    state = tree(m=module, extra=extra, kept=kept, plain=8)
    with pytest.raises(LayoutError, match=r"3 names are in the state tree and not in the checkpoint"):
        dense.restore(state, saved)
    assert module.weight.tolist() == [[2, 2], [2, 2]], "nothing was changed"
    restored = dense.restore(state, saved, strict=False)
    assert module.weight.tolist() == [[1, 1], [1, 1]]
    assert extra.weight.tolist() == [[3, 3], [3, 3]]
    assert restored == {"kept": kept, "plain": 8}
    assert state.unexpected == ["old"]


# ---- objects


class Thing:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_an_objects_state_is_its_ranks_own() -> None:
    thing = Thing(t=torch.arange(3.0), a=np.arange(2), n=[torch.ones(1), {"x": None}], size=3)
    state = tree(thing=thing)
    saved = dense.save(state)
    assert names(state) == ["@rank/0/thing/t", "@rank/0/thing/a", "@rank/0/thing/n/0"]
    other = Thing(t=torch.zeros(9))
    dense.restore(tree(thing=other), saved)
    assert other.state["t"].tolist() == [0, 1, 2]
    assert isinstance(other.state["a"], np.ndarray)
    assert other.state["n"][0].tolist() == [1]
    assert other.state["size"] == 3
    assert thing.state["t"] is not other.state["t"]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
        lambda o: lr_scheduler.ConstantLR(o),
        lambda o: lr_scheduler.LinearLR(o),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.PolynomialLR(o, 6),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    ],
)
def test_schedulers(make: Any) -> None:
    def program() -> tuple[StateTree, Any]:
        module = linear(1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(optimizer)

        def step(count: int) -> list[float]:
            rates = []
            for _ in range(count):
                optimizer.step()
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
                rates.append(optimizer.param_groups[0]["lr"])
            return rates

        return tree(m=module, o=optimizer, s=scheduler), step

    state, step = program()
    step(3)
    saved = dense.save(state)
    other, step_other = program()
    dense.restore(other, saved)
    assert step_other(5) == step(5)


# ---- containers of objects, and trees that change


def test_objects_in_containers() -> None:
    nets = {"gen": linear(1), "dis": linear(2)}
    things = [Thing(x=1), Thing(x=2)]
    state = tree(nets=nets, things=things, mixed=(linear(3), 5, torch.ones(1)))
    saved = dense.save(state)
    assert names(state)[:2] == ["nets/gen/weight", "nets/gen/bias"]
    assert state.capture().objects["things"] == [{"x": 1}, {"x": 2}]
    other = {"gen": linear(0), "dis": linear(0)}
    things2 = [Thing(), Thing()]
    restored = dense.restore(tree(nets=other, things=things2, mixed=(linear(0), 0, torch.zeros(1))), saved)
    assert other["dis"].weight.tolist() == [[2, 2], [2, 2]]
    assert things2[1].state == {"x": 2}
    assert restored == {"mixed": {1: 5, 2: torch.ones(1)}}


def test_an_object_that_was_replaced_is_seen() -> None:
    values: dict[str, Any] = {"m": linear(1), "list": [linear(1)], "v": 1}
    state = StateTree(values, 0, 1)
    before = state.capture()
    values["m"] = linear(2)
    assert dense.save(state).tensors["m/weight"].tolist() == [[2, 2], [2, 2]]
    values["list"].append(linear(3))
    assert "list/1/weight" in names(state)
    values["v"] = linear(4)
    assert "v/weight" in names(state)
    del values["m"]
    assert "m/weight" not in names(state)
    assert state.capture().structure != before.structure


# ---- refused


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


class Wrapper(Tensor):
    """A tensor that is more than its memory."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Any:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (sparse, "sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "jagged"),
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: nn.UninitializedParameter(), "has no shape yet"),
        (lambda: Wrapper(torch.ones(2)), "wrapper class .*Wrapper"),
    ],
)
def test_tensors_that_cannot_be_stored(make: Any, says: str) -> None:
    with pytest.raises(UnsupportedObject, match=f"^/x/a~1b/0 is .*{says}"):
        tree(x={"a/b": [make()]}).capture()


def test_a_mere_subclass_of_tensor_is_stored() -> None:
    class Named(Tensor):
        pass

    class Special(nn.Parameter):
        pass

    value = torch.arange(3.0).as_subclass(Named)
    module = linear(1)
    module.weight = Special(torch.ones(2, 2))
    saved = dense.save(tree(x=value, m=module))
    assert type(saved.tensors["x"]) is Tensor
    assert saved.tensors["m/weight"].tolist() == [[1, 1], [1, 1]]


def test_objects_that_cannot_be_stored_are_named_with_path_and_type() -> None:
    class Odd:
        pass

    with pytest.raises(UnsupportedObject, match=r"^/a/b/1: .*Odd"):
        encode(tree(a={"b": [1, Odd()]}).capture().objects)
    with pytest.raises(UnsupportedObject, match=r"^/thing/x: .*Odd"):
        encode(tree(thing=Thing(x=Odd())).capture().objects)


def test_old_fsdp_is_refused_with_what_to_use() -> None:
    class Fsdp(torch.distributed.fsdp.FullyShardedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    with pytest.raises(UnsupportedObject, match=r"/m uses FullyShardedDataParallel .*fully_shard"):
        tree(m=nn.Sequential(Fsdp()))


def test_torch_values_in_a_state_dict() -> None:
    thing = Thing(dtype=torch.bfloat16, size=torch.Size([2, 3]), device=torch.device("cpu"))
    other = Thing()
    dense.restore(tree(t=other), dense.save(tree(t=thing)))
    assert other.state == thing.state
    assert type(other.state["size"]) is torch.Size


@pytest.mark.parametrize("key", ["", "@rank", 3])
def test_keys_that_cannot_be(key: Any) -> None:
    with pytest.raises(InvalidInput, match="key"):
        StateTree({key: 1}, 0, 1)


def test_containers_that_contain_themselves() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    with pytest.raises(UnsupportedObject, match="/x/1 contains itself"):
        tree(x=loop).capture()


def test_keys_that_look_the_same() -> None:
    with pytest.raises(UnsupportedObject, match="called /x/1"):
        tree(x={1: torch.ones(1), "1": torch.ones(1)}).capture()


def test_another_dtype_or_shape_is_told_with_both() -> None:
    saved = dense.save(tree(m=linear(1)))
    with pytest.raises(LayoutError, match=r"/m/weight is bfloat16 \[2, 2\] here, but float32 \[2, 2\] in"):
        dense.restore(tree(m=linear(1).to(torch.bfloat16)), saved)
    with pytest.raises(LayoutError, match=r"/m/weight is float32 \[3, 2\] here, but float32 \[2, 2\] in"):
        dense.restore(tree(m=linear(1, 2, 3)), saved)


def test_names_only_the_checkpoint_has_are_told() -> None:
    saved = dense.save(tree(m=nn.Sequential(linear(1), linear(2))))
    state = tree(m=nn.Sequential(linear(1)))
    with pytest.raises(LayoutError, match=r"2 names are in the checkpoint and not .*/m/1\.bias, /m/1\.weight"):
        dense.restore(state, saved)
    StateTree({"m": nn.Sequential(linear(1))}, 0, 2).targets(saved.metas, saved.document(0))


def test_memory_that_cannot_be_filled() -> None:
    state = tree(x=torch.zeros(1).expand(3), y=torch.ones(1, 4).expand(1, 4))
    saved = dense.save(state)
    assert saved.tensors["x"].tolist() == [0, 0, 0]
    with pytest.raises(UnsupportedObject, match=r"/x cannot be filled.*contiguous\(\)"):
        dense.restore(state, saved)
    dense.restore(tree(x=torch.ones(3), y=torch.ones(1, 4)), saved)


def test_a_hook_that_invents_names() -> None:
    net = nn.Sequential(linear(1))

    def add(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + "total"] = module.weight.detach().sum()

    net[0]._register_state_dict_hook(add)
    net[0]._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.pop(prefix + "total"))
    saved = dense.save(tree(m=net))
    assert saved.tensors["m/0.total"].item() == 4
    with torch.no_grad():
        net[0].weight.zero_()
    dense.restore(tree(m=net), saved)
    assert net[0].weight.sum().item() == 4


def test_a_document_and_tensors_that_do_not_go_together() -> None:
    saved = dense.save(tree(t=[torch.ones(1)], thing=Thing(a=torch.ones(1))))
    with pytest.raises(LayoutError, match="/@rank/0/thing/a is in the document"):
        tree(t=[torch.ones(1)], thing=Thing()).targets({"t/0": TensorMeta("t/0", "float32", (1,))}, saved.document(0))


@pytest.mark.parametrize("damage", [{}, {"python": 3}, {"python": {"version": 3, "words": [1], "gauss": None}}])
def test_a_damaged_state_of_the_generators(damage: Any) -> None:
    state = tree(x=1)
    document = dense.save(state).document(0) | {"@rng": damage}
    state.targets(None, document)
    with pytest.raises(Damaged, match="random number generators"):
        state.load(document)


@pytest.mark.parametrize("document", [{"o": 3}, {"o": {}}, {"o": {"state": 1, "param_groups": 2}}, {"o": [1]}])
def test_a_document_with_something_else_at_an_object(document: Any) -> None:
    module = linear(1)
    state = tree(o=torch.optim.Adam(module.parameters()))
    with pytest.raises(CkptsvcError, match="/o"):
        state.targets({}, document)
    with pytest.raises(CkptsvcError, match="/o"):
        tree(o=module).targets({}, document)
