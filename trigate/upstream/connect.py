"""Connections to an origin: how one is made, looked at, and closed.

A plain connection is a non-blocking socket of the standard library, so that `transport` and a relay can read it
without a layer between. With TLS, Trio's `SSLStream` stands on it.

A name is looked up and tried with happy eyeballs (`trio.open_tcp_stream`). An address needs neither: it is connected
to directly.

Where not every address is allowed (`Refuse`), a name is looked up here, once, and only what has been looked at is
connected to: a second look-up could give another answer.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
from collections.abc import Callable

import attrs
import httpx2
import trio

# A buffer of 4 to 64 KiB costs the same for what usually comes: a send and a recv of 300 bytes take 7.5 µs whatever the
# size (4 000 bytes: 7.7), and recv_into a shared buffer, from which the bytes are then copied, 0.2 to 0.3 more.
RECEIVE_BYTES = 65536

_NEXT_ADDRESS_S = 0.25
"""How long an address is tried alone, before the next one is tried beside it (RFC 8305)."""
_PORTS = {"http": 80, "https": 443}
_BREAKS = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

Refuse = Callable[[str], str | None]
"""Says of an address why nobody may connect to it; None = it is allowed."""


class Refused(httpx2.ConnectError):
    """No address of the host is one that may be connected to. None was."""


@attrs.frozen(cache_hash=True)
class Origin:
    """Where a connection goes: what requests must have in common to share one."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if ":" not in self.host else f"[{self.host}]:{self.port}"

    @classmethod
    def of(cls, url: str | httpx2.URL) -> Origin:
        """The origin of a URL.

        >>> Origin.of("https://api.example/v1"), str(Origin.of("http://[::1]:8000"))
        (Origin(scheme='https', host='api.example', port=443), '[::1]:8000')

        Raises:
            httpx2.InvalidURL: It is none.
            httpx2.UnsupportedProtocol: It is not one of HTTP.
        """
        parsed = httpx2.URL(url)
        if parsed.scheme not in _PORTS or not parsed.host:
            raise httpx2.UnsupportedProtocol(f"{str(parsed)!r} is not an http:// or https:// URL")
        host = parsed.raw_host.decode("ascii")
        return cls(parsed.scheme, host, parsed.port or _PORTS[parsed.scheme])


class Connection:
    """One connection.

    Attributes:
        socket: Of the standard library, and non-blocking.
        stream: What stands on it, if it is not plain.
        reused: It has carried a request to its end.
        idle_since: When it was given back, in Trio's time.
    """

    __slots__ = ("_fd", "_look", "idle_since", "origin", "reused", "socket", "stream")

    def __init__(self, origin: Origin, sock: socket.socket, stream: trio.SSLStream[trio.SocketStream] | None) -> None:
        self.origin = origin
        self.socket = sock
        self.stream = stream
        self.reused = False
        self.idle_since = -math.inf
        self._fd = sock.fileno()
        # A poll object asks one socket without an exception or a list to build: 0.46 µs, against 1.3 µs for a
        # MSG_PEEK that ends in BlockingIOError and 1.0 µs for select.select.
        self._look = select.poll()
        self._look.register(self._fd, select.POLLIN)

    def __repr__(self) -> str:
        return f"<Connection to {self.origin}>"

    def is_quiet(self) -> bool:
        """Whether nothing has come, neither bytes nor the end. An idle connection of which that is not true is of no
        use: nobody has asked for what it would say."""
        return not self._look.poll(0)

    async def receive(self) -> bytes:
        """Returns what comes next; empty at its end.

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
                    continue  # another one was told of the same bytes
        except _BREAKS as error:
            raise httpx2.ReadError(_reason(error)) from error

    async def send(self, data: memoryview) -> None:  # noqa: ASYNC910 - of nothing, nothing is sent
        """Sends all of it.

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
        """Closes it at once: nothing is said to the peer, and nothing waited for. Who waits for it is told."""
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()


async def dial(
    origin: Origin,
    trust: Callable[[], ssl.SSLContext],
    *,
    timeout_s: float = math.inf,
    refuse: Refuse | None = None,
) -> Connection:
    """Makes a connection.

    Args:
        trust: Gives the certificate authorities; asked only where they are needed.
        timeout_s: For all of it: name, connection, TLS.
        refuse: Judges each address before it is connected to; None = all are allowed.

    Raises:
        Refused: All its addresses are refused.
        httpx2.ConnectTimeout: It took longer.
        httpx2.ConnectError: It was refused, or cannot be.

    **Cancels:** nothing is left open.
    """
    with trio.move_on_after(timeout_s) as deadline:
        try:
            sock = await _connect(origin, refuse)
            try:
                stream = None
                if origin.scheme == "https":
                    stream = await _secure(sock, origin.host, trust())
                return Connection(origin, sock, stream)
            except BaseException:
                trio.lowlevel.notify_closing(sock)
                sock.close()
                raise
        except (*_BREAKS, UnicodeError) as error:  # the latter: a name that cannot be one
            raise httpx2.ConnectError(_reason(error)) from error
    assert deadline.cancelled_caught
    raise httpx2.ConnectTimeout(f"{origin} did not accept a connection within {timeout_s:g} s")


async def _connect(origin: Origin, refuse: Refuse | None) -> socket.socket:
    family = _family_of(origin.host)
    if refuse is not None:
        sock = await _connect_to_first(await _allowed(origin, refuse))
    elif family is None:
        stream = await trio.open_tcp_stream(origin.host, origin.port)
        # Trio lends nobody its socket: the descriptor is taken out of it.
        sock = socket.socket(fileno=stream.socket.detach())
    else:
        sock = await _connect_to(family, (origin.host, origin.port))
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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


async def _allowed(origin: Origin, refuse: Refuse) -> list[_Address]:
    """The addresses of an origin that may be connected to, in the order in which they are to be tried."""
    allowed: list[_Address] = []
    refused: list[str] = []
    found = await trio.socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        why = refuse(str(address[0]))
        if why is None:
            allowed.append((family, address))
        else:
            refused.append(f"{address[0]} is {why}")
    if not allowed:
        raise Refused(f"{origin} must not be connected to: {', '.join(refused)}")
    return allowed


async def _connect_to_first(addresses: list[_Address]) -> socket.socket:
    """Connects to the first of these addresses that accepts; the later ones begin later."""
    accepted: list[socket.socket] = []
    errors: list[OSError] = []

    async def attempt(  # noqa: ASYNC910 - connecting waits
        family: socket.AddressFamily, address: _SocketAddress, failed: trio.Event
    ) -> None:
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
        sock.close()  # it has accepted in the same moment
    return accepted[0]


def _family_of(host: str) -> socket.AddressFamily | None:
    """The family of an address; None for a name.

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
    # The context may be shared with a client that speaks HTTP/2, and is read when the stream is made: no await between.
    context.set_alpn_protocols(["http/1.1"])
    stream = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
        context,
        server_hostname=host.rstrip("."),
        # Many servers close without a word of TLS. A body whose only end that is may have been cut; but so it may
        # without TLS, and whether an answer is complete is not left to its framing.
        https_compatible=True,
    )
    await stream.do_handshake()
    return stream


def _reason(error: BaseException) -> str:
    """What people need to read of an error: the cause under Trio's and attempts' wrappers."""
    while error.__cause__ is not None and isinstance(error, trio.BrokenResourceError | OSError):
        error = error.__cause__
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
