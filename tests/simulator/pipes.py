"""Connections in memory: two ends, a bounded number of bytes in transit, and the ways in which a connection breaks.

There are two kinds. `pair` is a Python stream. The gateway treats it as a stream with a layer above the socket, such as
TLS. It is lighter than the streams of `trio.testing` and adds what the simulation needs: a bound, so that a sender
blocks while the peer does not read; a reset, which discards unread bytes; and a close that the peer sees at once, from
outside and without a task.

`socket_pair` is `socket.socketpair`: the kernel holds the bytes, without a network and so without a delay. The gateway
relays streams between these plain sockets on the fast path (`trigate.exchange.socket_relay`).
"""

from __future__ import annotations

import math
import socket

import trio

Address = tuple[str, int]


class _Direction:
    """The bytes in one direction.

    Attributes:
        ended: No more bytes follow.
        unread: The reader has closed its end.
        reset: The connection was reset.
    """

    __slots__ = ("capacity", "data", "ended", "reader", "reset", "unread", "writer")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = self.unread = self.reset = False
        self.reader: trio.lowlevel.Task | None = None
        self.writer: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        """Wakes the tasks that wait at either end."""
        for task in (self.reader, self.writer):
            if task is not None:
                trio.lowlevel.reschedule(task)
        self.reader = self.writer = None


class _Addresses:
    """The part of a socket that a server uses of an accepted connection."""

    def __init__(self, near: Address, far: Address) -> None:
        self._near, self._far = near, far

    def getsockname(self) -> Address:
        return self._near

    def getpeername(self) -> Address:
        return self._far


class End(trio.abc.HalfCloseableStream):
    """One end of a connection.

    Attributes:
        closed: This side has closed it.
        peer_closed: Set when the other side has closed or reset it.
    """

    def __init__(self, incoming: _Direction, outgoing: _Direction, near: Address, far: Address) -> None:
        self._in, self._out = incoming, outgoing
        self.socket = _Addresses(near, far)
        self.closed = False
        self.peer_closed = trio.Event()
        self._other: End  # notified when this end closes

    def __repr__(self) -> str:
        return f"<End at {self.socket.getsockname()}{', closed' if self.closed else ''}>"

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to receive, neither bytes nor an end."""
        return not (self._in.data or self._in.ended or self._in.reset)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends, and waits while the buffer is full."""
        await trio.lowlevel.checkpoint()
        way, rest = self._out, memoryview(data)
        while True:
            if self.closed or way.ended:
                raise trio.ClosedResourceError
            if way.unread or way.reset:
                raise trio.BrokenResourceError
            if not rest:
                return
            free = int(min(len(rest), max(0.0, way.capacity - len(way.data))))
            if free:
                way.data += rest[:free]
                rest = rest[free:]
                if way.reader is not None:
                    trio.lowlevel.reschedule(way.reader)
                    way.reader = None
            else:
                way.writer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_sending)

    async def wait_send_all_might_not_block(self) -> None:
        """The simulation does not need this."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receives the bytes that have arrived, or waits for some."""
        await trio.lowlevel.checkpoint()
        way = self._in
        while True:
            if self.closed:
                raise trio.ClosedResourceError
            if way.reset:
                raise trio.BrokenResourceError
            if way.data:
                size = len(way.data) if max_bytes is None else min(max_bytes, len(way.data))
                data = bytes(way.data[:size])
                del way.data[:size]
                if way.writer is not None:
                    trio.lowlevel.reschedule(way.writer)
                    way.writer = None
                return data
            if way.ended:
                return b""
            assert way.reader is None, "two tasks read one end"
            way.reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_receiving)

    def _stop_sending(self, _: object) -> trio.lowlevel.Abort:
        self._out.writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _stop_receiving(self, _: object) -> trio.lowlevel.Abort:
        self._in.reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def send_eof(self) -> None:
        """Closes the sending side."""
        self._out.ended = True
        self._out.wake()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Closes the end."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Closes the end at once. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self._out.ended = self._in.unread = True
            self._in.data.clear()
            self._out.wake()
            self._in.wake()
            self._other.peer_closed.set()

    def reset(self) -> None:
        """Resets the connection: bytes that the other side has not read are lost."""
        if not self.closed:
            self._out.reset = self._in.reset = True
            self._out.data.clear()
            self.close()


def pair(near: Address, far: Address, *, capacity: float = math.inf) -> tuple[End, End]:
    """Makes a connection.

    Args:
        capacity: How many unread bytes may be in transit to the near end.

    Returns:
        The end at ``near`` and the end at ``far``.
    """
    there, back = _Direction(math.inf), _Direction(capacity)
    one, other = End(back, there, near, far), End(there, back, far, near)
    one._other, other._other = other, one
    return one, other


class SocketEnd:
    """The end of a socket pair that the gateway does not hold. Like `End`, but a reset only closes it.

    Attributes:
        peer_closed: To be set by the code that closes the other end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self.peer_closed = trio.Event()
        self.send_all = self._stream.send_all
        self.receive_some = self._stream.receive_some
        self.send_eof = self._stream.send_eof

    def close(self) -> None:
        """Closes the end at once. A second call does nothing."""
        self._stream.socket.close()

    reset = close


def socket_pair(*, capacity: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Makes a pair of non-blocking sockets.

    Args:
        capacity: About how many unread bytes from the first socket may be in transit.
    """
    one, other = socket.socketpair()
    if capacity is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, capacity)
    for sock in (one, other):
        sock.setblocking(False)
    return one, other
