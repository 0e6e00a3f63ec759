"""HTTP/2: one connection, served by hypercorn's protocol class.

`H2Protocol` and its `HTTPStream` are hypercorn's. Its version is pinned, as this module relies on their private parts.
The driver is here: hypercorn's own Trio connection can wait for itself when an app answers early, and never releases a
stalled client. The rules for editing it:

- **The reader ends the connection.** Other tasks only half-close it. The reader discards what still arrives (at least
  window updates), within bounds: closing a socket with unread input sends a reset, and a reset may overtake the last
  response.
- **A send happens completely or not at all.** A cancelled app gets `trio.Cancelled` at the beginning of a send, or
  after it. In between, the send is shielded, as half a message breaks the connection. So a task that sends to a client
  that does not read is released only by `Http2Connection.abort`, from another task.
- **There is no timer task.** An idle connection has a deadline on its read, which serves as keep-alive timeout and
  drain.

Bounds: `HEADER_BLOCK_BYTES` of header fields; `QUEUED_MESSAGES` pieces of a request body; `LINGER_BYTES` and `LINGER_S`
at the end of a connection.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias, cast

import attrs
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.frame_buffer import FrameBuffer
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_LOW_WATER, H2Protocol, StreamBuffer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup
from hypercorn.utils import UnexpectedMessageError

from trigate.config.sections import ServerConfig
from trigate.errors import Internal
from trigate.logs import log
from trigate.server import http1, request_head
from trigate.server.http1 import Address, Application, Message, Send
from trigate.server.request_head import HeadRefused
from trigate.tracebacks import drop_frames

_SendOrEnd: TypeAlias = Callable[[Message | None], Awaitable[None]]
"""hypercorn's ``send`` for an app; None = the app has returned."""

READ_BYTES = 64 * 1024
LINGER_S = 2.0
"""How long input is discarded after the last response of a connection."""
LINGER_BYTES = 1024 * 1024
"""How much input is discarded then."""
_GOAWAY = struct.pack(">HBBBLLL", 0, 8, 7, 0, 0, 2**31 - 1, 0)
"""A GOAWAY frame that refuses nothing: the highest stream id, and NO_ERROR."""
HEADER_BLOCK_BYTES = 64 * 1024
"""The size of the encoded header fields of a request: a HEADERS frame and its CONTINUATION frames."""
_HEADERS = 1  # the type of a HEADERS frame
_TABLE_SIZES = re.compile(rb"(?: [\x20-\x3e] | \x3f [\x80-\xff]* [\x00-\x7f] ){3}", re.VERBOSE)
QUEUED_MESSAGES = 10
"""How many pieces of a request body may wait for the app before the connection stops reading."""


class _FrameBuffer(FrameBuffer):
    """h2's buffer of frames, which refuses what would cost much to decode. All other connections wait meanwhile.

    h2 takes 64 CONTINUATION frames, a mebibyte, and any number of changes of the table's size: together six seconds
    (CPython 3.11, a shared core). RFC 7541 (4.2) allows two changes at the beginning of a block.
    """

    def _update_header_buffer(self, frame: Any) -> Any:  # Any: frames of hyperframe, which comes with h2
        whole: Any = super()._update_header_buffer(frame)
        if whole is not None and whole.type == _HEADERS:
            size = len(whole.data)
            if _TABLE_SIZES.match(whole.data):
                raise h2.exceptions.DenialOfServiceError("A header block changes the table's size more than twice.")
        else:
            size = sum([len(piece.data) for piece in self._headers_buffer])  # of at most 64
        if size > HEADER_BLOCK_BYTES:
            raise h2.exceptions.DenialOfServiceError(f"A header block has more than {HEADER_BLOCK_BYTES} bytes.")
        return whole


class _Buffer(StreamBuffer):
    """hypercorn's buffer of a response. Unlike hypercorn's, its app also waits while the client's window is closed."""

    async def pop(self, max_length: int) -> bytes:
        """Removes and returns up to this many bytes. No checkpoint: the caller sends them in the same step."""
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        return data

    async def note_sent(self) -> None:
        """Wakes an app that waits until everything is sent."""
        if not self.buffer:
            await self._is_empty.set()


