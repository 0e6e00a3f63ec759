"""The ASGI extension ``trigate.client``: what an app may do with its client beyond ASGI.

The app finds a `Client` in ``scope["extensions"]["trigate.client"]`` where the server is this one and the connection is
HTTP/1.1. Without it (HTTP/2, other servers) the app uses plain ASGI.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from trigate.errors import Header
from trigate.server.client_stream import ClientStream
from trigate.server.request_parser import RequestParser


class Responder(Protocol):
    """The connection of the current request: has the received part of its body, and sends its response."""

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a whole response to the current request, and adds its content-length.

        **Cancels:** not at all, so a caller may record the response as sent before it calls this.
        """

    def take_body(self) -> bytes:
        """Returns the rest of the current request's body, which has been received."""

    async def flush(self) -> None:
        """Sends the head of the response if it still waits for the first piece of the body."""


class Client:
    """The client of one connection, with regard to the current request.

    Args:
        stream: The stream to the client.
        parser: Has the current request.
        responder: Sends the response.

    Attributes:
        chunked: Whether the body of the current response is sent in chunks, which the app must make itself where it
            writes to `socket`. If not, the length of the body is declared, or the body ends with the connection
            (HTTP/1.0). Valid after ``http.response.start``.
        respond: Sends a whole response, in place of ASGI's two messages (`Responder.respond`).
    """

    __slots__ = ("_parser", "_responder", "_stream", "chunked", "respond")

    def __init__(self, stream: ClientStream, parser: RequestParser, responder: Responder) -> None:
        self._stream = stream
        self._parser = parser
        self._responder = responder
        self.respond = responder.respond
        self.chunked = False

    @property
    def socket(self) -> socket.socket | None:
        """The plain, non-blocking socket, to which the app may write pieces of a body of undeclared length.

        It may do so after `flush` has returned, and while no ``send`` is in progress. None under TLS, on other streams,
        and after the connection was closed.
        """
        return self._stream.socket

    @property
    def body_is_here(self) -> bool:
        """Whether the rest of the current request's body has been received, so that `take_body` may be called."""
        return self._parser.is_whole

    def take_body(self) -> bytes:
        """Returns the rest of the current request's body, in place of ``receive``."""
        return self._responder.take_body()

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a send waits, whenever the client takes some of it; None = that is not known."""
        return self._stream.taken_bytes

    def watch(self, callback: Callable[[], None]) -> bool:
        """Calls back once if the client disconnects during the current request.

        The callback is synchronous and must not raise. If the client has disconnected already, it is called before this
        method returns. The end of the request ends the watch.

        Returns:
            False = it will not be called, and only ``receive`` reports a disconnect.
        """
        stream = self._stream
        if not stream.watch():
            return False
        stream.on_disconnect = callback
        if stream.disconnected:
            stream.note_disconnect()
        return True

    def serve_half_closed(self) -> None:
        """From now on, a client that has closed its sending side has not disconnected: it may wait for its answer.

        Only a reset or a failed write shows then that a client has gone. This holds until the connection ends.
        """
        self._stream.serve_half_closed()

    async def flush(self) -> None:
        """Sends the head of the response if it still waits for the first piece of the body.

        **Cancels:** before it sends.
        """
        await self._responder.flush()

    async def abort(self) -> None:
        """Closes the connection at once, also while a send waits."""
        await self._stream.abort()
