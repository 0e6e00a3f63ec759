"""The fast path: one task moves the events of all streams whose two ends are plain sockets.

When an answer has begun, and both its upstream and its client are sockets without TLS, `answers.StreamAnswer` passes
the two sockets to this module, and its task sleeps (`RelayedStream.run`). From then on the poller's task does the work
for each piece: receive, parse the HTTP framing (`upstream.response_parser`), find whole events (`Reader`),
send. That takes a few function calls for each piece, and no task is woken.

**The exchange still owns everything.** Its task sleeps in `trio.lowlevel.wait_task_rescheduled`, whose abort function
takes the two sockets out of the poller. So a cancellation, at any moment, finds both ends with the task and no trace of
them here. The rules for editing this module:

- When a client does not take a whole frame at once, the stream blocks: its upstream is not read until the rest of the
  frame is out. So at most one piece is held for each stream.
- A frame that has been written in part is finished, also when the stream is cancelled: the rest goes to
  `PlainSocket.queue_partial`, and is sent before anything else.
- An error on a stream ends that stream only. `RelayedStream.failure` and ``reader.error`` hold errors of the upstream,
  and those of the poller, whose watches the kernel may refuse. A defect is raised in the exchange's task. Nothing is
  raised into the poller.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import httpx2
import outcome
import trio

from trigate.concurrency.poller import READABLE, WRITABLE, Poller
from trigate.exchange.sink import PlainSocket
from trigate.exchange.translation import Reader
from trigate.upstream.response_parser import Framing

# An event has some hundred bytes; events that arrived together are moved together. The kernel returns the bytes that
# are there, and CPython shrinks the buffer, so a large size costs nothing.
_RECEIVE_BYTES = 64 * 1024


class Owner(Protocol):
    """The answer that is relayed: it records the time of the last byte, and counts the bytes sent."""

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        """Bytes arrived from the upstream; ``sent_bytes`` = the size of the frames in them that went to the client."""

    def note_blocked(self, since: float | None) -> None:
        """Since when a frame has been waiting for the client to read; None = none is waiting."""


class SocketRelay:
    """Relays streams between plain sockets. There is one for each worker."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.streams = 0
        """The number of streams that are relayed now."""

    def __repr__(self) -> str:
        return f"<SocketRelay of {self.streams} streams>"

    def stream(self, parser: Framing, upstream: socket.socket, client: PlainSocket, *, reader: Reader) -> RelayedStream:
        """Makes a stream of two plain, non-blocking sockets. The caller owns both.

        Args:
            parser: Takes the upstream's bytes. It has no pieces left.
            client: Has a socket.
            reader: Has seen the first content.
        """
        return RelayedStream(self, parser, upstream, client, reader=reader)


