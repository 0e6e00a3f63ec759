"""One upstream: acquires a slot, sends a request, and owns the reply until it is closed.

`Upstream.open` is the only way to a reply, and it is an ``async with``: slot, connection and stream are released where
the block ends. Below it lies either our own pool of connections (`SocketTransport.pool`, used directly, since to build
and take apart `httpx2`'s requests and responses costs as much as everything else), or any other
`httpx2.AsyncBaseTransport`: the embedded echo, a proxy, a script in a test.

Deadlines are cancel scopes of the caller, except for the connect timeout, which only the transport can tell from other
waiting, and the queue timeout.

An upstream knows no dialect: it sends the method, path and body that it is given, and judges a reply by its HTTP
status. Only `Upstream.error_of` reads a body, for the provider's message; a body in an unknown dialect is an error
without one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import httpx2
import trio

from trigate.concurrency.fair_limiter import FairLimiter
from trigate.config.sections import Config, UpstreamConfig
from trigate.errors import (
    GatewayError,
    ProtocolViolation,
    Rejected,
    Truncated,
    Unavailable,
    Unsupported,
    UpstreamTimeout,
)
from trigate.openai.body_edits import edits_of
from trigate.openai.model_fields import max_output_tokens
from trigate.openai.native_responses import responses_mode_of
from trigate.routing.routes import Known
from trigate.upstream import azure
from trigate.upstream.address import Address, constant_headers, url_of
from trigate.upstream.auth.credentials import RequestAuth
from trigate.upstream.error_body import error_for
from trigate.upstream.local_model.process import LocalModel, LocalModelUnavailable
from trigate.upstream.pool import ConnectionPool
from trigate.upstream.reply import Httpx2Source, Reply, SocketSource, Source, translated
from trigate.upstream.request_stream import RequestStream, StreamContent, length_field
from trigate.upstream.transport import SocketTransport

if TYPE_CHECKING:
    from trigate.upstream.websocket import WebSocketReply

_DOWN_S = 10.0
_EXIT_NOTICED_S = 0.2
_MAX_ERROR_BODY_BYTES = 1024 * 1024
_LARGE_BYTES = 1024 * 1024
_MIN_SECRET_CHARS = 8


@attrs.frozen(kw_only=True)
class UpstreamStatistics:
    """A snapshot of an upstream.

    Attributes:
        state: ``disabled`` (by its configuration), ``down`` (it could not be reached, or refused its credentials),
            ``up``, or ``unknown`` (not called yet, or a failure that is too old to say anything).
        reason: Why the upstream is disabled or down; else None.
        in_flight: The number of calls that hold a slot.
        queued: The number of calls that wait for a slot.
        max_connections: The number of slots.
        models: The number of models that it lists.
        last_error: The message of the last error, which stays after a success.
        last_error_at: When that error occurred, in seconds since the epoch.
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
    """A provider that calls can be sent to. `generation.open_generation` makes one for each ``[upstreams.NAME]``.

    Args:
        transport: How requests are sent. The owner closes it.
        local_model: The process behind kind ``local``.
        unusable: Why no call can be sent to it; None = the configuration decides.
        default_models: The models that it serves if the configuration lists none.
        auth: Adds to each request what proves who sends it, where constant headers are not enough.

    Attributes:
        models: The models that it serves; empty until a discovery has succeeded.
        model_fields: What it says about them.
        state: ``up``, ``down`` or ``unknown``.
        reason: Why it is down.
        auth: As given.
        edits: What its configuration changes in requests; None = nothing.
        responses: How response calls go to it; ``discover`` until it has answered the first one.
        polled: Whether the upstream is asked for its models regularly, which keeps its state fresh.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        transport: httpx2.AsyncBaseTransport,
        *,
        local_model: LocalModel | None = None,
        unusable: str | None = None,
        default_models: tuple[str, ...] = (),
        auth: RequestAuth | None = None,
    ) -> None:
        self.name = name
        self.config: UpstreamConfig = config.upstreams[name]
        self.transport = transport
        self.unusable = unusable or config.disabled.get(name)
        configured = self.config.models if self.config.models != "discover" else ()
        self.models: tuple[str, ...] = configured or default_models
        self.model_fields: Mapping[str, Mapping[str, Any]] = {}
        # of all upstreams: what one provider says of a key may be about another one's
        values = (value.removeprefix("Bearer ") for own in config.secrets.values() for value in own.values())
        # a short secret is an ordinary word, whose redaction would garble messages
        self._secrets = tuple(value for value in values if len(value) >= _MIN_SECRET_CHARS)
        self._headers = {**constant_headers(self.config), **config.secrets.get(name, {})}
        self._fields = _fields(self._headers)
        self.edits = edits_of(self.config)
        self._pool: ConnectionPool | None = transport.pool if isinstance(transport, SocketTransport) else None
        self._local_model = local_model
        self.auth = auth
        self._url = url_of(self.config)
        self._api_version = self.config.api_version
        self._connect_timeout_s = config.timeout_s(name, "connect")
        self._queue_timeout_s = config.timeout_s(name, "queue")
        self._resend = config.retries.resend != "never"
        self._slots = FairLimiter(self.config.max_connections)
        self._address: Address | None = None
        self.state = "unknown"
        self.reason: str | None = None
        self.polled = False
        self.responses = self.config.responses or responses_mode_of(self.config.kind, self.config.base_url)
        self._down_at = -math.inf
        self.last_error: str | None = None
        self.last_error_at: float | None = None

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.state}, {self.in_flight} in flight>"

    # -- its state

    def known(self) -> Known:
        """Returns what routing needs to know of the upstream."""
        default = self.config.default_model or (self.models[0] if self.models else None)
        return Known(
            models=self.models,
            default_model=default,
            unusable=self.unusable,
            down=self._down(),
            stands_in=self.config.kind == "echo",
            lacks_endpoints=self.config.kind in ("anthropic", "gemini", "vertex"),
            passes=self.config.kind == "openai" or (self.config.kind == "azure" and self.config.api_version is None),
            endpoints=self.config.endpoints,
        )

    def max_output_tokens(self, model: str) -> int | None:
        """Returns the most tokens of an answer of a model, as configured (``model_info``) or listed; None = unknown."""
        return max_output_tokens(
            {**self.model_fields.get(model, {}), **self.config.model_info.get(model, {})},
            is_anthropic=self.config.kind == "anthropic",
        )

    def _down(self) -> str | None:
        if self.state == "down" and not self.polled and trio.current_time() - self._down_at >= _DOWN_S:
            # Without regular polling, an old failure says nothing about the present.
            self.state, self.reason = "unknown", None
        return self.reason if self.state == "down" else None

    def note_up(self) -> None:
        """Records that the upstream has just answered."""
        self.state, self.reason = "up", None

    def note_down(self, error: GatewayError) -> None:
        """Records that the upstream could not be reached, or refused its credentials."""
        self.note_error(error)
        self.state, self.reason = "down", error.message
        self._down_at = trio.current_time()

    def note_unlisted(self, error: GatewayError) -> None:
        """Records that the upstream answers, but not with a list of models: calls decide about its state."""
        self.note_error(error)
        if self.state == "down":
            self.state, self.reason = "unknown", None

    def note_failure(self, error: GatewayError) -> None:
        """Records the failure of an attempt."""
        is_unreachable = isinstance(error, Unavailable) and not error.reachable
        refuses_key = isinstance(error, Rejected) and error.status == 401
        if is_unreachable or refuses_key or (isinstance(error, UpstreamTimeout) and error.phase == "connect"):
            self.note_down(error)
        elif error.blame == "provider":
            self.note_error(error)

    def note_error(self, error: GatewayError) -> None:
        """Records the last error, without a change of the state."""
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
            queued=self._slots.queued,
            max_connections=self.config.max_connections,
            models=len(self.models),
            last_error=self.last_error,
            last_error_at=self.last_error_at,
        )

    # -- its slots

    @property
    def in_flight(self) -> int:
        """The number of calls that hold a slot."""
        return self._slots.taken

    def queue_position(self, owner: str, task: trio.lowlevel.Task) -> int | None:
        """Returns the position of a waiting task among those of its owner, from 1; None if it does not wait."""
        return self._slots.position(owner, task)

    async def _acquire_slot(self, owner: str) -> None:
        if self._slots.acquire_nowait(owner):
            return
        with trio.move_on_after(self._queue_timeout_s) as queue:
            await self._slots.acquire(owner)
            return
        if queue.cancelled_caught:
            raise UpstreamTimeout(
                f"The upstream {self.name} has {self.config.max_connections} calls in flight, "
                f"and no slot became free within {self._queue_timeout_s:g} s.",
                phase="queue",
            )

    # -- requests

    def open(
        self,
        method: str,
        path: str,
        body: bytes | RequestStream = b"",
        *,
        headers: Mapping[str, str] | None = None,
        model: str = "",
        owner: str = "",
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> AbstractAsyncContextManager[Reply]:
        """Sends a request and owns its reply for as long as the block lasts.

        Args:
            path: The path below the upstream's base URL, with its leading slash.
            body: The whole body; or a stream, which is sent as it arrives, and once.
            headers: Fields in addition to those of the configuration, which they override.
            model: The upstream's own id of the model that the request is for, if it is for one.
            owner: The owner of the call. Free slots go round the owners.
            on_phase: Called with ``queued``, then with ``connecting``, which lasts until the head of the reply.

        Raises:
            UpstreamTimeout: No slot in time, or no connection in time.
            Unavailable: No connection, or it broke before a reply.
            ProtocolViolation: The reply is not HTTP.

        **Cancels:** at any point; slot and connection are released.
        """
        if self._api_version is not None:
            path = azure.path_in(self._api_version, path, model)
        return _OpenReply(self, method, path, body, headers or {}, owner, on_phase)

    @asynccontextmanager
    async def open_websocket(
        self,
        path: str,
        *,
        headers: Mapping[str, str],
        subprotocols: Sequence[str],
        max_bytes: int,
        owner: str,
        on_phase: Callable[[str], None],
    ) -> AsyncIterator[WebSocketReply]:
        """Opens a WebSocket, and owns it for as long as the block lasts.

        Args:
            subprotocols: Those that the client offers.
            max_bytes: The largest message.

        Yields:
            The reply to the handshake, which may be a refusal. The other arguments, and errors, are those of `open`.

        Raises:
            Unsupported: The upstream is reached by something else than our own connections.
        """
        from trigate.upstream.websocket import open_websocket  # here: its library takes long to import, and few use it

        try:
            if self._pool is None:
                reason = f"The upstream {self.name} is reached through a proxy or by HTTP/2, without WebSockets."
                raise Unsupported(reason, status=501)
            on_phase("queued")
            await self._acquire_slot(owner)
            try:
                on_phase("connecting")
                address = await self._find_address()
                proof = await self.auth.headers("GET", address.netloc, address.path + path, b"") if self.auth else {}
                async with open_websocket(
                    self._pool,
                    address.origin,
                    name=self.name,
                    host=address.netloc,
                    target=address.path + path,
                    headers={**self._headers, **headers, **proof},
                    subprotocols=subprotocols,
                    connect_timeout_s=self._connect_timeout_s,
                    max_bytes=max_bytes,
                ) as reply:
                    yield reply
            finally:
                self._slots.release(owner)
        except GatewayError as error:
            self._redact(error)
            raise

    def at_root(self) -> Upstream:
        """Returns the same upstream, with the same slots and connections, below whose base URL there is no version."""
        other = copy.copy(self)
        other._url, other._address = self._url.removesuffix("/v1"), None
        return other

    async def _find_address(self) -> Address:
        """Returns the address of the upstream. Raises Unavailable."""
        base_url = await self._base_url()
        if self._address is None or base_url != self._address.base_url:
            try:
                self._address = Address.of(base_url)
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                raise translated(error, self.name, answered=False) from error
        return self._address

    async def _base_url(self) -> str:
        if self._local_model is None:
            return self._url
        try:
            return await self._local_model.wait_listening()
        except LocalModelUnavailable as error:
            raise Unavailable(str(error), status=503) from error

    async def _send(self, method: str, path: str, body: bytes | RequestStream, headers: Mapping[str, str]) -> Source:
        address = await self._find_address()
        try:
            if self.auth is not None:
                signed = body if isinstance(body, bytes) else b""  # no such scheme signs an upload
                proof = await self.auth.headers(method, address.netloc, address.path + path, signed)
                headers = {**headers, **proof}
            if self._pool is not None:
                stream = body if not isinstance(body, bytes) else None
                if isinstance(body, bytes) and len(body) > _LARGE_BYTES:  # it has just been copied, and is copied again
                    await trio.lowlevel.checkpoint()
                opening = self._pool.open(
                    address.origin,
                    self._serialized(method, address, path, headers, body),
                    method=method,
                    connect_timeout_s=self._connect_timeout_s,
                    resend=self._resend,
                    stream=stream,
                )
                return SocketSource(opening, await opening.__aenter__())
            if not isinstance(body, bytes) and body.length_bytes is not None:
                headers = {**headers, "content-length": str(body.length_bytes)}
            request = httpx2.Request(
                method,
                address.base_url + path,
                headers={**self._headers, **headers},
                content=body if isinstance(body, bytes) else StreamContent(body),
                extensions={"timeout": {"connect": _finite(self._connect_timeout_s)}},
            )
            return Httpx2Source(await self.transport.handle_async_request(request))
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise translated(error, self.name, answered=False) from error

    def _serialized(
        self, method: str, address: Address, path: str, headers: Mapping[str, str], body: bytes | RequestStream
    ) -> bytes:
        """Returns the request as it is sent, head and body; of a stream, the head.

        The values come from a validated configuration and from a parsed request, so they contain no line breaks."""
        if self._headers.keys().isdisjoint(headers):
            fields = self._fields + _fields(headers)
        else:
            fields = _fields({**self._headers, **headers})
        if body or method != "GET":
            fields += length_field(body)
        head = f"{method} {address.path}{path} HTTP/1.1\r\nhost: {address.netloc}\r\n{fields}\r\n"
        return head.encode("latin-1") + (body if isinstance(body, bytes) else b"")

    # -- error replies

    async def error_of(self, reply: Reply) -> GatewayError:
        """Reads an error reply and returns (does not raise) its error, without the upstream's secrets."""
        try:
            body = await reply.read(_MAX_ERROR_BODY_BYTES)
        except (Truncated, ProtocolViolation):
            body = b""  # the status alone decides
        error = error_for(self.name, self.config.kind, reply.status, reply.headers, body, now_epoch_s=time.time())
        if self.auth is not None and reply.status in (401, 403):
            self.auth.note_refused()
        self._redact(error)
        return error

    def _redact(self, error: GatewayError) -> None:
        error.redact(self._secrets if self.auth is None else self._secrets + self.auth.secrets)


