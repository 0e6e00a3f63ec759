"""What can go wrong below an answer: connecting, ends, silence, heads, framing, codings. A part of `catalogue`."""

from __future__ import annotations

import gzip
import zlib

from tests.faults.making import (
    ALL,
    ALL_JSON,
    ARRIVES,
    BODY,
    DONE,
    END,
    EVENTS,
    FINISH,
    GARBLED,
    GOOD_JSON,
    GOOD_STREAM,
    HALF,
    HEL,
    JSON,
    LO,
    SSE,
    TRUNCATED,
    UNAVAILABLE,
    USAGE,
    answer,
    body,
    both,
    chunked,
    fault,
    garbled,
    head,
    late,
    silent,
    stream,
    truncated,
    unread,
)
from tests.faults.steps import Expected, Fault, Fin, Hang, Pause, Place, Repeat, Rst, Script, Send, Spell, Step
from tests.support.provider import role

# -- connecting -------------------------------------------------------------------------------------------------------

ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
"""TLS: fatal, handshake_failure."""


def anywhere(name: str, at: Place, gets: Expected, gets_json: Expected | None = None) -> Fault:
    """A fault of the place: whoever gets through is answered well."""
    return fault(name, GOOD_STREAM, GOOD_JSON, gets, gets_json, at=at)


CONNECTING = (
    anywhere("Nobody listens", "nobody listens", UNAVAILABLE),
    anywhere("It accepts no connection, and does not refuse it", "accepts nothing", late("connect")),
    anywhere("Its name is unknown", "unknown name", UNAVAILABLE),
    anywhere("The name server does not answer", "name server hangs", late("connect")),
    anywhere("Of its two addresses, one is dead", "one address of two", ALL, ALL_JSON),
    unread("It accepts, and closes", (Fin(),), UNAVAILABLE),
    unread("It accepts, and resets", (Rst(),), UNAVAILABLE),
    unread("It speaks first, another protocol", (Send(b"SSH-2.0-OpenSSH_9.9\r\n"), Hang()), GARBLED),
    anywhere("None, over TLS", "TLS", ALL, ALL_JSON),
    anywhere("Its certificate is of an unknown authority", "TLS, unknown authority", UNAVAILABLE),
    anywhere("Its certificate has expired", "TLS, expired", UNAVAILABLE),
    anywhere("Its certificate is for another name", "TLS, other name", UNAVAILABLE),
    unread("TLS is expected, and it says nothing", (Hang(),), late("connect"), at="https to plain"),
    unread("TLS is expected, and it closes", (Fin(),), UNAVAILABLE, at="https to plain"),
    unread("TLS is expected, and it resets", (Rst(),), UNAVAILABLE, at="https to plain"),
    unread(
        "TLS is expected, and it speaks HTTP", (*answer(b"", status="400 X"), Fin()), UNAVAILABLE, at="https to plain"
    ),
    both("HTTP is expected, and it speaks TLS", (Send(ALERT), Fin()), GARBLED),
    fault(
        "Over TLS, it closes in the answer",
        stream(role(), HEL, then=(Fin(),)),
        body(HALF, then=(Fin(),)),
        truncated(role(), HEL),
        TRUNCATED,
        at="TLS",
    ),
    fault(
        "Over TLS, it resets in the answer",
        stream(role(), HEL, then=(Rst(),)),
        body(HALF, then=(Rst(),)),
        truncated(role(), HEL),
        TRUNCATED,
        at="TLS",
    ),
    fault(
        "Over TLS, it falls silent in the answer",
        stream(role(), HEL, then=(Hang(),)),
        body(HALF, then=(Hang(),)),
        silent(role(), HEL),
        late("idle"),
        at="TLS",
    ),
)

# -- ending early, and falling silent ---------------------------------------------------------------------------------


