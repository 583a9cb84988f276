"""`ckptsvc doctor`: is this node fit for a job, and what can its store do?"""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from statistics import median
from types import FrameType
from typing import Any, NoReturn

import click
import msgspec

from ckptsvc.agent.launcher.preflight import reason_against
from ckptsvc.cli import address
from ckptsvc.cli.benchmarks.machine import available_memory, load
from ckptsvc.cli.store_probe.advice import Advice, advise, noise, percentile, speeds
from ckptsvc.cli.store_probe.load import FOLDER
from ckptsvc.cli.store_probe.probe import Spec
from ckptsvc.cli.store_probe.supervisor import Measured, measure
from ckptsvc.cli.terminal import Screen, emit, note, plural, printable, size
from ckptsvc.config import load as load_settings
from ckptsvc.errors import InvalidInput
from ckptsvc.quantities import parse_duration, parse_size
from ckptsvc.settings import Settings

MiB = 1 << 20
_STAGES = {
    "about": "what the store is",
    "race": "creating one object from several threads",
    "metadata": "small objects",
    "copy": "memory",
    "write": "writing",
    "read": "reading",
    "tune": "settings of the driver",
    "clean": "removing what was written",
}


@click.command()
@click.option("--store", metavar="URL", help="Measure this store (a URL or a path) from here.")
@click.option("--size", "largest", default="128MiB", show_default=True, help="Of the largest object.")
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True, help="Samples of each.")
@click.option("--patience", default="60s", show_default=True, metavar="TIME",
    help="After so long without an answer the store counts as hanging.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True,
    help="After which a stage begins nothing new.")  # fmt: skip
