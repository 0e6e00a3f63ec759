"""The response to a client: ASGI's ``send``, where each message goes out whole.

Properties of the servers below, and how this module deals with them:

* Hypercorn recycles a keep-alive connection inside the application's *last* ``send``, and reports ``http.disconnect``
  meanwhile. An application that cancels itself then leaves the connection's idle timer unarmed for ever. So every send
  is shielded, and a disconnect is ignored once the answer is out.
* Hypercorn raises out of the connection when the application is cancelled inside ``http.response.start``. The same
  shield prevents that.
* When a response is sent while the client still sends its body, closing the socket causes a reset that erases the
  response. So the rest of the body is read, within bounds, before the last message (`asgi.request_body`).

The shields have no deadline of their own. Each is bounded from outside: by ``limits.stall_timeout_s``, after which
`ClientResponse.abort` closes the connection, and by `ClientResponse.patience_s` when the server stops.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import trio

from trigate.errors import Header
from trigate.server.client_capabilities import Client

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGISendCallable


class ClientResponse:
    """The response to one request.

    No send raises when the client has disconnected: the request's nursery is being cancelled then.

    Args:
        client: The capabilities of `trigate serve` beyond ASGI; None under another server.

    Attributes:
        headers: Headers of the response, besides those that are passed to `start` and `respond`.
        committed: The status line has gone out.
        ended: The last byte of the answer has been handed over.
        gone: The client has disconnected.
        sending_since: When the send in progress began (Trio time); None = there is none.
        last_sent_at: When the last send ended, of a response that continues; at first ``-math.inf``.
        patience_s: How long a send may wait for the client; finite only for the final message of a server that stops.
    """

    def __init__(self, send: ASGISendCallable, headers: Iterable[Header], client: Client | None = None) -> None:
        self._send = send
        self.client = client
        self.headers = list(headers)
        self._shield: trio.CancelScope | None = None
        self._sent: trio.Event | None = None
        self._partial = b""
        self.committed = False
        self.ended = False
        self.gone = False
        self.sending_since: float | None = None
        self.last_sent_at = -math.inf
        self.patience_s = math.inf

    @property
    def socket(self) -> socket.socket | None:
        """The client's socket, where body bytes may be written to it directly once the head is out."""
        return self.client.socket if self.client is not None else None

    @property
    def chunked(self) -> bool:
        """Whether body bytes written to the socket are framed as chunks."""
        return self.client is not None and self.client.chunked

    @property
    def acknowledged_bytes(self) -> int | None:
        """A number that grows while a send waits, whenever the client acknowledges bytes; None = unknown."""
        return self.client.taken_bytes if self.client is not None else None

    def queue_partial(self, rest: bytes) -> None:
        """Takes the rest of a frame that was written to the socket in part; it goes out before anything else."""
        self._partial = rest

    # The sends are not checkpoints for certain: whether a send is one depends on the server, and one more checkpoint
    # for each event would cost too much.

    async def _emit(self, *messages: Any) -> None:  # Any: hypercorn's union of ASGI messages
        if self.gone:
            return
        is_piece = messages[0].get("more_body", False)
        if is_piece and self.client is not None and self.sending_since is None and not self._partial:
            # This server writes each message whole. A cancellation may prevent a piece, but not a head or an end: those
            # are recorded as sent before they are.
            await self._emit_now(messages)
            return
        # bounded by: the stall limit (`abort`), and `patience_s`
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.patience_s) as self._shield:
            while self.sending_since is not None:  # a keep-alive, or a piece while a keep-alive is sent
                await self.wait_sent()
            await self._emit_now(messages)

    async def _emit_now(self, messages: tuple[Any, ...]) -> None:  # Any: as above
        self.sending_since = trio.current_time()
        try:
            if self._partial:
                await self._send_partial()
            for message in messages:
                await self._send(message)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has disconnected; the watch is notified, and cancels
        finally:
            self.last_sent_at = trio.current_time()
            self._note_sent()

    def _note_sent(self) -> None:
        self.sending_since = None
        if self._sent is not None:
            self._sent.set()
            self._sent = None

    async def wait_sent(self) -> None:
        """Waits for the send that is in progress; returns at once when none is."""
        if self.sending_since is not None:
            if self._sent is None:
                self._sent = trio.Event()
            await self._sent.wait()

    async def _send_partial(self) -> None:
        """Sends the rest of a frame."""
        rest, self._partial = memoryview(self._partial), b""
        with trio.CancelScope(shield=True):  # bounded by: as in `_emit`
            while rest and self.socket is not None:
                await trio.lowlevel.wait_writable(self.socket)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.socket.send(rest) :]

    async def start(self, status: int, headers: list[Header]) -> None:
        """Sends the head. This is COMMIT."""
        self.committed = True
        await self._emit({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send(self, data: bytes) -> None:
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
            return
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
        """Closes the client's connection now, even while a send waits, if the server allows it.

        Under `trigate serve`, HTTP/1.1 connections allow it (extension ``trigate.client``). Under asyncio servers the
        waiting send is cancelled. Under ``hypercorn -k trio`` nothing can end a waiting send.
        """
        self.ended = True
        if self._shield is not None:
            self._shield.cancel()
        if self.client is not None:
            await self.client.abort()
        else:
            await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """Leaves the response without its end. The server then closes the connection, which shows that it is
        incomplete."""
        self.ended = True
