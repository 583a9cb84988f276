"""Agents and strangers at a port: who is let in, and what who is not let in gets to know. Over real gRPC."""

import asyncio
import socket
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from harness.impostor import Impostor, words

from ckptsvc.errors import AgentUnavailable, ConfigError, StoreDenied
from ckptsvc.rpc import proof
from ckptsvc.rpc.channel import error_of
from ckptsvc.rpc.proof import CHALLENGE, CHALLENGE_KEY, NONCE_KEY, PROOF_KEY, SERVICE, Gate, ask
from ckptsvc.rpc.secret import is_loopback, numeric, shared_secret
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

SECRET, OTHER = "5" * 64, "0" * 64
REQUEST = pb.ListCompleteRequest(job="the job")


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers, and counts."""

    calls = 0

    async def ListComplete(self, request, context):
        self.calls += 1
        return agent_pb2.ListSnapshotsResponse()


class Listener:
    """A port behind a gate."""

    def __init__(self, secret=SECRET):
        self.refused, self.now, self.coordinator = 0, 0.0, Coordinator()
        self.gate = Gate(secret, self._count, lambda: self.now)

    def _count(self):
        self.refused += 1

    async def start(self):
        self._server = grpc.aio.server(interceptors=[self.gate])
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(self.coordinator, self._server)
        self.address = self.gate.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self):
        await self._server.stop(0)


@asynccontextmanager
async def serving(*parts):
    for part in parts:
        await part.start()
    try:
        yield
    finally:
        for part in parts:
            await part.stop()


async def list_complete(address, secret=SECRET, dialled=""):
    """One call as an agent makes it."""
    async with grpc.aio.insecure_channel(dialled or address) as channel:
        admission = await ask(channel, address, secret, "ListComplete")
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).ListComplete(REQUEST, metadata=admission.metadata)
        await admission.check(call)
        await call
        return admission


async def raw(address, method, metadata, body=b""):
    """One call as a stranger may make it; returns what it fails with, or the first metadata."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(method)(body, metadata=metadata)
        try:
            await call
        except grpc.aio.AioRpcError as failure:
            return error_of(failure)
        return dict(await call.initial_metadata())


