"""One upstream: a place in its queue, a request, a reply that is closed whatever happens.

The seam below is `httpx2.AsyncBaseTransport`: the embedded echo, a proxy, a script in a test. A `SocketTransport`,
which nearly all upstreams have, is used by its own interface: to build and take apart `httpx2`'s requests and responses
costs as much as everything else. `Upstream.open` is the only way to a reply, and it is an ``async with``: place,
connection and stream are given back where the block ends.

Deadlines are the caller's scopes, except for the connect timeout, which only the transport can tell from waiting.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol

import attrs
import httpx2
import trio

from trigate.concurrency.fair_limiter import FairLimiter
from trigate.config.sections import Config, UpstreamConfig
from trigate.errors import (
    GatewayError,
    Header,
    ProtocolViolation,
    Rejected,
    Throttled,
    Truncated,
    Unavailable,
    UpstreamTimeout,
    upstream_message,
)
from trigate.routing.retry import retry_after_s
from trigate.routing.routes import Known
from trigate.upstream.local_model.process import LocalModel, LocalModelUnavailable
from trigate.upstream.response_parser import NotHttp
from trigate.upstream.transport import Opening, Origin, Response, SocketTransport

_CLOSE_GRACE_S = 1.0
_A_TIME = re.compile(r"[A-Za-z0-9:,. ]{1,40}")
_DOWN_S = 10.0
_DEATH_NOTICED_S = 0.2
_RETRY_AFTER = ("retry-after", "retry-after-ms")
_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
_MAX_ERROR_BODY_BYTES = 1024 * 1024
_INFLATED_BYTES = 1024 * 1024


def _translated(error: httpx2.TransportError | httpx2.InvalidURL, name: str, *, answered: bool) -> GatewayError:
    """Turns a transport's exception into the gateway's; the one place where that mapping stands.

    Args:
        answered: The reply's head was there.
    """
    match error:
        case httpx2.ConnectTimeout():
            return UpstreamTimeout(f"The upstream {name} did not accept a connection in time.", phase="connect")
        case httpx2.InvalidURL():
            return Unavailable(f"The upstream {name} has an address that cannot be used: {error}.")
        case httpx2.ConnectError():
            return Unavailable(f"The upstream {name} cannot be reached: {str(error) or type(error).__name__}.")
        case NotHttp() if answered:
            return ProtocolViolation(f"The upstream {name} sent an answer that is not HTTP: {error}.")
        case httpx2.RemoteProtocolError() if answered:
            return Truncated(f"The upstream {name} cut its answer: {error}.")
        case httpx2.RemoteProtocolError() if "disconnected" in str(error):  # there is no exception of its own for it
            return Unavailable(f"The upstream {name} closed the connection before it answered.", reachable=True)
        case httpx2.RemoteProtocolError():
            return ProtocolViolation(f"The upstream {name} did not answer with HTTP: {error}.")
        case _ if answered:
            return Truncated(f"The upstream {name} broke the connection in its answer.")
        case _:
            return Unavailable(f"The upstream {name} broke the connection before it answered.", reachable=True)


class _Source(Protocol):
    """Where a reply comes from: a transport of our own, or any other."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names in lower case."""

    @property
    def response(self) -> Response | None:
        """The transport's own."""

    async def receive(self) -> bytes | None:
        """The next piece of the body; None at its end."""

    async def aclose(self) -> None:
        """Gives the connection back, or closes it."""


class _SocketSource:
    """A response of `transport`, whose connection the ``async with`` of `_Opening` owns."""

    __slots__ = ("headers", "receive", "release", "response", "status")

    def __init__(self, opening: Opening, response: Response) -> None:
        self.release = opening.release
        self.response = response
        self.receive = response.receive
        self.status = response.status
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}

    async def aclose(self) -> None:  # noqa: ASYNC910 - a socket is closed at once
        self.release()


class Httpx2Source:
    """A response of any transport that speaks `httpx2`: the echo, a proxy, HTTP/2, a script in a test."""

    response: Response | None = None

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers = response.headers
        self._pieces = aiter(response.stream)  # type: ignore[arg-type]  # an async transport's is an async stream

    async def receive(self) -> bytes | None:
        async for piece in self._pieces:
            if piece:
                return bytes(piece)
        return None

    async def aclose(self) -> None:
        with trio.move_on_after(_CLOSE_GRACE_S, shield=True):
            close_pieces = getattr(self._pieces, "aclose", None)
            if close_pieces is not None:
                await close_pieces()
            await self._response.aclose()