def ends_by(how: str, step: Step) -> tuple[Fault, ...]:
    """A connection that ends, at each place of an answer."""
    then = (step,)
    return (
        both(f"It {how} before it answers", then, UNAVAILABLE),
        both(f"It {how} in the status line", (Send(b"HTTP/1.1 20"), *then), UNAVAILABLE),
        both(f"It {how} in the header fields", (Send(b"HTTP/1.1 200 OK\r\ncontent-ty"), *then), UNAVAILABLE),
        fault(f"It {how} after the head", stream(then=then), body(then=then), TRUNCATED),
        fault(
            f"It {how} in the first content, or in the JSON",
            stream(role(), HEL[:60], then=then),
            body(HALF, then=then),
            TRUNCATED,
        ),
        fault(f"It {how} between two events", stream(role(), HEL, then=then), None, truncated(role(), HEL)),
        fault(f"It {how} in an event", stream(role(), HEL, LO[:60], then=then), None, truncated(role(), HEL)),
        fault(
            f"It {how} in the header of a chunk",
            (*stream(role(), HEL, then=(Send(b"1"), *then)),),
            body(HALF, then=(Send(b"1"), *then)),
            truncated(role(), HEL),
            TRUNCATED,
        ),
        fault(
            f"It {how} after `finish_reason`, before `[DONE]`",
            stream(role(), HEL, FINISH, then=then),
            None,
            truncated(role(), HEL, FINISH),
        ),
        fault(
            f"It {how} after the last byte of the answer, before the end of the framing",
            stream(EVENTS, then=then),
            body(BODY, then=then),
            ALL,
            TRUNCATED,
        ),
    )


HANGS = (
    both("It says nothing", (Hang(),), late("response_head")),
    both("It falls silent in the head", (Send(b"HTTP/1.1 200 OK\r\ncontent-ty"), Hang()), late("response_head")),
    fault(
        "It falls silent after the head",
        stream(then=(Hang(),)),
        body(then=(Hang(),)),
        late("first_token"),
        late("idle"),
    ),
    fault(
        "It falls silent after the role, or in the JSON",
        stream(role(), then=(Hang(),)),
        body(HALF, then=(Hang(),)),
        late("first_token"),
        late("idle"),
    ),
    fault("It falls silent between two events", stream(role(), HEL, then=(Hang(),)), None, silent(role(), HEL)),
    fault("It falls silent in an event", stream(role(), HEL, LO[:60], then=(Hang(),)), None, silent(role(), HEL)),
    fault(
        "It falls silent after `finish_reason`, before `[DONE]`",
        stream(role(), HEL, FINISH, then=(Hang(),)),
        None,
        silent(role(), HEL, FINISH),
    ),
    fault(
        "It falls silent after the last byte of the answer, before the end of the framing",
        stream(EVENTS, then=(Hang(),)),
        body(BODY, then=(Hang(),)),
        ALL,
        late("idle"),
    ),
    both(
        "It sends a head byte by byte, and does not get to its end in time",
        (Spell(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 99, 0.05),),
        late("response_head"),
    ),
    both(
        "It sends header fields slowly, for ever",
        (Send(b"HTTP/1.1 200 OK\r\n"), Repeat(b"x-a: b\r\n", 0.05)),
        late("response_head"),
    ),
    both(
        "It sends interim responses slowly, for ever",
        (Repeat(b"HTTP/1.1 102 Processing\r\n\r\n", 0.05),),
        late("response_head"),
    ),
    fault(
        "It sends comments, and no content",
        (Send(SSE), Repeat(chunked(b": wait\n\n"), 0.05)),
        None,
        late("first_token"),
    ),
    fault(
        "It sends roles and empty deltas, and no content",
        (Send(SSE), Repeat(chunked(role()), 0.05)),
        None,
        late("first_token"),
    ),
    fault(
        "It sends comments for ever, after some content",
        stream(role(), HEL, then=(Repeat(chunked(b": wait\n\n"), 0.05),)),
        None,
        silent(role(), HEL, phase="total"),
    ),
    fault(
        "It sends content slowly, for ever",
        (Send(SSE), Repeat(chunked(HEL), 0.05)),
        (Send(JSON), Repeat(chunked(b" "), 0.05)),
        silent(HEL, phase="total", endless=True),
        late("total"),
    ),
    fault(
        "It sends an event byte by byte, and does not get to its end in time",
        stream(role(), HEL, then=(Send(b"%x\r\n" % (len(LO) * 9)), Spell(LO[:-2] * 9, 0.02))),
        (Send(JSON + b"%x\r\n" % len(BODY)), Spell(BODY, 0.02)),
        silent(role(), HEL, phase="total"),
        late("total"),
    ),
    fault(
        "It is slow, and gets to its end",
        (
            Send(SSE),
            *(step for piece in (role(), HEL, LO, FINISH, USAGE, DONE) for step in (Pause(0.05), Send(chunked(piece)))),
            Send(END),
        ),
        (Send(JSON), Pause(0.1), Send(chunked(BODY[:50])), Pause(0.1), Send(chunked(BODY[50:]) + END)),
        ALL,
        ALL_JSON,
    ),
)

# -- the head ---------------------------------------------------------------------------------------------------------

TAIL = b"content-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b" % (len(EVENTS), EVENTS)
JSON_TAIL = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


