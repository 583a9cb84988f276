"""Agents of several hosts: whose certificate is let in, by whom, and until when. Over real TLS."""

import asyncio
import datetime
import logging
import os
import time
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import AgentUnavailable, ConfigError, StoreDenied
from ckptsvc.quantities import Address
from ckptsvc.rpc.certificates import identity_of, issue, make_authority, name_of
from ckptsvc.rpc.channel import error_of
from ckptsvc.rpc.trust import ByCertificate
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

AUTHORITY, OTHER = make_authority("one", 1), make_authority("other", 1)


def files(folder, user="me", authority=AUTHORITY, days=1.0):
    """A user's files; returns their paths."""
    folder.mkdir(exist_ok=True)
    pair = issue(authority, user, days)
    for name, data in (("ca.pem", authority.certificate), ("key.pem", pair.key), ("cert.pem", pair.certificate)):
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return [str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")]


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self):
        self.heard = []

    async def ListComplete(self, request, context):
        self.heard.append(request.job)
        return agent_pb2.ListSnapshotsResponse()

    async def Attend(self, requests, context):
        async for report in requests:
            self.heard.append(report.agent_hello.node)
            yield pb.Order(job=report.agent_hello.node)


@asynccontextmanager
async def listening(trust):
    """A coordinator's port; yields its address, what it has heard, and how many calls it has refused."""
    refused, servicer = [], Coordinator()
    server = grpc.aio.server(interceptors=[trust.gate(lambda: refused.append(1))], options=[("grpc.so_reuseport", 0)])
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    port, host = trust.open_port(server, Address("127.0.0.1", 0))
    await server.start()
    try:
        yield f"{host}:{port}", servicer.heard, refused
    finally:
        await server.stop(0)


async def call(trust, address):
    """One call each way as an agent makes them; raises what they end with."""
    channel = trust.channel(trust.spelled(address), [])
    try:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        admission = await trust.ask(channel, address, "ListComplete")
        one = stub.ListComplete(pb.ListCompleteRequest(job="the job"), metadata=admission.metadata, timeout=10)
        await admission.check(one)
        await one
        hello = pb.Report(agent_hello=pb.AgentHello(node="n1"))
        async for order in stub.Attend(iter([hello]), timeout=10):
            assert order.job == "n1"
    except grpc.RpcError as failure:
        raise error_of(failure) from None
    finally:
        await channel.close()


def meet(ours, theirs):
    """What a listener with `ours` has heard, and refused, of one with `theirs`; and what that one was told."""

    async def story():
        async with listening(ours) as (address, heard, refused):
            try:
                await call(theirs, address)
            except (AgentUnavailable, StoreDenied) as error:
                return heard, len(refused), error
            return heard, len(refused), None

    return asyncio.run(story())


def test_agents_of_one_user_meet(tmp_path):
    heard, refused, error = meet(ByCertificate(*files(tmp_path / "a")), ByCertificate(*files(tmp_path / "b")))
    assert (heard, refused, error) == (["the job", "n1"], 0, None)


def test_another_user_with_a_certificate_of_our_authority_is_told_nothing(tmp_path):
    ours, theirs = ByCertificate(*files(tmp_path / "a")), ByCertificate(*files(tmp_path / "b", "you"))
    heard, _, error = meet(ours, theirs)
    assert heard == []
    assert isinstance(error, AgentUnavailable)  # he does not even send: to him, we are another user

    async def insists():  # a client of his own, that takes us for whom we say we are
        pair = issue(AUTHORITY, "you", 1)
        shown = grpc.ssl_channel_credentials(AUTHORITY.certificate, pair.key, pair.certificate)
        name = [("grpc.ssl_target_name_override", ours.name)]
        async with (
            listening(ours) as (address, heard, refused),
            grpc.aio.secure_channel(address, shown, name) as channel,
        ):
            raw = channel.unary_unary("/ckptsvc.rpc.v1.CoordinatorService/ListComplete")
            with pytest.raises(grpc.RpcError) as caught:
                await raw(b"\xff" * 1000, timeout=10)  # no message: nobody has tried to read it
            return error_of(caught.value), heard, len(refused)

    error, heard, refused = asyncio.run(insists())
    assert isinstance(error, StoreDenied)
    assert (heard, refused) == ([], 1)


