"""What the catalogue is written with: the wire, good answers, and the usual expectations."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults.steps import Case, Cut, Expected, Fault, Pause, Place, Refusal, Script, Send, Whole
from tests.support.provider import chunk, completion, content, role, usage

# -- the wire ---------------------------------------------------------------------------------------------------------


def chunked(*pieces: bytes) -> bytes:
    """Pieces of a body, each a chunk."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def head(kind: str, *more: str, status: str = "200 OK", coding: str = "transfer-encoding: chunked") -> bytes:
    """The head of an answer whose body is chunked."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", *([coding] if coding else []), *more, "", ""]
    return "\r\n".join(lines).encode()


def answer(body: bytes, *more: str, status: str = "200 OK", kind: str = "application/json") -> Script:
    """An answer as most providers send it, with its length."""
    return (Send(head(kind, *more, status=status, coding=f"content-length: {len(body)}") + body),)


ARRIVES = Pause(0.03)
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
ALL = Whole(EVENTS, (3, 2))
ALL_JSON = Whole(BODY, (3, 2))
GOOD = Fault(
    name="none",
    stream=GOOD_STREAM,
    json=GOOD_JSON,
    expected={"one-stream": ALL, "one-json": ALL_JSON, "two-stream": ALL, "two-json": ALL_JSON},
)
"""What the second target does."""


def stream(*pieces: bytes, then: Script = ENDS) -> Script:
    """A stream of these pieces, and what comes behind them when they have arrived."""
    return (Send(SSE + chunked(*pieces)), ARRIVES, *then)


def body(*pieces: bytes, then: Script = ENDS) -> Script:
    """A JSON answer, as `stream`."""
    return (Send(JSON + chunked(*pieces)), ARRIVES, *then)


# -- what is expected -------------------------------------------------------------------------------------------------

UNAVAILABLE = Refusal(502, "upstream_unavailable")
GARBLED = Refusal(502, "upstream_garbled")
TRUNCATED = Refusal(502, "upstream_truncated")


def late(phase: str | None) -> Refusal:
    """A deadline, before COMMIT. After that of the whole call, there is no time for another target."""
    return Refusal(504, "upstream_timeout", phase=phase, final=phase == "total")


def truncated(*came: bytes) -> Cut:
    """The stream broke off behind these events."""
    return Cut(b"".join(came), "upstream_truncated")


def garbled(*came: bytes) -> Cut:
    """Nonsense came behind these events."""
    return Cut(b"".join(came), "upstream_garbled")


def silent(*came: bytes, phase: str = "idle", endless: bool = False) -> Cut:
    """A deadline, after these events."""
    return Cut(b"".join(came), "upstream_timeout", phase=phase, endless=endless)


def odd(*sent: bytes, note: str = "") -> Whole:
    """A stream that goes through, with the usage of `USAGE` where that is in it."""
    whole = b"".join(sent)
    return Whole(whole, (3, 2) if USAGE in whole else None, note)


def fault(
    name: str,
    asked_for_stream: Script,
    asked_for_json: Script | None,
    gets_stream: Expected,
    gets_json: Expected | None = None,
    *,
    at: Place = "plain",
    unread: bool = False,
    asks: Mapping[str, object] | None = None,
) -> Fault:
    """Makes a fault. The JSON answer is judged as the stream where nothing is said of it."""
    expected: dict[Case, Expected] = {"one-stream": gets_stream, "two-stream": behind(gets_stream, ALL)}
    if isinstance(gets_stream, Cut):
        expected["continued-stream"] = gets_stream if asks else continued(gets_stream)
    if asked_for_json is not None:
        gets_json = gets_json if gets_json is not None else gets_stream
        expected |= {"one-json": gets_json, "two-json": behind(gets_json, ALL_JSON)}
    return Fault(
        name=name,
        stream=asked_for_stream,
        json=asked_for_json,
        expected=expected,
        at=at,
        unread=unread,
        asks=asks or {},
    )


def behind(alone: Expected, good: Whole) -> Expected:
    """What the client gets where there is a second target: its answer instead of an error before COMMIT, unless the
    call itself was refused; in all other cases the same."""
    return good if isinstance(alone, Refusal) and not alone.final else alone


def continued(cut: Cut) -> Expected:
    """What the client gets where the second target may go on: what it says, behind what came. Not where the answer had
    said how it ends, nor where its time is over."""
    if FINISH in cut.body or cut.phase == "total":
        return cut
    return Whole(cut.body + HEL + LO + FINISH + USAGE + DONE, (3, 2))


def both(name: str, script: Script, gets: Expected, gets_json: Expected | None = None, *, at: Place = "plain") -> Fault:
    """A fault that is the same whatever was asked for."""
    return fault(name, script, script, gets, gets_json, at=at)


def unread(name: str, script: Script, gets: Refusal, *, at: Place = "plain") -> Fault:
    """A fault of a provider that does not read what it is asked."""
    return fault(name, script, script, gets, at=at, unread=True)
