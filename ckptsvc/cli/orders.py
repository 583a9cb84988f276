"""Giving orders to agents: which of them is meant, who gives the order, what is said of it in the end."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from ckptsvc.agent.orders.audit import AuditLog, Entry
from ckptsvc.cli.agents import NONSENSE, Answer, agent_directory, ask_all, ask_users
from ckptsvc.cli.others import audit_file
from ckptsvc.cli.terminal import duration, emit, note, printable, size
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import AgentUnavailable, CkptsvcError, InvalidInput, NotFound
from ckptsvc.quantities import parse_duration
from ckptsvc.rpc.accounts import user_name
from ckptsvc.rpc.dial import GRPC_SOCKET, IDENTITY_SOCKET, safe_socket, sockets
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
            click.option("--user", metavar="NAME", expose_value=False, callback=_keep,
                help="For root: through the agent that this node's service has started for that user."),
            click.option("--all-users", is_flag=True, expose_value=False, callback=_keep,
                help="For root: through the agents of all users of this node's service."),
            click.option("--no-wait", is_flag=True, help="Do not wait until it is done."),
            click.option("--timeout", default=timeout, show_default=True, metavar="TIME", help="Wait for so long."),
            click.option("--reason", default="", metavar="TEXT", help="Why, for people; logs show it."),
        ):  # fmt: skip
            command = each(command)
        return command

    return decorate


def _keep(context: click.Context, option: click.Parameter, value: object) -> None:
    context.meta[f"ckptsvc.{option.name}"] = value


def is_for_others() -> bool:
    """Whether the command that runs was given --user or --all-users."""
    meta = click.get_current_context().meta
    return bool(meta.get("ckptsvc.user") or meta.get("ckptsvc.all_users"))


def to_job(
    method: str, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, **fields: Any
) -> int:
    """Give an order about a job; returns the exit status.

    Raises:
        CkptsvcError: it cannot be carried out.
    """
    answer, name = of_job(_agents(directory), job)
    request = VerbRequest(job=name, no_wait=no_wait, **fields)
    response = give(answer, method, request, parse_duration(timeout))
    return tell(method, request, [response], as_json)


def to_node(
    method: str, node: str | None, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool,
    **fields: Any,
) -> tuple[int, bool]:  # fmt: skip
    """Give an order about a node (None: this one) to its agents, or to those through which it can be reached.

    Returns:
        The exit status, and whether it was the node's own agents that gave it, to the coordinators of all their jobs.
    """
    agents = _agents(directory)
    answers = of_node(agents, node, job)
    own = job is None and all(node in (None, (answer.status or {})["node"]) for answer in answers)
    requests = [
        VerbRequest(job=job or "", no_wait=no_wait, node=node or (answer.status or {})["node"], **fields)
        for answer in answers
    ]
    responses = give_all(answers, method, requests, parse_duration(timeout), all_know=own)
    if job is None and is_for_others():  # what an agent that lives has not heard is not done
        silent = [answer for answer in agents if answer.status is None and not answer.ended]
        responses += [VerbResponse(left=[f"{_whose(each)} does not answer: {each.error}"]) for each in silent]
    return tell(method, requests[0], responses, as_json), own


def _agents(directory: Path | None) -> list[Answer]:
    answers = _of_others() if is_for_others() else ask_all(where := directory or agent_directory())
    if not answers:
        raise AgentUnavailable(f"no agent runs in {where}", hint="orders go through an agent: `ckptsvc status`")
    for answer in answers:
        if answer.error is not None:
            note(printable(f"{_whose(answer)} does not answer: {answer.error}"))
    if all(answer.status is None for answer in answers):
        raise AgentUnavailable("no agent that is here answers", hint="`ckptsvc status` shows them")
    return answers


def _whose(agent: Answer) -> str:
    return f"the agent of user {agent.user}" if agent.uid >= 0 else f"the agent in {agent.directory}"


def _of_others() -> list[Answer]:
    """The agents of one user of this node's service, or of all."""
    if os.geteuid() != 0:
        raise InvalidInput(
            "only root gives orders to the agents of others", hint="sudo ckptsvc ...; the audit log names you"
        )
    user = click.get_current_context().meta.get("ckptsvc.user")
    answers = [answer for answer in ask_users() if user in (None, answer.user, str(answer.uid))]
    if not answers:
        raise AgentUnavailable("no user has an agent now" if user is None else f"user {user} has no agent here")
    return answers


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
    having = [answer for answer in answers if {job, launched_as(job)} & {*(answer.status or {}).get("jobs", ())}]
    if not having:
        raise NotFound(f"no agent of this node has a job {printable(job)!r}", hint=hint)
    users = sorted({(answer.user, answer.uid) for answer in having})
    if len(users) > 1:
        who = ", ".join(printable(name) for name, _ in users[:8])
        raise InvalidInput(f"several users say that they have a job {printable(job)!r}: {who}",
            hint="--user says whose is meant")  # fmt: skip
    return having[0], job


def of_node(answers: Sequence[Answer], node: str | None, job: str | None) -> list[Answer]:
    """The agents to ask about a node: its own, or those whose jobs may have it.

    Of several users', all: each knows of his own jobs only, and what one says does not count for the others.
    """
    if job is not None:
        return [of_job(answers, job)[0]]
    answers = [answer for answer in answers if answer.status is not None]
    if any(answer.uid >= 0 for answer in answers):
        return answers
    own = [answer for answer in answers if node is None or (answer.status or {})["node"] == node]
    names = sorted({(answer.status or {})["node"] for answer in own})
    if node is None and len(names) > 1:
        raise InvalidInput("which node?", hint=f"agents here are called {', '.join(map(printable, names))}")
    return own or answers