class TestAgents:
    def test_of_one_user_find_each_other(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                await list_complete(listener.address)
                await list_complete(listener.address)
            assert (listener.coordinator.calls, listener.refused) == (2, 0)

        asyncio.run(run())

    def test_of_two_users_do_not(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                with pytest.raises(StoreDenied, match="no agent of this user"):
                    await list_complete(listener.address, OTHER)
            assert listener.coordinator.calls == 0

        asyncio.run(run())

    def test_nobody_there(self):
        with pytest.raises(AgentUnavailable):
            asyncio.run(list_complete("127.0.0.1:1"))

    def test_somebody_who_never_answers(self, monkeypatch):
        monkeypatch.setattr(proof, "PATIENCE", 0.2)

        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(AgentUnavailable, match="does not answer as an agent does"):
                asyncio.run(list_complete(address))


class TestStrangers:
    def test_are_refused_whatever_they_call(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                for method in (f"{SERVICE}ListComplete", f"{SERVICE}Attend", f"{SERVICE}Nothing", "/x/y"):
                    assert isinstance(await raw(listener.address, method, ()), StoreDenied), method
                assert listener.refused == 4

        asyncio.run(run())

    def test_before_their_message_is_parsed(self):
        """It is none: who looked at it would say so instead. It is also larger than what is read ahead."""

        async def run():
            listener = Listener()
            async with serving(listener):
                body = b"\xff" * (3 << 20)
                assert isinstance(await raw(listener.address, f"{SERVICE}ListComplete", (), body), StoreDenied)

        asyncio.run(run())

    @pytest.mark.parametrize("nonce", ["", "0", "0" * 63, "x" * 64, "0" * 4000])
    def test_a_challenge_must_be_asked_for_with_a_nonce(self, nonce):
        async def run():
            listener = Listener()
            async with serving(listener), grpc.aio.insecure_channel(listener.address) as channel:
                call = channel.stream_stream(CHALLENGE)(metadata=((NONCE_KEY, nonce),))
                await call.done_writing()
                assert CHALLENGE_KEY not in dict(await call.trailing_metadata())
                assert await call.read() is grpc.aio.EOF

        asyncio.run(run())

    def test_a_challenge_does_not_let_anybody_in(self):
        async def run():
            listener = Listener()
            async with serving(listener), grpc.aio.insecure_channel(listener.address) as channel:
                call = channel.stream_stream(CHALLENGE)(metadata=((NONCE_KEY, "0" * 64),))
                given = dict(await call.trailing_metadata())
                for answer in ("", "0" * 64, given[PROOF_KEY]):  # the listener's own proof is for another role
                    metadata = ((CHALLENGE_KEY, given[CHALLENGE_KEY]), (PROOF_KEY, answer))
                    assert isinstance(await raw(listener.address, f"{SERVICE}ListComplete", metadata), StoreDenied)

        asyncio.run(run())

    def test_many_challenges_do_not_fill_the_memory(self, monkeypatch):
        monkeypatch.setattr(proof, "MAX_OPEN", 3)
        listener = Listener()
        for _ in range(10):
            listener.gate._challenge({NONCE_KEY: "0" * 64})
        assert len(listener.gate._open) == 3
        listener.now += proof.PATIENCE + 1
        listener.gate._challenge({NONCE_KEY: "0" * 64})
        assert len(listener.gate._open) == 1


class TestWhatIsRecorded:
    async def admitted(self, listener):
        async with grpc.aio.insecure_channel(listener.address) as channel:
            return await ask(channel, listener.address, SECRET, "ListComplete")

    def test_is_of_no_use_a_second_time(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                admission = await list_complete(listener.address)
                again = await raw(listener.address, f"{SERVICE}ListComplete", admission.metadata)
                assert isinstance(again, StoreDenied)
            assert listener.coordinator.calls == 1

        asyncio.run(run())

    def test_nor_for_another_method(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                admission = await self.admitted(listener)
                assert isinstance(await raw(listener.address, f"{SERVICE}Attend", admission.metadata), StoreDenied)

        asyncio.run(run())

    def test_nor_too_late(self):
        async def run():
            listener = Listener()
            async with serving(listener):
                admission = await self.admitted(listener)
                listener.now += proof.PATIENCE + 1
                late = await raw(listener.address, f"{SERVICE}ListComplete", admission.metadata)
                assert isinstance(late, StoreDenied)

        asyncio.run(run())

    def test_nor_of_another_listener(self):
        async def run():
            listener, next_one = Listener(), Listener()
            async with serving(listener, next_one):
                admission = await self.admitted(listener)
                elsewhere = await raw(next_one.address, f"{SERVICE}ListComplete", admission.metadata)
                assert isinstance(elsewhere, StoreDenied)

        asyncio.run(run())


class TestImpostors:
    def refused(self, impostor):
        async def run():
            async with serving(impostor):
                await list_complete(impostor.address)

        with pytest.raises(StoreDenied, match="no agent of this user"):
            asyncio.run(run())
        assert SECRET not in words(impostor)
        assert not impostor.said, "the request was sent to one who had not proved himself"

    def test_one_who_agrees_to_everything(self):
        self.refused(Impostor())

    def test_another_program_that_speaks_grpc(self):
        async def run():
            server = grpc.aio.server()
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            try:
                await list_complete(address)
            finally:
                await server.stop(0)

        with pytest.raises(StoreDenied, match="no agent of this user"):
            asyncio.run(run())

    def test_one_who_makes_up_a_proof(self):
        self.refused(Impostor(answer=((CHALLENGE_KEY, "0" * 64), (PROOF_KEY, "0" * 64))))

    def test_one_who_passes_challenges_on_to_an_agent(self):
        """The agent proves itself, but for the address at which it listens."""

        async def run():
            listener = Listener()
            await listener.start()
            impostor = Impostor(victim=listener.address)
            async with serving(impostor):
                with pytest.raises(StoreDenied, match="no agent of this user"):
                    await list_complete(impostor.address)
                assert [method for method, _ in impostor.heard] == [CHALLENGE]
            await listener.stop()
            assert listener.coordinator.calls == 0

        asyncio.run(run())

    def test_one_who_takes_the_agents_place_after_it_has_proved_itself(self):
        """As when the agent ends, and the channel connects anew: the proof must be on the call that is used."""

        async def run():
            listener = Listener()
            await listener.start()
            impostor = Impostor(victim=listener.address)
            async with serving(impostor):
                listener.gate.address = impostor.address  # it was there
                with pytest.raises(StoreDenied, match="no agent of this user"):
                    await list_complete(impostor.address)
                assert [method for method, _ in impostor.heard] == [CHALLENGE, f"{SERVICE}ListComplete"]
            await listener.stop()
            assert SECRET not in words(impostor)

        asyncio.run(run())


class TestAddresses:
    def test_one_spelling(self):
        assert numeric("localhost:70") == numeric("127.0.0.1:070") == "127.0.0.1:70"
        assert numeric("[::1]:70") == numeric("[0::1]:70") == "[::1]:70"
        assert numeric("127.77.0.3:70") == "127.77.0.3:70"

    @pytest.mark.parametrize("address", ["10.0.0.1:1", "127.example.org:1", "127.0.0.1.example.org:1", "host:1", "x"])
    def test_that_are_not_of_this_host(self, address):
        with pytest.raises(ConfigError):
            numeric(address)
        assert not is_loopback(address.rpartition(":")[0])


def test_a_file_without_a_secret_is_refused(tmp_path):
    secret = shared_secret(tmp_path)
    assert secret == shared_secret(tmp_path)
    for text in ("", "\n", secret[:10], "é" * 64):
        (tmp_path / "secret").write_text(text)
        with pytest.raises(ConfigError, match="holds no secret"):
            shared_secret(tmp_path)
