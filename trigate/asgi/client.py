"""The client's side of a request: what comes from it, counted, and what goes to it, whole.

What is known of the servers below, and dealt with here:

* Hypercorn recycles a keep-alive connection inside the app's *last* ``send``, and tells ``http.disconnect`` meanwhile:
  an app that cancels itself on that leaves the idle timer unarmed, for ever. So every send is shielded, and the watch
  stops watching once the answer is out.
* Hypercorn raises out of the connection when the app is cancelled inside ``http.response.start``: shielded too.
* A response that is sent while the client still sends its body is erased by the reset that closing the socket causes:
  the rest of the body is read, in bounds, before the last message.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable

from trigate.errors import BodyTimeout, Header, TooLarge

if TYPE_CHECKING:
    from trigate.server.client_capabilities import Client

_CONTROL_PLANE_BYTES = 1024 * 1024
_LINGER_BYTES = 256 * 1024 * 1024
_LINGER_S = 2.0


class Downstream:
    """The client's side of a request: ASGI's ``send``, with the rules of this module.

    Attributes:
        committed: The status line is out.
        ended: The last byte of the answer has been handed over.
        gone: The client has left.
        sending_since: Since when a send has been waiting; None = none is.
        last_sent_at: When something was sent last (trio time).
        patience_s: How long a send may wait for the client; finite only for the last words of a server that stops.
    """

    def __init__(self, send: ASGISendCallable, headers: Iterable[Header], client: Client | None = None) -> None:
        self._send = send
        self.client = client
        self.headers = list(headers)
        self._emitting: trio.CancelScope | None = None
        self._sent: trio.Event | None = None
        self._owed = b""
        self.committed = False
        self.ended = False
        self.gone = False
        self.sending_since: float | None = None
        self.last_sent_at = trio.current_time()
        self.patience_s = math.inf

    @property
    def socket(self) -> socket.socket | None:
        """The client's socket, where pieces of the body may be written to it directly once the head is out."""
        return self.client.socket if self.client is not None else None

    @property
    def chunked(self) -> bool:
        """How what is written there has to be framed."""
        return self.client is not None and self.client.chunked

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a send waits, whenever the client takes something; None = that cannot be seen."""
        return self.client.taken_bytes if self.client is not None else None

    def owe(self, rest: bytes) -> None:
        """Takes what is left of a frame that was begun at the socket; it goes out before anything else."""
        self._owed = rest

    # None of the sends is a checkpoint for certain: that is the server's affair, and costs too much to add per event.

    async def _emit(self, *messages: Any) -> None:  # noqa: ASYNC910 - Any: hypercorn's union of ASGI messages
        if self.gone:
            return  # noqa: ASYNC910 - nobody would get it
        piece = messages[0].get("more_body", False)
        if piece and self.client is not None and self.sending_since is None and not self._owed:
            # This server cuts no message in two. A piece that a cancellation leaves out is missed by nobody; a head and
            # an end that are noted have to go out.
            await self._emit_now(messages)
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.patience_s) as self._emitting:
            while self.sending_since is not None:  # a keep-alive, or the relay while one is sent
                if self._sent is None:
                    self._sent = trio.Event()
                await self._sent.wait()
            await self._emit_now(messages)

    async def _emit_now(self, messages: tuple[Any, ...]) -> None:  # noqa: ASYNC910 - Any: as above
        self.sending_since = trio.current_time()
        try:
            if self._owed:
                await self._pay()
            for message in messages:
                await self._send(message)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone; the watch is told so, and cancels
        finally:
            self._note_sent()

    def _note_sent(self) -> None:
        self.sending_since = None
        self.last_sent_at = trio.current_time()
        if self._sent is not None:
            self._sent.set()
            self._sent = None

    async def _pay(self) -> None:  # noqa: ASYNC910 - it is shielded
        """Sends what is left of a frame."""
        rest, self._owed = memoryview(self._owed), b""
        with trio.CancelScope(shield=True):
            while rest and self.socket is not None:
                await trio.lowlevel.wait_writable(self.socket)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.socket.send(rest) :]

    async def start(self, status: int, headers: list[Header]) -> None:
        """Sends the head. This is COMMIT."""
        self.committed = True
        await self._emit({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send(self, data: bytes) -> None:  # noqa: ASYNC910
        """Sends a piece of the body."""
        if not self.ended:
            await self._emit({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Sends the last piece of the body."""
        self.ended = True
        await self._emit({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a whole response."""
        self.committed = self.ended = True
        if self.gone:
            return  # noqa: ASYNC910 - nobody would get it
        if self.client is not None and self.sending_since is None:
            self.sending_since = trio.current_time()
            try:
                await self.client.respond(status, headers + self.headers, body)
            finally:
                self._note_sent()
            return
        headers = [*headers, (b"content-length", b"%d" % len(body)), *self.headers]
        await self._emit(
            {"type": "http.response.start", "status": status, "headers": headers},
            {"type": "http.response.body", "body": body, "more_body": False},
        )

    async def abort(self) -> None:
        """Closes the client's connection now, whatever waits to be sent on it; where the server lets us.

        Under `trigate serve`, HTTP/1.1 connections offer it (extension ``trigate.client``); under asyncio
        servers the send that waits is given up; under ``hypercorn -k trio`` nothing can reach it.
        """
        self.ended = True
        if self._emitting is not None:
            self._emitting.cancel()
        if self.client is not None:
            await self.client.abort()
        else:
            await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """Leaves the response without its end: the server then closes the connection, which is what tells."""
        self.ended = True


class RequestBody:
    """The request's body: ASGI's ``receive``, counted.

    Attributes:
        complete: The whole body has been received, or its client has left.
    """

    def __init__(self, receive: ASGIReceiveCallable) -> None:
        self._receive = receive
        self._received_bytes = 0
        self.complete = False

    async def receive(self) -> Any:  # Any: hypercorn's union of ASGI messages
        """Receives the next message."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def receive_bounded(self) -> Any:  # Any: as above
        """Receives for the control plane, which has no use for a large body: more than a bound is a client that left.

        (Quart keeps whatever arrives, and its own limit does not see chunked bodies.)
        """
        message = await self.receive()
        self._received_bytes += len(message.get("body", b""))
        return message if self._received_bytes <= _CONTROL_PLANE_BYTES else {"type": "http.disconnect"}

    async def read(self, *, max_bytes: int, timeout_s: float) -> bytes | None:
        """Reads the body, which must end in time and in bounds; None where the client left meanwhile.

        Raises:
            TooLarge: It is larger than ``max_bytes``.
            BodyTimeout: It did not end within ``timeout_s``.
        """
        pieces: list[bytes] = []
        size = 0
        with trio.move_on_after(timeout_s or math.inf):
            while True:
                message = await self.receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise too_large(max_bytes)
                pieces.append(piece)
                if self.complete:
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s (limits.body_timeout_s).")

    async def drain(self) -> None:  # noqa: ASYNC910 - there may be nothing to drain
        """Throws away what is left of the body, in bounds of bytes and time."""
        drained = 0
        with trio.move_on_after(_LINGER_S):
            while not self.complete and drained < _LINGER_BYTES:
                drained += len((await self.receive()).get("body", b""))


def too_large(max_bytes: int) -> TooLarge:
    """The error for a body over the limit."""
    return TooLarge(f"The body is larger than {max_bytes} bytes, which is the limit here.")