@attrs.define(eq=False)
class _OpenReply:
    """The ``async with`` of `Upstream.open`: a slot, a request and a reply, all released at its end.

    It is a class, since a generator would cost more than the rest.
    """

    _upstream: Upstream
    _method: str
    _path: str
    _body: bytes | RequestStream = attrs.field(repr=False)
    _headers: Mapping[str, str] = attrs.field(repr=False)
    _owner: str
    _on_phase: Callable[[str], None]
    _reply: Reply = attrs.field(init=False, repr=False)

    async def __aenter__(self) -> Reply:
        upstream = self._upstream
        try:
            self._on_phase("queued")
            await upstream._acquire_slot(self._owner)
            try:
                self._on_phase("connecting")
                self._reply = Reply(upstream.name, await self._send())
            except BaseException:
                upstream._slots.release(self._owner)
                raise
        except GatewayError as error:
            upstream._redact(error)
            raise
        return self._reply

    async def _send(self) -> Source:
        upstream = self._upstream
        try:
            return await upstream._send(self._method, self._path, self._body, self._headers)
        except Unavailable as error:
            if upstream._local_model is None or error.sent:
                raise
        # Retry outside `except`, so that the first error is not chained to the second. The local model's process has
        # probably just exited: once that has been noticed, the next process listens on another port.
        await trio.sleep(_EXIT_NOTICED_S)
        return await upstream._send(self._method, self._path, self._body, self._headers)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._reply.aclose()
        finally:
            self._upstream._slots.release(self._owner)
        if isinstance(error, GatewayError):
            self._upstream._redact(error)


def _fields(headers: Mapping[str, str]) -> str:
    """Formats header fields, each with its line end."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _finite(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds
