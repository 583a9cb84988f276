"""What the core is told, and what it answers, in few words.

decision = saves.staged(staged(0), now=1.0)
assert orders(decision, "save_ended") == [("n0", outcome)]
"""

from typing import Any

from ckptsvc.control.effects import Commit, Decision, EpochDone, Record, Restarted, Send
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

STORE = "file:///run"


def joined(rank: int, **changes: Any) -> pb.RankJoined:
    fields = {"job": "job", "node": f"n{rank}", "store": STORE, "attempt": 1, "world_size": 2, "keep": 3}
    return pb.RankJoined(rank=rank, **{**fields, **changes})


def left(rank: int, **changes: Any) -> pb.RankLeft:
    return pb.RankLeft(rank=rank, **{"job": "job", "node": f"n{rank}", "attempt": 1, "died": True, **changes})


def announced(rank: int, digest: str = "d", generation: int = 0, **changes: Any) -> pb.Announced:
    fields = {"job": "job", "attempt": 1, "digest": digest, "generation": generation}
    return pb.Announced(rank=rank, **{**fields, **changes})


def rewound(count: int, **changes: Any) -> pb.Rewound:
    return pb.Rewound(count=count, **{"job": "job", "attempt": 1, **changes})


def progressed(node: str, step: int, **changes: Any) -> pb.Progressed:
    return pb.Progressed(node=node, lowest=step, highest=step, **{"job": "job", "attempt": 1, **changes})


def staged(rank: int, **changes: Any) -> pb.Staged:
    fields = {"job": "job", "node": f"n{rank}", "epoch": 1, "step": 10, "attempt": 1, "world_size": 2, "store": STORE}
    return pb.Staged(rank=rank, **{**fields, **changes})


def durable(rank: int, **changes: Any) -> pb.Durable:
    fields = {"job": "job", "epoch": 1, "step": 10, "name": f"r{rank}", "nbytes": 100, "extent": 4096}
    return pb.Durable(rank=rank, **{**fields, **changes})


def shard_failed(rank: int, code: str = "store-full", **changes: Any) -> pb.ShardFailed:
    fields = {"job": "job", "epoch": 1, "step": 10, "what": "no space left"}
    return pb.ShardFailed(rank=rank, code=code, **{**fields, **changes})


def skipped(rank: int, **changes: Any) -> pb.Skipped:
    fields = {"job": "job", "attempt": 1, "epoch": 1, "step": 10, "why": "no arena"}
    return pb.Skipped(rank=rank, **{**fields, **changes})


def dropped(rank: int, **changes: Any) -> pb.Dropped:
    return pb.Dropped(rank=rank, **{"job": "job", "node": f"n{rank}", "epoch": 1, "step": 10, **changes})


def node_joined(node: str, **changes: Any) -> pb.NodeJoined:
    fields = {"job": "job", "node_rank": -1, "min_nodes": 2, "max_nodes": 2, "nproc": 2, "max_restarts": 2}
    return pb.NodeJoined(node=node, **{**fields, "address": f"address-of-{node}", **changes})


def node_ready(node: str, attempt: int = 0, **changes: Any) -> pb.NodeReady:
    return pb.NodeReady(node=node, attempt=attempt, **{"job": "job", "port": 1000 + attempt, **changes})


def epoch_done(epoch: int, **changes: Any) -> EpochDone:
    return EpochDone(**{"job": "job", "attempt": 1, "rewinds": 0, "epoch": epoch, **changes})


def orders(decision: Decision, kind: str) -> list[tuple[str, Any]]:
    """(node, order) of every order of that kind."""
    return [
        (effect.node, getattr(effect.order, kind))
        for effect in decision.effects
        if isinstance(effect, Send) and effect.order.WhichOneof("effect") == kind
    ]


def kinds(decision: Decision) -> list[str]:
    """What was decided: "node: kind of order", or the name of the effect; incidents and counts apart."""
    return [
        f"{effect.node}: {effect.order.WhichOneof('effect')}" if isinstance(effect, Send) else type(effect).__name__
        for effect in decision.effects
        if not isinstance(effect, Record | Restarted)
    ]


def incidents(decision: Decision) -> list[pb.Incident]:
    return [effect.incident for effect in decision.effects if isinstance(effect, Record)]


def commits(decision: Decision) -> list[Commit]:
    return [effect for effect in decision.effects if isinstance(effect, Commit)]
