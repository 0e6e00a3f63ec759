"""Faults below an answer: connecting, closing, silence, heads, framing, codings. A part of `catalogue`."""

from __future__ import annotations

import gzip
import zlib

import msgspec

from tests.faults.fault import (
    Complete,
    Endpoint,
    Expected,
    Fault,
    Fin,
    Hang,
    Pause,
    Repeat,
    Rst,
    Script,
    Send,
    SendSlowly,
    Step,
)
from tests.faults.replies import (
    ALL,
    ALL_JSON,
    ARRIVAL,
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
    stream,
    timed_out,
    timed_out_after,
    truncated,
    unread,
)
from tests.support.provider import role

# -- connecting -------------------------------------------------------------------------------------------------------

ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
"""TLS: fatal, handshake_failure."""


def at_endpoint(name: str, at: Endpoint, gets: Expected, gets_json: Expected | None = None) -> Fault:
    """Makes a fault of the endpoint: a request that arrives gets a good answer."""
    return fault(name, GOOD_STREAM, GOOD_JSON, gets, gets_json, at=at)


CONNECTING = (
    at_endpoint("The port is closed", "closed port", UNAVAILABLE),
    at_endpoint("It neither accepts nor refuses the connection", "full accept queue", timed_out("connect")),
    at_endpoint("Its host name does not resolve", "unknown name", UNAVAILABLE),
    at_endpoint("The name server does not answer", "name server hangs", timed_out("connect")),
    at_endpoint("One of its two addresses is dead", "one address of two", ALL, ALL_JSON),
    unread("It accepts the connection, then closes it", (Fin(),), UNAVAILABLE),
    unread("It accepts the connection, then resets it", (Rst(),), UNAVAILABLE),
    unread("It sends the greeting of another protocol first", (Send(b"SSH-2.0-OpenSSH_9.9\r\n"), Hang()), GARBLED),
    at_endpoint("No fault, over TLS", "TLS", ALL, ALL_JSON),
    at_endpoint("Its certificate is from an unknown authority", "TLS, unknown authority", UNAVAILABLE),
    at_endpoint("Its certificate has expired", "TLS, expired", UNAVAILABLE),
    at_endpoint("Its certificate is for another name", "TLS, other name", UNAVAILABLE),
    unread("TLS is expected, and it sends nothing", (Hang(),), timed_out("connect"), at="https to plain"),
    unread("TLS is expected, and it closes the connection", (Fin(),), UNAVAILABLE, at="https to plain"),
    unread("TLS is expected, and it resets the connection", (Rst(),), UNAVAILABLE, at="https to plain"),
    unread(
        "TLS is expected, and it speaks HTTP", (*answer(b"", status="400 X"), Fin()), UNAVAILABLE, at="https to plain"
    ),
    both("HTTP is expected, and it speaks TLS", (Send(ALERT), Fin()), GARBLED),
    fault(
        "Over TLS, it closes the connection within the answer",
        stream(role(), HEL, then=(Fin(),)),
        body(HALF, then=(Fin(),)),
        truncated(role(), HEL),
        TRUNCATED,
        at="TLS",
    ),
    fault(
        "Over TLS, it resets the connection within the answer",
        stream(role(), HEL, then=(Rst(),)),
        body(HALF, then=(Rst(),)),
        truncated(role(), HEL),
        TRUNCATED,
        at="TLS",
    ),
    fault(
        "Over TLS, it stops sending within the answer",
        stream(role(), HEL, then=(Hang(),)),
        body(HALF, then=(Hang(),)),
        timed_out_after(role(), HEL),
        timed_out("idle"),
        at="TLS",
    ),
)

# -- ending early, and silence ---------------------------------------------------------------------------------