class Reply:
    """An upstream's answer: its head, and its body piece by piece.

    Attributes:
        status: The HTTP status.
        content_type: Without parameters, lower-case.
    """

    def __init__(self, name: str, source: _Source) -> None:
        self._name = name
        self._source = source
        self.status = source.status
        self.headers = source.headers
        self.content_type = source.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._encoding = source.headers.get("content-encoding", "identity").strip().lower()
        # Identity was asked for; a provider that compresses all the same is decoded, a bounded piece at a time.
        self._inflate = zlib.decompressobj(wbits=47) if self._encoding in ("gzip", "x-gzip", "deflate") else None
        self._deflated = b""

    @property
    def plain_response(self) -> Response | None:
        """The response, where a relay may read its socket itself: nothing stands between the two."""
        response = self._source.response
        return response if response is not None and response.socket is not None and self._inflate is None else None

    def abandon(self) -> None:
        """Closes the connection at once, from whichever task, if it is the transport's own."""
        if self._source.response is not None:
            self._source.response.abandon()

    def cut_error(self, failure: httpx2.TransportError) -> GatewayError:
        """What it means that the transport failed in the body."""
        return _translated(failure, self._name, answered=True)

    async def receive(self) -> bytes | None:
        """Returns the next piece of the body; None at its end.

        Raises:
            Truncated: The connection broke, or the framing says that more was to come.
        """
        if self._inflate is None:
            return await self._receive_raw()
        while True:
            deflated = self._deflated or await self._receive_raw()
            if deflated is None:
                if not self._inflate.eof:
                    raise Truncated(f"The upstream {self._name} cut its compressed answer.")
                return None  # noqa: ASYNC910 - its end was received
            try:
                piece = self._inflate.decompress(deflated, _INFLATED_BYTES)
            except zlib.error as error:
                raise ProtocolViolation(
                    f"The upstream {self._name} sent a body that cannot be decoded: {error}."
                ) from None
            self._deflated = self._inflate.unconsumed_tail
            if piece:
                return piece  # noqa: ASYNC910 - more of what was received

    async def _receive_raw(self) -> bytes | None:
        if self._encoding != "identity" and self._inflate is None:
            raise ProtocolViolation(f"The upstream {self._name} sent a body encoded as {self._encoding[:50]!r}.")
        try:
            return await self._source.receive()
        except httpx2.TransportError as error:
            raise self.cut_error(error) from error

    async def read(self, max_bytes: int, *, on_piece: Callable[[], None] = lambda: None) -> bytes:
        """Returns the whole body.

        Args:
            on_piece: Told of each piece as it comes.

        Raises:
            ProtocolViolation: It is larger than ``max_bytes``.
            Truncated: As `receive`.
        """
        response = self._source.response
        if response is not None and response.complete and self._inflate is None and self._encoding == "identity":
            on_piece()
            body = b"".join(response.pieces)  # it came with its head, as most short answers do
            response.pieces.clear()
            if len(body) <= max_bytes:
                return body  # noqa: ASYNC910 - it was there
            raise ProtocolViolation(f"The upstream {self._name} answered with more than {max_bytes} bytes.")
        pieces = []
        size = 0
        while (piece := await self.receive()) is not None:
            on_piece()
            size += len(piece)
            if size > max_bytes:
                raise ProtocolViolation(f"The upstream {self._name} answered with more than {max_bytes} bytes.")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def aclose(self) -> None:  # noqa: ASYNC910 - closing twice does nothing
        """Closes the stream, and the connection too unless the body was read to its end. Never hangs, may be called
        twice, and from another task than the one that reads as long as that one is not inside `receive`."""
        if isinstance(self._source, _SocketSource):
            self._source.release()
            return  # noqa: ASYNC910 - at once
        with contextlib.suppress(httpx2.TransportError, OSError):
            await self._source.aclose()


@attrs.frozen(kw_only=True)
class UpstreamStatistics:
    """A moment of an upstream.

    Attributes:
        state: ``disabled`` (by its configuration), ``down`` (it failed last), ``up``, or ``unknown`` (nothing yet).
        reason: Why, if it is disabled or down.
    """

    name: str
    kind: str
    state: str
    reason: str | None
    in_flight: int
    queued: int
    max_connections: int
    models: int
    last_error: str | None
    last_error_at: float | None


