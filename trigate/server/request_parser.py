"""Parses the bytes of an HTTP/1 connection into requests: heads, and the pieces of their bodies. Pure.

`RequestParser` is fed bytes, and returns the next part on request. It never waits, and parses no further than it is
asked to. A head is checked twice: by `request_head.examine` (limits, line ends, framing, Host), and by llhttp (the
characters of methods, targets, names and values).

**This module finds the end of a message, not llhttp.** llhttp cannot be stopped at the end of a message: it would
continue into the next request, or into other bytes after the last one. A body of declared length is counted, and llhttp
does not see it. A chunked body is walked from one chunk head to the next. The bytes that the walk
has passed then go to llhttp, which must find the end at the same byte. This module also bounds a chunked body: the head
of a chunk, all extensions together, all trailers together. Extensions and trailers are dropped.
"""

from __future__ import annotations

import re

from httptools import HttpRequestParser
from httptools.parser.errors import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade

from trigate.server import request_head
from trigate.server.request_head import HeadRefused, RequestHead

MAX_CHUNK_HEAD_BYTES = 256
"""The size of the head of a chunk: its length and its extensions."""
MAX_CHUNK_BYTES = 10**18 - 1
"""The declared size of a chunk; no body is as long. (A Content-Length has at most 18 digits.)"""
MAX_EXTENSIONS_BYTES = 16 * 1024
"""The size of all chunk extensions of a body together."""
MAX_TRAILERS_BYTES = 8 * 1024
"""The size of all trailers of a body together."""

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,16})(;[^\r\n]*)?\r\n")
_TRANSFER_ENCODING = re.compile(rb"(\ntransfer-encoding:)[^\r\n]*(\r\n)", re.IGNORECASE)
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Fields:
    """llhttp's callbacks for a head: collects the fields in the form that ASGI specifies."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.found.append((name.lower(), value))


class _Chunks:
    """llhttp's callbacks for a chunked body."""

    __slots__ = ("complete", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


class _ChunkWalk:
    """Finds the end of one chunked body."""

    __slots__ = ("_chunks", "_extensions_bytes", "_left", "_parser", "_trailers_bytes", "complete")

    def __init__(self) -> None:
        self._chunks = _Chunks()
        self._parser = HttpRequestParser(self._chunks)
        self._parser.feed_data(_CHUNKED_HEAD)
        self._left = 0  # bytes of the current chunk, with the CR LF behind it
        self._extensions_bytes = 0
        self._trailers_bytes = -1  # -1 = the last chunk has not arrived
        self.complete = False

    def take(self, data: bytes) -> tuple[bytes, int]:
        """Returns the part of the body in these bytes, and how many of them are consumed.

        Raises:
            HeadRefused: The bytes are not a chunked body.
        """
        end = self._walk(data)
        if not end:
            return b"", 0
        chunks = self._chunks
        try:
            self._parser.feed_data(data[:end])
        except HttpParserError as error:
            raise HeadRefused(400, f"The chunked body is malformed: {error}.") from None
        if chunks.complete is not self.complete:
            raise HeadRefused(400, "The chunked body is malformed.")
        pieces = chunks.pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body, end

    def _walk(self, data: bytes) -> int:
        position, size = 0, len(data)
        while True:
            if self._left:
                if size - position < self._left:
                    self._left -= size - position
                    return size
                position += self._left
                self._left = 0
            if self._trailers_bytes >= 0:
                return self._walk_trailers(data, position)
            head = _CHUNK_HEAD.match(data, position)
            if head is None:
                if size - position > MAX_CHUNK_HEAD_BYTES or data.find(b"\n", position) >= 0:
                    raise HeadRefused(400, "The head of a chunk is malformed or too long.")
                return position
            if head.end() - position > MAX_CHUNK_HEAD_BYTES:
                raise HeadRefused(400, "The head of a chunk is malformed or too long.")
            if head[2] is not None:
                self._extensions_bytes += len(head[2])
                if self._extensions_bytes > MAX_EXTENSIONS_BYTES:
                    raise HeadRefused(400, f"The chunk extensions have more than {MAX_EXTENSIONS_BYTES} bytes.")
            position = head.end()
            length = int(head[1], 16)
            if length > MAX_CHUNK_BYTES:
                raise HeadRefused(400, f"A chunk is longer than {MAX_CHUNK_BYTES} bytes.")
            if length:
                self._left = length + 2
            else:
                self._trailers_bytes = 0

    def _walk_trailers(self, data: bytes, position: int) -> int:
        while not self.complete:
            end = data.find(b"\n", position)
            if self._trailers_bytes + (end + 1 if end >= 0 else len(data)) - position > MAX_TRAILERS_BYTES:
                raise HeadRefused(431, f"The trailers have more than {MAX_TRAILERS_BYTES} bytes.")
            if end < 0:
                break
            self.complete = data[position : end + 1] in (b"\r\n", b"\n")  # llhttp refuses the latter
            self._trailers_bytes += end + 1 - position
            position = end + 1
        return position


class RequestParser:
    """The requests of one connection, one after another.

    Attributes:
        head: The head of the current request; set by `next_request`.
        headers: Its header fields in their order, with names in lower case.
        complete: The body of the current request has been returned completely.
    """

    __slots__ = ("_chunks", "_data", "_left", "complete", "head", "headers")

    def __init__(self) -> None:
        self._data = b""
        self._left = 0
        self._chunks: _ChunkWalk | None = None
        self.head: RequestHead
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = True

    @property
    def buffered(self) -> int:
        """How many fed bytes have not been consumed."""
        return len(self._data)

    @property
    def is_whole(self) -> bool:
        """Whether the rest of the current body has been fed, as far as that is known without parsing it."""
        return self.complete or (self._chunks is None and len(self._data) >= self._left)

    def feed(self, data: bytes) -> None:
        """Appends received bytes."""
        self._data = self._data + data if self._data else data

    def next_request(self) -> bool:
        """Starts the next request if its head is complete. The body of the one before it must be `complete`.

        Returns:
            Whether a request has started.

        Raises:
            HeadRefused: The head is not acceptable. The meaning of the bytes behind it is unknown.
        """
        data = self._data
        if data[:1] == b"\r":  # empty lines before a request: some clients send one after a body
            lines = _EMPTY_LINES.match(data)
            self._data = data = data[lines.end() :] if lines else data
        head = request_head.examine(data)
        if head is None:
            return False
        end = head.end
        fields = _Fields()
        raw = data if end == len(data) else data[:end]
        if head.chunked:  # llhttp refuses some of the whitespace that RFC 9110 allows around a value
            raw = _TRANSFER_ENCODING.sub(b"\\1chunked\\2", raw, 1)
        try:
            HttpRequestParser(fields).feed_data(raw)
        except HttpParserUpgrade:
            pass  # to another protocol; a server may ignore the offer
        except HttpParserInvalidMethodError:
            raise HeadRefused(501, "This server does not support the method.") from None
        except HttpParserError as error:
            raise HeadRefused(400, f"The head of the request is malformed: {error}.") from None
        headers = fields.found
        if data.find(b" \r\n", 0, end) >= 0 or data.find(b"\t\r\n", 0, end) >= 0:
            headers = [(name, value.rstrip(b" \t")) for name, value in headers]
        self._data = data[end:]
        self.head = head
        self.headers = headers
        self._chunks = None
        if head.chunked:
            self._chunks = _ChunkWalk()
            self.complete = False
        else:
            self._left = head.content_length or 0
            self.complete = not self._left
        return True

    def take_rest(self) -> bytes:
        """Returns the bytes behind the current head, which are of another protocol."""
        rest, self._data = self._data, b""
        return rest

    def next_piece(self) -> bytes:
        """Returns the received part of the body; ``b""`` if there is none. `complete` is then up to date.

        Raises:
            HeadRefused: The body does not match its head.
        """
        data = self._data
        if self.complete or not data:
            return b""
        if self._chunks is not None:
            piece, end = self._chunks.take(data)
            self.complete = self._chunks.complete
            self._data = data[end:]
            return piece
        left = self._left
        piece = data[:left]
        self._data = data[left:]
        self._left = left - len(piece)
        self.complete = not self._left
        return piece
