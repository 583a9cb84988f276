"""TLS for connections between agents that are not gRPC's: what rpc.trust promises of those holds for these too.

Both ends show a certificate of one authority, each of them naming the same user: TLS 1.2 or newer, and the name is
compared letter by letter (a certificate for all users, with a wildcard, is nobody's).
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl

import msgspec


class Shown(msgspec.Struct, frozen=True):
    """What an agent shows and goes by, as `rpc.trust` has read it: nothing here touches files, which may hang.

    Attributes:
        authority: certificates of those who sign, PEM.
        certificate, key: our own, PEM.
        name: the DNS name that stands for our user.
    """

    authority: bytes
    certificate: bytes
    key: bytes
    name: str

    def connected(self, connection: socket.socket) -> ssl.SSLSocket:
        """The end that has connected; a timeout of the socket is one of the handshake too.

        Raises:
            OSError: the other end is no agent of our user. The socket is closed then.
        """
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        return self._checked(context.wrap_socket(connection, server_hostname=self.name))

    def accepted(self, connection: socket.socket) -> ssl.SSLSocket:
        """The end that was connected to; see `connected`."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        return self._checked(context.wrap_socket(connection, server_side=True))

    def check(self) -> None:
        """See that two agents who show this would let each other in, by a handshake in memory.

        Raises:
            ssl.SSLError: they would not.
        """
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        connects = self._context(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(back, there, server_hostname=self.name)
        accepts = self._context(ssl.PROTOCOL_TLS_SERVER).wrap_bio(there, back, server_side=True)
        for end in (connects, accepts, connects, accepts):  # TLS 1.3 has no more
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()

    def for_browsers(self) -> ssl.SSLContext:
        """The end that browsers and Prometheus connect to: they show no certificate."""
        return self._with_ours(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authority.decode("ascii", "ignore"))
        return self._with_ours(context)

    def _with_ours(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        file = os.memfd_create("certificate", os.MFD_CLOEXEC)  # OpenSSL takes these from files only
        try:
            os.write(file, self.certificate + b"\n" + self.key)
            context.load_cert_chain(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
        return context

    def _checked(self, connection: ssl.SSLSocket) -> ssl.SSLSocket:
        names = (connection.getpeercert() or {}).get("subjectAltName", ())
        if ("DNS", self.name) not in names:
            connection.close()
            raise ConnectionRefusedError("the certificate of the other end is of another user")
        return connection
