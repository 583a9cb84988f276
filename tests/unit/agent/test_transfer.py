"""Between two couriers: what a ticket is good for, and what nobody gets who has none."""

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time

import pytest
import xxhash

from ckptsvc.agent.tiers import transfer
from ckptsvc.agent.tiers.transfer import (
    REQUEST,
    File,
    Listener,
    Pace,
    Piece,
    Reader,
    Tickets,
    check,
    new_ticket,
    runs,
)
from ckptsvc.errors import AgentUnavailable, Damaged, SaveFailed
from ckptsvc.rpc import certificates
from ckptsvc.rpc.certificates import issue, make_authority
from ckptsvc.rpc.tls import Shown
from ckptsvc.rpc.trust import BySecret

SECRET = "5" * 64


def derive(secret, ticket):
    return BySecret(secret).key_of(ticket, "")


DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(scope="module")
def tickets():
    return Tickets()


@pytest.fixture(scope="module")
def address(tickets):
    return f"127.0.0.1:{Listener('127.0.0.1', tickets).port}"


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(DATA)
    return [File(str(tmp_path / "a"), 200_000), File(str(tmp_path / "b"), 300_000)]


@pytest.fixture
def ticket(tickets, files):
    made = new_ticket()
    tickets.admit(made, derive(SECRET, made), files)
    return made


def take(reader, length):
    buffer = bytearray(length)
    reader.take(memoryview(buffer))
    return bytes(buffer)


def test_who_has_the_ticket_and_knows_the_secret_reads_what_it_is_for(address, ticket):
    with Reader(address, ticket, derive(SECRET, ticket)) as reader:
        reader.ask(0, 5, 1000)
        reader.ask(1, 0, 300_000)
        assert take(reader, 1000) == DATA[5:1005]
        assert take(reader, 300_000) == DATA
        assert reader.nbytes == 301_000


def test_a_host_without_threads_turns_away_and_goes_on_listening(address, ticket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        for _ in range(3):
            with pytest.raises(AgentUnavailable):
                Reader(address, ticket, derive(SECRET, ticket))
    Reader(address, ticket, derive(SECRET, ticket)).__exit__()


def none_left(thread):
    raise RuntimeError("can't start new thread")


def test_a_ticket_is_good_for_some_connections_and_no_more(address, ticket):
    for _ in range(transfer.MAX_STREAMS):
        Reader(address, ticket, derive(SECRET, ticket)).__exit__()
    with pytest.raises(AgentUnavailable):
        Reader(address, ticket, derive(SECRET, ticket))


def test_what_was_said_once_cannot_be_said_again(tickets, ticket):
    raw, nonce = bytes.fromhex(ticket), bytes(32)
    proof = transfer._proof(derive(SECRET, ticket), b"reads", raw, nonce)
    assert tickets.take(raw, nonce, proof)
    assert tickets.take(raw, nonce, proof) is None


def test_who_saw_the_ticket_and_does_not_know_the_secret_gets_nothing_and_does_not_use_it_up(address, ticket):
    with pytest.raises(AgentUnavailable):
        Reader(address, ticket, derive("0" * 64, ticket))
    Reader(address, ticket, derive(SECRET, ticket)).__exit__()


def test_a_ticket_is_forgotten_after_a_time(address, ticket, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now + transfer.TICKET_SECONDS + 1)
    with pytest.raises(AgentUnavailable):
        Reader(address, ticket, derive(SECRET, ticket))


@pytest.mark.parametrize(
    "request_", [(0, 0, 200_001), (0, 200_000, 1), (2, 0, 1), (1 << 31, 0, 1), (0, 1 << 63, 1 << 63)]
)
def test_nothing_is_read_beyond_what_the_ticket_is_for(address, ticket, request_):
    with Reader(address, ticket, derive(SECRET, ticket)) as reader:
        reader.ask(*request_)
        with pytest.raises(SaveFailed, match="broke off"):
            take(reader, 1)


def test_an_arena_that_has_become_shorter_ends_the_connection(address, ticket, files):
    os.truncate(files[0].path, 100)
    with Reader(address, ticket, derive(SECRET, ticket)) as reader:
        reader.ask(0, 0, 1000)
        assert take(reader, 100) == DATA[:100]
        with pytest.raises(SaveFailed, match="broke off"):
            take(reader, 1)


@pytest.fixture(scope="module")
def shown():
    """What agents show between hosts: those of our user, who say that they are, and others."""
    authority = make_authority("one", 1)

    def make(user="me", by=authority):
        return Shown(authority.certificate, *issue(by, user, 1), "me.user.ckptsvc")

    return make


@pytest.fixture(scope="module")
def encrypted(tickets, shown):
    return f"127.0.0.1:{Listener('127.0.0.1', tickets, shown()).port}"


def test_between_hosts_all_that_is_read_is_encrypted(encrypted, ticket, shown):
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between:
        between.settimeout(10)
        thread = threading.Thread(target=overhear, args=(between, encrypted, heard))
        thread.start()
        address = f"127.0.0.1:{between.getsockname()[1]}"
        with Reader(address, ticket, derive(SECRET, ticket), shown()) as reader:
            reader.ask(1, 0, 300_000)
            reader.ask(0, 5, 1000)
            assert take(reader, 300_000) == DATA
            assert take(reader, 1000) == DATA[5:1005]
        thread.join()
    assert len(heard) > 300_000
    assert DATA[1000:1032] not in heard
    assert transfer.MAGIC not in heard


def overhear(between, address, heard):
    """Pass on what goes between two, and keep it."""
    one, _ = between.accept()
    with one, socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 10) as other:
        while True:
            for end in select.select([one, other], [], [], 10)[0]:
                data = end.recv(1 << 16)
                if not data:
                    return
                heard += data
                (other if end is one else one).sendall(data)