class _Protocol(H2Protocol):
    """HTTP/2 (over TLS only) without WebSockets, and without the requests that crash hypercorn."""

    def __init__(self, *args: Any) -> None:  # Any: passed on unchanged
        super().__init__(*args)
        self.connection.incoming_buffer = _FrameBuffer(server=True)
        codes = h2.settings.SettingCodes
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: self.config.h2_max_concurrent_streams,
                codes.MAX_HEADER_LIST_SIZE: self.config.h2_max_header_list_size,
            },
        )

    async def stream_send(self, event: StreamEvent) -> None:
        """Sends a part of a response. A checkpoint for each piece of a body."""
        if isinstance(event, Body):
            # Nothing below needs to wait: without this, an app that sends on after the end could not be cancelled.
            await trio.lowlevel.checkpoint()
        await super().stream_send(event)

    async def handle(self, event: Event) -> None:
        """Processes input, or the end of the connection, which also ends the buffers of all responses."""
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()  # otherwise an app that waits for space in it would wait forever

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None:
            self.priority.block(stream_id)  # only a PRIORITY frame has named this stream
        else:
            await super()._send_data(stream_id)
        if isinstance(buffer, _Buffer):
            await buffer.note_sent()  # only now: in a drain, the connection ends with its last app

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
            _, headers, body = error.to_response()
            headers += [(b"content-length", b"%d" % len(body)), *self.config.response_headers("h2")]
            with suppress(h2.exceptions.ProtocolError):
                self.connection.send_headers(request.stream_id, [(b":status", b"%d" % error.status), *headers])
                self.connection.send_data(request.stream_id, body, end_stream=True)
            await self._flush()
        else:
            await super()._create_stream(request)
            # The app has only been scheduled, so the buffer that is replaced is empty.
            self.stream_buffers[request.stream_id] = _Buffer(self.context.event_class)


