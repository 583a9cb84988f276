"""Every optimizer of torch: captured and restored bit for bit, and left alone otherwise."""

from collections.abc import Callable, Iterable
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn, optim

from ckptsvc.client.state import StateTree
from ckptsvc.errors import LayoutError

Groups = Iterable[Any]

OPTIMIZERS: dict[str, Callable[[Groups], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-decay": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adam-tensor-lr": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-single": lambda p: optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}


class Program:
    """Two parameter groups, a frozen parameter, one that gets no gradient at first, and one that never does."""

    def __init__(self, name: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.ModuleDict(
            {
                "body": nn.Linear(3, 4),
                "frozen": nn.Linear(4, 4),
                "late": nn.Linear(4, 4),
                "unused": nn.Linear(2, 2),
                "head": nn.Linear(4, 2, bias=False),
            }
        )
        self.net["frozen"].requires_grad_(False)
        head = self.net["head"].parameters()
        others = [p for n, p in self.net.named_parameters() if not n.startswith("head")]
        self.optimizer = OPTIMIZERS[name]([{"params": others}, {"params": head, "lr": 0.02}])
        self.state = StateTree({"model": self.net, "optimizer": self.optimizer}, 0, 1)
        self.steps = 0
        self.fused_sgd = name == "sgd-fused"

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = self.net["frozen"](self.net["body"](torch.rand(5, 3)))
            if self.steps >= 2 and not self.fused_sgd:  # torch's fused SGD fails if momentum starts late
                x = self.net["late"](x)
            loss = self.net["head"](x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.steps += 1
        return losses


def contents(program: Program) -> tuple[dict[str, bytes], list[bytes]]:
    saved = dense.save(program.state)
    return saved.bits(), saved.documents


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_bit_for_bit(name: str, steps: int) -> None:
    program = Program(name)
    program.train(steps)
    saved = dense.save(program.state)
    expected = program.train(4)
    again = Program(name, seed=1)
    again.steps = steps
    dense.restore(again.state, saved)
    assert contents(again) == (saved.bits(), saved.documents)
    assert again.train(4) == expected
    assert contents(again) == contents(program)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-fused", "adagrad", "rmsprop", "adam-tensor-lr"])
def test_rolled_back_in_a_running_program(name: str, steps: int) -> None:
    """The optimizer has state then, more than the checkpoint where that is of before the first step."""
    program = Program(name)
    program.train(steps)
    saved = dense.save(program.state)
    expected = program.train(4)
    program.steps = steps
    dense.restore(program.state, saved)
    assert contents(program) == (saved.bits(), saved.documents)
    assert program.train(4) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capturing_and_asking_for_targets_change_nothing(name: str) -> None:
    control, program = Program(name), Program(name)
    calls: list[int] = []
    program.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.manual_seed(7)
    expected = control.train(4)
    torch.manual_seed(7)
    losses = []
    for _ in range(4):
        program.state.capture()
        program.state.targets()
        losses += program.train(1)
    assert losses == expected
    assert len(calls) == 4, "nobody else takes steps"
    torch.manual_seed(8)
    after = contents(control)
    torch.manual_seed(8)
    assert contents(program) == after


def test_names_and_what_is_split() -> None:
    program = Program("sgd-momentum")
    program.train(1)
    parts = {p.meta.name: p for p in program.state.capture().parts if p.meta.name.startswith("optimizer")}
    slots = ["body.weight", "body.bias", "head.weight"]
    assert list(parts) == [f"optimizer/state/{name}/momentum_buffer" for name in slots]
    assert all(part.splittable for part in parts.values())
    groups = program.state.capture().objects["optimizer"]["param_groups"]
    assert groups[1]["params"] == ["head.weight"]
    assert (groups[0]["lr"], groups[1]["lr"]) == (0.1, 0.02)


def test_hyperparameters_are_read_every_time() -> None:
    program = Program("adam-tensor-lr")
    first = program.state.capture()
    program.optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    program.optimizer.param_groups[1]["lr"] = 3.0
    second = program.state.capture()
    assert first.objects["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert second.objects["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.6)
    assert second.objects["optimizer"]["param_groups"][1]["lr"] == 3.0


class Counting(optim.Optimizer):
    """Keeps what torch's own optimizers do not: numbers, text, higher precision, nested state, its own keys."""

    def __init__(self, params: Groups, *, nested: bool) -> None:
        self.nested = nested
        super().__init__(params, {"lr": 0.1, "mode": "fast"})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["note"] = f"step {state['count']}"
                state["exact"] = torch.full_like(p, 1 / 3, dtype=torch.float64) * state["count"]
                if self.nested:
                    state["history"] = [*state.get("history", []), torch.full((1,), 0.1, dtype=torch.float64)]
                    state[5] = {"x": (1, torch.ones(2))}


@pytest.mark.parametrize("nested", [False, True])
def test_an_optimizer_of_the_users(nested: bool) -> None:
    net, other = nn.Linear(2, 2).half(), nn.Linear(2, 2).half()
    optimizer, fresh = Counting(net.parameters(), nested=nested), Counting(other.parameters(), nested=nested)
    state = StateTree({"m": net, "o": optimizer}, 0, 1)
    for count in range(1, 4):
        optimizer.step()
        document = state.capture().objects["o"]["state"]
        assert document["weight"]["count"] == count
        assert document["weight"]["note"] == f"step {count}"
    saved = dense.save(state)
    state2 = StateTree({"m": other, "o": fresh}, 0, 1)
    dense.restore(state2, saved)
    assert fresh.state[other.weight]["count"] == 3
    assert fresh.state[other.weight]["note"] == "step 3"
    assert fresh.state[other.weight]["exact"].dtype == torch.float64, "torch would cast it to half"
    assert dense.save(state2).bits() == saved.bits()
    assert dense.save(state2).documents == saved.documents
    if nested:
        assert len(fresh.state[other.weight]["history"]) == 3
        assert fresh.state[other.weight]["history"][0].dtype == torch.float64


def test_lbfgs() -> None:
    def program(seed: int) -> tuple[StateTree, Callable[[], float]]:
        torch.manual_seed(seed)
        net = nn.Linear(3, 1)
        optimizer = optim.LBFGS(net.parameters(), max_iter=3)
        x = torch.arange(12.0).reshape(4, 3) / 12

        def step() -> float:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = (net(x) - 1).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure).item()

        return StateTree({"m": net, "o": optimizer}, 0, 1), step

    state, step = program(0)
    step()
    step()
    saved = dense.save(state)
    state2, step2 = program(1)
    dense.restore(state2, saved)
    assert [step2() for _ in range(3)] == [step() for _ in range(3)]


def test_one_optimizer_for_two_modules() -> None:
    def program(fill: float) -> tuple[StateTree, dict[str, nn.Linear], optim.Optimizer]:
        nets = {"a.b": nn.Linear(1, 1, bias=False), "c": nn.Linear(1, 1, bias=False)}
        for net in nets.values():
            nn.init.constant_(net.weight, fill)
        optimizer = optim.Adam([p for net in nets.values() for p in net.parameters()])
        return StateTree({"nets": nets, "o": optimizer}, 0, 1), nets, optimizer

    state, nets, optimizer = program(1)
    sum(net(torch.ones(1)) for net in nets.values()).backward()
    optimizer.step()
    saved = dense.save(state)
    assert "o/state/nets~1a_b.weight/exp_avg" in saved.tensors
    assert "o/state/nets~1c.weight/exp_avg" in saved.tensors
    state2, nets2, optimizer2 = program(2)
    dense.restore(state2, saved)
    weight, weight2 = nets["c"].weight, nets2["c"].weight
    assert torch.equal(optimizer2.state[weight2]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_two_optimizers_for_one_module() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    first, second = optim.Adam(net[0].parameters()), optim.SGD(net[1].parameters(), momentum=0.5)
    net(torch.ones(1)).backward()
    first.step()
    second.step()
    state = StateTree({"m": net, "opts": [first, second]}, 0, 1)
    saved = dense.save(state)
    assert {n for n in saved.tensors if n.startswith("opts")} == {
        *(f"opts/0/state/0.weight/{slot}" for slot in ("step", "exp_avg", "exp_avg_sq")),
        "opts/1/state/1.weight/momentum_buffer",
    }
    second.step()
    dense.restore(state, saved)
    assert dense.save(state).documents == saved.documents


def test_parameters_that_no_module_has() -> None:
    def program(value: float) -> tuple[StateTree, list[nn.Parameter], optim.Optimizer]:
        params = [nn.Parameter(torch.full((2,), value)), nn.Parameter(torch.full((1,), value))]
        optimizer = optim.Adam(params)
        return StateTree({"params": params, "o": optimizer}, 0, 1), params, optimizer

    state, params, optimizer = program(1.0)
    params[1].sum().backward()
    optimizer.step()
    saved = dense.save(state)
    assert {n for n in saved.tensors if n.startswith("o/")} == {
        "o/state/1/step",
        "o/state/1/exp_avg",
        "o/state/1/exp_avg_sq",
    }
    state2, params2, optimizer2 = program(2.0)
    dense.restore(state2, saved)
    assert params2[1].tolist() == params[1].tolist()
    assert torch.equal(optimizer2.state[params2[1]]["exp_avg"], optimizer.state[params[1]]["exp_avg"])
    assert params2[0] not in optimizer2.state


def test_groups_are_matched_by_their_parameters() -> None:
    net = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    first, second = net["a"].parameters(), net["b"].parameters()
    one = optim.SGD([{"params": first, "lr": 1}, {"params": second, "lr": 2}], lr=9)
    saved = dense.save(StateTree({"m": net, "o": one}, 0, 1))
    other = optim.SGD([{"params": net["b"].parameters()}, {"params": net["a"].parameters()}], lr=9)
    dense.restore(StateTree({"m": net, "o": other}, 0, 1), saved)
    assert [group["lr"] for group in other.param_groups] == [2, 1]
    assert other.param_groups[0]["params"][0] is net["b"].weight


def test_groups_that_cannot_be_matched() -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    one = optim.SGD([{"params": params[:1]}, {"params": params[1:2]}], lr=1)
    saved = dense.save(StateTree({"o": one}, 0, 1))
    three = optim.SGD([{"params": [p]} for p in params], lr=1)
    with pytest.raises(LayoutError, match="3 parameter groups here and 2 in the checkpoint"):
        dense.restore(StateTree({"o": three}, 0, 1), saved)


def test_names_given_to_the_optimizer_survive() -> None:
    net = nn.Linear(1, 1)
    state = StateTree({"m": net, "o": optim.SGD(net.named_parameters(), lr=1)}, 0, 1)
    dense.restore(state, dense.save(state))
    assert state._tree["o"].param_groups[0]["param_names"] == ["weight", "bias"]


def test_state_of_another_precision_than_live() -> None:
    """The checkpoint decides: what was float64 state is so again, whatever this optimizer would make."""
    net = nn.Linear(1, 1)
    optimizer = optim.Adam(net.parameters())
    net(torch.ones(1)).backward()
    optimizer.step()
    for entries in optimizer.state.values():
        entries["exp_avg"] = entries["exp_avg"].double()
    saved = dense.save(StateTree({"m": net, "o": optimizer}, 0, 1))
    fresh = optim.Adam(net.parameters())
    dense.restore(StateTree({"m": net, "o": fresh}, 0, 1), saved)
    assert fresh.state[net.weight]["exp_avg"].dtype == torch.float64
    assert fresh.state[net.weight]["exp_avg_sq"].dtype == torch.float32


def test_hooks_of_the_user_run() -> None:
    net = nn.Linear(1, 1)
    optimizer = optim.SGD(net.parameters(), lr=1, momentum=0.5)
    net(torch.ones(1)).backward()
    optimizer.step()
    state = StateTree({"m": net, "o": optimizer}, 0, 1)
    state.capture()
    calls = []

    def mark(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("saved")
        state_dict["param_groups"][0]["mark"] = len(calls)
        return state_dict

    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    net.register_load_state_dict_post_hook(lambda *_: calls.append("module"))
    assert state.capture().objects["o"]["param_groups"][0]["mark"] == 1
    assert state.capture().objects["o"]["param_groups"][0]["mark"] == 2
    saved = dense.save(state)
    dense.restore(state, saved)
    assert {"loading", "module"} <= set(calls)


class Own(optim.SGD):
    """Decides itself what its state is."""

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.param_groups[0]["lr"], "t": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = state["lr"] + state["t"].sum().item()


def test_an_optimizer_with_a_state_dict_of_its_own() -> None:
    net = nn.Linear(1, 1)
    optimizer = Own(net.parameters(), lr=3)
    state = StateTree({"m": net, "o": optimizer}, 0, 1)
    saved = dense.save(state)
    assert "@rank/0/o/t" in saved.tensors
    dense.restore(state, saved)
    assert optimizer.param_groups[0]["lr"] == 5
