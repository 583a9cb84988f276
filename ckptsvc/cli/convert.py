"""`ckptsvc convert`: a checkpoint into another layout, another format, or a part of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import click

from ckptsvc.cli import convert_work
from ckptsvc.cli.convert_text import Result, show, show_plan
from ckptsvc.cli.layout import Variable
from ckptsvc.cli.terminal import note, plural, progress
from ckptsvc.errors import ConfigError, InvalidInput, SaveFailed
from ckptsvc.interop.conversion.convert import Conversion
from ckptsvc.interop.conversion.estimate import estimate
from ckptsvc.interop.conversion.memory import checked_memory
from ckptsvc.interop.conversion.request import Request, open_sources
from ckptsvc.interop.naming.shapes import declared
from ckptsvc.launch import detect
from ckptsvc.quantities import parse_size


class Size(click.ParamType[int]):
    """Bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """From text, such as 4GiB or 10GB/s."""
        try:
            return parse_size(value.removesuffix("/s") if isinstance(value, str) else value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Setting(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """From text."""
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, text


class Share(click.ParamType[tuple[int, int]]):
    """I/N: which of how many workers."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """From text."""
        number, _, of = str(value).partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            self.fail(f"{value!r} is not I/N", param, ctx)
        return int(number), int(of)


@click.command()
@click.argument("places", nargs=-1, required=True, metavar="SRC... DST")
@click.option(
    "--to", default="", metavar="LAYOUT", help='For so many ranks, as "dp=4,tp=2,pp=4,zero=1"; see `ckptsvc layout`.'
)
@click.option(
    "--names", default="", metavar="SIDE", help="Give the tensors another framework's names: hf, megatron, ..."
)
@click.option("--family", "named", default="", metavar="NAME|FILE",
    help="Of the model, for --to and --names, as llama. Default: the one that fits the names.")  # fmt: skip
@click.option("--variable", "variables", type=Variable(), multiple=True, metavar="NAME=NUMBER",
    help="A size that the family's rules speak of, where the checkpoint does not say it. Repeatable.")  # fmt: skip
@click.option("--dtype", default="", metavar="TYPE", help="Cast the weights: bfloat16, float16, float32, float64.")
@click.option("--only", multiple=True, metavar="PATTERN",
    help="Only tensors whose name, or parameter's name, fits, as 'model.*'. Repeatable.")  # fmt: skip
@click.option("--drop-optimizer", is_flag=True, help="Leave the optimizer out.")
@click.option("--rename", multiple=True, metavar="REGEX=REPL", help="Rename parameters, as '^module\\.='. Repeatable.")
@click.option("--average", metavar="last:N|all", help="The mean of the weights of the run's last N, or of all SRC.")
@click.option("--option", "options", type=Setting(), multiple=True, help="Of the target's format. Repeatable.")
@click.option(
    "--from-option", "from_options", type=Setting(), multiple=True, help="Of the source's format. Repeatable."
)
@click.option("--memory", type=Size(), help="Of all processes on this node. Default: a quarter of what is free.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes on this node.")
@click.option("--alone", is_flag=True, help="Do all of it here, whatever a scheduler says about other processes.")
@click.option("--restart", is_flag=True, help="Throw away what an unfinished conversion into DST has done.")
@click.option("--dry-run", is_flag=True, help="Only say what it would cost.")
@click.option("--shape", metavar="NAME", help="With --dry-run, instead of SRC: a known model, as llama3-405b.")
@click.option("--read-bandwidth", type=Size(), metavar="SIZE/s", help="With --dry-run, to say how long it takes.")
@click.option("--write-bandwidth", type=Size(), metavar="SIZE/s", help="The same, for writing.")
@click.option("--share", type=Share(), hidden=True, help="Be worker I of N and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    places: tuple[str, ...], to: str, names: str, named: str, variables: tuple[tuple[str, int], ...],
    dtype: str, only: tuple[str, ...], drop_optimizer: bool, rename: tuple[str, ...],
    average: str | None, options: Sequence[tuple[str, str]], from_options: Sequence[tuple[str, str]],
    memory: int | None, workers: int, alone: bool, restart: bool, dry_run: bool, shape: str | None,
    read_bandwidth: int | None, write_bandwidth: int | None, share: tuple[int, int] | None, as_json: bool,
) -> int:  # fmt: skip
    """Convert a checkpoint: to other shards, another format, a part of it, another precision.

    SRC and DST are FORMAT:PLACE, as "hf:/models/llama"; a PLACE alone is recognised (SRC) or a run of ckptsvc (DST).
    The same command again goes on where an interrupted one stopped. Started by srun or mpiexec, each process does its
    share. Exit status 0 also means: this process has done its share, and others still work.

    \b
    JSON: {"source", "target", "format", "checkpoint", "step", "files", "bytes",
      "bytes_read", "resumed", "seconds", "complete", "notes": [{"kind", "what"}]}
      bytes: of the files of tensors; resumed: bytes that were there before
    with --dry-run: {"source", "target", "format", "files", "bytes_needed",
      "bytes_read", "bytes_written", "amplification", "memory", "seconds",
      "notes"}; seconds is null without a bandwidth
    """  # noqa: D301  \b is click's
    if shape is not None and not dry_run:
        raise InvalidInput("--shape has no data: it goes with --dry-run")
    *sources, target = places
    if bool(shape) == bool(sources):
        raise InvalidInput("SRC and DST are needed, or --shape and DST")
    request = Request(
        sources=tuple(sources) or (f"shape:{shape}",), target=target, from_options=dict(from_options),
        options=dict(options), only=only, drop_optimizer=drop_optimizer, rename=rename, dtype=dtype,
        average=_average(average, sources), to=to, names=names, family=named, variables=dict(variables),
    )  # fmt: skip
    if share:
        return convert_work.be_worker(request, memory or 0, *share)
    began = time.monotonic()
    rank, world, beside = (0, 1, 1) if alone or dry_run else _processes(restart)
    each = checked_memory(memory, workers * beside)
    opened = open_sources(request, [declared(shape)] if shape else ())
    try:
        conversion = convert_work.planned(request, opened, each, dry=dry_run, restart=restart, part=(rank, world))
    except BaseException:
        opened.logical.close()
        raise
    try:
        if dry_run:
            cost = estimate(conversion.logical, conversion.tasks, conversion.budget)
            show_plan(conversion, cost, cost.seconds(read_bandwidth, write_bandwidth), as_json)
            return 0
        resumed = sum(task.nbytes for task in conversion.tasks if task.number in conversion.finished)
        _work(conversion, request, workers, rank, world)
        complete = _finish(conversion, world)
        result = Result(complete, resumed, time.monotonic() - began)
        show(conversion, result, as_json)
    finally:
        conversion.close()
    return 0


def _processes(restart: bool) -> tuple[int, int, int]:
    """Which process this is, of how many, and how many of them are on this node."""
    here = detect(os.environ, platform.node().partition(".")[0])
    if restart and here.world_size > 1:  # each would throw away what the others have begun
        raise InvalidInput(
            "--restart is for one process, and this is one of several", hint="run it once with --alone --restart"
        )
    return here.rank, here.world_size, here.local_size


def _finish(conversion: Conversion, world: int) -> bool:
    """Whether the target is complete; a share of it may be all there is to do here."""
    complete = conversion.finish(alone=world == 1)
    if not complete and world == 1:
        raise SaveFailed("files that were finished are gone again", hint="the same command again makes them again")
    return complete


def _work(conversion: Conversion, request: Request, workers: int, rank: int, world: int) -> None:
    shares = range(rank * workers, (rank + 1) * workers)
    of = world * workers
    left = sum(task.nbytes for number in shares for task in conversion.left(number, of))
    if conversion.complete or not left:
        return
    label = "converting" if world == 1 else f"converting, process {rank} of {world}"
    with progress(label, left) as advance:
        if workers == 1:
            conversion.run(advance, rank, of)
        else:
            convert_work.run_workers(conversion, request, shares, of, advance)
    if world > 1:
        note(f"process {rank} of {world}: {plural(len(shares), 'share')} done")


def _average(text: str | None, sources: Sequence[str]) -> int:
    if text is None:
        if len(sources) > 1:
            raise InvalidInput("several SRC can only be averaged", hint="say --average all")
        return 0
    kind, _, count = text.partition(":")
    if kind == "last" and count.isdecimal() and int(count) > 0 and len(sources) == 1:
        return int(count)
    if text == "all" and sources:
        return len(sources)
    raise InvalidInput(f"--average {text!r} is neither last:N with one SRC nor all")
