"""A request body that is sent as it arrives, instead of being kept: an upload.

It can be sent once. So a request with such a body has a connection of its own and is never sent again; only if no
connection could be made, another upstream may get it.
"""

from __future__ import annotations

from typing import Protocol

import httpx2


class RequestStream(Protocol):
    """The body of a request, piece by piece."""

    @property
    def length_bytes(self) -> int | None:
        """Its whole length; None = that is not known, and it is sent in chunks."""

    @property
    def begun(self) -> bool:
        """A piece has been taken: the body cannot be sent by another request any more."""

    async def receive(self) -> bytes | None:
        """Returns the next piece, which is not empty; None at the end.

        Raises:
            GatewayError: It does not arrive in time, or is not what was announced.
        """


def length_field(body: bytes | RequestStream) -> str:
    """Returns the header field that announces the length of a body, with its line end."""
    if isinstance(body, bytes):
        return f"content-length: {len(body)}\r\n"
    if body.length_bytes is not None:
        return f"content-length: {body.length_bytes}\r\n"
    return "transfer-encoding: chunked\r\n"


class Frames:
    """The pieces of a body as HTTP/1.1 sends them: as they are, or in chunks."""

    def __init__(self, body: RequestStream) -> None:
        self._body = body
        self._ended = False

    async def next(self) -> bytes:
        """Returns the next bytes; none = all are sent. Raises as `RequestStream.receive`."""
        if self._ended:
            return b""
        piece = await self._body.receive()
        is_chunked = self._body.length_bytes is None
        if piece is None:
            self._ended = True
            return b"0\r\n\r\n" if is_chunked else b""
        return b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece


class StreamContent(httpx2.AsyncByteStream):
    """The body for a transport that speaks `httpx2`."""

    def __init__(self, body: RequestStream) -> None:
        self._body = body

    def __aiter__(self) -> StreamContent:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._body.receive()
        if piece is None:
            raise StopAsyncIteration
        return piece
