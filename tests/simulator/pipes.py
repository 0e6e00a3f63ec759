"""Connections in memory: two ends, a bounded number of bytes on the way, and the ways in which one breaks.

There are two kinds. `pair` is a stream of Python: for the gateway it is one on which something stands between it and
the socket, as TLS does. It is lighter than those of `trio.testing`, and has what matters here and is missing there: a
bound, so that who does not read keeps who sends waiting; a reset, which takes with it what has not been read; and an
end that is seen at once, from outside and without a task.

`socket_pair` is `socket.socketpair`: bytes that the kernel keeps, without a network and so without a delay. The gateway
relays streams between these plain sockets on the fast path (`trigate.exchange.socket_relay`).
"""

from __future__ import annotations

import math
import socket

import trio

Address = tuple[str, int]


class _Way:
    """The bytes that go one way.

    Attributes:
        ended: There will be no more.
        unread: Nobody will read them.
        reset: It broke.
    """

    __slots__ = ("capacity", "data", "ended", "reader", "reset", "unread", "writer")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = self.unread = self.reset = False
        self.reader: trio.lowlevel.Task | None = None
        self.writer: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        """Lets who waits at either end look again."""
        for task in (self.reader, self.writer):
            if task is not None:
                trio.lowlevel.reschedule(task)
        self.reader = self.writer = None


class _Names:
    """What a server asks the socket of an accepted connection."""

    def __init__(self, near: Address, far: Address) -> None:
        self._near, self._far = near, far

    def getsockname(self) -> Address:
        return self._near

    def getpeername(self) -> Address:
        return self._far


class End(trio.abc.HalfCloseableStream):
    """One end of a connection.

    Attributes:
        closed: It has been closed from this side.
        left: Set when the other side has closed or reset it.
    """

    def __init__(self, incoming: _Way, outgoing: _Way, near: Address, far: Address) -> None:
        self._in, self._out = incoming, outgoing
        self.socket = _Names(near, far)
        self.closed = False
        self.left = trio.Event()
        self._other: End  # to be told

    def __repr__(self) -> str:
        return f"<End at {self.socket.getsockname()}{', closed' if self.closed else ''}>"

    @property
    def is_quiet(self) -> bool:
        """Neither bytes nor an end wait to be received."""
        return not (self._in.data or self._in.ended or self._in.reset)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends, and waits while the way is full."""
        await trio.lowlevel.checkpoint()
        way, rest = self._out, memoryview(data)
        while True:
            if self.closed or way.ended:
                raise trio.ClosedResourceError
            if way.unread or way.reset:
                raise trio.BrokenResourceError
            if not rest:
                return
            room = int(min(len(rest), max(0.0, way.capacity - len(way.data))))
            if room:
                way.data += rest[:room]
                rest = rest[room:]
                if way.reader is not None:
                    trio.lowlevel.reschedule(way.reader)
                    way.reader = None
            else:
                way.writer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_sending)

    async def wait_send_all_might_not_block(self) -> None:
        """Not needed by anybody here."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receives what is there, or waits for something."""
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
        """Closes it."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Closes it, at once. Twice does nothing."""
        if not self.closed:
            self.closed = True
            self._out.ended = self._in.unread = True
            self._in.data.clear()
            self._out.wake()
            self._in.wake()
            self._other.left.set()

    def reset(self) -> None:
        """Breaks it: what the other side has not read is lost."""
        if not self.closed:
            self._out.reset = self._in.reset = True
            self._out.data.clear()
            self.close()


def pair(near: Address, far: Address, *, capacity: float = math.inf) -> tuple[End, End]:
    """Makes a connection.

    Args:
        capacity: How many bytes may be on their way to the near end, unread.

    Returns:
        The end at ``near``, and the one at ``far``.
    """
    there, back = _Way(math.inf), _Way(capacity)
    one, other = End(back, there, near, far), End(there, back, far, near)
    one._other, other._other = other, one
    return one, other


class SocketEnd:
    """The end of a pair of sockets that is not the gateway's; as `End`, but that it cannot reset: it closes.

    Attributes:
        left: To be set by who closes the other end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self.left = trio.Event()
        self.send_all = self._stream.send_all
        self.receive_some = self._stream.receive_some
        self.send_eof = self._stream.send_eof

    def close(self) -> None:
        """Closes it, at once. Twice does nothing."""
        self._stream.socket.close()

    reset = close


def socket_pair(*, capacity: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Makes a pair of non-blocking sockets.

    Args:
        capacity: About how many bytes may be on their way from the first one, unread.
    """
    one, other = socket.socketpair()
    if capacity is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, capacity)
    for sock in (one, other):
        sock.setblocking(False)
    return one, other
