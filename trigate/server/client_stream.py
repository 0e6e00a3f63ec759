"""The stream to a client: reading, writing, and noticing that the client disconnects.

A plain socket is used directly: ``recv`` and ``send`` at once, and Trio's waits only where the kernel has nothing. All
other streams (TLS, memory) are used by their methods.

**A write sends all of its bytes, or the stream is broken.** It cannot be cancelled: the wait for a client that does not
read is shielded, and `ClientStream.abort` ends it from another task. Where the socket takes the bytes at once, a write
is no checkpoint. A task that may continue like that for long calls `ClientStream.yield_to_others` in between.

**A disconnect** is what ASGI calls one: a FIN (also a half-close, as ASGI has one message for both), a reset, an abort.
After `ClientStream.serve_half_closed` a FIN is none, and only a reset, a failed write or an abort is. A `Poller`
reports a disconnect behind any unread input, so bytes that the app has not asked for stay in the kernel. A socket stays
in the poller from the first time that its app wants to know until the connection ends; so the watch costs nothing per
request.
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

from trigate.concurrency.poller import PEER_CLOSED, RESET, Poller

READ_BYTES = 64 * 1024
YIELD_AFTER_BYTES = 1024 * 1024
"""How many bytes a task may receive and send without a wait before it lets other tasks run."""

_CONNECTION_ERRORS = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class ClientStream:
    """The stream to one client.

    Args:
        stream: The server's end of the connection. Not owned; only `abort` closes it.
        poller: Reports a disconnect; None = there is none.

    Attributes:
        socket: The plain socket, if the stream is one, until it is released.
        disconnected: The client has closed its sending side, or the whole connection.
        half_closed: The client has closed its sending side; whether the whole connection, is not known.
        broken: Nothing can be sent to the client any more.
        on_disconnect: Called once when the client disconnects.
        disconnect_event: Set when the client disconnects; made by the task that waits for it.
        bytes_since_wait: How many bytes were received and sent since the task last had to wait.
    """

    __slots__ = (
        *("_fd", "_in_poller", "_poller", "_serves_half_closed", "_slowly_sent_bytes", "_stream", "_writing"),
        *("broken", "bytes_since_wait", "disconnect_event", "disconnected", "half_closed", "on_disconnect", "socket"),
    )

    def __init__(self, stream: trio.abc.Stream, poller: Poller | None) -> None:
        self._stream = stream
        self._poller = poller
        self._in_poller = False
        self._fd = -1
        self._serves_half_closed = False
        self._slowly_sent_bytes = 0  # sent in writes that had to wait
        self._writing: trio.Event | None = None  # set at the end of a write that has to wait
        self.socket: socket.socket | None = None
        self.disconnected = False
        self.half_closed = False
        self.broken = False
        self.on_disconnect: Callable[[], None] | None = None
        self.disconnect_event: trio.Event | None = None
        self.bytes_since_wait = 0
        if isinstance(stream, trio.SocketStream) and stream.socket.fileno() >= 0:
            # A second handle on the descriptor of Trio's socket; it is detached before Trio closes the descriptor.
            sock, self._fd = stream.socket, stream.socket.fileno()
            self.socket = socket.socket(sock.family, sock.type, sock.proto, self._fd)
            self.socket.setblocking(False)

    # -- reading and writing ------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Waits for bytes. Returns ``b""`` if the client has disconnected; the stream is broken then, or the client may
        have closed its sending side only."""
        plain = self.socket
        try:
            if plain is None:
                return b"" if self.broken else bytes(await self._stream.receive_some(READ_BYTES))
            while True:
                await wait_readable(self._fd)
                try:
                    return plain.recv(READ_BYTES)
                except BlockingIOError:
                    pass
        except _CONNECTION_ERRORS:
            self.broken = True
            return b""

    def read_nowait(self) -> bytes:
        """Returns the bytes that have arrived. ``b""`` = none have, or only `read` can find out."""
        if self.socket is None:
            return b""
        try:
            data = self.socket.recv(READ_BYTES)
        except OSError:
            return b""
        self.bytes_since_wait += len(data)
        return data

    async def yield_to_others(self) -> None:
        """Lets other tasks run."""
        self.bytes_since_wait = 0
        await checkpoint()

    async def write(self, data: bytes) -> None:
        """Sends all of the bytes, or marks the stream as broken.

        **Cancels:** not at all.
        """
        while self._writing is not None:  # another task of the app writes
            with trio.CancelScope(shield=True):  # bounded by: the other write, see below
                await self._writing.wait()
        self.bytes_since_wait += len(data)
        plain = self.socket
        sent = 0
        if plain is not None:
            try:
                sent = plain.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._break()
                return
            if sent == len(data):
                return
        elif self.broken:
            return
        self._writing = trio.Event()
        try:
            # bounded by: `abort`, which the app calls for a stalled client, and the server at the end of a drain; and
            # for a client that acknowledges nothing, TCP_USER_TIMEOUT (server.tcp_user_timeout_s)
            with trio.CancelScope(shield=True):
                if plain is None:
                    await self._stream.send_all(data)
                else:
                    await self._write_slowly(plain, memoryview(data)[sent:])
        except _CONNECTION_ERRORS:
            self._break()
        finally:
            self._writing.set()
            self._writing = None

    async def _write_slowly(self, plain: socket.socket, data: memoryview) -> None:
        while data:
            await wait_writable(self._fd)
            with suppress(BlockingIOError):
                sent = plain.send(data)
                self._slowly_sent_bytes += sent
                data = data[sent:]

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a write waits, whenever the client's system acknowledges bytes.

        It tells a client that reads slowly from one that does not read. None where the system does not report it (TLS,
        other streams, other systems than Linux).
        """
        if self.socket is None or sys.platform != "linux":
            return None
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)))  # SIOCOUTQ of a socket
        except OSError:
            return None
        return self._slowly_sent_bytes - int(queued)

    # -- disconnects --------------------------------------------------------------------------------------------------

    def watch(self) -> bool:
        """Has a disconnect noted as soon as it happens. Returns False where only `read` can find out."""
        if not self._in_poller and not self.disconnected:
            if self._poller is None or self.socket is None:
                return False
            try:
                self._poller.add(self._fd, 0 if self.half_closed else PEER_CLOSED, self._on_closed)
            except OSError:  # the kernel refuses another watch
                return False
            self._in_poller = True
        return True

    def _on_closed(self, events: int) -> None:
        assert self._poller is not None
        self._poller.remove(self._fd)
        self._in_poller = False
        if events & RESET:
            self.note_disconnect()
        else:
            self.note_fin()

    def serve_half_closed(self) -> None:
        """From now on, a client that has closed its sending side has not disconnected, until a write fails."""
        self._serves_half_closed = True
        if self.half_closed and not self.broken:
            self.disconnected = False

    def note_fin(self) -> None:
        """Notes that the client has closed its sending side, behind a whole request."""
        self.half_closed = True
        if self.broken or not self._serves_half_closed:
            self.note_disconnect()
        else:
            self.watch()  # from now on, for a reset

    def note_disconnect(self) -> None:
        """Notes that the client has disconnected, and notifies the app."""
        self.disconnected = True
        if self.disconnect_event is not None:
            self.disconnect_event.set()
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    def _break(self) -> None:
        self.broken = True
        self.note_disconnect()

    # -- closing ------------------------------------------------------------------------------------------------------

    async def half_close(self) -> None:
        """Closes the sending side, where the stream has one."""
        stream = self._stream.transport_stream if isinstance(self._stream, trio.SSLStream) else self._stream
        if isinstance(stream, trio.abc.HalfCloseableStream):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_eof()

    async def abort(self) -> None:
        """Closes the connection at once, even while other tasks use it."""
        self.release()
        self._break()
        await trio.aclose_forcefully(self._stream)

    def release(self) -> None:
        """Detaches from the descriptor. Called before the descriptor is closed."""
        if self._in_poller:
            self._in_poller = False
            assert self._poller is not None
            self._poller.remove(self._fd)
        if self.socket is not None:
            self.socket.detach()
            self.socket = None
