"""What a message may say: a bound for every field that agents, ranks and launchers send each other.

What gRPC has decoded is well-formed, and no more than that: the numbers in it are any numbers, and its texts any texts.
Whoever sends it has shown who he is, and may be wrong all the same: another version, a bug, a rank that was taken over.
So it is compared with this table before anything else looks at it, on both sides: an agent does not send what its
coordinator would hang up for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.identity import MAX_STEP
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

MOST_RANKS = 1 << 20
"""Ranks of a job. The largest machine that is known to us, Aurora, could have 10,624 x 12 = 127,488."""

MOST_RANKS_HERE = 1 << 14
"""Ranks of all jobs of one node."""

MAX_NPROC = 1 << 12
"""Ranks that one launcher starts on its node."""

MAX_IMAGE = 1 << 42
"""Bytes of a shard."""

MAX_NAME = 256
"""Characters of the name of a job or a node, and of an address."""

MAX_ALIASES = 8 << 20
"""Characters of the names of a rank's tied tensors: they are kept with each snapshot in memory."""

MAX_REASON = 1 << 20
"""Characters of a sentence: some name all nodes of a job."""

MAX_WHY = 300
"""Characters of the reason that a person gives for an order: agents keep it."""

MAX_COUNT = 1 << 30
"""Of attempts, restarts, and whatever else is counted: one more fits into an int32 too."""

MOST_SEVERAL = 1 << 12
"""Of notes, network cards, nodes of a group."""

MOST_REPORTS = 1 << 17
"""In one message; an agent puts no more than a mebibyte of them into one, and each takes eight bytes at least."""


Bound = Callable[[Any], bool]
"""Whether a value that is set may be."""


def number(least: float, most: float) -> Bound:
    """One between two others; what is no number is not."""
    return lambda value: least <= value <= most


def text(most: int, *, lines: bool = False, form: str = "") -> Bound:
    """So many characters at most, that can be shown in one line unless it has `lines`."""
    if lines:
        return lambda value: len(value) <= most
    if form:
        matches = re.compile(form).fullmatch
        return lambda value: len(value) <= most and matches(value) is not None
    return lambda value: len(value) <= most and value.isprintable()


def octets(most: int) -> Bound:
    """So many bytes, or items of any value, at most."""
    return lambda value: len(value) <= most


def words(most: int) -> Bound:
    """A map: so many characters at most, of keys and values together."""
    return lambda value: sum(len(key) + len(word) for key, word in value.items()) <= most


def many(most: int, each: Bound | None = None) -> Bound:
    """So many at most, each one as it says; messages as their own fields say."""
    return lambda value: len(value) <= most and all(map(each or fits, value))


NAME, WORD, SENTENCE = text(MAX_NAME), text(64), text(MAX_REASON, lines=True)
PATH, PAGES = text(4096, lines=True), text(1 << 18, lines=True)
HOST = text(253, form=r"[0-9A-Za-z_.:%-]*")
RANK, WORLD = number(0, MOST_RANKS - 1), number(0, MOST_RANKS)
COUNT, STEP, BYTES = number(0, MAX_COUNT), number(0, MAX_STEP), number(0, MAX_IMAGE)
PORT, STATUS, WHOLE = number(0, (1 << 16) - 1), number(-(1 << 31), (1 << 31) - 1), number(0, (1 << 31) - 1)
COUNTER, KIND = number(0, (1 << 64) - 1), number(0, 1 << 12)
VERSION = number(0, 1 << 60)
SECONDS, RATE = number(0, 1e12), number(0, 1e18)
DATA, SENTENCES = octets(1 << 28), many(MOST_SEVERAL, SENTENCE)