def give_all(
    agents: Sequence[Answer], method: str, requests: Sequence[VerbRequest], timeout: float, *, all_know: bool = True
) -> list[VerbResponse]:
    """Give an order to several agents at once; what one of them cannot do is left, and keeps no other from it.

    Args:
        agents: who.
        method: the order.
        requests: what it says, for each.
        timeout: seconds for each.
        all_know: False: it is enough that one of them knows the node that is meant.

    Raises:
        CkptsvcError: there is one agent only, and it cannot be carried out; or none of them knows the node.
    """
    if len(agents) == 1:
        return [give(agents[0], method, requests[0], timeout)]
    ended: queue.SimpleQueue[tuple[Answer, VerbResponse | Exception]] = queue.SimpleQueue()

    def one(agent: Answer, request: VerbRequest) -> None:
        try:
            ended.put((agent, give(agent, method, request, timeout)))
        except Exception as error:  # noqa: BLE001  for the thread that waits
            ended.put((agent, error))

    for agent, request in zip(agents, requests, strict=True):
        # Daemons: whoever has seen enough (Ctrl-C) does not wait for the slowest.
        threading.Thread(target=one, args=(agent, request), daemon=True).start()
    responses, unknown = [], None
    for _ in agents:
        agent, response = ended.get()
        if isinstance(response, NotFound) and not all_know:
            unknown = response
            continue
        if isinstance(response, CkptsvcError):
            what = str(response) if agent.uid >= 0 else f"{_whose(agent)}: {response}"
            response = VerbResponse(left=[what])
        if isinstance(response, Exception):
            raise response
        responses.append(response)
    if unknown is not None and not responses:
        raise unknown
    return responses


def give(agent: Answer, method: str, request: VerbRequest, timeout: float) -> VerbResponse:
    """Give an order to one agent, as who runs this program.

    Raises:
        CkptsvcError: it cannot be carried out, or the agent does not answer. What another user's agent says is no more
            than text, and it is said whose it is.
    """
    _take_down(agent, method, request, "begun", request.reason)
    try:
        response = _give(agent, method, request, timeout)
    except CkptsvcError as error:
        _take_down(agent, method, request, "failed", error.what)
        if agent.uid >= 0:
            error.what = printable(f"{_whose(agent)}: {error.what}")
            error.hint = printable(error.hint)
        raise
    except NONSENSE as error:
        if agent.uid < 0:
            raise
        raise AgentUnavailable(printable(f"{_whose(agent)} answers with nonsense: {error}")) from None
    if not math.isfinite(response.seconds):
        response.seconds = 0.0
    if response.done:
        _take_down(agent, method, request, "done", "; ".join(response.what))
    return response


def _take_down(agent: Answer, method: str, request: VerbRequest, outcome: str, what: str) -> None:
    """Put into root's own file what becomes of an order to a user's agent; a failure is said, and stops nothing."""
    path = audit_file()
    if path is None or 0 in (agent.uid, os.stat(agent.directory).st_uid):
        return
    person = msgspec.json.decode(_behind(os.environ) or '{"uid": 0, "name": ""}')
    entry = Entry(
        verb=method.lower(), job=request.job, target=request.node, uid=person["uid"], by=person["name"] or user_name(0),
        via=user_name(0) if person["uid"] else "", of=agent.user or agent.directory.owner(), node=socket.gethostname(),
        outcome=outcome, what=what,
    )  # fmt: skip
    try:
        AuditLog(path).append(entry)
    except (OSError, CkptsvcError) as error:
        note(printable(f"this is not in the audit log of root: {error}"))


def _give(agent: Answer, method: str, request: VerbRequest, timeout: float) -> VerbResponse:
    import grpc

    from ckptsvc.rpc.channel import FOR_KEY, LOCAL, OPTIONS, TOKEN_KEY, error_of
    from ckptsvc.rpc.identity import IdentityClient
    from ckptsvc.rpc.v1 import agent_pb2_grpc

    with contextlib.ExitStack() as stack:
        grpc_path, identity_path = sockets(agent.directory)
        if agent.uid >= 0:  # what that user has put there is not trusted
            grpc_path = stack.enter_context(safe_socket(agent.directory, GRPC_SOCKET, agent.uid))
            identity_path = stack.enter_context(safe_socket(agent.directory, IDENTITY_SOCKET, agent.uid))
        identity = stack.enter_context(contextlib.closing(IdentityClient(identity_path, of_anybody=True)))
        metadata = [(TOKEN_KEY, identity.call({"op": "caller"})[0]["token"])]
        if os.geteuid() == 0 and (person := _behind(os.environ)):
            metadata.append((FOR_KEY, person))
        bounds = LOCAL if agent.uid >= 0 else OPTIONS
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{grpc_path}", options=bounds))
        try:
            call = getattr(agent_pb2_grpc.AgentServiceStub(channel), method)
            response: VerbResponse = call(request, timeout=timeout + LATEST, metadata=metadata)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return response


def _behind(environ: Mapping[str, str]) -> str:
    """Who has become root by sudo(8) to give this order, for the audit log; "" if nobody has."""
    uid = environ.get("SUDO_UID", "")
    if not uid.isdecimal() or uid == "0":
        return ""
    return msgspec.json.encode({"uid": int(uid), "name": user_name(int(uid))}).decode()


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
