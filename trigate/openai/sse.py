"""Server-sent events, on bytes.

An event ends at a blank line, and a line ends at LF, CRLF or CR only: U+2028, U+2029 and U+0085 may occur unescaped in
JSON, so a text-mode line splitter would break events apart. A byte order mark may precede the stream. Events are never
decoded here: they leave as they arrived, byte for byte.

Source: WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6.
"""

from __future__ import annotations

import re
from typing import Literal

BOM = b"\xef\xbb\xbf"

# One line end, without backtracking: outside an atomic group, CRLF would also match as CR + LF, which is a blank line.
_EOL = rb"(?>\r\n|\n|\r)"
_BLANK_LINE = re.compile(_EOL + _EOL)
_LINE = re.compile(_EOL)
_RESUMPTION = re.compile(rb"^(?:id|retry)(?=:|\r|$)", re.M)


class EventTooLarge(ValueError):
    """An event is larger than the bound.

    Attributes:
        before: The whole events before it in the same piece.
    """

    def __init__(self, message: str, before: list[bytes]) -> None:
        super().__init__(message)
        self.before = before


class EventSplitter:
    r"""Splits a stream of bytes into whole events, wherever its pieces were split.

    >>> splitter = EventSplitter(max_event_bytes=100)
    >>> splitter.feed(b"data: 1\r\n\r\nda")
    [b'data: 1\r\n\r\n']
    >>> splitter.feed(b"ta: 2\n"), splitter.feed(b"\n: ping\n\n"), splitter.pending_bytes
    ([], [b'data: 2\n\n', b': ping\n\n'], 0)

    Args:
        max_event_bytes: A longer event raises `EventTooLarge`; the splitter must not be used after it.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._buffer = b""
        self._pieces: list[bytes] = []  # of the unfinished event, behind `_buffer`; none of them holds a line end
        self._pieces_bytes = 0
        self._started = False
        self._swallow_lf = False

    @property
    def pending(self) -> bytes:
        """The received part of an unfinished event."""
        if self._pieces:
            self._join()
        return self._buffer

    @property
    def is_between_events(self) -> bool:
        """Whether the next byte begins an event."""
        return self._started and not self._buffer and not self._swallow_lf

    @property
    def pending_bytes(self) -> int:
        """The size of the received part of an unfinished event."""
        return len(self._buffer) + self._pieces_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next piece, and returns the events that it completed, each with its blank line.

        Raises:
            EventTooLarge: An event, finished or not, is larger than ``max_event_bytes``.
        """
        if self._swallow_lf and data:
            # The last event ended with a CR at the very end of a piece; this LF belongs to it.
            self._swallow_lf = False
            if data[0] == 0x0A:
                data = data[1:]
        if self._started and self._buffer and b"\n" not in data and b"\r" not in data:
            # A part of one long line, such as a picture. Appending it to the buffer would copy the buffer each time.
            if self.pending_bytes + len(data) > self._max:
                raise self._too_large([])
            self._pieces.append(data)
            self._pieces_bytes += len(data)
            return []
        if self._pieces:
            self._join()
        scan = max(0, len(self._buffer) - 3)
        buffer = self._buffer + data if self._buffer else data
        if not self._started:
            if len(buffer) < 3 and BOM.startswith(buffer):
                self._buffer = buffer
                return []
            self._started = True
            buffer = buffer.removeprefix(BOM)
            scan = 0
        events = []
        start = 0
        for match in _BLANK_LINE.finditer(buffer, scan):
            end = match.end()
            events.append(buffer[start:end])
            start = end
        rest = buffer[start:] if start else buffer
        if events and not rest and events[-1][-1] == 0x0D:
            self._swallow_lf = True
        for index, event in enumerate([*events, rest] if len(buffer) > self._max else ()):
            if len(event) > self._max:
                raise self._too_large(events[:index])
        self._buffer = rest
        return events

    def _join(self) -> None:
        self._buffer = b"".join([self._buffer, *self._pieces])
        self._pieces.clear()
        self._pieces_bytes = 0

    def _too_large(self, before: list[bytes]) -> EventTooLarge:
        return EventTooLarge(f"an event is larger than {self._max} bytes", before)


def data_of(event: bytes) -> bytes | None:
    r"""Returns an event's data, its lines joined by LF; None if it has no ``data`` field (a comment, a bare id).

    >>> data_of(b"data: {}\n\n"), data_of(b"event: x\r\ndata:a\r\ndata: b\r\n\r\n"), data_of(b": ping\n\n")
    (b'{}', b'a\nb', None)
    """
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]  # one line, as nearly every event of nearly every provider
    found = []
    for line in _LINE.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            found.append(value.removeprefix(b" "))
    return b"\n".join(found) if found else None


def with_data(event: bytes, data: bytes) -> bytes:
    r"""Returns the event with other data and the same other fields.

    >>> with_data(b"event: x\r\ndata: a\r\ndata: b\r\n\r\n", b"c\nd")
    b'event: x\ndata: c\ndata: d\n\n'
    """
    others = [line for line in _LINE.split(event) if line and line.partition(b":")[0] != b"data"]
    return b"\n".join([*others, *[b"data: " + line for line in data.split(b"\n")]]) + b"\n\n"


def without_resumption(event: bytes) -> bytes:
    r"""Returns the event without its ``id`` and ``retry`` fields: a stream through the gateway cannot be resumed.

    >>> without_resumption(b"id: 7\nevent: x\ndata: a\n\n"), without_resumption(b"data: id\n\n")
    (b'event: x\ndata: a\n\n', b'data: id\n\n')
    """
    if event.startswith(b"data") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event
    if not _RESUMPTION.search(event) and b"\r" not in event:
        return event  # a search costs less than splitting lines, but does not know that a CR ends one
    lines = [line for line in _LINE.split(event) if line]
    kept = [line for line in lines if not _RESUMPTION.match(line)]
    return event if len(kept) == len(lines) else b"\n".join(kept) + b"\n\n"


def comment(text: str, form: Literal["block", "line"]) -> bytes:
    r"""Makes a comment.

    As a ``block``, it has a blank line after it. Parsers that split a stream at blank lines need that: they would take
    a comment and the event behind it for one block, and drop it, since it does not begin with ``data:``. Other parsers
    dispatch an event at every blank line, and fail at an empty one. (openai-python 3 does after an ``id`` or ``retry``
    field, which is one reason for `without_resumption`.) They need a ``line``, without a blank line.

    >>> comment("keep-alive", "block"), comment("keep-alive", "line")
    (b': keep-alive\n\n', b': keep-alive\n')
    """
    return b": " + text.encode() + (b"\n\n" if form == "block" else b"\n")