class RelayedStream:
    """Two sockets and the reader between them.

    Attributes:
        failure: How the upstream's connection broke, or what is wrong with its HTTP framing.
    """

    __slots__ = (
        "_blocked",
        "_chunked",
        "_client",
        "_client_fd",
        "_client_socket",
        "_owner",
        "_parser",
        "_poller",
        "_reader",
        "_relay",
        "_rest",
        "_running",
        "_task",
        "_upstream",
        "_upstream_fd",
        "failure",
    )

    def __init__(
        self, relay: SocketRelay, parser: Framing, upstream: socket.socket, client: PlainSocket, *, reader: Reader
    ) -> None:
        assert client.socket is not None, "a plain socket has a socket"
        self._relay = relay
        self._poller = relay.poller
        self._parser = parser
        self._upstream = upstream
        self._upstream_fd = upstream.fileno()
        self._client = client
        self._client_socket = client.socket
        self._client_fd = client.socket.fileno()
        self._chunked = client.chunked
        self._reader = reader
        self._running = False
        self._blocked = False
        self._rest = b""
        self.failure: httpx2.TransportError | None = None
        self._owner: Owner
        self._task: trio.lowlevel.Task

    async def run(self, owner: Owner) -> None:
        """Sleeps while the relay moves the stream; returns when the reader is complete or has an error, when the
        upstream's body has ended, or when there is a `failure`.

        **Cancels:** at any moment; the relay then has no trace of the stream.
        """
        self._owner = owner
        self._task = trio.lowlevel.current_task()

        def abort(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            self.release()
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            self._poller.add(self._upstream_fd, READABLE, self._on_readable)
            self._running = True
            self._relay.streams += 1
            await trio.lowlevel.wait_task_rescheduled(abort)
        except OSError as error:  # the poller cannot watch a socket, now or later
            self.failure = httpx2.ReadError(error.strerror or str(error))

    def release(self) -> bool:
        """Takes both sockets out of the relay; the task sleeps until it is cancelled. Returns False if they were
        not in it."""
        if not self._running:
            return False
        self._let_go()
        return True

    def detach(self) -> None:
        """Takes both sockets out of the relay, and wakes the task, which continues by itself."""
        if self.release():
            trio.lowlevel.reschedule(self._task)

    def inject(self, data: bytes) -> None:
        """Sends bytes of the gateway's own (a keep-alive comment) between two events. Does nothing while the client
        does not read, or when the stream has just ended: the rest of a frame may have to go out first."""
        if self._running and not self._blocked:
            self._send(self._framed(data))
            if self._rest:
                try:
                    self._block()
                except OSError as error:
                    self._fail(error)

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _on_readable(self, _: int) -> None:
        try:
            ended = self._move()
            if self._rest and not ended:
                self._block()
        except Exception as error:
            self._fail(error)
        else:
            if ended:
                self._let_go()
                trio.lowlevel.reschedule(self._task)

    def _move(self) -> bool:
        """Moves the bytes that have arrived from the upstream to the client; returns whether the stream has ended."""
        parser, reader = self._parser, self._reader
        try:
            data = self._upstream.recv(_RECEIVE_BYTES)
            if data:
                parser.feed(data)
            else:
                parser.feed_eof()
        except BlockingIOError:
            return False
        except OSError as error:
            self.failure = httpx2.ReadError(error.strerror or str(error))
        except httpx2.TransportError as error:
            self.failure = error
        sent_bytes = 0
        pieces = parser.pieces
        if pieces:  # they are valid, even if the bytes after them are not
            data = reader.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            pieces.clear()
            if data:
                sent_bytes = len(data)
                self._send(b"%x\r\n%b\r\n" % (sent_bytes, data) if self._chunked else data)
        self._owner.note_relayed(self._poller.now, sent_bytes)
        return parser.complete or reader.complete or reader.error is not None or self.failure is not None

    def _send(self, frame: bytes) -> None:
        try:
            sent = self._client_socket.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the client has disconnected; the watch on its socket cancels the exchange
        if sent < len(frame):
            self._rest = frame[sent:]

    def _block(self) -> None:
        self._blocked = True
        self._poller.remove(self._upstream_fd)
        self._poller.add(self._client_fd, WRITABLE, self._on_writable)
        self._owner.note_blocked(trio.current_time())

    def _on_writable(self, _: int) -> None:
        rest, self._rest = self._rest, b""
        self._send(rest)
        if not self._rest:
            self._blocked = False
            self._poller.remove(self._client_fd)
            self._owner.note_blocked(None)
            try:
                self._poller.add(self._upstream_fd, READABLE, self._on_readable)
            except OSError as error:
                self._fail(error)
        elif len(self._rest) < len(rest):
            self._owner.note_blocked(trio.current_time())  # it reads, but slowly

    def _fail(self, error: Exception) -> None:
        """Raises an error in the exchange's task."""
        self._let_go()
        trio.lowlevel.reschedule(self._task, outcome.Error(error))

    def _let_go(self) -> None:
        self._running = False
        self._relay.streams -= 1
        if self._blocked:
            self._blocked = False
            self._poller.remove(self._client_fd)
            self._owner.note_blocked(None)
        else:
            self._poller.remove(self._upstream_fd)
        if self._rest:
            self._client.queue_partial(self._rest)