FIELDS: dict[str, Bound] = {
    # whose
    "job": NAME, "node": NAME, "target": NAME, "name": NAME, "via": NAME, "domain": NAME, "uid": COUNTER,
    "store": PATH, "log_dir": text(3800, lines=True), "address": NAME, "master_addr": HOST, "doorbell": PORT,
    "port": PORT, "master_port": PORT, "key": NAME, "ticket": NAME, "slot": NAME, "twin_slot": NAME, "id": NAME,
    # which
    "rank": RANK, "first_rank": RANK, "world_size": WORLD, "nproc": number(0, MAX_NPROC), "first": RANK,
    "node_rank": number(-1, MOST_RANKS), "nodes": WORLD, "min_nodes": WORLD, "max_nodes": WORLD, "attempt": COUNT,
    "epoch": STEP, "step": STEP, "lowest": STEP, "highest": STEP, "began": STEP, "generation": STEP, "term": VERSION,
    "committed_epoch": STEP, "committed_step": STEP,
    "version": VERSION, "count": WORLD, "rewinds": COUNT, "round": COUNT, "pid": COUNT,
    # how many
    "every_steps": STEP, "steps": STEP, "keep": WHOLE, "best": COUNT, "max_restarts": WHOLE, "crash_loop": COUNT,
    "losses": KIND, "threads": COUNT, "enqueued": number(-1, 1 << 63), "completed": number(-1, 1 << 63),
    "nbytes": BYTES, "bytes": number(0, MAX_IMAGE * MOST_RANKS), "twin_bytes": BYTES, "extent": number(1, 1 << 26),
    "io_bytes": COUNTER, "resident": COUNTER, "timeouts": COUNTER, "peer_timeouts": COUNTER, "retries": COUNTER,
    "failures": COUNTER, "exhausted": COUNTER, "uncorrected": COUNTER, "replays": COUNTER, "flaps": COUNTER,
    # how long, how fast
    "seconds": SECONDS, "every_seconds": SECONDS, "age": SECONDS, "left": SECONDS, "at": SECONDS, "clock": SECONDS,
    "uptime": SECONDS, "grow": number(-1e12, 1e12), "blocked": SECONDS, "threshold": SECONDS,
    "children_cpu": SECONDS, "detected": SECONDS, "grace": SECONDS, "patience": SECONDS, "staging": SECONDS,
    "monotonic": SECONDS, "idle": SECONDS, "unanswered": SECONDS, "cpu": SECONDS, "confidence": SECONDS,
    "usual": RATE, "rate": RATE, "bandwidth": RATE, "sent": RATE, "received": RATE, "paused_tx": RATE,
    "paused_rx": RATE, "waits": RATE, "marks": RATE,
    # what
    "verb": KIND, "status": STATUS, "code": WORD, "kind": WORD, "state": WORD, "phase": WORD,
    "family": WORD, "nic": NAME, "link": NAME, "metric": NAME, "digest": WORD, "plain_digest": WORD, "opened": WORD,
    "waits_in": NAME, "group": SENTENCE, "collective": SENTENCE, "detail": SENTENCE, "reason": SENTENCE,
    "what": SENTENCE, "why": SENTENCE, "unfit": text(2000, lines=True), "sentence": SENTENCE, "stack": PAGES,
    "native_stack": PAGES, "other_stacks": PAGES, "log_tail": PAGES, "data": DATA, "digests": DATA, "columns": DATA,
    "segments": DATA, "aliases": words(MAX_ALIASES), "metrics": words(1 << 16),
    # several
    "more": many(MOST_REPORTS), "behind": octets(MOST_RANKS_HERE), "phases": many(MOST_RANKS_HERE, WORD),
    "members": many(MOST_SEVERAL), "ranks": many(MOST_RANKS), "runs": many(MOST_RANKS), "groups": many(MOST_RANKS),
    "nics": SENTENCES, "notes": SENTENCES, "signals": SENTENCES, "actions": SENTENCES, "shards": many(MOST_RANKS),
    "local": many(MOST_RANKS), "snapshots": many(MOST_RANKS),
}  # fmt: skip
"""By the name of the field, which means the same wherever it is."""

EXCEPTIONS: dict[str, Bound] = {
    "ProvideRequest.bytes": BYTES,
    "AcquireRequest.bytes": BYTES,
    "SubmitRequest.bytes": BYTES,
    "LocalShard.bytes": BYTES,
    "AbandonRequest.reason": text(1 << 25, lines=True),  # whatever an exception says; it is cut
    "Asked.reason": text(MAX_WHY, lines=True),
    "Pausing.reason": text(MAX_WHY, lines=True),
    "Vacate.reason": text(1000, lines=True),  # with the name of who gave the order
    "Dropped.rank": number(-1, MOST_RANKS - 1),
    "Examine.incident": NAME,
    "Examined.incident": NAME,
    "NicReading.stalled": SECONDS,
    "RankEvidence.stalled": SECONDS,
    "Examine.ranks": many(MOST_RANKS, RANK),
    "Incident.rank": number(-1, MOST_RANKS - 1),
    "NicSummary.nics": many(MOST_SEVERAL),
    "LocalKept.outcome": KIND,
    "NodeJoined.address": HOST,
    "Pausing.by": NAME,
    "LauncherHello.address": HOST,
    "RankRun.step": WORLD,
    "SaveOutcome.outcome": KIND,
}
"""By message and field, where the name alone does not say it."""


