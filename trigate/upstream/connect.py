"""Connections to an origin: opens, checks, reads, writes and closes one.

A plain connection is a non-blocking socket of the standard library, so that `pool` and a relay can read it directly.
With TLS, Trio's `SSLStream` wraps the socket.

A host name is resolved and connected to with happy eyeballs (`trio.open_tcp_stream`). An IP address is connected to
directly.

Where some addresses are refused (`AddressCheck`), this module resolves the name itself, once, and connects only to
addresses that passed the check: a second resolution could return other addresses (DNS rebinding).
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the codec of host names: there may be no descriptor left for it later
import errno
import math
import os
import select
import socket
import ssl
from collections.abc import Callable

import attrs
import httpx2
import trio

from trigate.concurrency import descriptors
from trigate.config.sections import ConfigError

# Buffers of 4 to 64 KiB cost the same for usual messages: a send and a recv of 300 bytes take 7.5 µs with each size
# (4 000 bytes: 7.7 µs). recv_into a shared buffer, from which the bytes are then copied, takes 0.2 to 0.3 µs more.
RECEIVE_BYTES = 65536

_NEXT_ADDRESS_S = 0.25
"""How long to wait for one address before the next one is tried in parallel (RFC 8305)."""
_PORTS = {"http": 80, "https": 443}
_BREAKS = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN}
_NO_DESCRIPTOR = "the process can open no other connection"

AddressCheck = Callable[[str], str | None]
"""Returns why an IP address is refused; None = it is allowed."""


class Refused(httpx2.ConnectError):
    """Every address of the host is refused. No connection was attempted."""


class NoDescriptor(httpx2.ConnectError):
    """The process has no file descriptor, memory or thread left for a connection. Says nothing about the peer."""


@attrs.frozen(cache_hash=True)
class Origin:
    """The destination of a connection. Requests with an equal origin can share a connection."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if ":" not in self.host else f"[{self.host}]:{self.port}"

    @classmethod
    def of(cls, url: str | httpx2.URL) -> Origin:
        """Returns the origin of a URL, with the scheme's default port where the URL names none.

        >>> Origin.of("https://api.example/v1"), str(Origin.of("http://[::1]:8000"))
        (Origin(scheme='https', host='api.example', port=443), '[::1]:8000')

        Raises:
            httpx2.InvalidURL: The text is not a URL.
            httpx2.UnsupportedProtocol: The scheme is neither ``http`` nor ``https``, or there is no host.
        """
        parsed = httpx2.URL(url)
        if parsed.scheme not in _PORTS or not parsed.host:
            raise httpx2.UnsupportedProtocol(f"{str(parsed)!r} is not an http:// or https:// URL")
        host = parsed.raw_host.decode("ascii")
        return cls(parsed.scheme, host, parsed.port or _PORTS[parsed.scheme])


class Connection:
    """One connection, owned by a request or by the pool.

    Attributes:
        socket: The non-blocking socket of the standard library.
        stream: The TLS stream over the socket; None if the connection is plain.
        reused: Whether the connection has carried a request to its end.
        idle_since: When the connection was returned to the pool, in Trio's time.
    """

    __slots__ = ("_fd", "_poll", "idle_since", "origin", "reused", "socket", "stream")

    def __init__(self, origin: Origin, sock: socket.socket, stream: trio.SSLStream[trio.SocketStream] | None) -> None:
        self.origin = origin
        self.socket = sock
        self.stream = stream
        self.reused = False
        self.idle_since = -math.inf
        self._fd = sock.fileno()
        # A poll object checks one socket without raising an exception or building a list: 0.46 µs. A MSG_PEEK that
        # ends in BlockingIOError takes 1.3 µs, select.select takes 1.0 µs.
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def __repr__(self) -> str:
        return f"<Connection to {self.origin}>"

    def is_quiet(self) -> bool:
        """Whether neither bytes nor the end of the connection have arrived. An idle connection that is not quiet cannot
        be reused: no request is waiting for those bytes."""
        return not self._poll.poll(0)

    async def receive(self) -> bytes:
        """Returns the next bytes; empty at the end of the connection.

        Raises:
            httpx2.ReadError: The connection broke.
        """
        try:
            if self.stream is not None:
                return bytes(await self.stream.receive_some(RECEIVE_BYTES))
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                try:
                    return self.socket.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    continue  # another reader of the socket (a relay) took the bytes first
        except _BREAKS as error:
            raise httpx2.ReadError(_reason(error)) from error

    async def send(self, data: memoryview) -> None:
        """Sends all of the data.

        Raises:
            httpx2.WriteError: The connection broke.
        """
        try:
            if self.stream is not None:
                await self.stream.send_all(data)
                return
            while data:
                await trio.lowlevel.wait_writable(self._fd)
                try:
                    data = data[self.socket.send(data) :]
                except BlockingIOError:
                    continue
        except _BREAKS as error:
            raise httpx2.WriteError(_reason(error)) from error

    def close(self) -> None:
        """Closes the socket at once, without a TLS close and without waiting. Tasks that wait for the socket get an
        error. Closing twice does nothing."""
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()


