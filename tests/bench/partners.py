"""How fast snapshots go between nodes and are rebuilt from parity, next to memcpy: python tests/bench/partners.py [MIB]

Every node is a courier of its own on this machine, connected over loopback; each case is run several times, best first.
"rebuilt" counts the bytes of the lost node's arena; for each of them, as many are read as nodes are left in a stripe.
The sums alone, without processes and sockets: `ckptsvc bench rebuild`. memcpy is by the processor time of one thread,
which a busy machine distorts less than the time on the wall.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from ckptsvc.agent.tiers.transfer import new_ticket
from ckptsvc.agent.worker.proxy import WorkerProxy
from ckptsvc.format.checksum import extent_digests
from ckptsvc.pipeline.arena import populate
from ckptsvc.pipeline.parity import Stripes
from ckptsvc.rpc.trust import BySecret

MIB = 1 << 20
EXTENT = MIB
SECRET = "5" * 64
RUNS = 3
STREAMS = str(max((os.cpu_count() or 1) // 2, 1))


class Node:
    """One courier, its arena with a snapshot, and room for another's."""

    def __init__(self, folder: Path, number: int, nbytes: int) -> None:
        self.number, self.nbytes = number, nbytes
        self.courier = WorkerProxy("courier", "ckptsvc.agent.tiers.courier", ("127.0.0.1", "0", STREAMS))
        self.own, self.other = (str(folder / f"{number}-{what}.arena") for what in ("own", "other"))
        self.parity = str(folder / f"{number}-parity.arena")
        for path in (self.own, self.other, self.parity):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            populate(fd, 2 * nbytes)
            os.close(fd)
        data = np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)
        with open(self.own, "r+b") as file:
            file.write(data)
        self.digests = extent_digests(data.data, EXTENT).tobytes()
        self.parity_digests, self.parity_bytes = b"", 0

    async def origin(self, *, parity: bool = False) -> dict[str, Any]:
        """A ticket for all it has."""
        ticket = new_ticket()
        key = BySecret(SECRET).key_of(ticket, "")
        files, pieces = [(self.own, self.nbytes)], [(0, self.nbytes, EXTENT, self.digests)]
        if parity:
            files.append((self.parity, self.parity_bytes))
            pieces.append((1, self.parity_bytes, EXTENT, self.parity_digests))
        admitted = await self.courier.call("admit", {"ticket": ticket, "key": key, "files": files, "shown": None})
        return {"address": f"127.0.0.1:{admitted['port']}", "ticket": ticket, "key": key, "pieces": pieces}


async def best(action: Callable[[], Awaitable[Any]]) -> float:
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        await action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def say(what: str, nbytes: int, seconds: float, memcpy: float, cpu: float = 0.0) -> None:
    rate = nbytes / seconds
    used = f"   {cpu / (nbytes / 1e9):5.2f} CPU s/GB" if cpu else ""
    print(f"{what:58} {rate / 1e9:6.2f} GB/s   {rate / memcpy:5.2f} of memcpy{used}", flush=True)


def cpu_of(nodes: list[Node]) -> float:
    """Processor seconds that the couriers have used."""
    total = 0
    for node in nodes:
        if node.courier._process is not None:
            fields = Path(f"/proc/{node.courier._process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def memcpy_rate(nbytes: int) -> float:
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        np.copyto(target, source)
        seconds.append(time.thread_time() - began)
    return nbytes / min(seconds)


async def grpc_stream(nbytes: int) -> float:
    """Seconds for the same bytes through a gRPC stream of 1 MiB messages, server and client in one process."""

    async def send(request: bytes, context: Any) -> Any:
        data = bytes(EXTENT)
        for _ in range(nbytes // EXTENT):
            yield data

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_stream_rpc_method_handler(send)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x", {"y": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)]) as c:

        async def read() -> None:
            async for _ in c.unary_stream("/x/y")(b""):
                pass

        seconds = await best(read)
    await server.stop(0)
    return seconds


async def measured(
    what: str, nodes: list[Node], nbytes: int, action: Callable[[], Awaitable[Any]], memcpy: float
) -> None:
    """Run it some times, and say how fast the best was, and what processor time one takes."""
    await action()  # processes are started, and pages mapped
    before = cpu_of(nodes)
    seconds = await best(action)
    say(what, nbytes, seconds, memcpy, (cpu_of(nodes) - before) / RUNS)


async def couriers(folder: Path, nbytes: int, memcpy: float) -> None:
    nodes = [Node(folder, number, nbytes) for number in range(4)]

    async def copy() -> None:
        origin = await nodes[0].origin()
        await nodes[1].courier.call("copy", {"origin": origin, "targets": [{"path": nodes[1].other, "number": 0}]})

    await measured("a copy, one to one", nodes, nbytes, copy, memcpy)
    for losses, lost in ((1, (3,)), (2, (3,)), (2, (2, 3))):
        stripes = (4, losses, nbytes // EXTENT)
        chunk = Stripes(*stripes).chunk * EXTENT

        async def guard(node: Node, stripes: tuple[int, int, int] = stripes, chunk: int = chunk) -> None:
            origins = [await other.origin() if other is not node else None for other in nodes]
            done = await node.courier.call("guard", {"stripes": stripes, "extent": EXTENT, "keeper": node.number,
                "origins": origins, "path": node.parity})  # fmt: skip
            node.parity_digests, node.parity_bytes = done["digests"], stripes[1] * chunk

        what = f"parity for {losses} losses, 4 nodes at once, bytes protected"
        await measured(what, nodes, 4 * nbytes, lambda guard=guard: asyncio.gather(*map(guard, nodes)), memcpy)

        async def rebuild(lost: tuple[int, ...] = lost, stripes: tuple[int, int, int] = stripes) -> None:
            origins = [None if n.number in lost else await n.origin(parity=True) for n in nodes]
            node = nodes[lost[0]]
            row = [lost[0], [(0, nbytes, EXTENT, node.digests)], [nodes[0].other]]
            await nodes[0].courier.call("rebuild", {"stripes": stripes, "extent": EXTENT, "origins": origins,
                "lost": [row]})  # fmt: skip

        await measured(f"rebuilt, {len(lost)} of 4 lost, parity for {losses}", nodes, nbytes, rebuild, memcpy)
    for node in nodes:
        await node.courier.close()


def main() -> None:
    nbytes = int(sys.argv[1] if len(sys.argv) > 1 else 256) * MIB
    memcpy = memcpy_rate(nbytes)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; arenas of {nbytes // MIB} MiB")
    say("memcpy", nbytes, nbytes / memcpy, memcpy)
    say("gRPC stream, both ends in one process", nbytes, asyncio.run(grpc_stream(nbytes)), memcpy)
    folder = Path(tempfile.mkdtemp(prefix="ck-", dir="/dev/shm"))
    try:
        asyncio.run(couriers(folder, nbytes, memcpy))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