@click.option("--state", metavar="SIZE", help='What this node saves each time, as "64GiB".')
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    store: str | None, largest: str, repeat: int, patience: str, seconds: float, state: str | None, as_json: bool
) -> int:
    """Check this node, and measure what a store can do from here.

    Without --store: memory, shared memory, disks, loopback and network cards, as before a job. With it: bandwidth of
    writing and reading by size and number of objects at a time, latencies of calls on small objects, whether creating
    an object is exclusive, whether direct I/O works; and settings that follow from it, with the reason. All is written
    below one folder of the store and removed again.

    \b
    Exit status: 0; 3 where the store hung, where it is not exclusive, or where something could not be removed.
    JSON: {"node": {"name", "cores", "load", "unfit"}, "store": null or {"url",
      "found": {stage: ...}, "hung", "left", "noise", "advice": [{"setting",
      "value", "why", "change"}]}}
    unfit is "" for a fit node; found has the samples of every stage, in
    seconds; hung is the stage in which the store did not answer; advice
    without a setting is a warning.
    """  # noqa: D301  \b is click's
    signal.signal(signal.SIGTERM, _terminated)
    settings = load_settings(os.environ)
    node: dict[str, Any] = {"name": platform.node(), "cores": len(os.sched_getaffinity(0)), "load": load()}
    if store is None:
        node["unfit"] = asyncio.run(reason_against(settings.arena.dir, [os.getcwd()], "127.0.0.1"))
        return _show_node(node, as_json)
    spec = _spec(store, largest, repeat, seconds)
    wait = parse_duration(patience)
    measured = measure(spec, wait, lambda stage: _tell(stage, as_json))
    node["load"] = f"{node['load']} before, {load()} after"
    advice = advise(measured.found, node["cores"], settings.save.early_cores, parse_size(state) if state else None)
    if as_json:
        emit(_document(node, spec, measured, advice))
    else:
        _show(Screen(), node, spec, measured, advice, settings)
    if measured.error is not None:
        raise measured.error
    return 3 if measured.hung or measured.left or any(not each.setting and "race" in each.why for each in advice) else 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends the measurement as Ctrl-C does: what was written goes first."""
    sys.exit(128 + number)


def _spec(store: str, largest: str, repeat: int, seconds: float) -> Spec:
    url = address.parse(store).url
    if url.startswith("memory:"):
        raise InvalidInput("memory:// is no store that could be measured: it is not shared between processes")
    top = parse_size(largest)
    most = min(512 * MiB, available_memory() // 4)
    if not 1 << 16 <= top <= most:
        raise InvalidInput(f"--size {largest} is not between 64 KiB and {size(most)}, a share of the memory there is")
    sizes = sorted({min(each, top) for each in (MiB, 16 * MiB, top)})
    return Spec(url=url, folder=f"{FOLDER}{secrets.token_hex(6)}", sizes=tuple(sizes), most=max(most, top),
        repeat=repeat, seconds=seconds)  # fmt: skip


def _tell(stage: str, as_json: bool) -> None:
    if not as_json and sys.stderr.isatty():
        note(f"... {_STAGES[stage]}")


def _show_node(node: dict[str, Any], as_json: bool) -> int:
    if as_json:
        emit({"node": node, "store": None})
    else:
        screen = Screen()
        screen.line(f"node {node['name']}: {plural(node['cores'], 'core')}, load {node['load']}")
        for reason in node["unfit"].split("; ") if node["unfit"] else ():
            screen.line(screen.paint(printable(reason), "bad"))
        if not node["unfit"]:
            screen.line(screen.paint("fit: memory, shared memory, disk, loopback and network cards", "good"))
        note("--store URL measures a store from here")
    return 3 if node["unfit"] else 0


def _document(node: dict[str, Any], spec: Spec, measured: Measured, advice: Sequence[Advice]) -> dict[str, Any]:
    return {
        "node": node | {"unfit": None},
        "store": {
            "url": measured.found.get("about", {}).get("url", spec.url),
            "found": measured.found,
            "hung": measured.hung,
            "left": measured.left,
            "noise": noise(measured.found),
            "advice": [msgspec.to_builtins(each) for each in advice],
        },
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def _show(
    screen: Screen, node: dict[str, Any], spec: Spec, measured: Measured, advice: Sequence[Advice], settings: Settings
) -> None:
    found = measured.found
    about = found.get("about", {})
    screen.line(screen.paint("store  ", "head") + printable(about.get("url", spec.url)))
    direct = "direct I/O" if about and not about["direct_io"] else ""
    notes = [*about.get("notes", ()), direct, "on this node only" if about.get("local") else ""]
    for line in textwrap.wrap(printable("; ".join(each for each in notes if each)), (screen.width or 120) - 7):
        screen.line(f"       {line}")
    screen.line(screen.paint("from   ", "head") + f"node {node['name']}, {plural(node['cores'], 'core')}, load"
        f" {node['load']}")  # fmt: skip
    for old in about.get("removed", ()):
        screen.line(f"       removed what an earlier measurement had left: {old}")
    _show_speeds(screen, "write", "writing, MiB/s", found)
    _show_speeds(screen, "read", f"reading, MiB/s ({found.get('read', {}).get('cold', '')})", found)
    _show_calls(screen, found)
    winners = found.get("race", {}).get("winners")
    if winners:
        once = sum(w == 1 for w in winners)
        words = f"of {found['race']['writers']} writers of one object exactly one won, {once} times of {len(winners)}"
        screen.line()
        screen.line(screen.paint(words, "good" if once == len(winners) else "bad"))
    _show_troubles(screen, measured)
    if found:
        _show_advice(screen, advice)


def _show_speeds(screen: Screen, stage: str, title: str, found: Mapping[str, Any]) -> None:
    known = speeds(found.get(stage))
    if not known:
        return
    columns = sorted({parallel for _, parallel in known})
    rows = []
    for nbytes in sorted({nbytes for nbytes, _ in known}):
        cells = [known.get((nbytes, parallel)) for parallel in columns]
        rows.append((
            size(nbytes),
            *(f"{c.median / MiB:,.0f} ({c.low / MiB:,.0f} - {c.high / MiB:,.0f})" if c else "" for c in cells),
        ))  # fmt: skip
    screen.line()
    screen.line(screen.paint(title, "head"))
    header = ("OBJECTS OF", *(f"{parallel} AT A TIME" for parallel in columns))
    screen.table(header, rows, right=header, indent="  ")


def _show_calls(screen: Screen, found: Mapping[str, Any]) -> None:
    calls = {name: times for name, times in found.get("metadata", {}).get("calls", {}).items() if times}
    if not calls:
        return
    rows = [
        (
            f"list {found['metadata']['listed']}" if name == "list" else name,
            _ms(median(times)),
            _ms(percentile(times, 0.99)),
            f"{len(times):,}",
        )
        for name, times in calls.items()
    ]
    screen.line()
    screen.line(screen.paint("small objects, ms a call", "head"))
    screen.table(("CALL", "MEDIAN", "99 %", "CALLS"), rows, right=("MEDIAN", "99 %", "CALLS"), indent="  ")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"


def _show_troubles(screen: Screen, measured: Measured) -> None:
    said = []
    if measured.hung:
        said.append(("bad", f"the store did not answer any more: {_STAGES.get(measured.hung, measured.hung)}"))
    if measured.left:
        said.append(("bad", f"not removed: {measured.left}; the next measurement tries again"))
    if noise(measured.found):
        said.append(("doubt", noise(measured.found)))
    for style, sentence in said:
        screen.line()
        for line in textwrap.wrap(printable(sentence), screen.width or 120):
            screen.line(screen.paint(line, style))


def _show_advice(screen: Screen, advice: Sequence[Advice]) -> None:
    screen.line()
    screen.line(screen.paint("what follows", "head"))
    width = (screen.width or 120) - 4
    for each in advice:
        if each.setting and each.value != "-":
            head = f"{each.setting} = {each.value}" + ("" if each.change else "  (as it is)")
        else:
            head = each.setting or "mind"
        screen.line("  " + screen.paint(head, "doubt" if each.change or not each.setting else "good"))
        for line in textwrap.wrap(each.why, width):
            screen.line(f"    {line}")
