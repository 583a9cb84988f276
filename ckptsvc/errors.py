"""Every error ckptsvc raises on purpose, sorted by what a handler would do about it.

    CkptsvcError
      InvalidInput              the call, the file or the setting is wrong: fix it
        UnsupportedObject         an object in the state tree that cannot be stored
        ConfigError               a setting or an environment variable
      StoreError                the place bytes are kept; `retryable` says whether trying again may help
        NotFound                  no such object
        StoreFull                 no space, no quota
        StoreDenied               read-only, permission, credentials
        StoreUnavailable          unreachable or timed out (retryable)
      Damaged                   bytes that do not verify: the checkpoint exists and is not to be trusted
      IncompatibleVersion       written by a newer major version of the format
      NoCheckpoint              nothing that could be restored
      LayoutError               what is wanted does not fit what is stored
      RunBusy                   another live job writes to this run
      Fenced                    a newer job has taken this run over
      AgentUnavailable          no agent answers
      CoordinationUnavailable   etcd does not answer
      ArenaExhausted            no shared memory for a snapshot
      SaveFailed                a save ended without a commit; the message says why
      Interrupted               stopped on request after a last save
      CrashLoop                 attempt after attempt failed without progress
      NodeUnfit                 this node cannot take part in a job
      LimitReached              more than one user, job or process may have

Codes are append-only: they appear in JSON output, logs and gRPC trailers. `EXIT_STATUS` and `GRPC_STATUS` are the one
table from a code to an exit status and to a gRPC status name.
"""

from __future__ import annotations

from typing import ClassVar


class CkptsvcError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: a stable word for programs.
        what: one sentence: what happened, to which object.
        hint: what the person can do, or an empty string.
    """

    code: ClassVar[str] = "internal"
    retryable: bool = False

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class InvalidInput(CkptsvcError, ValueError):
    """The call, the file or the name given is wrong."""

    code = "invalid-input"


class UnsupportedObject(InvalidInput):
    """An object in the state tree has a type that cannot be stored without pickle."""

    code = "unsupported-object"


class ConfigError(InvalidInput):
    """A setting is unknown, of the wrong type, or contradicts another."""

    code = "config"


class StoreError(CkptsvcError):
    """A store refused or failed; subclasses say how."""

    code = "store"


class NotFound(StoreError):
    """The object does not exist."""

    code = "not-found"


class StoreFull(StoreError):
    """No space or no quota left; retrying does not help until somebody frees some."""

    code = "store-full"


class StoreDenied(StoreError):
    """The store is read-only, or the credentials do not allow this."""

    code = "store-denied"


class StoreUnavailable(StoreError):
    """The store did not answer, or answered with an error that may pass."""

    code = "store-unavailable"
    retryable = True


class Damaged(CkptsvcError):
    """Bytes that do not verify: a wrong checksum, a truncated object, a malformed record."""

    code = "damaged"


class IncompatibleVersion(CkptsvcError):
    """Written by a newer major version of the format than this reader knows."""

    code = "incompatible-version"


class NoCheckpoint(CkptsvcError):
    """There is no checkpoint that could be restored."""

    code = "no-checkpoint"


class LayoutError(CkptsvcError, ValueError):
    """What is wanted does not fit what is stored: a missing tensor, another shape, a hole."""

    code = "layout"


class RunBusy(CkptsvcError):
    """Another live job writes to this run."""

    code = "run-busy"


class Fenced(CkptsvcError):
    """A newer job has taken this run over; this one may not commit any more."""

    code = "fenced"


class AgentUnavailable(CkptsvcError):
    """No agent answers on the socket, or it stopped answering."""

    code = "agent-unavailable"
    retryable = True


class CoordinationUnavailable(CkptsvcError):
    """The service through which the agents elect a coordinator does not answer."""

    code = "coordination-unavailable"
    retryable = True


class ArenaExhausted(CkptsvcError):
    """There is no shared memory for a snapshot within the limit that was set."""

    code = "arena-exhausted"


class SaveFailed(CkptsvcError):
    """A save ended without a commit."""

    code = "save-failed"


class Interrupted(CkptsvcError):
    """The job stopped because it was asked to, after a last save."""

    code = "interrupted"


class CrashLoop(CkptsvcError):
    """Attempt after attempt of a job failed, and none of them got further than the one before."""

    code = "crash-loop"


class NodeUnfit(CkptsvcError):
    """This node cannot take part in a job; others may."""

    code = "node-unfit"


class LimitReached(CkptsvcError):
    """What was asked for is more than a user, a job or a process may have."""

    code = "limit-reached"


EXIT_STATUS: dict[str, int] = {
    "internal": 1,
    "invalid-input": 2,
    "unsupported-object": 2,
    "config": 2,
    "store": 4,
    "store-unavailable": 4,
    "store-full": 5,
    "store-denied": 6,
    "not-found": 10,
    "no-checkpoint": 10,
    "run-busy": 11,
    "fenced": 11,
    "damaged": 12,
    "incompatible-version": 13,
    "layout": 14,
    "agent-unavailable": 20,
    "arena-exhausted": 21,
    "save-failed": 22,
    "coordination-unavailable": 23,
    "limit-reached": 24,
    "interrupted": 85,
    "crash-loop": 86,
    "node-unfit": 87,
}
"""Exit status of the CLI for each code. 3 means partial success; 130 is an interrupt from the keyboard.

For schedulers: 85 says "requeue me", 86 "do not", 87 "not on this node".
"""

GRPC_STATUS: dict[str, str] = {
    "internal": "INTERNAL",
    "invalid-input": "INVALID_ARGUMENT",
    "unsupported-object": "INVALID_ARGUMENT",
    "config": "INVALID_ARGUMENT",
    "store": "FAILED_PRECONDITION",
    "store-unavailable": "UNAVAILABLE",
    "store-full": "RESOURCE_EXHAUSTED",
    "store-denied": "PERMISSION_DENIED",
    "not-found": "NOT_FOUND",
    "no-checkpoint": "NOT_FOUND",
    "run-busy": "FAILED_PRECONDITION",
    "fenced": "ABORTED",
    "damaged": "DATA_LOSS",
    "incompatible-version": "FAILED_PRECONDITION",
    "layout": "FAILED_PRECONDITION",
    "agent-unavailable": "UNAVAILABLE",
    "arena-exhausted": "RESOURCE_EXHAUSTED",
    "save-failed": "FAILED_PRECONDITION",
    "coordination-unavailable": "UNAVAILABLE",
    "interrupted": "CANCELLED",
    "crash-loop": "ABORTED",
    "node-unfit": "FAILED_PRECONDITION",
    "limit-reached": "RESOURCE_EXHAUSTED",
}
"""gRPC status name for each code; `rpc.channel` uses it in both directions."""


def _tree(cls: type[CkptsvcError]) -> list[type[CkptsvcError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


BY_CODE: dict[str, type[CkptsvcError]] = {cls.code: cls for cls in reversed(_tree(CkptsvcError))}
"""The error class for each code, to raise on this side what was raised on the other."""
