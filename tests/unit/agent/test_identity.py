"""The identity socket: who may come in, and what a message can do."""

import contextlib
import json
import os
import random
import socket
import stat

import pytest

from ckptsvc.errors import AgentUnavailable, CkptsvcError, InvalidInput, StoreDenied
from ckptsvc.rpc.identity import MAX_PACKET, PAGE_BYTES, IdentityClient
from ckptsvc.rpc.v1 import agent_pb2


def registration(**changes):
    fields = {"op": "register", "job": "job", "attempt": 0, "rank": 0, "world_size": 1, "store": "memory://identity"}
    return {**fields, **changes}


def send_raw(path, data):
    """The agent's answer to one packet; b"" if it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.send(data)
        return sock.recv(MAX_PACKET)


def sessions(agent):
    return json.loads(agent.call("GetStatus", agent_pb2.GetStatusRequest()).json)["ranks"]


IMPOSSIBLE = [
    ({"rank": 1}, "rank 1 of 1 is impossible"),
    ({"rank": -1}, "rank -1 of 1 is impossible"),
    ({"world_size": 0}, "rank 0 of 0"),
    ({"world_size": 1 << 40}, "rank 0 of 1099511627776"),
    ({"job": ""}, "a job needs a name"),
    ({"store": "runs/7"}, "is no URL"),
    ({"job": "j" * 257}, "at most 256"),
    ({"store": ""}, "a store"),
    ({"store": "s" * 4097}, "4096"),
    ({"attempt": -1}, "out of range"),
    ({"attempt": 1 << 40}, "out of range"),
    ({"epoch": 1 << 70}, "malformed|out of range"),
    ({"keep": 1 << 31}, "out of range"),
    ({"every_steps": -5}, "out of range"),
    ({"every_seconds": -0.5}, "out of range"),
    ({"extent": 100}, "an extent of 100 bytes"),
    ({"extent": 1 << 30}, "impossible"),
    ({"extent": 5000}, "impossible"),
    ({"coordinator": "c" * 301}, "at most 300"),
    ({"domain": "d" * 257}, "at most 256"),
    ({"rank": "0"}, "malformed message: Expected `int`"),
    ({"colour": "red"}, "unknown field `colour`"),
]


class TestRegistering:
    def test_gives_a_token_the_node_and_the_heartbeat_page(self, agent):
        identity = IdentityClient(agent.identity_path)
        answer, fd = identity.call(registration())
        assert len(answer["token"]) == 32
        assert answer["node"] == socket.gethostname()
        assert os.fstat(fd).st_size == PAGE_BYTES
        os.close(fd)
        (rank,) = sessions(agent)
        assert (rank["job"], rank["rank"], rank["pid"]) == ("job", 0, os.getpid())
        identity.close()

    def test_twice_on_one_connection_is_refused(self, agent):
        rank = agent.register()
        with pytest.raises(InvalidInput, match="'register' is not understood here"):
            rank.identity.call(registration())
        rank.close()

    def test_again_from_the_same_process_replaces_the_session(self, agent):
        first = agent.register()
        second = agent.register()
        assert first.token != second.token
        assert len(sessions(agent)) == 1
        first.close()
        second.call("Abandon", agent_pb2.AbandonRequest(step=1))
        with pytest.raises(AgentUnavailable, match="does not know the session"):
            first.call("Abandon", agent_pb2.AbandonRequest(step=1))
        second.close()

    def test_a_rank_may_give_orders_and_keeps_its_session(self, agent):
        rank = agent.register()
        (slot, *_) = rank.call("Provide", agent_pb2.ProvideRequest(bytes=4096)).slots
        answer, _ = rank.identity.call({"op": "caller"})
        assert answer["token"] != rank.token
        _, fd = rank.identity.call({"op": "map", "slot": slot})
        os.close(fd)
        rank.call("Leave", agent_pb2.LeaveRequest())
        rank.close()

    def test_of_what_cannot_be_is_refused_and_leaves_nothing(self, agent):
        for changes, message in IMPOSSIBLE:
            with pytest.raises(InvalidInput, match=message):
                agent.register(**changes)
        assert sessions(agent) == []
        agent.register().close()

    def test_the_end_of_the_connection_ends_the_session_of_a_process_that_has_left(self, agent):
        rank = agent.register()
        rank.call("Leave", agent_pb2.LeaveRequest())
        assert sessions(agent) == []
        with pytest.raises(AgentUnavailable):
            rank.call("Leave", agent_pb2.LeaveRequest())
        rank.close()


class TestMapping:
    def test_needs_a_registration(self, agent):
        identity = IdentityClient(agent.identity_path)
        with pytest.raises(InvalidInput, match="'map' is not understood here"):
            identity.call({"op": "map", "slot": "x"})
        identity.close()

    def test_of_an_arena_that_is_not_there_is_refused(self, agent):
        rank = agent.register()
        for slot in ("", "nobody", "../../etc/passwd", "x" * 60000):
            with pytest.raises(InvalidInput, match="there is no arena"):
                rank.identity.call({"op": "map", "slot": slot})
        rank.close()

    def test_of_an_arena_of_another_job_is_refused(self, agent):
        one, other = agent.register(job="one"), agent.register(job="other")
        (slot, *_) = one.call("Provide", agent_pb2.ProvideRequest(bytes=4096)).slots
        with pytest.raises(InvalidInput, match="of job other"):
            other.identity.call({"op": "map", "slot": slot})
        for rank in (one, other):
            rank.close()

    def test_a_neighbour_may_read_and_not_write(self, agent):
        mine, neighbour = agent.register(rank=0, world_size=2), agent.register(rank=1, world_size=2)
        (slot, *_) = mine.call("Provide", agent_pb2.ProvideRequest(bytes=4096)).slots
        for rank, writable in ((mine, True), (neighbour, False)):
            answer, fd = rank.identity.call({"op": "map", "slot": slot})
            assert answer["capacity"] >= 4096
            assert bool(os.get_blocking(fd))
            if writable:
                assert os.pwrite(fd, b"x", 0) == 1
            else:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.pwrite(fd, b"x", 0)
            os.close(fd)
            rank.close()


class TestPrivacy:
    def test_the_sockets_are_for_their_user_only(self, agent):
        assert stat.S_IMODE(os.stat(agent.directory).st_mode) == 0o700
        for name in ("agent.sock", "identity.sock"):
            assert stat.S_IMODE(os.stat(agent.directory / name).st_mode) == 0o600

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_another_user_is_refused_even_where_the_files_let_him_in(self, agent):
        for path in (agent.directory.parent.parent, agent.directory.parent, agent.directory):
            path.chmod(0o777)
        os.chmod(agent.identity_path, 0o777)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                answer = send_raw(agent.identity_path, json.dumps(registration()).encode())
            except BaseException as error:
                answer = repr(error).encode()
            os.write(write, answer)
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            answer = json.loads(pipe.read())
        os.waitpid(child, 0)
        assert answer["ok"] is False
        assert (answer["code"], answer["what"]) == (StoreDenied.code, "this agent serves user 0, not user 65534")
        assert sessions(agent) == []


class TestMalformedPackets:
    def test_random_ones_never_end_the_agent(self, agent):
        rng = random.Random(1)
        good = json.dumps(registration()).encode()
        packets = [
            b"\0",
            b"{",
            b"null",
            b"[]",
            b'"register"',
            b"1e999",
            b"{}",
            b'{"op": null}',
            b'{"op": {"op": "register"}}',
            b'{"op": ["register"]}',
            b"[" * 60_000,
            b'{"op": "map", "slot": ' + b"[" * 50_000,
            b'{"op": "register", "job": "\\ud800"}',
            b"\xff\xfe" * 100,
            good + b"x",
            good * 2,
            b" " * MAX_PACKET,
            json.dumps(registration(job="j" * 60_000)).encode(),
            json.dumps(registration(every_seconds=1e308)).encode()[:-1] + b', "rank": 1e400}',
        ]
        for _ in range(200):
            packet = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(packet))
                how = rng.randrange(3)
                if how == 0:
                    packet[at] = rng.randrange(256)
                elif how == 1:
                    del packet[at : at + rng.randint(1, 20)]
                else:
                    packet[at:at] = rng.choice([b'"', b"\\", b"{", b"}", b"-", b"9" * 25, b"\0", b"1e400", b"null"])
                packet = packet or bytearray(b"x")
            packets.append(bytes(packet))
        packets += [rng.randbytes(rng.choice([1, 10, 1000, 60_000])) for _ in range(50)]
        for packet in packets:
            answer = send_raw(agent.identity_path, packet)
            assert answer, f"no answer to {packet[:100]!r}"
            parsed = json.loads(answer)
            assert parsed["ok"] or parsed["code"] == "invalid-input", (parsed, packet[:200])
        assert agent.alive
        agent.register(job="another").close()

    def test_a_packet_that_is_too_long_is_refused(self, agent):
        answer = json.loads(send_raw(agent.identity_path, b'{"op": "' + b"x" * MAX_PACKET + b'"}'))
        assert (answer["ok"], answer["code"]) == (False, "invalid-input")

    def test_peers_that_hang_up_or_never_speak_do_no_harm(self, agent):
        socks = []
        for i in range(50):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(agent.identity_path)
            if i % 2:
                sock.send(b"{}")
            socks.append(sock)
        agent.register().close()
        for sock in socks:
            sock.close()
        agent.register().close()

    def test_a_peer_that_never_reads_its_answers_is_dropped(self, agent):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(5)
            sock.connect(agent.identity_path)
            with contextlib.suppress(ConnectionError):
                for _ in range(100_000):
                    sock.send(b"{}" + b" " * 1000)
                raise AssertionError("it was listened to for ever")
        agent.register().close()


class TestClient:
    def test_nobody_there(self, tmp_path):
        with pytest.raises(AgentUnavailable, match="no agent answers"):
            IdentityClient(str(tmp_path / "nobody"))

    def test_the_agent_goes_away(self, agent):
        rank = agent.register()
        agent.process.kill()
        agent.process.wait()
        with pytest.raises(AgentUnavailable):
            rank.identity.call({"op": "map", "slot": "x"})
        rank.close()

    def test_a_refusal_of_a_newer_agent_is_an_error_of_the_base_class(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client = IdentityClient.__new__(IdentityClient)
        client._sock = ours
        theirs.send(b'{"ok": false, "code": "brand-new", "what": "w"}')
        with pytest.raises(CkptsvcError, match="w"):
            client.call({})
        ours.close()
        theirs.close()