def headed(name: str, start: bytes, gets: Expected, gets_json: Expected | None = None) -> Fault:
    """A good answer whose head begins like this."""
    return fault(name, (Send(start + TAIL),), (Send(start + JSON_TAIL),), gets, gets_json)


OK = b"HTTP/1.1 200 OK\r\n"

HEADS = (
    headed("It has no reason phrase", b"HTTP/1.1 200\r\n", ALL, ALL_JSON),
    headed(
        "A few interim responses come first", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3 + OK, ALL, ALL_JSON
    ),
    headed("A thousand interim responses come first", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + OK, GARBLED),
    headed("Status 101", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n", GARBLED),
    headed("Status 999", b"HTTP/1.1 999 What\r\n", GARBLED),
    headed("Status 600", b"HTTP/1.1 600 What\r\n", GARBLED),
    headed("Status 42", b"HTTP/1.1 42 What\r\n", GARBLED),
    headed("Status OK", b"HTTP/1.1 OK\r\n", GARBLED),
    headed("HTTP/3.0", b"HTTP/3.0 200 OK\r\n", GARBLED),
    both("HTTP/2, unasked", (Send(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64"), Hang()), GARBLED),
    both("An answer without a head (HTTP/0.9)", (Send(EVENTS), Fin()), GARBLED),
    headed("A header field of 100 KiB", OK + b"x-a: " + b"a" * 102_400 + b"\r\n", GARBLED),
    headed("Ten thousand header fields", OK + b"x-a: bcdef\r\n" * 10_000, GARBLED),
    headed("A header field without a colon", OK + b"nonsense\r\n", GARBLED),
    headed("A NUL in a header field", OK + b"x-a: b\0c\r\n", GARBLED),
    headed("A line end of its own in a header field's name", OK + b"x\ra: b\r\n", GARBLED),
    headed("Two lengths", OK + b"content-length: 7\r\n", GARBLED),
    headed("A negative length", OK + b"content-length: -7\r\n", GARBLED),
    headed("A length that is no number", OK + b"content-length: many\r\n", GARBLED),
    headed("A length beyond any", OK + b"content-length: " + b"9" * 30 + b"\r\n", GARBLED),
    headed("A length and chunks", OK + b"transfer-encoding: chunked\r\n", GARBLED),
    fault(
        "A transfer coding that nobody asked for",
        (Send(head("text/event-stream", coding="transfer-encoding: gzip, chunked") + chunked(EVENTS) + END),),
        (Send(head("application/json", coding="transfer-encoding: gzip, chunked") + chunked(BODY) + END),),
        GARBLED,
    ),
    fault(
        "No content type",
        (Send(OK + b"content-length: %d\r\n\r\n%b" % (len(EVENTS), EVENTS)),),
        (Send(OK + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)),),
        ALL,
        ALL_JSON,
    ),
    fault(
        "Another content type: `text/plain`",
        answer(EVENTS, kind="text/plain"),
        answer(BODY, kind="text/plain"),
        GARBLED,
        ALL_JSON,
    ),
    fault("A stream is asked for, and JSON comes; or the other way round", GOOD_JSON, GOOD_STREAM, GARBLED),
)

# -- framing and codings ----------------------------------------------------------------------------------------------


CLOSES: Script = (Fin(),)


def sized(length: int, sent: bytes, *, kind: str, then: Script = CLOSES) -> Script:
    """A body with this length said of it."""
    return (Send(head(kind, coding=f"content-length: {length}") + sent), *then)


def _flushed(*parts: bytes) -> list[bytes]:
    """gzip: for each part, all that it makes; and its end."""
    packer = zlib.compressobj(wbits=31)
    return [*[packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH) for part in parts], packer.flush()]


def _packed(start: bytes, *parts: bytes) -> Script:
    packed = _flushed(*parts)
    return (Send(start), *(step for each in packed for step in (Send(chunked(each)), ARRIVES)), Send(END))


GZIP_SSE = head("text/event-stream", "content-encoding: gzip")
GZIP_JSON = head("application/json", "content-encoding: gzip")
BOMB = bytes(20_000_000)
BR = head("text/event-stream", "content-encoding: br"), head("application/json", "content-encoding: br")

FRAMING = (
    fault(
        "Its length says more than comes, and it closes",
        sized(9999, role() + HEL, kind="text/event-stream"),
        sized(9999, BODY, kind="application/json"),
        truncated(role(), HEL),
        TRUNCATED,
    ),
    fault(
        "Its length says more than comes, and it falls silent",
        sized(9999, role() + HEL, kind="text/event-stream", then=(Hang(),)),
        sized(9999, BODY, kind="application/json", then=(Hang(),)),
        silent(role(), HEL),
        late("idle"),
    ),
    fault(
        "Its length says less than comes",
        sized(len(role() + HEL), EVENTS, kind="text/event-stream", then=()),
        sized(len(HALF), BODY, kind="application/json", then=()),
        truncated(role(), HEL),
        GARBLED,
    ),
    fault(
        "Something comes behind the answer",
        (Send(SSE + chunked(EVENTS) + END + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),),
        (*GOOD_JSON, Send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")),
        ALL,
        ALL_JSON,
    ),
    fault(
        "Its body ends with the connection (HTTP/1.0)",
        (Send(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + EVENTS), Fin()),
        (Send(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + BODY), Fin()),
        ALL,
        ALL_JSON,
    ),
    fault(
        "Its body ends with the connection, too early",
        (Send(head("text/event-stream", coding="") + role() + HEL), Fin()),
        (Send(head("application/json", coding="") + HALF), Fin()),
        truncated(role(), HEL),
        GARBLED,
    ),
    fault(
        "The size of the first chunk is no number",
        (Send(SSE + b"zz\r\n" + EVENTS),),
        (Send(JSON + b"zz\r\n" + BODY),),
        GARBLED,
    ),
    fault(
        "The size of a later chunk is no number",
        stream(role(), HEL, then=(Send(b"zz\r\n" + LO),)),
        body(HALF, then=(Send(b"zz\r\n" + BODY),)),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "A chunk is longer than its size",
        stream(role(), HEL, then=(Send(b"5\r\n" + LO),)),
        body(HALF, then=(Send(b"5\r\n" + BODY),)),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "The size of a chunk is beyond any",
        stream(role(), HEL, then=(Send(b"f" * 30 + b"\r\n" + LO),)),
        body(HALF, then=(Send(b"f" * 30 + b"\r\n"),)),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "A chunk extension that never ends",
        (Send(SSE + b"5;"), Repeat(b"a" * 4096)),
        (Send(JSON + b"5;"), Repeat(b"a" * 4096)),
        GARBLED,
    ),
    fault(
        "Trailers",
        (Send(SSE + chunked(EVENTS) + b"0\r\nx-a: b\r\n\r\n"),),
        (Send(JSON + chunked(BODY) + b"0\r\nx-a: b\r\n\r\n"),),
        ALL,
        ALL_JSON,
    ),
    fault(
        "Trailers that never end",
        stream(EVENTS, then=(Send(b"0\r\n"), Repeat(b"x-a: b\r\n" * 500))),
        body(BODY, then=(Send(b"0\r\n"), Repeat(b"x-a: b\r\n" * 500))),
        ALL,
        GARBLED,
    ),
    fault(
        "Each byte is a chunk",
        stream(*(EVENTS[at : at + 1] for at in range(len(EVENTS)))),
        body(*(BODY[at : at + 1] for at in range(len(BODY)))),
        ALL,
        ALL_JSON,
    ),
    fault(
        "gzip, unasked",
        (Send(GZIP_SSE + chunked(gzip.compress(EVENTS)) + END),),
        (Send(GZIP_JSON + chunked(gzip.compress(BODY)) + END),),
        ALL,
        ALL_JSON,
    ),
    fault(
        "gzip that inflates to 20 MB",
        _packed(GZIP_SSE, role() + HEL, BOMB),
        _packed(GZIP_JSON, BOMB),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "gzip that is cut",
        (Send(GZIP_SSE + chunked(_flushed(role() + HEL)[0]) + END),),
        (Send(GZIP_JSON + chunked(_flushed(BODY)[0]) + END),),
        truncated(role(), HEL),
        TRUNCATED,
    ),
    fault(
        "gzip that is none",
        (Send(GZIP_SSE + chunked(EVENTS) + END),),
        (Send(GZIP_JSON + chunked(BODY) + END),),
        GARBLED,
    ),
    fault(
        "gzip that goes bad in its middle",
        (Send(GZIP_SSE + chunked(_flushed(role() + HEL)[0])), ARRIVES, Send(chunked(b"\xff" * 40) + END)),
        (Send(GZIP_JSON + chunked(_flushed(HALF)[0], b"\xff" * 40) + END),),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "A coding that nobody asked for (`br`)",
        (Send(BR[0] + chunked(EVENTS) + END),),
        (Send(BR[1] + chunked(BODY) + END),),
        GARBLED,
    ),
)