class Upstream:
    """A provider that calls can be sent to. Made by the gateway, one for each ``[upstreams.NAME]``.

    Args:
        local_model: The process behind kind ``local``.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        transport: httpx2.AsyncBaseTransport,
        *,
        local_model: LocalModel | None = None,
        unusable: str | None = None,
    ) -> None:
        self.name = name
        self.config: UpstreamConfig = config.upstreams[name]
        self.transport = transport
        self.unusable = unusable or config.disabled.get(name)
        self.models: tuple[str, ...] = self.config.models if self.config.models != "discover" else ()
        values = (value.removeprefix("Bearer ") for value in config.secrets.get(name, {}).values())
        self._secrets = tuple(value for value in values if len(value) >= 8)  # a short one is any word
        self._headers = {
            "accept-encoding": "identity",
            "user-agent": "trigate",
            **config.secrets.get(name, {}),
        }
        self._local_model = local_model
        self._connect_timeout_s = config.timeout_s(name, "connect")
        self._queue_timeout_s = config.timeout_s(name, "queue")
        self._places = FairLimiter(self.config.max_connections)
        self._address: _Address | None = None
        self.state = "unknown"
        self.reason: str | None = None
        self.watched = False
        """Somebody asks it for its models again and again, and so keeps its state fresh."""
        self._down_at = -math.inf
        self.last_error: str | None = None
        self.last_error_at: float | None = None

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.state}, {self.in_flight} in flight>"

    def known(self) -> Known:
        """What routing needs of it."""
        default = self.config.default_model or (self.models[0] if self.models else None)
        return Known(
            models=self.models,
            default_model=default,
            unusable=self.unusable,
            down=self._down(),
            stands_in=self.config.kind == "echo",
        )

    def _down(self) -> str | None:
        if self.state == "down" and not self.watched and trio.current_time() - self._down_at >= _DOWN_S:
            # Nobody asks it regularly, so a failure says nothing about later.
            self.state, self.reason = "unknown", None
        return self.reason if self.state == "down" else None

    def note_up(self) -> None:
        """Remembers that it has just served."""
        self.state, self.reason = "up", None

    def note_down(self, error: GatewayError) -> None:
        """Remembers that it could not be reached, or refused its credentials."""
        self.note_error(error)
        self.state, self.reason = "down", error.message
        self._down_at = trio.current_time()

    def note_error(self, error: GatewayError) -> None:
        """Remembers its last error; whether it is down is another question."""
        self.last_error, self.last_error_at = error.message, time.time()

    def statistics(self) -> UpstreamStatistics:
        """Returns a snapshot."""
        self._down()
        return UpstreamStatistics(
            name=self.name,
            kind=self.config.kind,
            state="disabled" if self.unusable else self.state,
            reason=self.unusable or self.reason,
            in_flight=self.in_flight,
            queued=self._places.queued,
            max_connections=self.config.max_connections,
            models=len(self.models),
            last_error=self.last_error,
            last_error_at=self.last_error_at,
        )

    async def _base_url(self) -> str:
        if self._local_model is None:
            return self.config.base_url or "http://echo.invalid/v1"  # noqa: ASYNC910 - known
        try:
            return await self._local_model.wait_listening()
        except LocalModelUnavailable as error:
            raise Unavailable(str(error), status=503) from error

    @property
    def in_flight(self) -> int:
        """How many have a place."""
        return self._places.taken

    def queue_position(self, owner: str, task: trio.lowlevel.Task) -> int | None:
        """At which place a task waits among its owner's, from 1; None = it does not."""
        return self._places.position(owner, task)

    async def _take_place(self, owner: str) -> None:
        if self._places.acquire_nowait(owner):
            return  # noqa: ASYNC910 - there was one
        with trio.move_on_after(self._queue_timeout_s) as queue:
            await self._places.acquire(owner)
            return
        if queue.cancelled_caught:
            raise UpstreamTimeout(
                f"The upstream {self.name} has {self.config.max_connections} calls in flight, "
                f"and no place came free within {self._queue_timeout_s:g} s.",
                phase="queue",
            )

    def open(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        owner: str = "",
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> AbstractAsyncContextManager[Reply]:
        """Sends a request and owns its reply for as long as the block lasts.

        Args:
            path: Below the upstream's base URL, with its leading slash.
            owner: Whose it is: places go round the owners.
            on_phase: Told ``queued``, ``connecting`` (until the reply's head is there), and nothing after that.

        Raises:
            UpstreamTimeout: No place in time, or no connection in time.
            Unavailable: No connection; or it broke before a reply.
            ProtocolViolation: The reply is not HTTP.

        **Cancels:** at any point; place and connection are given back.
        """
        return _Request(self, method, path, body, headers or {}, owner, on_phase)

    async def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> _Source:
        base_url = await self._base_url()
        try:
            if isinstance(self.transport, SocketTransport):
                address = self._address
                if address is None or base_url != address.base_url:
                    address = self._address = _Address.of(base_url)
                opening = self.transport.open(
                    address.origin,
                    _serialized(method, address, path, {**self._headers, **headers}, body),
                    method=method,
                    connect_timeout_s=self._connect_timeout_s,
                )
                return _SocketSource(opening, await opening.__aenter__())
            request = httpx2.Request(
                method,
                base_url + path,
                headers={**self._headers, **headers},
                content=body,
                extensions={"timeout": {"connect": _finite(self._connect_timeout_s)}},
            )
            return Httpx2Source(await self.transport.handle_async_request(request))
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise _translated(error, self.name, answered=False) from error

    async def error_of(self, reply: Reply) -> GatewayError:
        """Reads an error reply and returns (not raises) what it means."""
        try:
            body = await reply.read(_MAX_ERROR_BODY_BYTES)
        except (Truncated, ProtocolViolation):
            body = b""
        error = self._meaning(reply, body)
        error.redact(self._secrets)
        return error  # noqa: ASYNC910 - it was received

    def _meaning(self, reply: Reply, body: bytes) -> GatewayError:
        status, said = reply.status, upstream_message(body)
        after_s = retry_after_s(reply.headers, now_epoch_s=time.time())
        passed: tuple[Header, ...] = tuple(
            (name.encode(), reply.headers[name].encode())
            for name in (_RETRY_AFTER if after_s is not None else ()) + _RESETS
            if _A_TIME.fullmatch(reply.headers.get(name, ""))
        )
        if status == 429:
            throttled = Throttled(self.name, status, body, headers=passed)
            throttled.retry_after_s = after_s
            return throttled
        if 400 <= status < 500:
            rejected = Rejected(self.name, status, body, headers=passed)
            rejected.retry_after_s = after_s
            return rejected
        if status in (503, 529):
            return Unavailable(
                f"The upstream {self.name} is overloaded or down ({status}){said}",
                status=503,
                reachable=True,
                retry_after_s=after_s,
            )
        if 500 <= status < 600:
            return Unavailable(
                f"The upstream {self.name} failed ({status}){said}", reachable=True, retry_after_s=after_s
            )
        return ProtocolViolation(f"The upstream {self.name} answered with status {status}.")


class _Request:
    """A place, a request, a reply; and all given back. Written out, as generators would cost more than the rest."""

    __slots__ = ("_body", "_headers", "_method", "_on_phase", "_owner", "_path", "_reply", "_upstream")

    def __init__(
        self,
        upstream: Upstream,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        owner: str,
        on_phase: Callable[[str], None],
    ) -> None:
        self._owner = owner
        self._upstream = upstream
        self._method = method
        self._path = path
        self._body = body
        self._headers = headers
        self._on_phase = on_phase
        self._reply: Reply

    async def __aenter__(self) -> Reply:
        upstream = self._upstream
        try:
            self._on_phase("queued")
            await upstream._take_place(self._owner)
            try:
                self._on_phase("connecting")
                self._reply = Reply(upstream.name, await self._send())
            except BaseException:
                upstream._places.release(self._owner)
                raise
        except GatewayError as error:
            error.redact(upstream._secrets)
            raise
        return self._reply

    async def _send(self) -> _Source:
        upstream = self._upstream
        try:
            return await upstream._send(self._method, self._path, self._body, self._headers)
        except Unavailable:
            if upstream._local_model is None:
                raise
        # Out of the handler: an error that has been dealt with is not part of the next one.
        await trio.sleep(_DEATH_NOTICED_S)  # its process has just died: the next one has another port
        return await upstream._send(self._method, self._path, self._body, self._headers)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._reply.aclose()
        finally:
            self._upstream._places.release(self._owner)
        if isinstance(error, GatewayError):
            error.redact(self._upstream._secrets)


@attrs.frozen
class _Address:
    """A base URL, taken apart once."""

    base_url: str
    origin: Origin
    path: str
    netloc: str

    @classmethod
    def of(cls, base_url: str) -> _Address:
        """Raises httpx2.InvalidURL as `Origin.of` does."""
        url = httpx2.URL(base_url)
        path = url.raw_path.decode("ascii")
        return cls(base_url, Origin.of(url), "" if path == "/" else path, url.netloc.decode("ascii"))


def _serialized(method: str, address: _Address, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """The request as it goes out. The values come from a validated configuration and a parsed request: no line ends."""
    lines = [f"{method} {address.path}{path} HTTP/1.1\r\nhost: {address.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body or method != "GET":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _finite(seconds: float) -> float | None:
    return None if seconds == float("inf") else seconds
