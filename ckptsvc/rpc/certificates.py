"""Certificates of agents: who somebody is, until when; and an authority of one's own, for those who have none.

An agent's certificate names its user, in two spellings (subject alternative names, RFC 5280 4.2.1.6):

    DNS:<user>.user.ckptsvc                    which gRPC checks at the end that connects
    URI:spiffe://<domain>/ckptsvc/user/<user>  for those who have SPIFFE (its ID standard, section 2)

It names no host: what a user's agent may do, it may do from any host.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, NamedTuple

from ckptsvc.errors import ConfigError

if TYPE_CHECKING:  # at run time it is imported where it is needed: few agents have certificates
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes as PublicKey

SUFFIX = ".user.ckptsvc"
"""Of the DNS name that stands for a user."""

CLOCKS = datetime.timedelta(minutes=5)
"""How far a clock may be behind the authority's."""

_USER = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9.-]{1,253}")


class Identity(NamedTuple):
    """What a certificate says.

    Attributes:
        name: the DNS name that stands for the user.
        not_before, not_after: from when and until when it is valid, unix seconds.
        issuer: who says so, as people write it.
    """

    name: str
    not_before: float
    not_after: float
    issuer: str


class Pair(NamedTuple):
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes


def name_of(user: str) -> str:
    """The DNS name that stands for a user.

    Raises:
        ConfigError: the user's name cannot be part of one.
    """
    if not _USER.fullmatch(user):
        raise ConfigError(
            f"{user!r} cannot be the name of a user in a certificate",
            hint='lower-case letters, digits, "-" and "_", 63 at most',
        )
    return user + SUFFIX


def identity_of(certificate: bytes, key: bytes | None, what: str) -> Identity:
    """What the first certificate of a PEM file says.

    Args:
        certificate: the file: the certificate of the agent, then those that lead to the authority.
        key: its private key, which is checked to fit; None: it is not at hand.
        what: names the file, for the message.

    Raises:
        ConfigError: it is none, is not an agent's, or the key is another one's.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        found = x509.load_pem_x509_certificate(certificate)
        try:
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            agents = [name for name in names.get_values_for_type(x509.DNSName) if name.endswith(SUFFIX)]
        except x509.ExtensionNotFound:
            agents = []
        if key is not None:
            ours = serialization.load_pem_private_key(key, None).public_key()
            form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            if ours.public_bytes(*form) != found.public_key().public_bytes(*form):
                raise ConfigError(f"the private key does not belong to the certificate in {what}")
        since, until = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
        issuer = found.issuer.rfc4514_string()
    except (
        ValueError, TypeError, UnsupportedAlgorithm,  # TypeError: a key that wants a password
        x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
    ) as error:  # fmt: skip
        raise ConfigError(f"{what}: no certificate and key in PEM: {str(error)[:200]}") from None
    if len(agents) != 1:
        raise ConfigError(
            f"the certificate in {what} names {len(agents)} users of ckptsvc, not 1",
            hint=f"it needs the subject alternative name DNS:<user>{SUFFIX}; see `ckptsvc certs`",
        )
    if not _USER.fullmatch(agents[0].removesuffix(SUFFIX)):
        raise ConfigError(f"the certificate in {what} names {agents[0]!r}, which stands for no single user")
    return Identity(agents[0], since, until, issuer)


def check_authority(certificates: bytes, what: str) -> None:
    """See that a PEM file holds certificates.

    Raises:
        ConfigError: it holds none.
    """
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(certificates)
    except ValueError as error:
        raise ConfigError(f"{what}: no certificates in PEM: {str(error)[:200]}") from None
    if not found:
        raise ConfigError(f"{what}: no certificates in PEM")


def make_authority(name: str, days: float) -> Pair:
    """A new authority that signs its own certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(made, key)


def issue(authority: Pair, user: str, days: float, domain: str = "ckptsvc.local") -> Pair:
    """A new certificate for the agents of a user.

    Raises:
        ConfigError: the name cannot be used, or the authority is none.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    name = name_of(user)
    if not _DOMAIN.fullmatch(domain):
        raise ConfigError(f"{domain!r} is no trust domain", hint='lower-case letters, digits, "." and "-"')
    try:
        signer = x509.load_pem_x509_certificate(authority.certificate)
        signing = serialization.load_pem_private_key(authority.key, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the authority is no certificate and key in PEM: {str(error)[:200]}") from None
    if not isinstance(signing, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigError("the authority's key is neither of an elliptic curve nor RSA")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName(name), x509.UniformResourceIdentifier(f"spiffe://{domain}/ckptsvc/user/{user}")]
    made = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user)]), signer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    return _pair(made, key)


def _builder(subject: x509.Name, issuer: x509.Name, public_key: PublicKey, days: float) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    from cryptography.hazmat.primitives import serialization

    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), secret)
