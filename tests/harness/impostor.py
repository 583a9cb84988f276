"""Somebody at an agent's port without the secret: he keeps all he hears, and answers as he likes."""

import grpc
import grpc.aio

from ckptsvc.rpc.proof import CHALLENGE
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

ORDER = pb.Order(job="job", kill=pb.Kill(attempt=1, rank=0, reason="the impostor says so"))


class Impostor(grpc.GenericRpcHandler):
    """Listens on loopback.

    Args:
        victim: address of an agent that he asks for the answers to challenges; "": he makes them up.
        answer: metadata of the answers that are made up.

    Attributes:
        heard: methods and metadata of the calls, in order.
        said: bodies.
        address: where he listens.
    """

    def __init__(self, victim="", answer=()):
        self.victim, self.answer = victim, answer
        self.heard, self.said, self.address = [], [], ""

    async def start(self):
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self):
        await self._server.stop(0)

    def service(self, details):
        metadata = tuple(details.invocation_metadata)
        self.heard.append((details.method, metadata))

        async def challenge(requests, context):
            context.set_trailing_metadata(await self._passed_on(metadata) if self.victim else self.answer)

        async def serve(requests, context):
            await context.send_initial_metadata(self.answer)
            await context.write(ORDER.SerializeToString())
            async for request in requests:
                self.said.append(request)

        return grpc.stream_stream_rpc_method_handler(challenge if details.method == CHALLENGE else serve)

    async def _passed_on(self, metadata):
        async with grpc.aio.insecure_channel(self.victim) as channel:
            call = channel.stream_stream(CHALLENGE)((), metadata=_ours(metadata))
            return _ours(await call.trailing_metadata())


def _ours(metadata):
    return tuple((key, value) for key, value in metadata if key.startswith("ckptsvc-"))


def words(impostor):
    """All that he has heard and been told, as one text."""
    return repr(impostor.heard) + repr(impostor.said)
