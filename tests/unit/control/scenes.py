"""Jobs that stand still, as an examination would find them: one for each kind of fault, with gaps in the evidence.

scene, culprits = draw("missed collective", rng)
"""

import random
from collections.abc import Callable

from ckptsvc.control.blame import Scene
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

GROUP = "default (gloo)"
REDUCE = f"all_reduce of [1048576] float32 in group {GROUP}"
TRAINING = "main (train.py:10)\ntrain_step (train.py:42)\n"
WAITING = TRAINING + "all_reduce (torch/distributed/distributed_c10d.py:3252)"
COMPUTING = TRAINING + "forward (model.py:77)\nlinear (torch/nn/functional.py:2000)"
LOADING = (
    "main (train.py:9)\n__next__ (torch/utils/data/dataloader.py:733)\n_try_get_data (x.py:1)\npoll (selectors.py:415)"
)
EVALUATING = "main (train.py:20)\nevaluate (train.py:60)\nforward (model.py:77)"


class Stage:
    """A job in which all ranks wait in collective `number` after `step` steps; a fault changes some of them."""

    def __init__(self, rng: random.Random, *, nodes: int = 2, quiet: float = 5.0, threshold: float = 4.0) -> None:
        self.rng = rng
        self.per_node = rng.choice([1, 2, 4, 8])
        self.world = self.per_node * rng.choice([nodes, 3, 4, 8])
        self.number, self.step = rng.randrange(100, 10_000), rng.randrange(20, 1000)
        self.nodes = {rank: f"n{rank // self.per_node}" for rank in range(self.world)}
        self.culprit = rng.randrange(self.world)
        self.silent: set[str] = set()
        self.nics: dict[str, list[str]] = {}
        self.ranks = {
            rank: pb.RankEvidence(
                rank=rank,
                pid=1000 + rank,
                phase="step",
                step=self.step,
                stalled=quiet + rng.uniform(0, 0.3),
                threshold=threshold,
                state="S",
                cpu=rng.uniform(0, 0.05),
                waits_in="futex_wait_queue",
                asked=True,
                answers=True,
                stack=WAITING,
            )
            for rank in range(self.world)
        }
        for evidence in self.ranks.values():
            in_collective(evidence, self.number, REDUCE)

    @property
    def node(self) -> str:
        return self.nodes[self.culprit]

    def change(self, **fields: object) -> None:
        """What is different about the culprit."""
        for name, value in fields.items():
            setattr(self.ranks[self.culprit], name, value)

    def not_there(self, **fields: object) -> None:
        """The culprit has not begun the collective that the others wait in."""
        in_collective(self.ranks[self.culprit], self.number - 1, "")
        self.change(**fields)

    def unseen(self, *what: str) -> None:
        """Some things could not be found out, about anybody."""
        for evidence in self.ranks.values():
            if "collective" in what:
                forget_collectives(evidence)
            if "stack" in what:
                evidence.stack = ""
            if "answers" in what:
                evidence.asked = evidence.answers = False

    def blur(self) -> None:
        """As it is in life: here a rank without a flight recorder, there one whose stack was not to be had."""
        if self.rng.random() < 0.3:
            self.unseen(self.rng.choice(["stack", "collective", "answers"]))
        for rank, evidence in self.ranks.items():
            if rank != self.culprit and self.rng.random() < 0.1:
                forget_collectives(evidence)
            if rank != self.culprit and self.rng.random() < 0.1:
                evidence.stack = ""

    def scene(self) -> Scene:
        return Scene(self.nodes, self.ranks, self.silent, self.nics)


def in_collective(evidence: pb.RankEvidence, number: int, collective: str) -> None:
    """It has begun so many; the last one is not over if it has a name."""
    forget_collectives(evidence)
    completed = number - bool(collective)
    evidence.enqueued, evidence.completed, evidence.collective = number, completed, collective
    evidence.groups.add(group=GROUP, enqueued=number, completed=completed, collective=collective)


