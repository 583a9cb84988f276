"""Giving orders to agents: which of them is meant, who gives the order, what is said of it in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ckptsvc.cli.agents import Answer, agent_directory, ask_all
from ckptsvc.cli.terminal import duration, emit, note, printable, size
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import AgentUnavailable, InvalidInput, NotFound
from ckptsvc.quantities import parse_duration
from ckptsvc.rpc.v1.agent_pb2 import VerbRequest, VerbResponse

PARTLY_DONE = 3
"""Exit status of an order that is not carried out yet, or not everywhere."""

LATEST = 2.0
"""Seconds beyond its deadline in which an agent says how far it has come."""


def options(timeout: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options that all orders have; `timeout` is how long this one is waited for."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in (
            click.option("--json", "as_json", is_flag=True, help="One JSON document."),
            click.option("--dir", "directory", type=click.Path(path_type=Path),
                help="Directory of the sockets; default: as for `ckptsvc agent`."),
            click.option("--no-wait", is_flag=True, help="Do not wait until it is done."),
            click.option("--timeout", default=timeout, show_default=True, metavar="TIME", help="Wait for so long."),
            click.option("--reason", default="", metavar="TEXT", help="Why, for people; logs show it."),
        ):  # fmt: skip
            command = each(command)
        return command

    return decorate


def to_job(
    method: str, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, **fields: Any
) -> int:
    """Give an order about a job; returns the exit status.

    Raises:
        CkptsvcError: it cannot be carried out.
    """
    answer, name = of_job(_agents(directory), job)
    request = VerbRequest(job=name, no_wait=no_wait, **fields)
    response = give(answer.directory, method, request, parse_duration(timeout))
    return tell(method, request, [response], as_json)


def to_node(
    method: str, node: str | None, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool,
    **fields: Any,
) -> int:  # fmt: skip
    """Give an order about a node (None: this one) to its agents, or to those through which it can be reached."""
    answers = of_node(_agents(directory), node, job)
    request = VerbRequest(job=job or "", no_wait=no_wait, **fields)
    responses = []
    for answer in answers:
        request.node = node or (answer.status or {})["node"]
        responses.append(give(answer.directory, method, request, parse_duration(timeout)))
    return tell(method, request, responses, as_json)


def _agents(directory: Path | None) -> list[Answer]:
    where = directory or agent_directory()
    answers = ask_all(where)
    if not answers:
        raise AgentUnavailable(f"no agent runs in {where}", hint="orders go through an agent: `ckptsvc status`")
    for answer in answers:
        if answer.error is not None:
            note(printable(f"the agent in {answer.directory} does not answer: {answer.error}"))
    return [answer for answer in answers if answer.status is not None]


def of_job(answers: Sequence[Answer], job: str | None) -> tuple[Answer, str]:
    """The agent to ask about a job, and its name: the only one there is, if none is given.

    Raises:
        NotFound: no agent has it.
        InvalidInput: several could be meant.
    """
    known = {name for answer in answers for name in (answer.status or {}).get("jobs", ())}
    hint = f"there are: {', '.join(printable(name) for name in sorted(known)[:8])}" if known else ""
    if job is None:
        if len(known) > 1:
            raise InvalidInput("which job?", hint=hint)
        if not known:
            raise NotFound("no agent of this node has a job")
        (job,) = known
    for answer in answers:
        names = (answer.status or {}).get("jobs", ())
        if launched_as(job) in names or job in names:
            return answer, job
    raise NotFound(f"no agent of this node has a job {printable(job)!r}", hint=hint)


def of_node(answers: Sequence[Answer], node: str | None, job: str | None) -> list[Answer]:
    """The agents to ask about a node: its own, or those whose jobs may have it."""
    if job is not None:
        return [of_job(answers, job)[0]]
    own = [answer for answer in answers if node is None or (answer.status or {})["node"] == node]
    names = sorted({(answer.status or {})["node"] for answer in own})
    if node is None and len(names) > 1:
        raise InvalidInput("which node?", hint=f"agents here are called {', '.join(map(printable, names))}")
    return own or list(answers)


def give(directory: Path, method: str, request: VerbRequest, timeout: float) -> VerbResponse:
    """Give an order to one agent, as who runs this program.

    Raises:
        CkptsvcError: it cannot be carried out, or the agent does not answer.
    """
    import grpc

    from ckptsvc.rpc.channel import OPTIONS, TOKEN_KEY, error_of
    from ckptsvc.rpc.dial import sockets
    from ckptsvc.rpc.identity import IdentityClient
    from ckptsvc.rpc.v1 import agent_pb2_grpc

    grpc_path, identity_path = sockets(directory)
    identity = IdentityClient(identity_path, of_anybody=True)
    try:
        token = identity.call({"op": "caller"})[0]["token"]
        with grpc.insecure_channel(f"unix:{grpc_path}", options=OPTIONS) as channel:
            call = getattr(agent_pb2_grpc.AgentServiceStub(channel), method)
            response: VerbResponse = call(request, timeout=timeout + LATEST, metadata=((TOKEN_KEY, token),))
            return response
    except grpc.RpcError as failure:
        raise error_of(failure) from None
    finally:
        identity.close()


def tell(method: str, request: VerbRequest, responses: Sequence[VerbResponse], as_json: bool) -> int:
    """Say what has come of an order; returns the exit status."""
    what = list(dict.fromkeys(line for response in responses for line in response.what))
    left = list(dict.fromkeys(line for response in responses for line in response.left))
    newest = max(responses, key=lambda response: response.step)
    if as_json:
        emit(
            {"verb": method.lower(), "job": request.job, "node": request.node,
                "done": all(response.done for response in responses), "what": what, "left": left,
                "step": newest.step or None, "bytes": newest.bytes, "seconds": newest.seconds}
        )  # fmt: skip
        return PARTLY_DONE if left else 0
    for line in what:
        note(printable(line))
    if newest.bytes:
        note(f"{size(newest.bytes)} in {duration(newest.seconds)}")
    for line in left:
        note(printable(f"not done: {line}"))
    return PARTLY_DONE if left else 0
