"""Asking a process where it is: the agent's end and the process's, on a real connection."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ckptsvc.agent.aside import MAX_THREADS, aside
from ckptsvc.agent.watching.witness import Witness
from ckptsvc.client import witness as client
from ckptsvc.client.link import AgentLink
from ckptsvc.errors import AgentUnavailable, InvalidInput
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.rpc.testimony import Answer


def connected(scenario: Callable[[Witness, socket.socket], Awaitable[Any]]) -> Any:
    """Runs a scenario with the agent's end and the raw other end of a connection."""

    async def run() -> Any:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        witness = Witness(ours)
        try:
            return await scenario(witness, theirs)
        finally:
            witness.close()
            await witness.closed()
            ours.close()
            theirs.close()

    return asyncio.run(run())


def serve(sock: socket.socket, answer: Callable[[bytes], bytes]) -> threading.Thread:
    """The process's thread, on its end."""
    connection = IdentityClient.__new__(IdentityClient)
    connection._sock = sock
    thread = threading.Thread(target=connection.serve, args=(answer,))
    thread.start()
    return thread


def test_a_process_tells_its_stacks_and_ends_when_the_agent_hangs_up() -> None:
    async def scenario(witness: Witness, sock: socket.socket) -> Answer:
        thread = serve(sock, client.answer)
        testimony = await witness.ask("stacks", 20.0)
        witness.close()
        await asyncio.to_thread(thread.join, 20.0)
        assert not thread.is_alive()
        return testimony

    stacks = connected(scenario).stacks
    assert [stack.main for stack in stacks].count(True) == 1
    assert stacks[0].main
    assert stacks[0].thread == "MainThread"
    assert any(line.startswith("test_a_process_tells_its_stacks_and_ends_when_the_agent_hangs_up (")
        for line in stacks[0].frames)  # fmt: skip


def test_one_that_does_not_answer_is_not_waited_for_and_its_late_answer_is_not_taken_for_another() -> None:
    go = threading.Event()

    def late(packet: bytes) -> bytes:
        go.wait(20.0)
        return client.answer(packet)

    async def scenario(witness: Witness, sock: socket.socket) -> None:
        thread = serve(sock, late)
        with pytest.raises(TimeoutError):
            await witness.ask("collectives", 0.2)
        go.set()
        testimony = await witness.ask("stacks", 20.0)
        assert testimony.id == 2
        assert testimony.stacks
        witness.close()
        await asyncio.to_thread(thread.join)

    connected(scenario)


@pytest.mark.parametrize(
    "packet",
    [
        b"nonsense",
        b"[]",
        b'{"id": "1"}',
        b'{"id": 1, "stacks": [{"thread": 1, "main": true, "frames": []}]}',
        b'{"id": 1, "groups": [{"name": "g", "enqueued": -5, "completed": 0, "collective": ""}]}',
        b'{"id": 1, "groups": [{"name": "g", "enqueued": 9223372036854775808, "completed": 0, "collective": ""}]}',
        b'{"id": 1, "note": "' + b"x" * 5000 + b'"}',
        msgspec.json.encode({"id": 1, "stacks": [{"thread": "t", "main": True, "frames": ["f"] * 1000}]}),
        b"[" * 60_000,
    ],
)
def test_an_answer_that_is_none_is_an_error(packet: bytes) -> None:
    async def scenario(witness: Witness, sock: socket.socket) -> None:
        sock.send(packet)
        with pytest.raises((ValueError, RecursionError)):
            await witness.ask("stacks", 20.0)

    connected(scenario)


def test_one_that_has_hung_up_is_an_error_now_and_later() -> None:
    async def scenario(witness: Witness, sock: socket.socket) -> None:
        sock.close()
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await witness.ask("stacks", 20.0)

    connected(scenario)


def test_the_end_of_the_session_ends_a_question() -> None:
    async def scenario(witness: Witness, sock: socket.socket) -> None:
        asking = asyncio.ensure_future(witness.ask("stacks", 60.0))
        await asyncio.sleep(0.05)
        witness.close()
        with pytest.raises(ConnectionError):
            await asking

    connected(scenario)


def witnesses() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ckptsvc-witness"]


def registration() -> dict[str, Any]:
    return {"op": "register", "job": "job", "store": "memory://x", "attempt": 0, "rank": 0, "world_size": 1}


class TestTheConnection:
    def test_is_kept_until_the_session_ends(self, agent):
        rank = agent.register()
        client.testify(agent.identity_path, rank.token)
        (mine,) = witnesses()
        rank.close()
        mine.join(20.0)
        assert not mine.is_alive()

    def test_is_made_again_with_a_new_agent(self, start):
        first = start()
        link = AgentLink(first.directory, registration())
        link.connect()
        (old,) = witnesses()
        first.process.kill()
        first.process.wait()
        old.join(20.0)
        link.disconnect()
        start()
        link.connect()
        (new,) = witnesses()
        assert new is not old
        link.leave()
        link.disconnect()
        new.join(20.0)
        assert not new.is_alive()

    def test_of_an_unknown_session_is_refused(self, agent):
        connection = IdentityClient(agent.identity_path)
        with pytest.raises(AgentUnavailable, match="does not know the session"):
            connection.call({"op": "witness", "token": "nobody's"})
        connection.close()
        before = threading.active_count()
        client.testify(agent.identity_path, "nobody's")  # nor does it harm the training
        assert threading.active_count() == before

    def test_is_refused_to_another_process_and_to_malformed_offers(self, agent):
        rank = agent.register()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                IdentityClient(agent.identity_path).call({"op": "witness", "token": rank.token})
            except BaseException as error:
                os.write(write, repr(error).encode())
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            assert b"cannot answer for process" in pipe.read()
        os.waitpid(child, 0)
        for offer in ({"op": "witness"}, {"op": "witness", "token": 1}, {"op": "witness", "token": "", "more": 1}):
            connection = IdentityClient(agent.identity_path)
            with pytest.raises(InvalidInput, match="malformed"):
                connection.call(offer)
            connection.close()
        with pytest.raises(InvalidInput, match="'witness' is not understood here"):
            rank.identity.call({"op": "witness", "token": rank.token})
        rank.close()


class TestAside:
    def test_gives_what_the_function_gives(self):
        assert asyncio.run(aside(lambda: 7, 20.0)) == 7
        with pytest.raises(ZeroDivisionError):
            asyncio.run(aside(lambda: 1 // 0, 20.0))  # type: ignore[arg-type]

    def test_leaves_what_hangs_alone_and_only_so_many(self):
        go = threading.Event()

        async def hang() -> None:
            hanging = [asyncio.ensure_future(aside(go.wait, 60.0)) for _ in range(MAX_THREADS)]
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError, match="waiting already"):
                await aside(lambda: True, 60.0)
            for each in hanging:
                each.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

        began = time.monotonic()
        with pytest.raises(TimeoutError):
            asyncio.run(aside(go.wait, 0.05))
        asyncio.run(hang())
        assert time.monotonic() - began < 30  # the end of the loop does not wait for them
        go.set()