def test_who_has_another_authority_or_no_certificate_gets_no_call_through(tmp_path):
    ours = ByCertificate(*files(tmp_path / "a"))
    heard, refused, error = meet(ours, ByCertificate(*files(tmp_path / "b", authority=OTHER)))
    assert (heard, refused) == ([], 0)
    assert "no secure connection" in str(error)

    async def plain(credentials):
        async with listening(ours) as (address, heard, refused):
            options = [("grpc.ssl_target_name_override", ours.name)]
            opened = (
                grpc.aio.secure_channel(address, credentials, options)
                if credentials
                else grpc.aio.insecure_channel(address)
            )
            async with opened as channel:
                with pytest.raises(grpc.RpcError):
                    await channel.unary_unary("/ckptsvc.rpc.v1.CoordinatorService/ListComplete")(b"", timeout=10)
            return heard, len(refused)

    assert asyncio.run(plain(None)) == ([], 0)
    assert asyncio.run(plain(grpc.ssl_channel_credentials(AUTHORITY.certificate))) == ([], 0)


def test_an_impostor_with_a_certificate_of_our_authority_is_told_nothing(tmp_path):
    heard, _, error = meet(ByCertificate(*files(tmp_path / "b", "you")), ByCertificate(*files(tmp_path / "a")))
    assert heard == []
    assert "no secure connection" in str(error)


def test_new_files_are_used_by_what_connects_then(tmp_path, caplog):
    seen = []
    ours = ByCertificate(*files(tmp_path / "a", days=1), on_expiry=seen.append)
    theirs = ByCertificate(*files(tmp_path / "b"))

    async def story():
        async with listening(ours) as (address, heard, _):
            await call(theirs, address)
            before = theirs.shown()
            # Both ends go over to another authority; the port stays.
            files(tmp_path / "a", authority=OTHER, days=20)
            files(tmp_path / "b", authority=OTHER, days=20)
            ours.refresh()
            theirs.refresh()
            assert theirs.shown() is not before
            await call(theirs, address)
            # A file that is of no use changes nothing.
            (tmp_path / "a" / "cert.pem").write_text("nonsense")
            ours.refresh()
            await call(theirs, address)
            return heard

    caplog.set_level(logging.WARNING)
    assert len(asyncio.run(story())) == 6
    assert seen[-1] - seen[0] > 18 * 86400
    assert "new certificates are not used" in caplog.text


def test_a_certificate_of_an_authority_that_ours_is_not_is_not_used(tmp_path, caplog):
    ours, theirs = ByCertificate(*files(tmp_path / "a")), ByCertificate(*files(tmp_path / "b"))
    before = ours.shown()
    files(tmp_path / "a", authority=OTHER)
    (tmp_path / "a" / "ca.pem").write_bytes(AUTHORITY.certificate)
    for _ in range(3):
        ours.refresh()
    assert ours.shown() is before
    assert meet(ours, theirs)[2] is None
    said = [each for each in caplog.messages if "new certificates are not used" in each]
    assert len(said) == 1
    assert "not one that others would let in: CERTIFICATE_VERIFY_FAILED" in said[0]
    assert "signed by CN=other; is that in tls.ca_file?" in said[0]
    files(tmp_path / "a")
    ours.refresh()
    assert ours.shown() is not before
    with pytest.raises(ConfigError, match="others would let in"):
        ByCertificate(*files(tmp_path / "c", authority=OTHER)[:1], *files(tmp_path / "d")[1:])


def test_both_authorities_are_known_while_one_takes_the_others_place(tmp_path):
    both = AUTHORITY.certificate + OTHER.certificate
    for folder, authority in (("a", AUTHORITY), ("b", OTHER)):
        files(tmp_path / folder, authority=authority)
        (tmp_path / folder / "ca.pem").write_bytes(both)
    ours, theirs = (ByCertificate(*(str(tmp_path / f / n) for n in ("ca.pem", "cert.pem", "key.pem"))) for f in "ab")
    assert meet(ours, theirs)[2] is None


def test_that_it_has_expired_is_said_once(tmp_path, caplog, monkeypatch):
    ours = ByCertificate(*files(tmp_path / "a", days=1))
    later = time.time() + 2 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    for _ in range(3):
        ours.refresh()
    assert [("has expired" in each, "expires on" in each) for each in caplog.messages] == [(False, True), (True, False)]


