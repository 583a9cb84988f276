"""Which collectives this process has started and completed, from torch's own flight recorder.

The recorder keeps the last collectives of every process group. On Gloo it needs no setting, and never says that a
collective's state is "completed", only that it is retired; on NCCL both are said. JSON format "2.x", as torch 2.6 to
2.13 write it (torch/csrc/distributed/c10d/FlightRecorder.hpp).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import msgspec

from ckptsvc.rpc.testimony import MAX_GROUPS, Group

_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
_DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "Long": "int64", "Int": "int32", "Byte": "uint8"}
_SIZES_SHOWN = 4


class _Entry(msgspec.Struct):
    process_group: tuple[str, str]  # name, description
    profiling_name: str  # "gloo:all_reduce"
    collective_seq_id: int
    time_created_ns: int
    state: str = ""
    retired: bool = False
    is_p2p: bool = False
    input_sizes: list[list[int]] = []
    input_dtypes: list[str] = []

    @property
    def backend(self) -> str:
        return self.profiling_name.partition(":")[0]

    @property
    def group(self) -> str:
        name, description = self.process_group
        if description in ("", "undefined"):
            return f"{name} ({self.backend})"
        return f"{'default' if description == 'default_pg' else f'{description} {name}'} ({self.backend})"

    @property
    def pending(self) -> bool:
        return not self.retired and self.state != "completed"

    def __str__(self) -> str:
        operation = self.profiling_name.partition(":")[2] or self.profiling_name
        sizes = ", ".join(map(str, self.input_sizes[:_SIZES_SHOWN]))
        more = f" and {len(self.input_sizes) - _SIZES_SHOWN} more" if len(self.input_sizes) > _SIZES_SHOWN else ""
        dtypes = " ".join(dict.fromkeys(_DTYPES.get(name, name.lower()) for name in self.input_dtypes))
        of = f" of {sizes}{more} {dtypes}".rstrip() if sizes else ""
        return f"{operation}{of} in group {self.group}"[:1000]


class _Dump(msgspec.Struct):
    entries: list[_Entry] = []


def recorded() -> Iterator[bytes]:
    """The dumps of this process's recorders; none where torch has none, or is not imported.

    Nothing is imported here: the main thread may be stuck in an import.
    """
    torch = sys.modules.get("torch")
    module = getattr(getattr(torch, "_C", None), "_distributed_c10d", None)
    for name in _RECORDERS:
        dump = getattr(module, name, None)
        if dump is not None:
            text = dump()
            yield text.encode() if isinstance(text, str) else text


def progress(dumps: Iterable[bytes]) -> list[Group]:
    """What the dumps say of each process group; first the one that the process waits in, or has used last.

    Raises:
        msgspec.MsgspecError: a dump is not what this torch version is known to write.
    """
    groups: dict[str, list[_Entry]] = {}
    for dump in dumps:
        for entry in msgspec.json.decode(dump, type=_Dump).entries:
            groups.setdefault(entry.group, []).append(entry)
    ordered = sorted(groups.items(), key=lambda item: _urgency(item[1]))
    return [_summary(name, entries) for name, entries in ordered[:MAX_GROUPS]]


def _urgency(entries: list[_Entry]) -> tuple[bool, int]:
    pending = [entry.time_created_ns for entry in entries if entry.pending]
    return (False, min(pending)) if pending else (True, -max(entry.time_created_ns for entry in entries))


def _summary(name: str, entries: list[_Entry]) -> Group:
    pending = min((e for e in entries if e.pending), key=lambda e: e.time_created_ns, default=None)
    collectives = [e for e in entries if not e.is_p2p]  # a send or receive has no number of its own here
    enqueued = max((e.collective_seq_id for e in collectives), default=-1)
    unfinished = [e.collective_seq_id for e in collectives if e.pending]
    # They complete in order, so the one before the first unfinished one is the last that has.
    completed = min(unfinished) - 1 if unfinished else enqueued
    return Group(name, enqueued, completed, str(pending) if pending else "")
