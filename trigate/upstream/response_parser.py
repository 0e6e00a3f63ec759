"""The framing of one HTTP/1.1 response, from bytes: llhttp (`httptools`), and what it lets through.

No sockets here, so whoever has the bytes may feed them: `transport`, or a relay that reads the socket itself.

What llhttp does: the grammar, chunks and lengths, conflicting or repeated lengths, bodies that cannot be (1xx, 204,
304). What stands here:

- bounds: on the bytes of all heads together, on interim responses, on what a peer may send that is no body (endless
  chunk extensions and trailers), however it is cut into segments;
- a status of 200 to 599, of HTTP/1.0 or 1.1, and no transfer coding but ``chunked``, since none was asked for;
- ``HEAD``, of which the parser knows nothing;
- the end of the connection, which is a proper end only for a body without a length;
- whether the connection may carry another request.

It is made once for each response, and fed for each piece: callbacks are as few and as small as they can be. The parser
keeps bound methods of this object, which makes a cycle; `close` breaks it, so that no garbage waits for the collector.
"""

from __future__ import annotations

from typing import NoReturn

import httptools
import httpx2

MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM = 16

_DISCONNECTED = "Server disconnected without sending a response."  # as httpcore says it; `upstream` looks for it
_CUT = "peer closed connection without sending complete message body"


class NotHttp(httpx2.RemoteProtocolError):
    """What came is not HTTP, or beyond a bound; in the head, or in the framing of the body."""


class Framing:
    """A response that is fed bytes.

    Args:
        method: Of the request.

    Attributes:
        status: 0 until the head is there.
        headers: Names in lower case, in the order in which they came. Without trailers, which are dropped.
        begun: The final head is there.
        complete: The message is complete.
        heard: Anything at all has come.
        keep_alive: The connection may carry another request, once this is complete.
        pieces: Decoded pieces of the body that nobody has taken yet. It stays the same list.
    """

    __slots__ = (
        "_barren_bytes",
        "_fault",
        "_interim",
        "_method",
        "_parser",
        "begun",
        "complete",
        "headers",
        "heard",
        "keep_alive",
        "on_body",
        "pieces",
        "status",
    )

    def __init__(self, method: str = "POST") -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.begun = self.complete = self.heard = self.keep_alive = False
        self.on_body = self.pieces.append  # the one callback of the hot path: C from end to end
        self._method = method
        self._interim = 0
        self._barren_bytes = 0  # since the last piece of a body
        self._fault: str | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "begun" if self.begun else "waiting"
        return f"<{type(self).__name__} {self.status or '-'} {state}, {len(self.pieces)} pieces>"

    def feed(self, data: bytes | memoryview) -> None:
        """Parses what came from the peer; pieces of the body are appended to ``pieces``.

        Raises:
            NotHttp: It is not HTTP, or beyond a bound.
        """
        begun = self.begun
        if not begun:
            self.heard = True
            room = MAX_HEAD_BYTES - self._barren_bytes
            if len(data) > room > 0:  # the bound is on bytes, not on how they came
                self.feed(data[:room])
                data = data[room:]
                begun = self.begun
        if self._parser is None:
            raise httpx2.ReadError("The response was closed.")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._refuse(error)
            self.keep_alive = False  # something follows its end
        if self.complete:
            if self._method == "HEAD" and self.pieces:
                self.pieces.clear()
                self.keep_alive = False
        elif self.pieces:
            self._barren_bytes = 0
        elif begun is self.begun:
            self._barren_bytes += len(data)
            if self._barren_bytes >= MAX_HEAD_BYTES:
                what = "framing between two pieces of its body" if begun else "response head"
                raise NotHttp(f"the server sent more than {MAX_HEAD_BYTES} bytes of {what}")
        else:
            self._barren_bytes = 0

    def feed_eof(self) -> None:
        """Says that the peer has closed the connection.

        Raises:
            httpx2.RemoteProtocolError: There was more to come.
        """
        self.keep_alive = False
        if self.complete:
            return
        if not self.begun:
            # A connection that closes in the head has not answered either.
            raise httpx2.RemoteProtocolError(_DISCONNECTED)
        for name, _ in self.headers:
            if name == b"transfer-encoding":
                raise httpx2.RemoteProtocolError(f"{_CUT} (incomplete chunked read)")
            if name == b"content-length":
                raise httpx2.RemoteProtocolError(f"{_CUT} (less than its content-length)")
        self.complete = True

    def close(self) -> None:
        """Lets go of the parser. What was parsed stays."""
        self._parser = None

    def _refuse(self, error: Exception) -> NoReturn:
        if self._fault is not None:
            raise NotHttp(self._fault) from None
        message = "it switched protocols" if isinstance(error, httptools.HttpParserUpgrade) else str(error)
        raise NotHttp(message or type(error).__name__) from error

    # -- what llhttp calls

    def on_message_begin(self) -> None:
        """Another message behind the end: what is not asked for is not parsed."""
        if self.complete:
            raise ValueError("a message without a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of a head, or of the trailers."""
        if not self.begun:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The end of a head, interim or final."""
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.headers.clear()
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._stop(f"the server sent more than {MAX_INTERIM} interim responses")
            return
        if not 200 <= status < 600:
            self._stop(f"status {status} is no answer")
        if parser.get_http_version() not in ("1.1", "1.0"):
            self._stop(f"HTTP/{parser.get_http_version()} was not asked for")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                self._stop(f"the transfer coding {value[:50]!r} was not asked for")
        self.keep_alive = parser.should_keep_alive()
        self.status = status
        self.begun = True
        if self._method == "HEAD":
            self.complete = True

    def on_message_complete(self) -> None:
        """The end of a message: of an interim one, there is more to come."""
        self.complete = self.begun

    def _stop(self, fault: str) -> NoReturn:
        # The parser hides what a callback raises behind an error of its own.
        self._fault = fault
        raise ValueError(fault)