def _is_rank(message: Any) -> bool:
    return bool(message.rank < message.world_size)


def _is_launch(message: Any) -> bool:
    ranks = message.nproc >= 1 and message.first_rank + message.nproc <= MOST_RANKS
    return bool(message.job and ranks and 1 <= message.min_nodes <= message.max_nodes)


def _name(kind: Descriptor | None) -> str:
    return "" if kind is None else kind.name


def _total(runs: Iterable[Any]) -> bool:
    return sum(int(run.count) for run in runs) <= MOST_RANKS


RULES: dict[str, Bound] = {
    "RankJoined": lambda m: bool(m.job and m.store) and _is_rank(m),
    "Staged": lambda m: bool(m.job) and _is_rank(m),
    "LocalKept": lambda m: bool(m.job) and _is_rank(m),
    "Guarded": lambda m: bool(m.job) and m.world_size >= 1 and _total(r for each in m.members for r in each.ranks),
    "Protect": lambda m: _total(run for each in m.members for run in each.ranks),
    "Rebuild": lambda m: _total(m.ranks) and _total(run for each in m.members for run in each.ranks),
    "FetchRequest": lambda m: _total(m.ranks),
    "RankRun": lambda m: m.first + max(m.step, 1) * (m.count - 1) < MOST_RANKS,
    "Holders": lambda m: _total(run for each in m.groups for run in each.runs),
    "NodeJoined": _is_launch,
    "LauncherHello": _is_launch,
    "ProvideRequest": lambda m: m.bytes > 0,
    "AcquireRequest": lambda m: m.bytes > 0,
    "StartRanks": lambda m: m.attempt >= 1 and m.first_rank < m.world_size and m.node_rank < m.nodes,
}
"""How the fields of a message must fit each other."""


def bound_of(field: FieldDescriptor) -> Bound | None:
    """What holds for a field; None where every value will do.

    Raises:
        KeyError: nobody has said so far.
    """
    found = EXCEPTIONS.get(f"{_name(field.containing_type)}.{field.name}") or FIELDS.get(field.name)
    if found is None and field.cpp_type != field.CPPTYPE_BOOL:
        return fits if field.message_type is not None else FIELDS[field.name]
    return found


@cache
def _bounds(kind: Descriptor) -> tuple[dict[FieldDescriptor, Bound], Bound | None]:
    found = ((field, bound_of(field)) for field in kind.fields)
    return {field: bound for field, bound in found if bound is not None}, RULES.get(kind.name)


def fits(message: Message) -> bool:
    """Whether a message says what it may."""
    bounds, rule = _bounds(message.DESCRIPTOR)
    for field, value in message.ListFields():
        bound = bounds.get(field)
        if bound is not None and not bound(value):
            return False
    return rule is None or bool(rule(message))


def check(message: Message) -> None:
    """Refuse a message that says what it may not.

    Raises:
        InvalidInput: names the field.
    """
    if not fits(message):
        raise InvalidInput(f"a message says what cannot be: {_wrong(message)}")


def check_report(report: pb.Report, node: str) -> None:
    """Refuse what an agent reports that cannot be, or that another node has to say.

    Raises:
        InvalidInput: names the field.
    """
    if len(report.more) > MOST_REPORTS:
        raise InvalidInput("a message says what cannot be: Report.more")
    for each in (report, *report.more):
        kind = each.WhichOneof("event")
        if kind is None:
            continue
        event = getattr(each, kind)  # not the whole: a coordinator has thousands of these in a second
        if not fits(event):
            check(event)
        if getattr(event, "node", node) != node:
            raise InvalidInput(f"a message says what cannot be: {kind} of another node")


def _wrong(message: Message) -> str:
    """The innermost message that does not fit, and the field of it."""
    bounds, _ = _bounds(message.DESCRIPTOR)
    for field, value in message.ListFields():
        bound = bounds.get(field)
        if bound is None or bound(value):
            continue
        inner = [value] if isinstance(value, Message) else value if field.cpp_type == field.CPPTYPE_MESSAGE else ()
        bad = next((each for each in inner if isinstance(each, Message) and not fits(each)), None)
        return f"{message.DESCRIPTOR.name}.{field.name}" if bad is None else _wrong(bad)
    return f"{message.DESCRIPTOR.name}, whose fields do not fit each other"