def test_an_expired_certificate_is_said_at_the_start_and_warned_of_before(tmp_path, caplog):
    with pytest.raises(ConfigError, match="has expired"):
        ByCertificate(*files(tmp_path / "a", days=-0.001))
    ByCertificate(*files(tmp_path / "b", days=1))
    assert "expires on" in caplog.text


def test_a_certificate_that_expires_in_use_is_said_and_gets_no_call_through(tmp_path, monkeypatch):
    ours = ByCertificate(*files(tmp_path / "a"))
    theirs = ByCertificate(*files(tmp_path / "b", days=2 / 86400))
    time.sleep(2.5)
    with pytest.raises(ConfigError, match="our own certificate has expired"):
        meet(ours, theirs)
    monkeypatch.setattr("ckptsvc.rpc.trust._check_time", lambda identity, what: None)  # one that does not look
    heard, refused, error = meet(ours, theirs)
    assert (heard, refused) == ([], 0)
    assert isinstance(error, AgentUnavailable)


OTHER_KEY = issue(AUTHORITY, "me", 1).key


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ({"ca.pem": b"nonsense"}, "no certificates in PEM"),
        ({"ca.pem": b""}, "no certificates in PEM"),
        ({"key.pem": None}, "No such file"),
        ({"cert.pem": b"nonsense"}, "no certificate and key in PEM"),
        ({"key.pem": OTHER_KEY}, "does not belong"),
        ({"cert.pem": AUTHORITY.certificate, "key.pem": AUTHORITY.key}, "names 0 users"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, spoiled, says):
    paths = files(tmp_path / "a")
    for name, data in spoiled.items():
        if data is None:
            (tmp_path / "a" / name).unlink()
        else:
            (tmp_path / "a" / name).write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        ByCertificate(*paths)


def test_a_key_that_others_may_read_is_refused(tmp_path):
    paths = files(tmp_path / "a")
    os.chmod(paths[2], 0o644)
    with pytest.raises(ConfigError, match="readable by its owner alone"):
        ByCertificate(*paths)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.binary(max_size=300), st.integers(0, 600))
def test_damaged_certificates_are_refused(noise, at):
    pair = issue(AUTHORITY, "me", 1)
    damaged = pair.certificate[:at] + noise + pair.certificate[at + len(noise) :]
    if damaged != pair.certificate:
        with suppress(ConfigError):
            identity_of(damaged, pair.key, "it")


def signed(names, common_name="you"):
    """A certificate of our authority with these subject alternative names, and its key."""
    signer = x509.load_pem_x509_certificate(AUTHORITY.certificate)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(signer.subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(serialization.load_pem_private_key(AUTHORITY.key, None), hashes.SHA256())
    )  # fmt: skip
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return made.public_bytes(serialization.Encoding.PEM), key.private_bytes(serialization.Encoding.PEM, *form)


@pytest.mark.parametrize("kind", [x509.RFC822Name, x509.UniformResourceIdentifier])
def test_our_name_as_a_name_of_another_kind_is_not_ours(tmp_path, kind):
    certificate, key = signed([x509.DNSName("me2.user.ckptsvc"), kind("me.user.ckptsvc")])

    async def story():
        ours = ByCertificate(*files(tmp_path / "a"))
        shown = grpc.ssl_channel_credentials(AUTHORITY.certificate, key, certificate)
        name = [("grpc.ssl_target_name_override", ours.name)]
        async with (
            listening(ours) as (address, heard, refused),
            grpc.aio.secure_channel(address, shown, name) as channel,
        ):
            with pytest.raises(grpc.RpcError):
                await channel.unary_unary("/ckptsvc.rpc.v1.CoordinatorService/ListComplete")(b"", timeout=10)
            return heard, len(refused)

    assert asyncio.run(story()) == ([], 1)


def test_a_name_for_many_users_is_refused():
    certificate, key = signed([x509.DNSName("*.user.ckptsvc")])
    with pytest.raises(ConfigError, match="no single user"):
        identity_of(certificate, key, "it")


@pytest.mark.parametrize("user", ["", "A", "a.b", "-a", "a" * 64, "ä", "a/b", "*"])
def test_names_that_mean_something_else_are_refused(user):
    with pytest.raises(ConfigError, match="cannot be the name"):
        name_of(user)
