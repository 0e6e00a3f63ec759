"""The pool as an `httpx2.AsyncBaseTransport`, for callers that speak `httpx2`'s interface.

`Upstream` does not come this way: it uses the transport's ``pool`` directly, since building `httpx2`'s requests and
responses costs as much as everything else. Channels and callbacks do, and so does a client of `httpx2` in a test.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable, Mapping

import httpx2
import trio

from trigate.upstream.connect import AddressCheck, Connection, Origin, dial
from trigate.upstream.pool import ConnectionPool, Opening, PoolStatistics, Response
from trigate.upstream.step_timeouts import StepTimeouts, within


class SocketTransport(httpx2.AsyncBaseTransport):
    """Requests over HTTP/1.1, with and without TLS.

    The extension ``trigate.once`` of a request means that it must not arrive twice (``once`` of `ConnectionPool.open`).

    Args:
        trust: Returns the TLS context with the certificate authorities; called when a connection needs one.
        max_connections: The most connections that are open at once, to all origins together; further requests queue.
            None = no limit.
        max_idle: The most idle connections that are kept.
        idle_expiry_s: How long an idle connection is kept.
        refuse: Checks each address before a connection to it is attempted; None = all are allowed.
        dial: Makes the connections.

    Attributes:
        pool: The connections.

    **Resource handling:** `run`, if it runs, closes idle connections that have expired; `aclose` closes all idle ones.
    """

    def __init__(
        self,
        *,
        trust: Callable[[], ssl.SSLContext] = httpx2.create_ssl_context,
        max_connections: int | None = None,
        max_idle: int = 100,
        idle_expiry_s: float = 30.0,
        refuse: AddressCheck | None = None,
        dial: Callable[..., Awaitable[Connection]] = dial,
    ) -> None:
        self.pool = ConnectionPool(
            trust=trust,
            max_connections=max_connections,
            max_idle=max_idle,
            idle_expiry_s=idle_expiry_s,
            refuse=refuse,
            dial=dial,
        )

    def __repr__(self) -> str:
        found = self.statistics()
        return f"<SocketTransport {found.open} open, {found.idle} idle, {found.waiting} waiting>"

    def statistics(self) -> PoolStatistics:
        """Returns a snapshot of the pool."""
        return self.pool.statistics()

    async def run(self) -> None:
        """Closes connections that have been idle for too long, until it is cancelled."""
        await self.pool.run()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request within `httpx2`'s timeouts. Closing the response releases the connection.

        Raises:
            httpx2.LocalProtocolError: The request cannot be sent as it is.
            httpx2.TransportError: As `ConnectionPool.open`.
        """
        body = await request.aread()
        timeouts = request.extensions.get("timeout", {})
        steps = StepTimeouts(
            queue_s=_limit(timeouts, "pool"), read_s=_limit(timeouts, "read"), write_s=_limit(timeouts, "write")
        )
        opening = self.pool.open(
            Origin.of(request.url),
            _serialized(request, body),
            method=request.method,
            connect_timeout_s=_limit(timeouts, "connect"),
            steps=steps,
            once=bool(request.extensions.get("trigate.once")),
        )
        response = await opening.__aenter__()
        try:
            return httpx2.Response(
                response.status,
                headers=response.headers,
                stream=_Body(opening, response, steps.read_s),
                extensions={"http_version": b"HTTP/1.1"},
            )
        except BaseException:
            opening.release()
            raise

    async def aclose(self) -> None:
        """Closes the idle connections. A connection in use is closed when its response is."""
        self.pool.close()
        await trio.lowlevel.checkpoint()


def _limit(timeouts: Mapping[str, float | None], step: str) -> float:
    seconds = timeouts.get(step)
    return math.inf if seconds is None else seconds


class _Body(httpx2.AsyncByteStream):
    """The body of a response, as `httpx2` reads it."""

    def __init__(self, opening: Opening, response: Response, read_s: float) -> None:
        self._opening = opening
        self._response = response
        self._read_s = read_s

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        piece = await within(self._read_s, httpx2.ReadTimeout, self._response.receive())
        if piece is None:
            self._opening.release()
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        self._opening.release()


def _serialized(request: httpx2.Request, body: bytes) -> bytes:
    """Returns the request as it is sent, head and body.

    Raises:
        httpx2.LocalProtocolError: The head would not be read as it is meant: a line break or NUL in it, a wrong
            content-length; or the method is ``CONNECT``.
    """
    if request.method == "CONNECT":
        raise httpx2.LocalProtocolError("CONNECT is for proxies")
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    names = set()
    for name, value in request.headers.raw:
        lower = name.lower()
        if lower == b"transfer-encoding":
            continue  # the body is complete here, so it is sent with its length
        if lower == b"content-length" and value != b"%d" % len(body):
            raise httpx2.LocalProtocolError(f"the content-length is not that of the body, {len(body)}")
        names.add(lower)
        lines.append(b"%b: %b" % (name, value))
    if b"accept-encoding" not in names:
        lines.append(b"accept-encoding: identity")
    if b"content-length" not in names and (body or request.method in ("POST", "PUT", "PATCH")):
        lines.append(b"content-length: %d" % len(body))
    for line in lines:
        if b"\r" in line or b"\n" in line or b"\0" in line:
            raise httpx2.LocalProtocolError("a header or the path has a line break in it")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