def ends_by(how: str, step: Step) -> tuple[Fault, ...]:
    """Makes the faults of a connection that ends, at each point of an answer."""
    then = (step,)
    return (
        both(f"It {how} the connection before it answers", then, UNAVAILABLE),
        both(f"It {how} it within the status line", (Send(b"HTTP/1.1 20"), *then), UNAVAILABLE),
        both(f"It {how} it within the header fields", (Send(b"HTTP/1.1 200 OK\r\ncontent-ty"), *then), UNAVAILABLE),
        fault(f"It {how} it after the head", stream(then=then), body(then=then), TRUNCATED),
        fault(
            f"It {how} it within the first content, or within the JSON",
            stream(role(), HEL[:60], then=then),
            body(HALF, then=then),
            TRUNCATED,
        ),
        fault(f"It {how} it between two events", stream(role(), HEL, then=then), None, truncated(role(), HEL)),
        fault(f"It {how} it within an event", stream(role(), HEL, LO[:60], then=then), None, truncated(role(), HEL)),
        fault(
            f"It {how} it within the header of a chunk",
            (*stream(role(), HEL, then=(Send(b"1"), *then)),),
            body(HALF, then=(Send(b"1"), *then)),
            truncated(role(), HEL),
            TRUNCATED,
        ),
        fault(
            f"It {how} it after `finish_reason`, before `[DONE]`",
            stream(role(), HEL, FINISH, then=then),
            None,
            truncated(role(), HEL, FINISH),
        ),
        fault(
            f"It {how} it after the last byte of the answer, before the end of the framing",
            stream(EVENTS, then=then),
            body(BODY, then=then),
            ALL,
            TRUNCATED,
        ),
    )


HANGS = (
    both("It sends nothing", (Hang(),), timed_out("response_head")),
    both(
        "It stops sending within the head", (Send(b"HTTP/1.1 200 OK\r\ncontent-ty"), Hang()), timed_out("response_head")
    ),
    fault(
        "It stops sending after the head",
        stream(then=(Hang(),)),
        body(then=(Hang(),)),
        timed_out("first_token"),
        timed_out("idle"),
    ),
    fault(
        "It stops sending after the role, or within the JSON",
        stream(role(), then=(Hang(),)),
        body(HALF, then=(Hang(),)),
        timed_out("first_token"),
        timed_out("idle"),
    ),
    fault(
        "It stops sending between two events", stream(role(), HEL, then=(Hang(),)), None, timed_out_after(role(), HEL)
    ),
    fault(
        "It stops sending within an event",
        stream(role(), HEL, LO[:60], then=(Hang(),)),
        None,
        timed_out_after(role(), HEL),
    ),
    fault(
        "It stops sending after `finish_reason`, before `[DONE]`",
        stream(role(), HEL, FINISH, then=(Hang(),)),
        None,
        timed_out_after(role(), HEL, FINISH),
    ),
    fault(
        "It stops sending after the last byte of the answer, before the end of the framing",
        stream(EVENTS, then=(Hang(),)),
        body(BODY, then=(Hang(),)),
        ALL,
        timed_out("idle"),
    ),
    both(
        "It sends a head byte by byte, too slowly",
        (SendSlowly(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 99, 0.05),),
        timed_out("response_head"),
    ),
    both(
        "It sends header fields slowly, without end",
        (Send(b"HTTP/1.1 200 OK\r\n"), Repeat(b"x-a: b\r\n", 0.05)),
        timed_out("response_head"),
    ),
    both(
        "It sends interim responses slowly, without end",
        (Repeat(b"HTTP/1.1 102 Processing\r\n\r\n", 0.05),),
        timed_out("response_head"),
    ),
    fault(
        "It sends comments and no content",
        (Send(SSE), Repeat(chunked(b": wait\n\n"), 0.05)),
        None,
        timed_out("first_token"),
    ),
    fault(
        "It sends roles and empty deltas, but no content",
        (Send(SSE), Repeat(chunked(role()), 0.05)),
        None,
        timed_out("first_token"),
    ),
    fault(
        "It sends comments without end, after some content",
        stream(role(), HEL, then=(Repeat(chunked(b": wait\n\n"), 0.05),)),
        None,
        timed_out_after(role(), HEL, phase="total"),
    ),
    fault(
        "It sends content slowly, without end",
        (Send(SSE), Repeat(chunked(HEL), 0.05)),
        (Send(JSON), Repeat(chunked(b" "), 0.05)),
        timed_out_after(HEL, phase="total", endless=True),
        timed_out("total"),
    ),
    fault(
        "It sends an event byte by byte, too slowly",
        stream(role(), HEL, then=(Send(b"%x\r\n" % (len(LO) * 9)), SendSlowly(LO[:-2] * 9, 0.02))),
        (Send(JSON + b"%x\r\n" % len(BODY)), SendSlowly(BODY, 0.02)),
        timed_out_after(role(), HEL, phase="total"),
        timed_out("total"),
    ),
    fault(
        "It is slow, but completes the answer",
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
    """Makes a fault: a good answer whose head begins like this."""
    return fault(name, (Send(start + TAIL),), (Send(start + JSON_TAIL),), gets, gets_json)


OK = b"HTTP/1.1 200 OK\r\n"

AS_EVENTS = (
    b"data: " + BODY.replace(b'completion"', b'completion.chunk"', 1).replace(b"message", b"delta") + b"\n\n" + DONE
)
AS_JSON = msgspec.json.encode(
    {
        **{name: field for name, field in msgspec.json.decode(BODY).items() if name != "choices"},
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Hello"},
            }
        ],
    }
)

