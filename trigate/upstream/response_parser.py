"""Parses one HTTP/1.1 response from bytes: llhttp (`httptools`), and the checks that llhttp leaves out.

The parser does no I/O, so anything that has the bytes can feed it: `pool`, or a relay that reads the socket itself.

llhttp checks the grammar, chunks and lengths, rejects conflicting or repeated lengths, and knows the responses that
have no body (1xx, 204, 304). This module adds:

- bounds: on the bytes of all heads together, on the number of interim responses, and on bytes that carry no body
  (endless chunk extensions and trailers), however the bytes are split into segments;
- a status of 200 to 599, HTTP/1.0 or 1.1, and no transfer coding but ``chunked``, since the request asked for none;
- ``HEAD``, which the parser does not know about;
- the end of the connection, which completes only a body without a length;
- whether the connection can carry another request.

Rules for editing: one object is made for each response and fed with each segment, so the callbacks are as few and as
small as possible. The parser keeps bound methods of this object, which makes a reference cycle. `Framing.close` breaks
the cycle, so that the garbage collector has nothing to find.
"""

from __future__ import annotations

from typing import NoReturn

import httptools
import httpx2

MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM = 16

DISCONNECTED = "Server disconnected without sending a response."
"""The message of the `httpx2.RemoteProtocolError` for a connection that ends before the head; httpcore's wording, which
`reply.translated` recognises, since httpx2 has no exception of its own for it."""
_TRUNCATED = "peer closed connection without sending complete message body"


class NotHttp(httpx2.RemoteProtocolError):
    """The bytes are not HTTP, or exceed a bound; in the head or in the framing of the body."""


class Framing:
    """The framing of one response: is fed bytes, gives the head and the pieces of the body.

    Args:
        method: The method of the request.

    Attributes:
        status: The HTTP status; 0 until the final head is complete.
        headers: The fields of the final head in the order of arrival, with names in lower case. Trailers are dropped.
        begun: Whether the final head is complete.
        complete: Whether the message is complete.
        received_any: Whether any byte has been received.
        keep_alive: Whether the connection can carry another request once this message is complete.
        pieces: Decoded pieces of the body that the reader has not taken yet. It stays the same list object.
    """

    __slots__ = (
        "_bytes_since_body",
        "_interim",
        "_method",
        "_parser",
        "_violation",
        "begun",
        "complete",
        "headers",
        "keep_alive",
        "on_body",
        "pieces",
        "received_any",
        "status",
    )

    def __init__(self, method: str = "POST") -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.begun = self.complete = self.received_any = self.keep_alive = False
        self.on_body = self.pieces.append  # the only callback on the hot path runs in C from end to end
        self._method = method
        self._interim = 0
        self._bytes_since_body = 0
        self._violation: str | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "begun" if self.begun else "waiting"
        return f"<{type(self).__name__} {self.status or '-'} {state}, {len(self.pieces)} pieces>"

    def feed(self, data: bytes | memoryview) -> None:
        """Parses bytes of the peer and appends the pieces of the body to ``pieces``.

        Raises:
            NotHttp: The bytes are not HTTP, or exceed a bound.
            httpx2.ReadError: The response was closed.
        """
        begun = self.begun
        if not begun:
            self.received_any = True
            allowed = MAX_HEAD_BYTES - self._bytes_since_body
            if len(data) > allowed > 0:  # the bound counts bytes, however they are split into segments
                self.feed(data[:allowed])
                data = data[allowed:]
                begun = self.begun
        if self._parser is None:
            raise httpx2.ReadError("The response was closed.")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._raise_not_http(error)
            self.keep_alive = False  # bytes follow the end of the message
        if self.complete:
            if self._method == "HEAD" and self.pieces:
                self.pieces.clear()
                self.keep_alive = False
        elif self.pieces:
            self._bytes_since_body = 0
        elif begun is self.begun:
            self._bytes_since_body += len(data)
            if self._bytes_since_body >= MAX_HEAD_BYTES:
                what = "framing between two pieces of its body" if begun else "response head"
                raise NotHttp(f"the server sent more than {MAX_HEAD_BYTES} bytes of {what}")
        else:
            self._bytes_since_body = 0

    def feed_eof(self) -> None:
        """Reports that the peer has closed the connection.

        Raises:
            httpx2.RemoteProtocolError: The message is incomplete.
        """
        self.keep_alive = False
        if self.complete:
            return
        if not self.begun:
            # A connection that ends within the head has not answered either.
            raise httpx2.RemoteProtocolError(DISCONNECTED)
        for name, _ in self.headers:
            if name == b"transfer-encoding":
                raise httpx2.RemoteProtocolError(f"{_TRUNCATED} (incomplete chunked read)")
            if name == b"content-length":
                raise httpx2.RemoteProtocolError(f"{_TRUNCATED} (less than its content-length)")
        self.complete = True

    def close(self) -> None:
        """Releases the parser. The head and the pieces that were parsed stay."""
        self._parser = None

    def _raise_not_http(self, error: Exception) -> NoReturn:
        if self._violation is not None:
            raise NotHttp(self._violation) from None
        message = "it switched protocols" if isinstance(error, httptools.HttpParserUpgrade) else str(error)
        raise NotHttp(message or type(error).__name__) from error

    # -- callbacks of llhttp

    def on_message_begin(self) -> None:
        """Rejects a second message behind the first: no request asked for it."""
        if self.complete:
            raise ValueError("a message without a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a field of a head; drops a field of the trailers."""
        if not self.begun:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Checks a complete head, interim or final."""
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.headers.clear()
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._reject(f"the server sent more than {MAX_INTERIM} interim responses")
            return
        if not 200 <= status < 600:
            self._reject(f"status {status} is not a valid answer")
        if parser.get_http_version() not in ("1.1", "1.0"):
            self._reject(f"HTTP/{parser.get_http_version()} was not asked for")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.rstrip(b" ").lower() != b"chunked":
                self._reject(f"the transfer coding {value[:50]!r} was not asked for")
        self.keep_alive = parser.should_keep_alive()
        self.status = status
        self.begun = True
        if self._method == "HEAD":
            self.complete = True

    def on_message_complete(self) -> None:
        """Marks the message as complete, unless it was an interim response: the final one follows it."""
        self.complete = self.begun

    def _reject(self, violation: str) -> NoReturn:
        # llhttp replaces an exception of a callback by an error of its own, so the reason is kept here.
        self._violation = violation
        raise ValueError(violation)
