"""One client connection: HTTP/1.1 (`http1`), or, where TLS has agreed on it, HTTP/2 by hypercorn's protocol class.

`H2Protocol` and its `HTTPStream` are hypercorn's (its version is pinned: this room touches their insides). What drives
them is here, as hypercorn's own Trio connection can wait for itself when an app answers early, and never lets go of a
stalled peer. The rules for HTTP/2:

- **Whoever reads ends the connection.** Other tasks half-close it and leave the rest to the reader, which discards
  what still arrives (window updates, at the least), within bounds: closing a socket that has unread input sends a
  reset, and a reset may overtake the last response.
- **A send happens as a whole or not at all**: an app that is cancelled gets `trio.Cancelled` at the
  beginning of a send, or after it. In between it is shielded, as half a message spoils the connection. A
  task that sends to a peer which does not read is therefore only freed from outside, by `Connection.abort`.
- **There is no timer task.** A connection that is idle has a deadline on its read; that is the keep-alive timeout and
  the drain in one.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeAlias, cast

import attrs
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_LOW_WATER, H2Protocol, StreamBuffer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup
from hypercorn.utils import UnexpectedMessageError

from trigate.concurrency.poller import Poller
from trigate.concurrency.timers import Timers, open_timers
from trigate.config.sections import ServerConfig
from trigate.errors import Internal
from trigate.server import http1, request_head
from trigate.server.http1 import Address, Application, Message, Send, refusal
from trigate.server.request_head import HeadRefused

log = structlog.get_logger("trigate.server.server")

_Put: TypeAlias = Callable[[Message | None], Awaitable[None]]

READ_BYTES = 64 * 1024
HANDSHAKE_TIMEOUT_S = 10.0
LINGER_S = 2.0
"""How long input is discarded after the last response of a connection."""
LINGER_BYTES = 1024 * 1024
_GOODBYE = struct.pack(">HBBBLLL", 0, 8, 7, 0, 0, 2**31 - 1, 0)
"""A GOAWAY frame of HTTP/2 that takes nothing back: any stream may still be served, and nothing is wrong."""
QUEUED_MESSAGES = 10
"""How many pieces of a request body wait for the app before the connection is read no further."""


class _Buffer(StreamBuffer):
    """hypercorn's buffer of a response, but its app waits also while the client's window is shut."""

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        return data  # noqa: ASYNC910 - nothing may happen between this and what is done with the data

    async def note_sent(self) -> None:  # noqa: ASYNC910 - it waits for nothing
        """Lets go of an app that waits until everything is sent."""
        if not self.buffer:
            await self._is_empty.set()


class _Http2(H2Protocol):
    """HTTP/2 (over TLS only) without WebSockets, and without the requests that hypercorn dies of."""

    def __init__(self, *args: Any) -> None:  # Any: handed on as they are
        super().__init__(*args)
        codes = h2.settings.SettingCodes
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: self.config.h2_max_concurrent_streams,
                codes.MAX_HEADER_LIST_SIZE: self.config.h2_max_header_list_size,
            },
        )

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Body):
            # Nothing below need wait; an app that goes on sending after the end would never be cancelled.
            await trio.lowlevel.checkpoint()
        await super().stream_send(event)

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()  # else an app that waits for room in it waits for ever

    async def _send_data(self, stream_id: int) -> None:  # noqa: ASYNC910 - there may be nothing to send
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None:
            self.priority.block(stream_id)  # a PRIORITY frame has made it known, and nothing else has
        else:
            await super()._send_data(stream_id)
        if isinstance(buffer, _Buffer):
            await buffer.note_sent()  # only now: in a drain, the connection ends with the last app

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self._stop_upload(event)
                continue
            await super()._handle_events([event])
            if isinstance(event, h2.events.RequestReceived | h2.events.StreamReset) and self.idle:
                await self.send(Updated(idle=True))
        await self._flush()

    def _stop_upload(self, event: h2.events.DataReceived) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.NO_ERROR)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        try:
            request_head.examine_h2(request.headers)
        except HeadRefused as error:
            log.debug("request_refused", status=error.status, reason=error.message, client=self.client)
            _, headers, body = refusal(error)
            headers += [(b"content-length", b"%d" % len(body)), *self.config.response_headers("h2")]
            with suppress(h2.exceptions.ProtocolError):
                self.connection.send_headers(request.stream_id, [(b":status", b"%d" % error.status), *headers])
                self.connection.send_data(request.stream_id, body, end_stream=True)
            await self._flush()
        else:
            await super()._create_stream(request)
            # The app has only been scheduled: nothing is in the other buffer yet.
            self.stream_buffers[request.stream_id] = _Buffer(self.context.event_class)


@attrs.define(eq=False)
class _AppTasks:
    """Runs the app for the protocol classes, in the place of hypercorn's ``TaskGroup``.

    Unlike there, the end of a request never waits: a disconnect needs no room in the queue, and once
    the app has returned, its input is dropped. (Else an app that answers before it has read a long
    body waits for itself.)
    """

    _nursery: trio.Nursery

    def spawn(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(function, *args)

    async def spawn_app(self, app: AppWrapper, config: HypercornConfig, scope: Message, send: _Put) -> Send:
        to_app, inbox = trio.open_memory_channel[Message](config.max_app_queue_size)

        async def put(message: Message) -> None:  # noqa: ASYNC910 - an end must not wait
            if message["type"] == "http.disconnect":
                to_app.close()
            else:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await to_app.send(message)

        self._nursery.start_soon(self._run, cast(Application, app), scope, inbox, send)
        return put  # noqa: ASYNC910 - the request's body is put in before the app runs

    async def _run(
        self,
        app: Application,
        scope: Message,
        inbox: trio.MemoryReceiveChannel[Message],
        send: _Put,
    ) -> None:
        async def receive() -> Message:
            try:
                return await inbox.receive()
            except trio.EndOfChannel:
                await trio.lowlevel.checkpoint()
                return {"type": "http.disconnect"}

        crash: ExceptionGroup | None = None
        with inbox:
            try:
                await app(scope, receive, send)
            except* Exception as group:
                crash = group
        if crash is not None:
            log.error("app_crashed", method=scope["method"], path=scope["path"], exc_info=crash)
            await self._apologize(send)
        await send(None)

    async def _apologize(self, send: _Put) -> None:  # noqa: ASYNC910 - it sends, or has sent
        status, headers, body = Internal("The server failed on this request.").to_response()
        headers.append((b"content-length", b"%d" % len(body)))
        with suppress(UnexpectedMessageError):  # a response had begun; it stays cut off
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


@attrs.define(eq=False)
class Http2Service:
    """What connections share, where some of them may be HTTP/2.

    Args:
        http1: What they share anyway.
        config: hypercorn's; see `hypercorn_config`.
        context: hypercorn's; its ``terminated`` says that a drain has begun.
    """

    http1: http1.Service
    config: HypercornConfig
    context: WorkerContext = attrs.field(init=False, factory=lambda: WorkerContext(None))

    def begin_to_end(self) -> None:
        """Has every connection end by itself, as soon as its client knows of the end. See also `Connection.leave`."""
        self.http1.ending = True

    async def begin_drain(self) -> None:
        """Lets every connection end with what it is serving."""
        self.http1.ending = self.http1.draining = True
        await self.context.terminated.set()


@attrs.define(eq=False)
class Connection:
    """One connection, from its acceptance to its end.

    Args:
        service: What it shares with the others.
        stream: Owned. A `trio.SSLStream` makes it HTTPS, with HTTP/2 if the peer wants it.
        client: The peer's address, for the scope.
        server: This end's address, for the scope.
    """

    _service: Http2Service
    _stream: trio.abc.Stream
    client: Address | None = None
    server: Address | None = None
    _http1: http1.Connection | None = attrs.field(init=False, default=None)
    _protocol: _Http2 = attrs.field(init=False)
    _sending: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _receiving: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    _deadline: float = attrs.field(init=False, default=math.inf)
    _idle: bool = attrs.field(init=False, default=True)
    _speaks_http2: bool = attrs.field(init=False, default=False)
    _has_said_goodbye: bool = attrs.field(init=False, default=False)
    _ending: bool = attrs.field(init=False, default=False)

    async def run(self) -> None:
        """Serves the connection until it is closed."""
        if isinstance(self._stream, trio.SSLStream):
            async with aclosing(self._stream):
                alpn = await self._shake_hands()
                if alpn == "h2":
                    await self._serve_http2()
                elif alpn is not None:
                    await self._serve_http1()
        else:
            await self._serve_http1()

    def close_if_idle(self) -> None:
        """Closes the connection unless it is serving a request."""
        if self._http1 is not None:
            self._http1.close_if_idle()
        elif self._idle:
            self._deadline = self._receiving.deadline = -math.inf

    async def leave(self) -> None:  # noqa: ASYNC910 - there may be nobody to tell
        """Tells a client that connections end (`Http2Service.begin_to_end`). HTTP/1.1 does that with its responses.

        An HTTP/2 client is told when it is waiting for nothing: some (httpcore) give up what they wait for then.
        """
        if self._speaks_http2 and self._idle:
            await self._say_goodbye()

    async def abort(self) -> None:
        """Closes the connection at once, whatever its tasks are doing."""
        if self._http1 is not None:
            await self._http1.abort()
        else:
            await trio.aclose_forcefully(self._stream)

    async def _shake_hands(self) -> str | None:
        assert isinstance(self._stream, trio.SSLStream)
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as self._receiving:
            try:
                await self._stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                log.debug("handshake_failed", client=self.client, reason=repr(error.__cause__ or error))
            else:
                return self._stream.selected_alpn_protocol() or "http/1.1"
        return None  # noqa: ASYNC910 - the handshake waits

    async def _serve_http1(self) -> None:
        self._http1 = http1.Connection(self._service.http1, self._stream, self.client, self.server)
        await self._http1.run()

    async def _serve_http2(self) -> None:
        async with trio.open_nursery() as nursery:
            service = self._service
            self._protocol = _Http2(
                cast(AppWrapper, service.http1.app),
                service.config,
                service.context,
                cast(TaskGroup, _AppTasks(nursery)),
                ConnectionState(dict(service.http1.state)),
                True,
                self.client,
                self.server,
                self._send,
            )
            await self._protocol.initiate()
            self._speaks_http2 = True
            self._set_idle(True)
            await self._read()

    async def _read(self) -> None:
        discarded = 0
        while discarded <= LINGER_BYTES:
            with trio.CancelScope(deadline=self._deadline) as self._receiving:
                try:
                    data = bytes(await self._stream.receive_some(READ_BYTES))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    break
            if self._receiving.cancelled_caught:
                break
            if self._ending:
                discarded += len(data)
            else:
                await self._protocol.handle(RawData(data))
            if not data:
                break
        await self._protocol.handle(Closed())
        if self._ending:
            await self._stream.aclose()

    async def _send(self, event: Event) -> None:  # noqa: ASYNC910 - becoming idle does not wait
        match event:
            case RawData(data=data):
                if not await self._write(data):
                    await self._protocol.handle(Closed())
            case Updated(idle=True) if not self._service.context.terminated.is_set():
                self._set_idle(True)
                if self._service.http1.ending:
                    await self._say_goodbye()
            case Updated(idle=False):
                self._set_idle(False)
            case _:
                await self._end()
                await self._protocol.handle(Closed())

    async def _end(self) -> None:  # noqa: ASYNC910 - the first to come does it
        if not self._ending:
            self._ending = True
            self._deadline = self._receiving.deadline = trio.current_time() + LINGER_S
            if not self._sending.locked():  # else `_write` does it
                await self._half_close()

    async def _say_goodbye(self) -> None:  # noqa: ASYNC910 - once
        """Asks the client to make its next request on another connection. What it has sent already is served.

        **Source:** RFC 9113, section 6.8: the first of two GOAWAY frames; here the second is the end of the connection.
        """
        if not self._has_said_goodbye and not self._ending:
            self._has_said_goodbye = True
            self._set_idle(self._idle)
            await self._write(_GOODBYE)

    async def _write(self, data: bytes) -> bool:
        # The lock is under the shield too: the protocol counts these bytes as sent already.
        with trio.CancelScope(shield=True):
            async with self._sending:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return False
                if self._ending and not self._sending.statistics().tasks_waiting:
                    await self._half_close()
        return True

    async def _half_close(self) -> None:  # noqa: ASYNC910 - only some streams can
        stream = self._stream
        transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        if isinstance(transport, trio.abc.HalfCloseableStream):
            with trio.CancelScope(shield=True), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await transport.send_eof()

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        if self._ending:
            return
        if not idle:
            self._deadline = math.inf
        elif self._service.context.terminated.is_set():
            self._deadline = -math.inf
        else:
            timeout_s = LINGER_S if self._has_said_goodbye else self._service.config.keep_alive_timeout
            self._deadline = trio.current_time() + timeout_s
        self._receiving.deadline = self._deadline


def hypercorn_config(config: ServerConfig) -> HypercornConfig:
    """Makes hypercorn's configuration, as far as `Connection` needs one."""
    made = HypercornConfig()
    made.accesslog = made.errorlog = None
    made.include_server_header = False
    made.keep_alive_timeout = config.keep_alive_timeout_s
    made.keep_alive_max_requests = sys.maxsize  # HTTP/2 streams are cut when it is reached
    made.h2_max_header_list_size = request_head.MAX_FIELDS_BYTES
    made.max_app_queue_size = QUEUED_MESSAGES
    return made


def open_service(
    app: Application, config: ServerConfig, state: Mapping[str, Any], timers: Timers, poller: Poller | None = None
) -> Http2Service:
    """Makes what the connections of a server share.

    Args:
        app: A Trio-native ASGI app.
        config: Its timeouts apply.
        state: The lifespan state.
        timers: End idle connections.
        poller: Tells of clients that leave.
    """
    service = http1.Service(app, timers, config.keep_alive_timeout_s, state, poller)
    return Http2Service(service, hypercorn_config(config))


async def serve_connection(
    app: Application,
    stream: trio.abc.Stream,
    *,
    config: ServerConfig | None = None,
    state: Mapping[str, Any] | None = None,
    client: Address | None = None,
    server: Address | None = None,
) -> None:
    """Serves one connection on any stream (one of a pair of memory streams will do), unguarded.

    Args:
        app: A Trio-native ASGI app; its lifespan is the caller's business.
        stream: The server's end. Owned.
        config: Its timeouts apply.
        state: The lifespan state.
        client: The peer's address, for the scope.
        server: This end's address, for the scope.
    """
    async with open_timers() as timers:
        service = open_service(app, config or ServerConfig(), state or {}, timers)
        await Connection(service, stream, client, server).run()
