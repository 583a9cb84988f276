"""`ckptsvc plan`: what checkpoints of a job would take, before there is one."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import replace
from typing import Any

import click
import msgspec

from ckptsvc.cli.plan_examples import EXAMPLES, STATE
from ckptsvc.cli.plan_model import Job, Plan, doubts, memory, needed, plans
from ckptsvc.cli.terminal import Screen, emit, plural
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import parse_duration, parse_size
from ckptsvc.settings import ArenaSettings, TierSettings

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[+]?[0-9]+)?) *([KMBGT]?)", re.IGNORECASE)
_COUNT_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_WAYS = {
    "store": "the store alone",
    "store + memory": "store and memory",
    "disk + memory": "disk of the node and memory",
}


class Given(msgspec.Struct, frozen=True):
    """What the options and an example say together."""

    params: float
    state: float
    job: Job
    assumed: bool  # what the store takes: as much as is needed


@click.command()
@click.option("--example", type=click.Choice(list(EXAMPLES)), help="Begin with a job that is known.")
@click.option("--examples", "list_them", is_flag=True, help="List these, and end.")
@click.option("--params", metavar="N", help='Parameters of the model: 1e12, "405B", "1T".')
@click.option("--bytes-per-param", type=click.FloatRange(0, min_open=True), metavar="N",
    help="Of the state. [default: 14: 16-bit weights, 32-bit master weights, Adam's two moments]")  # fmt: skip
@click.option("--ranks", type=click.IntRange(1), help="Ranks of the job.")
@click.option("--ranks-per-node", type=click.IntRange(1), help="[default: 8]")
@click.option("--store-bandwidth", metavar="RATE",
    help='What the store takes from all nodes: "650GB/s". [default: as much as the best interval needs]')  # fmt: skip
@click.option("--read-bandwidth", metavar="RATE", help="What it gives. [default: as much]")
@click.option("--local-bandwidth", metavar="RATE", help="What the disk of one node takes and gives. [default: none]")
@click.option("--copy-bandwidth", metavar="RATE", default="10GB/s", show_default=True,
    help="At which one rank copies its state to memory.")  # fmt: skip
@click.option("--mtbf", metavar="TIME", help='Mean time between failures of the whole job: "3h".')
@click.option("--node-mtbf", metavar="TIME", help='Or that of one node: "365d".')
@click.option("--restart", metavar="TIME", default="60s", show_default=True,
    help="From a failure until the ranks run again, without reading.")  # fmt: skip
@click.option("--soft", type=click.FloatRange(0, 1), default=0.7, show_default=True,
    help="Share of failures after which the snapshot in memory is still there.")  # fmt: skip
@click.option("--overlap", is_flag=True, help="Snapshots are copied beside the training: a tenth of the copy is felt.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(example: str | None, list_them: bool, as_json: bool, **given: Any) -> None:
    """Compute sizes and times of a job's checkpoints, the best interval, and the useful time that is left.

    \b
    ckptsvc plan --params 1e12 --ranks 6144 --store-bandwidth 650GB/s --mtbf 3h
    ckptsvc plan --example aurora-1t-daos --mtbf 3h
    ckptsvc plan --example llama3-405b

    The interval is Daly's (2006; a refinement of Young's, 1974): the training waits only for the copy to memory, the
    writing goes on behind it, and what is not durable yet when a failure comes is lost. Where the formula does not
    hold, that is said. Without --store-bandwidth the plan says what the store must take. Sizes are decimal: 1 TB is
    10^12 bytes.

    \b
    JSON: {"params", "bytes", "bytes_per_rank", "bytes_per_node", "ranks",
      "nodes", "mtbf", "store_bandwidth", "assumed", "memory": {"snapshots",
      "copy", "xor", "rs"}, "seconds": {"copy", "waiting", "disk", "store", "read",
      "restart"}, "plans": [{"name", "interval", "best", "waiting", "lost",
      "useful", "limited"}], "doubts": [...]}
    seconds: "copy" until a snapshot is in memory, "waiting" what the training
    feels of it, "disk" and "store" until it is durable there (null: there is
    none); "assumed": the store's bandwidth was not given, this much is needed;
    memory: bytes a node, those of tiers.partner beside its own snapshots,
    where there are nodes enough; plans: "best" is the formula's interval, "interval" never shorter
    than a save takes ("limited"), "waiting" and "useful" are shares, "lost"
    the seconds a failure costs on average.
    """  # noqa: D301  \b is click's
    if list_them:
        _list(as_json)
        return
    wanted = resolve(example, given)
    found = plans(wanted.job)
    said = doubts(wanted.job, found)
    if as_json:
        emit(_document(wanted, found, said))
    else:
        _show(Screen(), wanted, found, said, given["node_mtbf"] is None and given["mtbf"] is None)


def resolve(example: str | None, given: dict[str, Any]) -> Given:
    """What is planned for: the example, where there is one, with what the options say.

    Raises:
        ConfigError: something is missing, or cannot be.
    """
    known = EXAMPLES[example] if example else None
    params = count(given["params"]) if given["params"] else known.params if known else _missing("--params", "1e12")
    ranks = given["ranks"] or (known.ranks if known else _missing("--ranks", "6144"))
    per_node = given["ranks_per_node"] or (known.ranks // known.nodes if known else 8)
    nodes = -(-ranks // per_node)
    store = rate(given["store_bandwidth"]) if given["store_bandwidth"] else known.store if known else 0.0
    state = given["bytes_per_param"] or (known.state if known else STATE)
    copy = rate(given["copy_bandwidth"])
    job = Job(
        nbytes=params * state,
        ranks=ranks,
        nodes=nodes,
        copy=copy,
        store=store,
        read=rate(given["read_bandwidth"]) if given["read_bandwidth"] else 0.0,
        local=rate(given["local_bandwidth"]) if given["local_bandwidth"] else 0.0,
        mtbf=_mtbf(given["mtbf"], given["node_mtbf"], nodes),
        restart=parse_duration(given["restart"]),
        soft=given["soft"],
        overlap=0.1 if given["overlap"] else 1.0,
    )
    if not store and not math.isfinite(needed(job)):
        _missing("--store-bandwidth", "650GB/s")  # none would be enough
    store = store or _rounded_up(needed(job))
    return Given(params, state, replace(job, store=store, read=job.read or store), assumed=job.store == 0)


def _rounded_up(number: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _mtbf(whole: str | None, node: str | None, nodes: int) -> float:
    if whole and node:
        raise ConfigError("--mtbf and --node-mtbf say the same twice")
    seconds = parse_duration(node) / nodes if node else parse_duration(whole or "3h")
    if seconds <= 0:
        raise ConfigError("the mean time between failures is 0")
    return seconds


def _missing(option: str, example: str) -> Any:
    raise ConfigError(f"{option} is missing", hint=f"for example {option} {example}, or begin with --example")


def count(text: str) -> float:
    """A large number as people write it: "1e12", "405B", "1.5T".

    Raises:
        ConfigError: it is none, or 0.
    """
    match = _COUNT.fullmatch(text.strip())
    number = float(match[1]) * _COUNT_UNITS[match[2].lower()] if match else 0.0
    if not 0 < number < 1e18:
        raise ConfigError(f"{text!r} is no number of parameters", hint='for example 1e12, "405B" or "1T"')
    return number


def rate(text: str) -> float:
    """Bytes a second: "650GB/s", "2.5 GiB/s"; "/s" may be left out.

    Raises:
        ConfigError: it is none, or 0.
    """
    try:
        found = parse_size(text.strip().removesuffix("/s"))
    except ConfigError:
        found = 0
    if not found:
        raise ConfigError(f"{text!r} is no bandwidth", hint='for example "650GB/s" or "2.5GiB/s"')
    return float(found)


def _memory(job: Job) -> dict[str, float]:
    return memory(job, ArenaSettings().slots, TierSettings().group)


# ---- for people ------------------------------------------------------------------------------------------------------


def decimal(number: float) -> str:
    """Bytes in decimal units: "17.0 TB"."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if number < 999.95 or unit == "PB":
            return f"{number:.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError


