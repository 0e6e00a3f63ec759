"""A provider on real sockets that plays the script of a `Fault` in raw bytes, and addresses that cannot be reached."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import attrs
import trio
import trustme

from tests.faults.fault import DATE, Endpoint, Fault, Fin, Hang, Pause, Repeat, Rst, Script, Send, SendSlowly

_PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NAMES = {
    "unknown name": "unknown.invalid",
    "name server hangs": "hanging.invalid",
    "one address of two": "two.invalid",
}


@attrs.define(eq=False)
class FaultyProvider:
    """A running provider with a fault.

    Attributes:
        base_url: The base URL of the upstream.
        asked: The request lines of all requests that were read.
        dates: The dates that replaced `DATE`.
        open_now: The number of open connections.
    """

    fault: Fault
    base_url: str = ""
    asked: list[bytes] = attrs.field(factory=list)
    dates: list[str] = attrs.field(factory=list)
    open_now: int = 0

    async def serve(self, context: ssl.SSLContext | None, plain: trio.SocketStream) -> None:
        """Serves one connection."""
        self.open_now += 1
        stream: Any = plain if context is None else trio.SSLStream(plain, context, server_side=True)
        try:
            # the handshake may fail, and the gateway may disconnect at any time
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if self.fault.unread:
                    await self._play(self.fault.stream, stream, plain)
                    return
                while (request := await _read_request(stream)) is not None:
                    self.asked.append(request.partition(b"\r\n")[0])
                    script = self.fault.stream if b'"stream":true' in request else self.fault.json
                    assert script is not None, "this fault has no JSON answer"
                    if not await self._play(script, stream, plain):
                        return
        finally:
            await trio.aclose_forcefully(plain)
            self.open_now -= 1

    async def _play(self, script: Script, stream: Any, plain: trio.SocketStream) -> bool:
        """Plays the steps; returns whether another request may follow."""
        for step in script:
            match step:
                case Send(data):
                    await stream.send_all(self._dated(data))
                case Pause(seconds):
                    await trio.sleep(seconds)
                case SendSlowly(data, every_s):
                    for byte in data:
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(every_s)
                    await _read_to_end(stream)
                    return False
                case Repeat(data, every_s):
                    while True:
                        await trio.sleep(every_s)
                        await stream.send_all(data)
                case Hang():
                    await _read_to_end(stream)
                    return False
                case Fin():
                    await plain.send_eof()
                    await _read_to_end(plain)
                    return False
                case Rst():
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return False
        return True

    def _dated(self, data: bytes) -> bytes:
        if DATE not in data:
            return data
        self.dates.append(email.utils.formatdate(time.time() + 30, usegmt=True))
        return data.replace(DATE, self.dates[-1].encode())


async def _read_to_end(stream: Any) -> None:
    while await stream.receive_some():
        pass


async def _read_request(stream: Any) -> bytes | None:
    """Reads the head and the body of a request; returns None at the end of the connection."""
    received = b""
    while True:
        data = bytes(await stream.receive_some())
        if not data:
            return None
        received += data
        head, found, body = received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        if found and len(body) >= int(length or b"0"):
            return received


# -- addresses ------------------------------------------------------------------------------------------------------


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def trust() -> ssl.SSLContext:
    """Returns the trust of the gateway: one authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _authority().configure_trust(context)
    return context


@functools.cache
def _identity(at: Endpoint) -> ssl.SSLContext | None:
    """Returns the TLS context of a provider, None without TLS."""
    match at:
        case "TLS":
            certificate = _authority().issue_cert("127.0.0.1")
        case "TLS, unknown authority":
            certificate = trustme.CA().issue_cert("127.0.0.1")
        case "TLS, expired":
            certificate = _authority().issue_cert("127.0.0.1", not_before=_PAST, not_after=_PAST.replace(year=2021))
        case "TLS, other name":
            certificate = _authority().issue_cert("other.example")
        case _:
            return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


class _Names(trio.abc.HostnameResolver):
    """A resolver: ``two.invalid`` has two addresses, ``hanging.invalid`` never gets an answer, no other name exists."""

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        await trio.lowlevel.checkpoint()
        match host:
            case b"hanging.invalid":
                await trio.sleep_forever()
            case b"two.invalid":
                # nothing listens on the first address, which is on the loopback network too
                stream = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
                return [(*stream, ("127.0.0.2", int(port))), (*stream, ("127.0.0.1", int(port)))]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise AssertionError("no test resolves an address to a name")


@contextlib.contextmanager
def _full_port() -> Iterator[int]:
    """Yields the port of a listener with a full accept queue: the kernel drops further connection requests."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(address)
        yield address[1]


@contextlib.contextmanager
def _closed_port() -> Iterator[int]:
    """Yields a port that is bound, but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextlib.asynccontextmanager
async def open_faulty_provider(fault: Fault) -> AsyncIterator[FaultyProvider]:
    """Serves a provider with this fault on loopback."""
    hostile = FaultyProvider(fault)
    trio.socket.set_custom_hostname_resolver(_Names())
    host = _NAMES.get(fault.at, "127.0.0.1")
    scheme = "https" if fault.at.startswith(("TLS", "https")) else "http"
    if fault.at in ("closed port", "full accept queue"):
        with _full_port() if fault.at == "full accept queue" else _closed_port() as port:
            hostile.base_url = f"http://{host}:{port}/v1"
            yield hostile
        return
    async with trio.open_nursery() as nursery:
        serve = functools.partial(hostile.serve, _identity(fault.at))
        [listener] = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        hostile.base_url = f"{scheme}://{host}:{port}/v1"
        try:
            yield hostile
        finally:
            nursery.cancel_scope.cancel()
