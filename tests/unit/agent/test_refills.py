"""Whose memory goes when a snapshot is brought back from the local disk."""

from dataclasses import replace
from pathlib import Path

from ckptsvc.agent.tiers.refills import may_go
from ckptsvc.pipeline.arena import WAITING, Arena, Label, State


def arena(name: str, state: State, job: str = "job", epoch: int = 2, step: int = 0) -> Arena:
    made = Arena(name, Path(name), 4096, job, 0, state, step, epoch)
    if state in (State.KEPT, State.STAGED):
        made.label = Label(
            job=job, store="file:///run", coordinator="", attempt=1, epoch=epoch, step=step, rank=0, world_size=2,
            nbytes=1, extent=4096, aliases={},
        )  # fmt: skip
    return made


def test_what_is_older_goes_and_then_what_is_another_jobs() -> None:
    arenas = [
        arena("same", State.KEPT, step=100),
        arena("newer", State.KEPT, step=110),
        arena("of a later epoch", State.KEPT, epoch=3, step=10),
        arena("being saved", State.STAGED, step=10),
        arena("being filled", State.FILLING, step=10),
        arena("another job's, of the same step", State.KEPT, "another", step=100),
        arena("another job's", State.KEPT, "another", epoch=1, step=200),
        arena("older", State.KEPT, step=90),
        arena("of an earlier epoch, of the same step", State.KEPT, epoch=1, step=100),
        arena("free", State.FREE, step=-1),
        replace(arena("filled for a twin", State.FILLING, step=100), guest=True, holder=WAITING),
    ]
    assert [each.name for each in may_go(arenas, "job", (2, 100))] == [
        "free",
        "filled for a twin",
        "of an earlier epoch, of the same step",
        "older",
        "another job's",
        "another job's, of the same step",
    ]
