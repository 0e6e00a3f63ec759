"""From the bytes of an HTTP/1 connection to requests: heads, and the pieces of their bodies. Pure.

`RequestParser` is fed bytes and asked for what comes next; it never waits, and does not look further than it is asked
to. What a head says is judged twice: by `request_head.examine` (limits, line ends, framing, Host), and by llhttp
(the characters of methods, targets, names and values).

**Where a message ends is found here, not by llhttp**: it cannot be told to stop at the end of one, and would run into
the next request, or into whatever a peer has sent behind the last one. A body of declared length is counted, which
llhttp need not see. A chunked one is walked from one chunk head to the next, and what the walk has passed over is then
given to llhttp, which must find the end at the same byte. The bounds of a chunked body (length of a chunk's head, all
extensions together, all trailers together) are here too. Extensions and trailers are dropped.
"""

from __future__ import annotations

import re

from httptools import HttpRequestParser
from httptools.parser.errors import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade

from trigate.server import request_head
from trigate.server.request_head import HeadRefused, RequestHead

MAX_CHUNK_HEAD_BYTES = 256
"""The longest head of a chunk: its size and its extensions."""
MAX_EXTENSIONS_BYTES = 16 * 1024
"""All chunk extensions of a body together: who sends many of them sends no body."""
MAX_TRAILERS_BYTES = 8 * 1024

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,16})(;[^\r\n]*)?\r\n")
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Fields:
    """What llhttp calls for a head: it collects the fields as ASGI wants them."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.found.append((name.lower(), value))


class _Chunks:
    """What llhttp calls for a chunked body."""

    __slots__ = ("complete", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


class _ChunkWalk:
    """One chunked body."""

    __slots__ = ("_chunks", "_extensions_bytes", "_left", "_parser", "_trailers_bytes", "complete")

    def __init__(self) -> None:
        self._chunks = _Chunks()
        self._parser = HttpRequestParser(self._chunks)
        self._parser.feed_data(_CHUNKED_HEAD)
        self._left = 0  # of the current chunk, with the CR LF behind it
        self._extensions_bytes = 0
        self._trailers_bytes = -1  # -1 = the last chunk has not come
        self.complete = False

    def take(self, data: bytes) -> tuple[bytes, int]:
        """Gives what there is of the body in these bytes, and how many of them are done with.

        Raises:
            HeadRefused: They are not a chunked body.
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
        head: The current request's; set by `next_request`.
        headers: Its fields: names in lower case, in their order.
        complete: Nothing (more) of its body is to come.
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
        """How many bytes have been fed that nobody has asked for."""
        return len(self._data)

    @property
    def is_whole(self) -> bool:
        """Whether the rest of the current body has been fed, as far as that can be told without parsing it."""
        return self.complete or (self._chunks is None and len(self._data) >= self._left)

    def feed(self, data: bytes) -> None:
        """Takes bytes."""
        self._data = self._data + data if self._data else data

    def next_request(self) -> bool:
        """Goes on to the next request, if its head is complete. The one before it must be.

        Raises:
            HeadRefused: It is none. Nothing can be said of the bytes behind it.
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
        try:
            HttpRequestParser(fields).feed_data(data if end == len(data) else data[:end])
        except HttpParserUpgrade:
            pass  # to another protocol that we do not know, and need not
        except HttpParserInvalidMethodError:
            raise HeadRefused(501, "This server does not know the method.") from None
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

    def next_piece(self) -> bytes:
        """Gives what has arrived of the body; nothing, if nothing has. `complete` says whether that is all.

        Raises:
            HeadRefused: It is not what its head says.
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
