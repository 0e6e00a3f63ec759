"""An upstream's reply: where its bytes come from, how they are decoded, and what a failure in it means.

A reply has one of two sources: a response of our own `pool`, or the response of any transport that speaks `httpx2`.
`translated` is the only place that maps exceptions of a transport to errors of the gateway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

import httpx2
import trio

from trigate.content_coding import CODINGS, Decoder, NotDecodable, coding_of
from trigate.errors import GatewayError, Overloaded, ProtocolViolation, Truncated, Unavailable, UpstreamTimeout
from trigate.upstream.connect import NoDescriptor
from trigate.upstream.pool import Opening, Response
from trigate.upstream.response_parser import NotHttp

_CLOSE_GRACE_S = 1.0


def translated(error: httpx2.TransportError | httpx2.InvalidURL, name: str, *, answered: bool) -> GatewayError:
    """Returns the gateway's error for an exception of a transport.

    Args:
        name: The upstream.
        answered: Whether the head of the reply had been received.
    """
    match error:
        case NoDescriptor():
            return Overloaded(f"The gateway has no file descriptor left for a connection to the upstream {name}.")
        case httpx2.ConnectTimeout():
            return UpstreamTimeout(f"The upstream {name} did not accept a connection in time.", phase="connect")
        case httpx2.InvalidURL():
            return Unavailable(f"The upstream {name} has an address that cannot be used: {error}.")
        case httpx2.ConnectError():
            return Unavailable(f"The upstream {name} cannot be reached: {str(error) or type(error).__name__}.")
        case NotHttp() if answered:
            return ProtocolViolation(f"The upstream {name} sent an answer that is not HTTP: {error}.")
        case httpx2.RemoteProtocolError() if answered:
            return Truncated(f"The answer of the upstream {name} was truncated: {error}.")
        case httpx2.RemoteProtocolError() if "disconnected" in str(error):  # `response_parser.DISCONNECTED`
            return Unavailable(f"The upstream {name} closed the connection before it answered.", reachable=True)
        case httpx2.RemoteProtocolError():
            return ProtocolViolation(f"The upstream {name} did not answer with HTTP: {error}.")
        case httpx2.WriteError() if not answered:
            unsent = Unavailable(f"The connection to the upstream {name} broke within the request.", reachable=True)
            unsent.sent = False
            return unsent
        case _ if answered:
            return Truncated(f"The connection to the upstream {name} broke during its answer.")
        case _:
            return Unavailable(f"The connection to the upstream {name} broke before it answered.", reachable=True)


class Source(Protocol):
    """A response of any transport, as `Reply` reads it."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The header fields by their names in lower case."""

    def header(self, name: str) -> str:
        """The value of a header field, by its name in lower case; empty = there is none."""

    @property
    def response(self) -> Response | None:
        """The response of our own pool; None for another transport."""

    async def receive(self) -> bytes | None:
        """Returns the next piece of the body; None at its end."""

    async def aclose(self) -> None:
        """Releases the connection, or closes it."""


class SocketSource:
    """A response of the pool. Its connection is owned by the ``async with`` of `pool.Opening`."""

    __slots__ = ("_fields", "receive", "release", "response", "status")

    def __init__(self, opening: Opening, response: Response) -> None:
        self.release = opening.release
        self.response = response
        self.receive = response.receive
        self.status = response.status
        self._fields = dict(response.headers)

    @property
    def headers(self) -> Mapping[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self._fields.items()}

    def header(self, name: str) -> str:
        value = self._fields.get(name.encode())
        return value.decode("latin-1") if value is not None else ""

    async def aclose(self) -> None:
        self.release()


class Httpx2Source:
    """A response of any transport that speaks `httpx2`: the echo, a proxy, HTTP/2, a script in a test."""

    response: Response | None = None

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers = response.headers
        self._pieces = aiter(response.stream)  # type: ignore[arg-type]  # an async transport's is an async stream

    def header(self, name: str) -> str:
        value: str = self.headers.get(name, "")
        return value

    async def receive(self) -> bytes | None:
        async for piece in self._pieces:
            if piece:
                return bytes(piece)
        return None

    async def aclose(self) -> None:
        with trio.move_on_after(_CLOSE_GRACE_S, shield=True):
            close_pieces = getattr(self._pieces, "aclose", None)
            if close_pieces is not None:
                await close_pieces()
            await self._response.aclose()


