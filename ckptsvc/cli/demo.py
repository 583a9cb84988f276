"""`ckptsvc demo`: train, kill, recover, resume at other scales, and check every claim against a control.

    control    4 ranks FSDP2, never interrupted, without ckptsvc
    run        the same training on two "nodes" (two agents on loopback); a rank is killed with SIGKILL
    branches   a checkpoint of the run goes on with 3 ranks, and with 2 x 2 ranks FSDP2 x tensor parallel

Everything is done through the commands and the two calls that a user has. The checks compare what the training
program logged: they need not trust what the service says about itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

import ckptsvc
from ckptsvc.cli.demonstration.facts import Facts
from ckptsvc.cli.demonstration.flow import EVERY, STEPS, Demo
from ckptsvc.cli.demonstration.report import report, size, verdict
from ckptsvc.cli.demonstration.story import Story
from ckptsvc.errors import ConfigError, InvalidInput


@click.command()
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Leave the stores, the logs and the report in this new or empty directory.")  # fmt: skip
@click.option("--report", "page", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The report. [default: ckptsvc-demo.html, or DIR/report.html]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, and no story.")
def command(keep: Path | None, page: Path | None, as_json: bool) -> int:
    """Train a small GPT, kill a rank, recover, resume at other scales; about two minutes on two cores.

    Exit status 0 means that every check passed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the demo trains with PyTorch, which is not installed", hint="pip install ckptsvc[torch]")
    signal.signal(signal.SIGTERM, _terminated)
    page = (page or (keep / "report.html" if keep else Path("ckptsvc-demo.html"))).absolute()
    story = Story(quiet=as_json)
    facts = _play(keep, story)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report(facts), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(_as_json(facts, page), indent=2))
    else:
        story.tables(facts)
        story.say(f"{verdict(facts)}. Report: {page}")
    return 0 if facts.passed else 1


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends the demo as Ctrl-C does: children and temporary files go first."""
    sys.exit(128 + number)


def _play(keep: Path | None, story: Story) -> Facts:
    """Runs the demo in `keep`, or in a temporary directory, which is left only where something went wrong."""
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise InvalidInput(f"{keep} is not empty", hint="name a new directory")
        keep.mkdir(parents=True, exist_ok=True)
        return Demo(keep.absolute(), story, machine_facts()).run()
    directory, wrong = Path(tempfile.mkdtemp(prefix="ckptsvc-demo-")), True
    try:
        facts = Demo(directory, story, machine_facts()).run()
        wrong = not facts.passed
    except (KeyboardInterrupt, SystemExit):
        wrong = False
        raise
    finally:
        if wrong:
            click.echo(f"logs and stores are left in {directory}", err=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return facts


def machine_facts() -> dict[str, str]:
    """What the numbers were measured on, for people."""
    model = _first_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown processor"
    memory = _first_field("/proc/meminfo", "MemTotal")
    amount = f", {size(int(memory.split()[0]) * 1024)} memory" if memory else ""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "grpcio")]
    load = os.getloadavg()[0]
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores ({model}){amount}, load {load:.1f} at the start",
        "software": f"ckptsvc {ckptsvc.__version__}, {', '.join(versions)}, Python {platform.python_version()}",
        "training": f"byte-level GPT with 3.3 million parameters on the sources of Python's standard library; "
        f"{STEPS} steps, a checkpoint every {EVERY}, AdamW, Gloo on CPU, one thread a rank",
    }


def _first_field(path: str, name: str) -> str:
    """The value of the first line `name: value` of a file, "" where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _as_json(facts: Facts, page: Path) -> dict[str, Any]:
    """The facts for programs: without the digests and the single steps of the runs."""
    runs = [{"label": r.label, "layout": r.layout, "losses": r.losses} for r in facts.runs]
    values = {name: [asdict(v) for v in getattr(facts, name)] for name in ("incidents", "saves", "checks")}
    about = {
        "passed": facts.passed,
        "verdict": verdict(facts),
        "report": str(page),
        "machine": dict(facts.machine),
    }
    return {**about, **values, "runs": runs, "phases": dict(facts.phases)}
