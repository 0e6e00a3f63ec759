"""The other end of a client's connection: reading, writing, and its leaving.

A plain socket is used directly: ``recv`` and ``send`` at once, and Trio where it must be waited for. All other streams
(TLS, memory) are used by their methods.

**A write goes out whole, or the peer is lost.** It is not to be cancelled: the wait for a peer that does not read is
shielded, and ends with `Peer.abort`, from outside. Where the socket takes the bytes at once, it is no checkpoint. Who
may go on like that for long calls `Peer.take_turns` in between.

**Leaving** is what ASGI calls a disconnect: a FIN (also a half-close: ASGI has one message for both), a reset, an
abort. Where there is a `Poller` it is told whatever the peer has sent before, so bytes that nobody has asked for stay
in the kernel. A socket stays with the poller from the first time that somebody wants to know to its end: then it costs
nothing per request.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

import trio
from trio.lowlevel import checkpoint, wait_readable, wait_writable

from trigate.concurrency.poller import PEER_CLOSED, Poller

READ_BYTES = 64 * 1024
UNYIELDING_BYTES = 1024 * 1024
"""How much may come and go at once before a task lets others have their turn."""

_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Peer:
    """One client's end.

    Args:
        stream: The server's end of it. Not owned, but for `abort`.
        poller: Tells of leaving.

    Attributes:
        socket: The plain socket, if it is one and until it is released.
        gone: It has closed its sending side, or all of it.
        lost: Nothing can be sent to it any more.
        on_leave: What to call when it leaves; once.
        left: Set when it leaves, if somebody has put an event here.
        unyielding_bytes: How much has come and gone since the task has had to wait.
    """

    __slots__ = (
        *("_fd", "_polled", "_poller", "_slowly_bytes", "_stream", "_writing"),
        *("gone", "left", "lost", "on_leave", "socket", "unyielding_bytes"),
    )

    def __init__(self, stream: trio.abc.Stream, poller: Poller | None) -> None:
        self._stream = stream
        self._poller = poller
        self._polled = False
        self._fd = -1
        self._slowly_bytes = 0  # have gone out in writes that had to wait
        self._writing: trio.Event | None = None  # set by a write that has to wait, at its end
        self.socket: socket.socket | None = None
        self.gone = False
        self.lost = False
        self.on_leave: Callable[[], None] | None = None
        self.left: trio.Event | None = None
        self.unyielding_bytes = 0
        if isinstance(stream, trio.SocketStream) and stream.socket.fileno() >= 0:
            # A second handle on the descriptor of Trio's socket, detached before that is closed.
            sock, self._fd = stream.socket, stream.socket.fileno()
            self.socket = socket.socket(sock.family, sock.type, sock.proto, self._fd)
            self.socket.setblocking(False)

    # -- reading and writing ------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Waits for bytes; nothing if the peer has left."""
        plain = self.socket
        try:
            if plain is None:
                return b"" if self.lost else bytes(await self._stream.receive_some(READ_BYTES))  # noqa: ASYNC910
            while True:
                await wait_readable(self._fd)
                try:
                    return plain.recv(READ_BYTES)
                except BlockingIOError:
                    pass
        except _GONE:
            return b""  # noqa: ASYNC910

    def read_nowait(self) -> bytes:
        """Gives what is there; nothing if that is nothing, or if only `read` can tell."""
        if self.socket is None:
            return b""
        try:
            data = self.socket.recv(READ_BYTES)
        except OSError:
            return b""
        self.unyielding_bytes += len(data)
        return data

    async def take_turns(self) -> None:
        """Lets other tasks have their turn."""
        self.unyielding_bytes = 0
        await checkpoint()

    async def write(self, data: bytes) -> None:  # noqa: ASYNC910 - the socket may take it at once
        """Sends all of it, or notes that the peer is lost."""
        while self._writing is not None:  # another task of the app
            with trio.CancelScope(shield=True):
                await self._writing.wait()
        self.unyielding_bytes += len(data)
        plain = self.socket
        sent = 0
        if plain is not None:
            try:
                sent = plain.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._lose()
                return  # noqa: ASYNC910
            if sent == len(data):
                return  # noqa: ASYNC910
        elif self.lost:
            return  # noqa: ASYNC910
        self._writing = trio.Event()
        try:
            with trio.CancelScope(shield=True):
                if plain is None:
                    await self._stream.send_all(data)
                else:
                    await self._write_slowly(plain, memoryview(data)[sent:])
        except _GONE:
            self._lose()
        finally:
            self._writing.set()
            self._writing = None

    async def _write_slowly(  # noqa: ASYNC910 - there is something to write
        self, plain: socket.socket, data: memoryview
    ) -> None:
        while data:
            await wait_writable(self._fd)
            with suppress(BlockingIOError):
                sent = plain.send(data)
                self._slowly_bytes += sent
                data = data[sent:]

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a write waits, whenever the peer's system takes something: so a peer that reads
        slowly is not one that does not read. None where that cannot be seen (TLS, other streams, other systems)."""
        if self.socket is None or sys.platform != "linux":
            return None
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)))  # SIOCOUTQ, of a socket
        except OSError:
            return None
        return self._slowly_bytes - int(queued)

    # -- leaving ------------------------------------------------------------------------------------------------------

    def watch(self) -> bool:
        """Sees to it that `leave` is called in time. Says whether it will be; else only `read` can tell."""
        if not self._polled and not self.gone:
            if self._poller is None or self.socket is None:
                return False
            self._poller.add(self._fd, PEER_CLOSED, self._on_closed)
            self._polled = True
        return True

    def _on_closed(self, _: int) -> None:
        assert self._poller is not None
        self._poller.remove(self._fd)
        self._polled = False
        self.leave()

    def leave(self) -> None:
        """Notes that it has left, and tells who wants to know."""
        self.gone = True
        if self.left is not None:
            self.left.set()
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()

    def _lose(self) -> None:
        self.lost = True
        self.leave()

    # -- the end ------------------------------------------------------------------------------------------------------

    async def half_close(self) -> None:  # noqa: ASYNC910 - not every stream can be
        """Closes the sending side."""
        stream = self._stream.transport_stream if isinstance(self._stream, trio.SSLStream) else self._stream
        if isinstance(stream, trio.abc.HalfCloseableStream):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_eof()

    async def abort(self) -> None:
        """Closes the connection at once, whatever is being done with it."""
        self.release()
        self._lose()
        await trio.aclose_forcefully(self._stream)

    def release(self) -> None:
        """Lets go of the descriptor, before it is closed."""
        if self._polled:
            self._polled = False
            assert self._poller is not None
            self._poller.remove(self._fd)
        if self.socket is not None:
            self.socket.detach()
            self.socket = None