class Reply:
    """An upstream's answer: its head, and its body piece by piece.

    The gateway asks for identity encoding. The body of a provider that compresses anyway (gzip, deflate) is decoded, in
    bounded pieces (`trigate.content_coding`).

    Args:
        name: The upstream, for error messages.

    Attributes:
        status: The HTTP status.
        content_type: In lower case, without parameters; empty if the reply has none.
    """

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        self._source = source
        self.status = source.status
        self.content_type = source.header("content-type").partition(";")[0].strip().lower()
        self._encoding = coding_of(source.header("content-encoding"))
        self._decoder = Decoder(self._encoding) if self._encoding in CODINGS else None

    @property
    def headers(self) -> Mapping[str, str]:
        """The header fields by their names in lower case."""
        return self._source.headers

    @property
    def plain_response(self) -> Response | None:
        """The response whose socket a relay may read itself; None where TLS or compression lies between."""
        response = self._source.response
        return response if response is not None and response.socket is not None and self._decoder is None else None

    def abandon(self) -> None:
        """Closes the connection at once, from any task. Does nothing for a transport that is not our own."""
        if self._source.response is not None:
            self._source.response.abandon()

    def truncation_error(self, failure: httpx2.TransportError) -> GatewayError:
        """Returns the gateway's error for a failure of the transport during the body."""
        return translated(failure, self._name, answered=True)

    async def receive(self) -> bytes | None:
        """Returns the next piece of the body; None at its end.

        Raises:
            Truncated: The connection broke, or the body ended before its framing or its compression did.
            ProtocolViolation: The body is not HTTP, has an unknown encoding, or cannot be decoded.
        """
        decoder = self._decoder
        if decoder is None:
            return await self._receive_raw()
        while True:
            try:
                piece = decoder.next_piece()
            except NotDecodable as error:
                raise ProtocolViolation(
                    f"The upstream {self._name} sent a body that cannot be decoded: {error}."
                ) from None
            if piece:
                await trio.lowlevel.checkpoint()  # a few received bytes may become many pieces
                return piece
            data = await self._receive_raw()
            if data is None:
                if not decoder.complete:
                    raise Truncated(f"The compressed answer of the upstream {self._name} was truncated.")
                return None
            decoder.feed(data)

    async def _receive_raw(self) -> bytes | None:
        if self._encoding != "identity" and self._decoder is None:
            raise ProtocolViolation(f"The upstream {self._name} sent a body encoded as {self._encoding[:50]!r}.")
        try:
            return await self._source.receive()
        except httpx2.TransportError as error:
            raise self.truncation_error(error) from error

    async def read(
        self, max_bytes: int, *, max_decoded_bytes: int | None = None, on_piece: Callable[[], None] = lambda: None
    ) -> bytes:
        """Returns the whole body.

        Args:
            max_decoded_bytes: The limit for a compressed body, once it is decoded; None = ``max_bytes``.
            on_piece: Called for each piece that is received after the head.

        Raises:
            ProtocolViolation: The body is larger than its limit; or as `receive`.
            Truncated: As `receive`.
        """
        response = self._source.response
        if response is not None and response.complete and self._encoding == "identity":
            # The body was received together with its head, like that of most short answers.
            body = b"".join(response.pieces)
            response.pieces.clear()
            if len(body) <= max_bytes:
                return body
            raise self._too_large(max_bytes)
        if self._decoder is not None and max_decoded_bytes is not None:
            max_bytes = min(max_bytes, max_decoded_bytes)
        pieces = []
        size = 0
        while (piece := await self.receive()) is not None:
            on_piece()
            size += len(piece)
            if size > max_bytes:
                raise self._too_large(max_bytes)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_large(self, max_bytes: int) -> ProtocolViolation:
        return ProtocolViolation(f"The upstream {self._name} answered with more than {max_bytes} bytes.")

    async def aclose(self) -> None:
        """Closes the reply, and its connection unless the body was read to its end. A second call does nothing.

        Another task than the reader may call this, as long as the reader is not inside `receive`.

        **Cancels:** never hangs: a transport that is not our own gets one second.
        """
        if isinstance(self._source, SocketSource):
            self._source.release()
            return
        with contextlib.suppress(httpx2.TransportError, OSError):
            await self._source.aclose()
