"""The command tree, and errors -> exit statuses.

Sub-commands are imported when they are called: `ckptsvc run` on ten thousand nodes must not open what it does not need.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from typing import Any

import click

import ckptsvc
from ckptsvc.cli.terminal import printable
from ckptsvc.errors import EXIT_STATUS, CkptsvcError

COMMANDS = {
    "run": "start the ranks of a job on this node, and restart them when one dies",
    "agent": "run the agent of this node",
    "status": "show what the agent of this node is doing",
    "checkpoint": "have a job take a checkpoint now",
    "pause": "have a job take no automatic snapshots for a while",
    "resume": "have a paused job take automatic snapshots again",
    "restart": "have a launched job start anew from its newest snapshot",
    "drain": "get everything away from a node, and take no new jobs there",
    "undrain": "take jobs on a drained node again",
    "exclude": "start no ranks on a node any more",
    "include": "start ranks on a node again",
    "nodes": "list the nodes that are excluded, or have failed",
    "audit": "show who has ordered what, and what was deleted",
    "support-bundle": "collect what is needed to find out what went wrong, without secrets",
    "incidents": "show what went wrong with jobs, and who was to blame",
    "ls": "list the checkpoints of a run",
    "inspect": "show what a checkpoint holds",
    "verify": "re-read a checkpoint and check every byte",
    "diff": "compare two checkpoints",
    "convert": "turn a checkpoint into another layout or format",
    "layout": "show how a parallel layout would divide a checkpoint, and by which rules",
    "config": "show, check and explain settings",
    "certs": "make and show the certificates of agents on several hosts",
    "pin": "keep a checkpoint from being deleted",
    "unpin": "let retention decide about a checkpoint again",
    "doctor": "check this node, and measure what a store can do",
    "plan": "compute sizes, times and the best interval of a job's checkpoints",
    "gc": "remove what interrupted work has left; show what retention keeps and why",
    "bench": "measure saving and restoring here, beside the raw limits and other systems",
    "demo": "train, kill, recover, and resume at other scales",
}


class LazyGroup(click.Group):
    """Imports a command's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckptsvc.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command where there is none of that name."""
        near = difflib.get_close_matches(args[0], COMMANDS, 1) if args[0] not in COMMANDS else []
        if near and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}': did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ckptsvc.__version__, prog_name="ckptsvc")
def cli() -> None:
    """Checkpoints and fault tolerance for large PyTorch jobs.

    Exit statuses: 0 done; 1 unexpected; 2 wrong usage or setting; 3 partly done; 4 store failed; 5 store full;
    6 store refused; 10 not found; 11 run busy or fenced; 12 damaged; 13 newer format; 14 layout does not fit;
    20 no agent; 21 no arena; 22 save failed; 23 no etcd; 24 limit reached; 85 stopped on request; 86 crash loop;
    87 node unfit; 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: no traceback for errors that were foreseen."""
    args = sys.argv[1:] if arguments is None else arguments
    try:
        # Not cli.main(): that would take a broken pipe for itself, and end with the status of an unexpected error.
        with cli.make_context("ckptsvc", list(args)) as context:
            status: Any = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:  # --help, --version
        sys.exit(end.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CkptsvcError as error:
        if "--json" in args:
            fields = {"error": {"code": error.code, "what": error.what, "hint": error.hint}}
            click.echo(json.dumps(fields))
        for head, text in (("error", error.what), ("hint", error.hint)):
            if text:  # what is in it may be somebody else's
                click.echo("\n".join(map(printable, f"{head}: {text}".split("\n"))), err=True)
        sys.exit(EXIT_STATUS[error.code])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `ckptsvc ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered
        sys.exit(141)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