def forget_collectives(evidence: pb.RankEvidence) -> None:
    """Its flight recorder could not be read."""
    evidence.enqueued = evidence.completed = -1
    evidence.collective = ""
    del evidence.groups[:]


def out_of_touch(stage: Stage, **fields: object) -> None:
    """The culprit answers nothing."""
    forget_collectives(stage.ranks[stage.culprit])
    stage.change(answers=False, **fields)


def stopped(stage: Stage) -> None:
    out_of_touch(stage, state="T", asked=False)
    stage.change(stack=stage.rng.choice(["", WAITING, COMPUTING]))


def zombie(stage: Stage) -> None:
    out_of_touch(stage, state="Z", stack="")


def loop_with_the_interpreter_lock(stage: Stage) -> None:
    out_of_touch(stage, state="R", cpu=1.0, stack=TRAINING + "spin (train.py:50)", waits_in="")


def loop_without_the_interpreter_lock(stage: Stage) -> None:
    stage.not_there(state="R", cpu=1.0, stack=TRAINING + "svd (numpy/linalg.py:1600)", waits_in="")


def stuck_data_loader(stage: Stage) -> None:
    stage.not_there(stack=LOADING, waits_in="do_poll")


def missed_collective(stage: Stage) -> None:
    """It has left the loop, or waits in another one for what never comes."""
    if stage.rng.random() < 0.5:
        stage.not_there(stack=TRAINING + "sleep (train.py:51)")
    else:
        in_collective(stage.ranks[stage.culprit], stage.number - 1, f"barrier in group {GROUP}")
        stage.change(stack=TRAINING + "barrier (torch/distributed/distributed_c10d.py:4100)")


def mismatched_collective(stage: Stage) -> None:
    in_collective(stage.ranks[stage.culprit], stage.number, f"all_gather of [1048576] float32 in group {GROUP}")
    stage.change(stack=TRAINING + "all_gather (torch/distributed/distributed_c10d.py:4200)")


def mismatched_size(stage: Stage) -> None:
    in_collective(stage.ranks[stage.culprit], stage.number, f"all_reduce of [7] float32 in group {GROUP}")


def dead_file_system(stage: Stage) -> None:
    out_of_touch(stage, state="D", waits_in="cl_sync_io_wait", stack=TRAINING + "read (train.py:44)")


def hang_in_an_evaluation(stage: Stage) -> None:
    stage.not_there(phase="evaluation", stack=EVALUATING, threshold=30.0, stalled=33.0, cpu=1.0, state="R")


def silent_network_card(stage: Stage) -> None:
    stage.nics[stage.node] = ["cxi0: 305 packet timeouts in the last 5 s; the job's median is 0"]


def frozen_node(stage: Stage) -> None:
    stage.silent.add(stage.node)
    for rank, node in stage.nodes.items():
        if node == stage.node:
            del stage.ranks[rank]


FAULTS: dict[str, Callable[[Stage], None]] = {
    f.__name__.replace("_", " "): f
    for f in (
        stopped,
        zombie,
        loop_with_the_interpreter_lock,
        loop_without_the_interpreter_lock,
        stuck_data_loader,
        missed_collective,
        mismatched_collective,
        mismatched_size,
        dead_file_system,
        hang_in_an_evaluation,
        silent_network_card,
        frozen_node,
    )
}

OF_NODES = ("silent network card", "frozen node")
"""Faults that are a node's, not a rank's."""


OF_MANY = ("missed collective", "mismatched collective", "mismatched size")
"""Faults in which all ranks wait in collectives: of two, nobody can say who is wrong."""


def stage_of(fault: str, rng: random.Random) -> Stage:
    """A scene of that fault."""
    stage = Stage(rng, nodes=3 if fault in OF_MANY else 2)
    FAULTS[fault](stage)
    return stage


def draw(fault: str, rng: random.Random) -> Stage:
    """A scene of that fault, blurred."""
    stage = stage_of(fault, rng)
    stage.blur()
    return stage