def seconds(span: float) -> str:
    """A time: "0.28 s", "26 s", "4.5 min", "3.0 h", "2.1 d"."""
    if span < 1:
        return f"{span:.2g} s"
    for unit, length, most in (("s", 1.0, 120), ("min", 60.0, 120), ("h", 3600.0, 72)):
        if span < most * length:
            return f"{span / length:.0f} {unit}" if span / length >= 10 else f"{span / length:.1f} {unit}"
    return f"{span / 86400:,.1f} d"


def _show(screen: Screen, wanted: Given, found: list[Plan], said: list[str], assumed: bool) -> None:
    job = wanted.job
    failure = f"a failure every {seconds(job.mtbf)}" + (" (assumed: --mtbf)" if assumed else "")
    from_store = job.restart + job.reading
    taken = _memory(job)
    beside = " or ".join(f"{decimal(taken[way])} ({way})" for way in ("copy", "xor", "rs") if way in taken)
    lines = [
        ("state", f"{decimal(job.nbytes)}: {wanted.params:.4g} parameters of {wanted.state:g} bytes"),
        ("job", f"{plural(job.ranks, 'rank')} on {plural(job.nodes, 'node')}, {failure}"),
        ("a rank has", decimal(job.nbytes / job.ranks)),
        ("a node has", decimal(job.nbytes / job.nodes)),
        ("in memory", f"after {seconds(job.copying)}, at {decimal(job.copy)}/s a rank"),
        ("waiting", f"{seconds(job.waiting)} of the training for each snapshot"),
        *([("on its disk", f"after {seconds(job.to_disk)}, at {decimal(job.local)}/s a node")] if job.local else []),
        ("durable", f"after {seconds(job.to_store)}, at {decimal(job.store)}/s in all"),
        *([("", "which the interval below needs (--store-bandwidth)")] if wanted.assumed else []),
        ("memory", f"{decimal(taken['snapshots'])} a node"),
        *([("of partners", f"{beside} more (tiers.partner)")] if beside else []),
        ("restarted", f"after {seconds(job.restart + job.copying)} from memory, {seconds(from_store)} from the store"),
    ]
    for name, text in lines:
        screen.line(screen.paint(name.ljust(13), "head") + text)
    screen.line()
    rows = [
        (
            _WAYS[plan.name],
            seconds(plan.interval) + (" *" if plan.limited else "  "),
            f"{plan.waiting:.2%}",
            seconds(plan.lost),
            f"{plan.useful:.1%}",
        )
        for plan in found
    ]
    screen.table(
        ("RESTARTS FROM", "SAVE EVERY  ", "WAITING", "A FAILURE COSTS", "USEFUL TIME"), rows,
        right=("SAVE EVERY  ", "WAITING", "A FAILURE COSTS", "USEFUL TIME"),
        style=lambda row, column: "good" if column == "USEFUL TIME" and row == _best(found) else "",
    )  # fmt: skip
    if any(plan.limited for plan in found):
        screen.line("* as long as a save takes: the next one begins when the last one is durable")
    if job.soft:
        screen.line()
        screen.line(f"after {job.soft:.0%} of failures the snapshots in memory are still there (--soft)")
    for sentence in said:
        for line in textwrap.wrap(sentence, screen.width or 10_000):
            screen.line(screen.paint(line, "doubt"))
    best = found[_best(found)]
    screen.line(f'setting: save.every = "{max(round(best.interval), 1)}s"')