HEADS = (
    headed("No reason phrase", b"HTTP/1.1 200\r\n", ALL, ALL_JSON),
    headed("A few interim responses first", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3 + OK, ALL, ALL_JSON),
    headed("A thousand interim responses first", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + OK, GARBLED),
    headed("Status 101", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n", GARBLED),
    headed("Status 999", b"HTTP/1.1 999 What\r\n", GARBLED),
    headed("Status 600", b"HTTP/1.1 600 What\r\n", GARBLED),
    headed("Status 42", b"HTTP/1.1 42 What\r\n", GARBLED),
    headed("Status OK", b"HTTP/1.1 OK\r\n", GARBLED),
    headed("HTTP/3.0", b"HTTP/3.0 200 OK\r\n", GARBLED),
    both(
        "HTTP/2 without negotiation",
        (Send(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64"), Hang()),
        GARBLED,
    ),
    both("An answer without a head (HTTP/0.9)", (Send(EVENTS), Fin()), GARBLED),
    headed("A header field of 100 KiB", OK + b"x-a: " + b"a" * 102_400 + b"\r\n", GARBLED),
    headed("Ten thousand header fields", OK + b"x-a: bcdef\r\n" * 10_000, GARBLED),
    headed("A header field without a colon", OK + b"nonsense\r\n", GARBLED),
    headed("A NUL in a header field", OK + b"x-a: b\0c\r\n", GARBLED),
    headed("A bare CR in a header field's name", OK + b"x\ra: b\r\n", GARBLED),
    headed("Two different `content-length` fields", OK + b"content-length: 7\r\n", GARBLED),
    headed("A negative `content-length`", OK + b"content-length: -7\r\n", GARBLED),
    headed("A `content-length` that is not a number", OK + b"content-length: many\r\n", GARBLED),
    headed("A `content-length` of 30 digits", OK + b"content-length: " + b"9" * 30 + b"\r\n", GARBLED),
    headed("Both `content-length` and chunked coding", OK + b"transfer-encoding: chunked\r\n", GARBLED),
    fault(
        "A transfer coding that was not requested",
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
        "Content type `text/plain`",
        answer(EVENTS, kind="text/plain"),
        answer(BODY, kind="text/plain"),
        ALL,
        ALL_JSON,
    ),
    fault(
        "JSON instead of a stream, or a stream instead of JSON",
        GOOD_JSON,
        GOOD_STREAM,
        Complete(AS_EVENTS, (3, 2), "as one event"),
        Complete(AS_JSON, (3, 2), "put together"),
    ),
)

# -- framing and codings ----------------------------------------------------------------------------------------------


CLOSES: Script = (Fin(),)


def sized(length: int, sent: bytes, *, kind: str, then: Script = CLOSES) -> Script:
    """Makes a body with this ``content-length``."""
    return (Send(head(kind, coding=f"content-length: {length}") + sent), *then)


def _flushed(*parts: bytes) -> list[bytes]:
    """Compresses each part with gzip and flushes it; the last element is the end."""
    packer = zlib.compressobj(wbits=31)
    return [*[packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH) for part in parts], packer.flush()]


def _packed(start: bytes, *parts: bytes) -> Script:
    packed = _flushed(*parts)
    return (Send(start), *(step for each in packed for step in (Send(chunked(each)), ARRIVAL)), Send(END))


GZIP_SSE = head("text/event-stream", "content-encoding: gzip")
GZIP_JSON = head("application/json", "content-encoding: gzip")
BOMB = bytes(20_000_000)
BR = head("text/event-stream", "content-encoding: br"), head("application/json", "content-encoding: br")

FRAMING = (
    fault(
        "The body is shorter than `content-length`, and it closes the connection",
        sized(9999, role() + HEL, kind="text/event-stream"),
        sized(9999, BODY, kind="application/json"),
        truncated(role(), HEL),
        TRUNCATED,
    ),
    fault(
        "The body is shorter than `content-length`, and it stops sending",
        sized(9999, role() + HEL, kind="text/event-stream", then=(Hang(),)),
        sized(9999, BODY, kind="application/json", then=(Hang(),)),
        timed_out_after(role(), HEL),
        timed_out("idle"),
    ),
    fault(
        "The body is longer than `content-length`",
        sized(len(role() + HEL), EVENTS, kind="text/event-stream", then=()),
        sized(len(HALF), BODY, kind="application/json", then=()),
        truncated(role(), HEL),
        GARBLED,
    ),
    fault(
        "A second response follows the answer",
        (Send(SSE + chunked(EVENTS) + END + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),),
        (*GOOD_JSON, Send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")),
        ALL,
        ALL_JSON,
    ),
    fault(
        "The body ends with the connection (HTTP/1.0)",
        (Send(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + EVENTS), Fin()),
        (Send(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + BODY), Fin()),
        ALL,
        ALL_JSON,
    ),
    fault(
        "The body ends with the connection, too early",
        (Send(head("text/event-stream", coding="") + role() + HEL), Fin()),
        (Send(head("application/json", coding="") + HALF), Fin()),
        truncated(role(), HEL),
        GARBLED,
    ),
    fault(
        "The size of the first chunk is not a number",
        (Send(SSE + b"zz\r\n" + EVENTS),),
        (Send(JSON + b"zz\r\n" + BODY),),
        GARBLED,
    ),
    fault(
        "The size of a later chunk is not a number",
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
        "The size of a chunk has 30 digits",
        stream(role(), HEL, then=(Send(b"f" * 30 + b"\r\n" + LO),)),
        body(HALF, then=(Send(b"f" * 30 + b"\r\n"),)),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "A chunk extension without end",
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
        "Trailers without end",
        stream(EVENTS, then=(Send(b"0\r\n"), Repeat(b"x-a: b\r\n" * 500))),
        body(BODY, then=(Send(b"0\r\n"), Repeat(b"x-a: b\r\n" * 500))),
        ALL,
        GARBLED,
    ),
    fault(
        "Each byte is a chunk of its own",
        stream(*(EVENTS[at : at + 1] for at in range(len(EVENTS)))),
        body(*(BODY[at : at + 1] for at in range(len(BODY)))),
        ALL,
        ALL_JSON,
    ),
    fault(
        "gzip that was not requested",
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
        "Truncated gzip",
        (Send(GZIP_SSE + chunked(_flushed(role() + HEL)[0]) + END),),
        (Send(GZIP_JSON + chunked(_flushed(BODY)[0]) + END),),
        truncated(role(), HEL),
        TRUNCATED,
    ),
    fault(
        "`content-encoding: gzip`, but the body is not gzip",
        (Send(GZIP_SSE + chunked(EVENTS) + END),),
        (Send(GZIP_JSON + chunked(BODY) + END),),
        GARBLED,
    ),
    fault(
        "gzip that is corrupt from its middle on",
        (Send(GZIP_SSE + chunked(_flushed(role() + HEL)[0])), ARRIVAL, Send(chunked(b"\xff" * 40) + END)),
        (Send(GZIP_JSON + chunked(_flushed(HALF)[0], b"\xff" * 40) + END),),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault(
        "A content coding that was not requested (`br`)",
        (Send(BR[0] + chunked(EVENTS) + END),),
        (Send(BR[1] + chunked(BODY) + END),),
        GARBLED,
    ),
)
