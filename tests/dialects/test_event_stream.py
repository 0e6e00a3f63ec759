"""AWS's event-stream framing: whole, in pieces, damaged."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.event_stream import frame, header, message
from trigate.dialects.bedrock.framing import END, EXCEPTION, FAULT, EventStreamSplitter
from trigate.openai import sse

FRAMES = (
    frame("messageStart", {"role": "assistant"}),
    frame("contentBlockDelta", body=b'{"delta":\r\n{"text":"\xc3\xa9"}}'),
    frame("metadata", {"usage": {}}),
)
STREAM = b"".join(FRAMES)
EVENTS = [
    b'data: {"messageStart":{"role":"assistant"}}\n\n',
    b'data: {"contentBlockDelta":{"delta":  {"text":"\xc3\xa9"}}}\n\n',
    b'data: {"metadata":{"usage":{}}}\n\n',
    b"data: " + END + b"\n\n",
]


def split(*pieces: bytes, limit: int = 10_000) -> list[bytes]:
    """Feeds the pieces to a splitter."""
    splitter = EventStreamSplitter(max_event_bytes=limit)
    return [event for piece in pieces for event in splitter.feed(piece)]


def test_every_split() -> None:
    """The events are the same, however the bytes are cut; while a message is not whole, it is pending."""
    assert split(STREAM) == EVENTS
    assert split(*[STREAM[at : at + 1] for at in range(len(STREAM))]) == EVENTS
    ends = {0, *[len(b"".join(FRAMES[: count + 1])) for count in range(len(FRAMES))]}
    for at in range(len(STREAM) + 1):
        splitter = EventStreamSplitter(max_event_bytes=10_000)
        events = splitter.feed(STREAM[:at])
        assert bool(splitter.pending) == (at not in ends)
        assert [*events, *splitter.feed(STREAM[at:])] == EVENTS


def test_every_flipped_bit() -> None:
    """A damaged message is an error, or never ends; the messages before it are whole; nothing behind it counts."""
    whole = len(FRAMES[0])
    for at in range(len(STREAM)):
        for bit in range(8):
            damaged = bytearray(STREAM)
            damaged[at] ^= 1 << bit
            events = split(bytes(damaged), b"more")
            before = EVENTS[: 0 if at < whole else 1 if at < whole + len(FRAMES[1]) else 2]
            assert events[: len(before)] == before
            rest = events[len(before) :]
            assert len(rest) == 1
            assert rest[0].startswith(FAULT)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_noise(noise: bytes, at: int) -> None:
    """No bytes raise anything, and none are taken for a message."""
    events = split(noise[:at], noise[at:])
    assert all(event.startswith(FAULT) for event in events)
    events = split(STREAM + noise)
    assert events[:4] == EVENTS
    assert all(event.startswith(FAULT) for event in events[4:])


def test_a_large_message() -> None:
    """One that exceeds the limit is refused at its first bytes; what came before it is kept."""
    large = frame("contentBlockDelta", {"delta": {"text": "x" * 1000}})
    splitter = EventStreamSplitter(max_event_bytes=500)
    with pytest.raises(sse.EventTooLarge) as caught:
        splitter.feed(FRAMES[0] + large[:12])
    assert caught.value.before == EVENTS[:1]
    assert splitter.feed(STREAM) == []


def test_exceptions() -> None:
    """An exception has its name; an error without a modelled exception has its code."""
    [event] = split(frame("throttlingException", {"message": "slow"}, kind="exception"))
    assert event == EXCEPTION + b'{"throttlingException":{"message":"slow"}}\n\n'
    headers = header(":message-type", "error") + header(":error-code", "InternalError")
    [event] = split(message(headers + header(":error-message", "it broke"), b""))
    assert event == EXCEPTION + b'{"InternalError":{"message":"it broke"}}\n\n'


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        header(":message-type", "event"),
        header(":message-type", "event") + header(":event-type", 'x":1}'),
        header(":message-type", "other") + header(":event-type", "x"),
        header(":message-type", "event") + header(":event-type", "x")[:-1],
        b"\x01a\x0b",
        b"\x01\xff\x07\x00\x00",
    ],
)
def test_malformed_headers(headers: bytes) -> None:
    """A message that does not say what it is breaks the stream."""
    [event] = split(message(headers, b"{}"))
    assert event.startswith(FAULT)


def test_headers_of_every_type() -> None:
    """Headers that are no strings are skipped."""
    others = b"".join(
        bytes([1]) + name + bytes([kind]) + value
        for name, kind, value in [
            (b"a", 0, b""),
            (b"b", 1, b""),
            (b"c", 2, b"1"),
            (b"d", 3, b"12"),
            (b"e", 4, b"1234"),
            (b"f", 5, b"12345678"),
            (b"g", 6, b"\x00\x02xy"),
            (b"h", 8, b"12345678"),
            (b"i", 9, b"1234567890123456"),
        ]
    )
    named = header(":message-type", "event") + header(":event-type", "x")
    assert split(message(others + named, b"{}")) == [b'data: {"x":{}}\n\n']


@pytest.mark.parametrize(("total", "headers"), [(15, 0), (0, 0), (40, 25), (2**31, 2**20)])
def test_lengths_that_contradict_each_other(total: int, headers: int) -> None:
    """They are refused, although their checksum is right."""
    prelude = struct.pack(">II", total, headers)
    [event] = split(prelude + struct.pack(">I", zlib.crc32(prelude)))
    assert event.startswith(FAULT)