def _best(found: list[Plan]) -> int:
    return max(range(len(found)), key=lambda number: found[number].useful)


def _document(wanted: Given, found: list[Plan], said: list[str]) -> dict[str, Any]:
    job = wanted.job
    return {
        "params": wanted.params,
        "bytes": job.nbytes,
        "bytes_per_rank": job.nbytes / job.ranks,
        "bytes_per_node": job.nbytes / job.nodes,
        "ranks": job.ranks,
        "nodes": job.nodes,
        "mtbf": job.mtbf,
        "store_bandwidth": job.store,
        "assumed": wanted.assumed,
        "memory": _memory(job),
        "seconds": {
            "copy": job.copying,
            "waiting": job.waiting,
            "disk": job.to_disk if job.local else None,
            "store": job.to_store,
            "read": job.reading,
            "restart": job.restart,
        },
        "plans": [msgspec.to_builtins(plan) for plan in found],
        "doubts": said,
    }


def _list(as_json: bool) -> None:
    if as_json:
        emit({"examples": {name: each._asdict() for name, each in EXAMPLES.items()}})
        return
    rows = [
        (
            name,
            f"{each.ranks:,}",
            decimal(each.params * each.state),
            f"{decimal(each.store)}/s" if each.store else "-",
            each.what,
        )
        for name, each in EXAMPLES.items()
    ]
    Screen().table(("EXAMPLE", "RANKS", "STATE", "STORE", "WHAT"), rows, right=("RANKS", "STATE", "STORE"), fold="WHAT")
