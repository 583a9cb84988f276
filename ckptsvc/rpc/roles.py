"""Which role each gRPC method is for. A method that is not in the table is answered to nobody.

    user       the owner of the agent: his ranks, his launchers, his other agents
    operator   the owner, and whoever operates the machine: root, and those whom system.operators names

Between agents (CoordinatorService), rpc.trust has found out that the caller is an agent of the same user.
"""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Whom a method is for."""

    USER = "user"
    OPERATOR = "operator"


AGENT = "ckptsvc.rpc.v1.AgentService"
COORDINATOR = "ckptsvc.rpc.v1.CoordinatorService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

VERBS = frozenset(
    f"/{AGENT}/{name}"
    for name in ("Checkpoint", "Pause", "Resume", "Restart", "Drain", "Undrain", "Exclude", "Include")
)
"""What people order. These want a token of the identity socket, so that it is known who did: only the owner and root
reach the agent's sockets, and which of the two it was belongs into the audit log. The others have the token of a rank's
session, or need none: GetStatus changes nothing, and a launcher's orders come from the job's coordinator."""

ROLES: dict[str, Role] = (
    dict.fromkeys(VERBS, Role.OPERATOR)
    | {
        f"/{AGENT}/{name}": Role.USER
        for name in (
            "Prepare", "Rewind", "Provide", "Acquire", "Submit", "Abandon", "WaitSave", "ListSnapshots", "Refill",
            "Leave", "Launch",
        )
    }
    | {f"/{AGENT}/GetStatus": Role.OPERATOR}
    | {f"/{COORDINATOR}/{name}": Role.USER for name in ("Challenge", "Attend", "ListComplete", "Measure", "Fetch")}
    | {f"/{HEALTH}/{name}": Role.OPERATOR for name in ("Check", "Watch", "List")}
    | {f"/{REFLECTION}/ServerReflectionInfo": Role.OPERATOR}
)  # fmt: skip
"""By the path of the method."""
