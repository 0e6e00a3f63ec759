"""AWS's event-stream framing (``application/vnd.amazon.eventstream``), turned into server-sent events.

A message is::

    total length (4)  length of the headers (4)  CRC of these 8 bytes (4)
    headers           payload                    CRC of everything before (4)

and a header is the length of its name (1), the name, a type (1) and a value whose length the type tells. All numbers
are big-endian. The checksums are verified, the first one before the lengths are used. A message that is not what it
should be ends the stream with an error: nothing after it can be trusted.

**Source:** "Event stream encoding" in the Amazon Transcribe Developer Guide; smithy.io, "Amazon Event Stream".
"""

from __future__ import annotations

import re
import struct
import zlib

import msgspec

from trigate.openai import sse

EVENT_STREAM = "application/vnd.amazon.eventstream"
"""The content type."""
FAULT = b"event: !fault\ndata: "
"""Begins the event that stands for a broken message; no event of the upstream can begin like this."""
EXCEPTION = b"event: !exception\ndata: "
"""Begins the event that stands for an error that the upstream reports."""
END = b'{"end":{}}'
"""The data of the event that follows the last message: the stream is complete, though its body may not have ended."""

_LAST = "metadata"
_PRELUDE = struct.Struct(">III")
_MIN_BYTES = 16
_MAX_HEADERS_BYTES = 128 * 1024
_STRING = 7
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
"""The sizes of values by their types; of 6 and 7, bytes and strings, the value begins with its length (2)."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}\Z")
_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")


class EventStreamSplitter:
    """Splits a stream into its messages, each as one server-sent event. A `formats.Splitter`.

    The data of an event is an object whose only key is the name of the message (``contentBlockDelta``), with the
    payload as its value. In valid JSON, line ends stand between values only, so they become blanks.

    Args:
        max_event_bytes: The size limit of a message.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._buffer = bytearray()
        self._is_broken = False

    @property
    def pending(self) -> bytes:
        """A byte that is no text, if a message has begun and not ended."""
        return b"\0" if self._buffer else b""

    def feed(self, piece: bytes) -> list[bytes]:
        """As `formats.Splitter.feed`."""
        events: list[bytes] = []
        if self._is_broken:
            return events
        buffer = self._buffer
        buffer += piece
        start = 0
        with memoryview(buffer) as view:
            while len(view) - start >= _PRELUDE.size:
                total, headers, checksum = _PRELUDE.unpack_from(view, start)
                if zlib.crc32(view[start : start + 8]) != checksum:
                    problem = "the checksum of a message's lengths is wrong"
                elif total < _MIN_BYTES or headers > min(total - _MIN_BYTES, _MAX_HEADERS_BYTES):
                    problem = "the lengths of a message contradict each other"
                elif total > self._max:
                    self._is_broken = True
                    raise sse.EventTooLarge(f"a message is larger than {self._max} bytes", events)
                elif len(view) - start < total:
                    break
                else:
                    problem = self._take(bytes(view[start : start + total]), headers, events)
                    start += total
                if problem:
                    events.append(FAULT + problem.encode() + b"\n\n")
                    self._is_broken = True
                    break
        del buffer[:start]
        return events

    def _take(self, message: bytes, headers: int, events: list[bytes]) -> str:
        """Appends the event of one message; returns what is wrong with it."""
        if zlib.crc32(message[:-4]) != int.from_bytes(message[-4:], "big"):
            return "the checksum of a message is wrong"
        named = _headers_of(message[12 : 12 + headers])
        if named is None:
            return "the headers of a message are malformed"
        kind = named.get(":message-type")
        name = named.get(f":{kind}-type") if kind in ("event", "exception") else named.get(":error-code")
        if kind not in ("event", "exception", "error") or name is None or not _NAME.match(name):
            return "a message is of no known type"
        payload = message[12 + headers : -4].translate(_LINE_ENDS).strip()
        if kind == "error":
            payload = msgspec.json.encode({"message": named.get(":error-message", "")})
        if kind == "event":
            events.append(b'data: {"%b":%b}\n\n' % (name.encode(), payload or b"{}"))
            if name == _LAST:
                events.append(b"data: %b\n\n" % END)
        else:
            events.append(EXCEPTION + b'{"%b":%b}\n\n' % (name.encode(), payload or b"{}"))
        return ""


def _headers_of(data: bytes) -> dict[str, str] | None:
    """Returns the headers that are strings; None if they are malformed."""
    found = {}
    at = 0
    try:
        while at < len(data):
            name = data[at + 1 : at + 1 + data[at]].decode()
            at += 1 + data[at]
            kind = data[at]
            at += 1
            if kind in (6, _STRING):
                size = int.from_bytes(data[at : at + 2], "big")
                at += 2
            else:
                size = _SIZES[kind]
            value = data[at : at + size]
            at += size
            if kind == _STRING:
                found[name] = value.decode()
    except (IndexError, KeyError, UnicodeDecodeError):
        return None
    return found if at == len(data) else None