@attrs.define(eq=False)
class _AppTasks:
    """Runs the app for the protocol classes, in place of hypercorn's ``TaskGroup``.

    Unlike hypercorn's, the end of a request never waits: a disconnect needs no space in the queue, and input is dropped
    after the app has returned. (Otherwise an app that answers before it has read a long body would wait for itself.)
    """

    _nursery: trio.Nursery

    def spawn(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(function, *args)

    async def spawn_app(self, app: AppWrapper, config: HypercornConfig, scope: Message, send: _SendOrEnd) -> Send:
        to_app, from_client = trio.open_memory_channel[Message](config.max_app_queue_size)

        async def put(message: Message) -> None:
            if message["type"] == "http.disconnect":
                to_app.close()
            else:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await to_app.send(message)

        self._nursery.start_soon(self._run, cast(Application, app), scope, from_client, send)
        return put

    async def _run(
        self,
        app: Application,
        scope: Message,
        from_client: trio.MemoryReceiveChannel[Message],
        send: _SendOrEnd,
    ) -> None:
        async def receive() -> Message:
            try:
                return await from_client.receive()
            except trio.EndOfChannel:
                await trio.lowlevel.checkpoint()
                return {"type": "http.disconnect"}

        crash: ExceptionGroup | None = None
        with from_client:
            try:
                await app(scope, receive, send)
            except* Exception as group:
                crash = group
        if crash is not None:
            log.error("app_crashed", method=scope["method"], path=scope["path"], exc_info=crash)
            drop_frames(crash)
            await self._send_internal_error(send)
        await send(None)

    async def _send_internal_error(self, send: _SendOrEnd) -> None:
        status, headers, body = Internal("The server failed on this request.").to_response()
        headers.append((b"content-length", b"%d" % len(body)))
        with suppress(UnexpectedMessageError):  # a response has begun; it stays truncated
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


@attrs.define(eq=False)
class Http2Service:
    """What the HTTP/2 connections of a server share.

    Args:
        http1: What HTTP/1.1 connections share.
        config: hypercorn's configuration; see `hypercorn_config`.

    Attributes:
        context: hypercorn's; its ``terminated`` is set when a drain has begun.
    """

    http1: http1.Service
    config: HypercornConfig
    context: WorkerContext = attrs.field(init=False, factory=lambda: WorkerContext(None))


@attrs.define(eq=False)
class Http2Connection:
    """One HTTP/2 connection, after its TLS handshake.

    Args:
        service: What the connections share.
        stream: Closed by the owner after `run`.
        client: The client's address, for the scope.
        server: The server's address, for the scope.
    """

    _service: Http2Service
    _stream: trio.SSLStream[trio.abc.Stream]
    client: Address | None
    server: Address | None
    _protocol: _Protocol = attrs.field(init=False)
    _sending: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _receiving: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    _deadline: float = attrs.field(init=False, default=math.inf)
    _idle: bool = attrs.field(init=False, default=True)
    _idle_since: float = attrs.field(init=False, factory=trio.current_time)
    _initiated: bool = attrs.field(init=False, default=False)
    _close_announced: bool = attrs.field(init=False, default=False)
    _ending: bool = attrs.field(init=False, default=False)

    async def run(self) -> None:
        """Serves the connection until the client closes it, or it has been idle for too long."""
        async with trio.open_nursery() as nursery:
            service = self._service
            self._protocol = _Protocol(
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
            self._initiated = True
            self._set_idle(True)
            await self._read()

    def close_if_idle(self) -> None:
        """Closes the connection unless it is serving a request."""
        if self._idle:
            self._deadline = self._receiving.deadline = -math.inf

    @property
    def idle_since(self) -> float | None:
        """Since when the connection has served no request; None = it serves one."""
        return self._idle_since if self._idle else None

    async def announce_close(self) -> None:
        """Sends GOAWAY to an idle client (`connection.Service.announce_close`).

        A client that waits for a response gets it afterwards: some clients (httpcore) give up on their responses when
        they receive GOAWAY.
        """
        if self._initiated and self._idle:
            await self._send_goaway()

    async def abort(self) -> None:
        """Closes the connection at once, even while its tasks use it."""
        await trio.aclose_forcefully(self._stream)

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

    async def _send(self, event: Event) -> None:
        match event:
            case RawData(data=data):
                if not await self._write(data):
                    await self._protocol.handle(Closed())
            case Updated(idle=True) if not self._service.context.terminated.is_set():
                self._set_idle(True)
                if self._service.http1.announces_close:
                    await self._send_goaway()
            case Updated(idle=False):
                self._set_idle(False)
            case _:
                await self._end()
                await self._protocol.handle(Closed())

    async def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self._deadline = self._receiving.deadline = trio.current_time() + LINGER_S
            if not self._sending.locked():  # otherwise `_write` does it
                await self._half_close()

    async def _send_goaway(self) -> None:
        """Asks the client to send its next request on another connection. Requests that it has sent are served.

        **Source:** RFC 9113, section 6.8: the first of two GOAWAY frames; here the end of the connection replaces the
        second.
        """
        if not self._close_announced and not self._ending:
            self._close_announced = True
            self._set_idle(self._idle)
            await self._write(_GOAWAY)

    async def _write(self, data: bytes) -> bool:
        # The shield includes the wait for the lock: the protocol counts these bytes as sent already.
        # bounded by: `abort`, which the server calls at the end of a drain; and for a client that acknowledges nothing,
        # TCP_USER_TIMEOUT (server.tcp_user_timeout_s)
        with trio.CancelScope(shield=True):
            async with self._sending:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return False
                if self._ending and not self._sending.statistics().tasks_waiting:
                    await self._half_close()
        return True

    async def _half_close(self) -> None:
        transport = self._stream.transport_stream
        if isinstance(transport, trio.abc.HalfCloseableStream):
            # bounded by: a FIN waits for nothing, the kernel queues it
            with trio.CancelScope(shield=True), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await transport.send_eof()

    def _set_idle(self, idle: bool) -> None:
        if idle and not self._idle:
            self._idle_since = trio.current_time()
        self._idle = idle
        if self._ending:
            return
        if not idle:
            self._deadline = math.inf
        elif self._service.context.terminated.is_set():
            self._deadline = -math.inf
        else:
            timeout_s = LINGER_S if self._close_announced else self._service.config.keep_alive_timeout
            self._deadline = trio.current_time() + timeout_s
        self._receiving.deadline = self._deadline


def hypercorn_config(config: ServerConfig) -> HypercornConfig:
    """Makes the part of hypercorn's configuration that `Http2Connection` needs."""
    made = HypercornConfig()
    made.accesslog = made.errorlog = None
    made.include_server_header = False
    made.keep_alive_timeout = config.keep_alive_timeout_s
    made.keep_alive_max_requests = sys.maxsize  # hypercorn truncates HTTP/2 streams when it is reached
    made.h2_max_header_list_size = request_head.MAX_FIELDS_BYTES
    made.max_app_queue_size = QUEUED_MESSAGES
    return made
