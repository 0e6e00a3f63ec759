"""The parts of the catalogue's entries: bytes on the wire, good answers, and common expectations."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults.fault import Case, Complete, Endpoint, Expected, Fault, Pause, Refusal, Script, Send, StreamError
from tests.support.provider import chunk, completion, content, role, usage

# -- the wire ---------------------------------------------------------------------------------------------------------


def chunked(*pieces: bytes) -> bytes:
    """Encodes each piece of a body as one chunk."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def head(kind: str, *more: str, status: str = "200 OK", coding: str = "transfer-encoding: chunked") -> bytes:
    """Makes the head of an answer, by default with a chunked body."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", *([coding] if coding else []), *more, "", ""]
    return "\r\n".join(lines).encode()


def answer(body: bytes, *more: str, status: str = "200 OK", kind: str = "application/json") -> Script:
    """Makes an answer with ``content-length``, as most providers send it."""
    return (Send(head(kind, *more, status=status, coding=f"content-length: {len(body)}") + body),)


ARRIVAL = Pause(0.03)
END = b"0\r\n\r\n"
ENDS: Script = (Send(END),)
SSE = head("text/event-stream")
JSON = head("application/json")
HEL, LO = content("Hel"), content("lo")
FINISH = chunk({}, finish_reason="stop")
USAGE = usage(3, 2)
DONE = b"data: [DONE]\n\n"
EVENTS = role() + HEL + LO + FINISH + USAGE + DONE
BODY = completion("Hello")
HALF = BODY[:60]

GOOD_STREAM: Script = (Send(SSE + chunked(role(), HEL, LO, FINISH, USAGE, DONE) + END),)
GOOD_JSON: Script = answer(BODY)
ALL = Complete(EVENTS, (3, 2))
ALL_JSON = Complete(BODY, (3, 2))
GOOD = Fault(
    name="none",
    stream=GOOD_STREAM,
    json=GOOD_JSON,
    expected={"one-stream": ALL, "one-json": ALL_JSON, "two-stream": ALL, "two-json": ALL_JSON},
)
"""The script of the second target."""


def stream(*pieces: bytes, then: Script = ENDS) -> Script:
    """Makes a stream of these pieces; the steps of ``then`` follow when the pieces have arrived."""
    return (Send(SSE + chunked(*pieces)), ARRIVAL, *then)


def body(*pieces: bytes, then: Script = ENDS) -> Script:
    """Makes a JSON answer of these pieces; the steps of ``then`` follow when the pieces have arrived."""
    return (Send(JSON + chunked(*pieces)), ARRIVAL, *then)


# -- what is expected -------------------------------------------------------------------------------------------------

UNAVAILABLE = Refusal(502, "upstream_unavailable")
GARBLED = Refusal(502, "upstream_garbled")
TRUNCATED = Refusal(502, "upstream_truncated")


def timed_out(phase: str | None) -> Refusal:
    """Expects a timeout before COMMIT. After the total timeout there is no time for another target."""
    return Refusal(504, "upstream_timeout", phase=phase, final=phase == "total")


def truncated(*came: bytes) -> StreamError:
    """Expects a stream that is truncated after these events."""
    return StreamError(b"".join(came), "upstream_truncated")


def garbled(*came: bytes) -> StreamError:
    """Expects a protocol violation after these events."""
    return StreamError(b"".join(came), "upstream_garbled")


def timed_out_after(*came: bytes, phase: str = "idle", endless: bool = False) -> StreamError:
    """Expects a timeout after these events."""
    return StreamError(b"".join(came), "upstream_timeout", phase=phase, endless=endless)


def passed(*sent: bytes, note: str = "") -> Complete:
    """Expects a stream that is passed on, with the usage of `USAGE` if the stream contains it."""
    whole = b"".join(sent)
    return Complete(whole, (3, 2) if USAGE in whole else None, note)


def fault(
    name: str,
    asked_for_stream: Script,
    asked_for_json: Script | None,
    gets_stream: Expected,
    gets_json: Expected | None = None,
    *,
    at: Endpoint = "plain",
    unread: bool = False,
    asks: Mapping[str, object] | None = None,
) -> Fault:
    """Makes a fault. Without ``gets_json``, the expectation of the JSON answer is that of the stream."""
    expected: dict[Case, Expected] = {"one-stream": gets_stream, "two-stream": with_second_target(gets_stream, ALL)}
    if isinstance(gets_stream, StreamError):
        expected["continued-stream"] = gets_stream if asks else continued(gets_stream)
    if asked_for_json is not None:
        gets_json = gets_json if gets_json is not None else gets_stream
        expected |= {"one-json": gets_json, "two-json": with_second_target(gets_json, ALL_JSON)}
    return Fault(
        name=name,
        stream=asked_for_stream,
        json=asked_for_json,
        expected=expected,
        at=at,
        unread=unread,
        asks=asks or {},
    )


def with_second_target(with_one_target: Expected, good: Complete) -> Expected:
    """Expects the answer of the second target instead of an error before COMMIT, unless the error is final. All other
    expectations stay the same."""
    return good if isinstance(with_one_target, Refusal) and not with_one_target.final else with_one_target


def continued(cut: StreamError) -> Expected:
    """Expects what the second target adds when it may continue the stream. It adds nothing after
    ``finish_reason`` or the total timeout."""
    if FINISH in cut.body or cut.phase == "total":
        return cut
    return Complete(cut.body + HEL + LO + FINISH + USAGE + DONE, (3, 2))


def both(
    name: str, script: Script, gets: Expected, gets_json: Expected | None = None, *, at: Endpoint = "plain"
) -> Fault:
    """Makes a fault that is the same for streams and JSON answers."""
    return fault(name, script, script, gets, gets_json, at=at)


def unread(name: str, script: Script, gets: Refusal, *, at: Endpoint = "plain") -> Fault:
    """Makes a fault of a provider that does not read the request."""
    return fault(name, script, script, gets, at=at, unread=True)