@pytest.mark.parametrize("who", ["another user", "another authority", "a wildcard", "nobody"])
def test_between_hosts_only_our_user_is_served_and_believed(encrypted, tickets, ticket, shown, who, monkeypatch):
    ours = shown()
    if who == "a wildcard":
        monkeypatch.setattr(certificates, "name_of", lambda user: f"*{certificates.SUFFIX}")
    made = {"another user": ["other"], "another authority": ["me", make_authority("other", 1)], "a wildcard": ["me"]}
    other = shown(*made[who]) if who in made else None
    with pytest.raises(AgentUnavailable):
        Reader(encrypted, ticket, derive(SECRET, ticket), other)
    theirs = Listener("127.0.0.1", tickets, other)
    with pytest.raises(AgentUnavailable):
        Reader(f"127.0.0.1:{theirs.port}", ticket, derive(SECRET, ticket), ours)
    Reader(encrypted, ticket, derive(SECRET, ticket), ours).__exit__()  # the ticket is not used up


def test_an_impostor_gets_no_key_and_is_not_believed():
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        ticket = new_ticket()
        impostor.settimeout(10)

        def answer():
            connection, _ = impostor.accept()
            with connection:
                heard = connection.recv(1000)
                connection.sendall(heard[-32:])  # what was proved is all he has
                assert derive(SECRET, ticket).encode() not in heard
                assert bytes.fromhex(derive(SECRET, ticket)) not in heard

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AgentUnavailable, match="no agent of ours"):
            Reader(f"127.0.0.1:{impostor.getsockname()[1]}", ticket, derive(SECRET, ticket))
        thread.join()


@pytest.mark.parametrize("seed", range(60))
def test_garbage_is_told_nothing_and_does_no_harm(address, tickets, ticket, seed):
    rng = random.Random(seed)
    key = derive(SECRET, ticket)
    raw, nonce = bytes.fromhex(ticket), rng.randbytes(32)
    hello = bytearray(transfer.MAGIC + raw + nonce + transfer._proof(key, b"reads", raw, nonce))
    how = seed % 4
    if how == 0:
        hello[rng.randrange(len(hello))] ^= 1 << rng.randrange(8)
    elif how == 1:
        hello = bytearray(rng.randbytes(rng.randrange(300)))
    elif how == 2:
        del hello[rng.randrange(len(hello)) :]
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 10) as connection:
        connection.sendall(hello)
        if how == 3:  # a good hello, then nonsense
            assert len(connection.recv(32)) == 32
            connection.sendall(REQUEST.pack(rng.randrange(3, 1 << 32), rng.getrandbits(64), rng.getrandbits(64)))
        with contextlib.suppress(OSError):  # it may have been hung up on by now
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    other = new_ticket()
    tickets.admit(other, derive(SECRET, other), [])
    Reader(address, other, derive(SECRET, other)).__exit__()  # it still serves


def test_tickets_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(transfer, "MAX_TICKETS", 3)
    tickets = Tickets()
    for _ in range(10):
        tickets.admit(new_ticket(), "00", [])
    assert len(tickets._open) == 3


def test_the_pace_is_kept():
    pace = Pace(1e6)
    began = time.monotonic()
    for _ in range(5):
        pace.wait(100_000)
    assert time.monotonic() - began > 0.3  # 0.5 s, less what may be made up for


def test_whoever_is_held_waits_until_it_goes_on(monkeypatch):
    pace = Pace(0)
    pace.hold(on=True)
    monkeypatch.setattr(transfer, "HOLD_SECONDS", 0.05)
    began = time.monotonic()
    pace.wait(1)
    assert time.monotonic() - began >= 0.05
    pace.hold(on=False)
    monkeypatch.setattr(transfer, "HOLD_SECONDS", 60.0)
    pace.wait(1)


def test_a_row_of_pieces_is_cut_where_they_end():
    pieces = [Piece(n, nbytes, 10, b"") for n, nbytes in enumerate([25, 10, 41])]  # 3, 1 and 5 extents
    assert [(p.number, first, count) for p, first, count in runs(pieces, 0, 100)] == [(0, 0, 3), (1, 0, 1), (2, 0, 5)]
    assert [(p.number, first, count) for p, first, count in runs(pieces, 2, 4)] == [(0, 2, 1), (1, 0, 1), (2, 0, 2)]
    assert list(runs(pieces, 9, 5)) == []


def test_a_block_that_does_not_match_is_not_taken():
    digests = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(DATA[i : i + 10])) for i in (0, 10))
    piece = Piece(0, 20, 10, digests)
    check(memoryview(DATA[10:20]), piece, 1, "it")
    with pytest.raises(Damaged, match="it: extent 0"):
        check(memoryview(DATA[10:20]), piece, 0, "it")