async def dial(
    origin: Origin,
    trust: Callable[[], ssl.SSLContext],
    *,
    timeout_s: float = math.inf,
    refuse: AddressCheck | None = None,
) -> Connection:
    """Opens a connection.

    Args:
        trust: Returns the TLS context with the certificate authorities; called for ``https`` only.
        timeout_s: The limit for name resolution, connection and TLS handshake together.
        refuse: Checks each address before a connection to it is attempted; None = all are allowed.

    Raises:
        Refused: All addresses of the host are refused.
        NoDescriptor: The process can open no other connection.
        httpx2.ConnectTimeout: The connection was not ready within ``timeout_s``.
        httpx2.ConnectError: The name does not resolve, the peer refused, or the TLS handshake failed.

    **Cancels:** at any point; no socket stays open.
    """
    with trio.move_on_after(timeout_s) as deadline:
        try:
            sock = await _connect(origin, refuse)
            try:
                if descriptors.is_spent(sock.fileno()):
                    raise NoDescriptor(_NO_DESCRIPTOR)
                stream = None
                if origin.scheme == "https":
                    stream = await _secure(sock, origin.host, trust())
                return Connection(origin, sock, stream)
            except BaseException:
                trio.lowlevel.notify_closing(sock)
                sock.close()
                raise
        except (*_BREAKS, UnicodeError) as error:  # UnicodeError: the host cannot be encoded as a DNS name
            # The resolver does not say that it could open no file, so the process is asked.
            if getattr(_root(error), "errno", None) in _SHORT or descriptors.are_spent():
                raise NoDescriptor(_NO_DESCRIPTOR) from error
            raise httpx2.ConnectError(_reason(error)) from error
        except ConfigError as error:  # the certificate authorities cannot be read
            raise httpx2.ConnectError(str(error)) from error
    assert deadline.cancelled_caught
    raise httpx2.ConnectTimeout(f"{origin} did not accept a connection within {timeout_s:g} s")


async def _connect(origin: Origin, refuse: AddressCheck | None) -> socket.socket:
    family = _family_of(origin.host)
    try:
        if refuse is not None:
            sock = await _connect_to_first(await _allowed(origin, refuse))
        elif family is None:
            stream = await trio.open_tcp_stream(origin.host, origin.port)
            # Trio does not expose the stdlib socket inside its own, so the descriptor is detached from it.
            sock = socket.socket(fileno=stream.socket.detach())
        else:
            sock = await _connect_to(family, (origin.host, origin.port))
    except RuntimeError as error:  # no thread can be started for the resolver
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


_SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
_Address = tuple[socket.AddressFamily, _SocketAddress]


async def _connect_to(family: socket.AddressFamily, address: _SocketAddress) -> socket.socket:
    opening = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await opening.connect(address)
    except BaseException:
        opening.close()
        raise
    return socket.socket(fileno=opening.detach())


async def _allowed(origin: Origin, refuse: AddressCheck) -> list[_Address]:
    """Resolves an origin, and returns its allowed addresses in the order in which to try them.

    Raises:
        Refused: All addresses are refused.
    """
    allowed: list[_Address] = []
    refused: list[str] = []
    found = await trio.socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        reason = refuse(str(address[0]))
        if reason is None:
            allowed.append((family, address))
        else:
            refused.append(f"{address[0]} is {reason}")
    if not allowed:
        raise Refused(f"{origin} must not be connected to: {', '.join(refused)}")
    return allowed


async def _connect_to_first(addresses: list[_Address]) -> socket.socket:
    """Returns a socket connected to the first address that accepts. Each further address is tried as soon as the one
    before it has failed, or has not accepted within `_NEXT_ADDRESS_S`."""
    accepted: list[socket.socket] = []
    errors: list[OSError] = []

    async def attempt(family: socket.AddressFamily, address: _SocketAddress, failed: trio.Event) -> None:
        try:
            accepted.append(await _connect_to(family, address))
        except OSError as error:
            errors.append(error)
            failed.set()
        else:
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for family, address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, family, address, failed)
                with trio.move_on_after(_NEXT_ADDRESS_S):
                    await failed.wait()
        if not accepted:
            raise errors[0]
    except BaseException:
        for sock in accepted:
            sock.close()
        raise
    for sock in accepted[1:]:
        sock.close()  # accepted in the same event-loop iteration
    return accepted[0]


def _family_of(host: str) -> socket.AddressFamily | None:
    """Returns the address family of an IP address; None for a host name.

    >>> _family_of("127.0.0.1").name, _family_of("::1").name, _family_of("localhost")
    ('AF_INET', 'AF_INET6', None)
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return family
    return None


async def _secure(sock: socket.socket, host: str, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
    # The context may be shared with an HTTP/2 client, which sets other protocols. SSLStream reads the setting when it
    # is constructed, so there must be no await between these two statements.
    context.set_alpn_protocols(["http/1.1"])
    stream = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
        context,
        server_hostname=host.rstrip("."),
        # Many servers close the connection without a TLS close_notify. A body that ends only with the connection may
        # then have been truncated; but that holds without TLS as well, and completeness of an answer is judged by its
        # content, not by its framing.
        https_compatible=True,
    )
    await stream.do_handshake()
    return stream


def _root(error: BaseException) -> BaseException:
    """Returns the root cause of a failure, without the wrappers of Trio and parallel attempts."""
    while error.__cause__ is not None and isinstance(error, trio.BrokenResourceError | OSError):
        error = error.__cause__
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(error: BaseException) -> str:
    """Returns the readable reason of a failure."""
    error = _root(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
