"""What can be wrong with an answer: statuses, `Retry-After`, JSON, events, how a stream ends. A part of `catalogue`."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

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
    GOOD_STREAM,
    HEL,
    JSON,
    LO,
    SSE,
    TRUNCATED,
    UNAVAILABLE,
    USAGE,
    answer,
    both,
    chunked,
    fault,
    garbled,
    head,
    late,
    odd,
    stream,
    truncated,
)
from tests.faults.steps import DATE, Cut, Expected, Fault, Fin, Hang, Pause, Refusal, Repeat, Send, Whole
from tests.support.provider import completion, content, event, role

# -- statuses ---------------------------------------------------------------------------------------------------------

PAGE = b"<html><head><title>It broke</title></head><body><h1>It broke</h1>nginx</body></html>"
SAID = b'{"error":{"message":"It broke.","type":"some_error","param":null,"code":"it_broke"}}'
REFUSED = {
    code: Refusal(code, "it_broke", outcome="upstream_rejected", body=SAID, final=True) for code in range(400, 500)
}
LIMITED = Refusal(429, "it_broke", outcome="upstream_throttled", body=SAID)
BROKEN = head("application/json", status="500 X", coding="content-length: 99")


def status(line: str, gets: Refusal, sent: bytes = SAID, *more: str, kind: str = "application/json") -> Fault:
    """The same status whatever was asked for."""
    said = {SAID: "an error object", PAGE: "a page of HTML", b"": "nothing"}[sent]
    return both(f"Status {line}, with {said}", answer(sent, *more, status=f"{line} X", kind=kind), gets)


STATUSES = (
    *(status(str(code), REFUSED[code]) for code in (400, 401, 403, 404, 413, 422)),
    status("404", Refusal(404, "upstream_rejected", says="404", final=True), PAGE, kind="text/html"),
    both(
        "Status 408, with an error object",
        answer(SAID, status="408 X"),
        Refusal(408, "it_broke", outcome="upstream_rejected", body=SAID),
    ),
    both(
        "Status 409, with an error object",
        answer(SAID, status="409 X"),
        Refusal(409, "it_broke", outcome="upstream_rejected", body=SAID),
    ),
    status("429", LIMITED),
    status("429", Refusal(429, "upstream_throttled", says="429"), PAGE, kind="text/html"),
    *(
        status(str(code), Refusal(503 if code in (503, 529) else 502, "upstream_unavailable", says="It broke."))
        for code in (500, 502, 503, 504, 529)
    ),
    *(
        status(
            str(code),
            Refusal(503 if code == 503 else 502, "upstream_unavailable", says=f"({code})"),
            PAGE,
            kind="text/html",
        )
        for code in (500, 502, 503)
    ),
    both(
        "Status 500, and a body that is cut",
        (Send(BROKEN + SAID), Fin()),
        UNAVAILABLE,
    ),
    both("Status 500, and a body that never ends", (Send(BROKEN + SAID), Hang()), late(None)),
    both(
        "Status 500, and 2 MB of an error",
        answer(b'{"error":"' + b"a" * 2_000_000 + b'"}', status="500 X"),
        UNAVAILABLE,
    ),
    both("Status 200, with a page of HTML", answer(PAGE, kind="text/html"), GARBLED),
    both("Status 200, with nothing", answer(b""), GARBLED),
    fault("Status 200, with a stream of nothing", answer(b"", kind="text/event-stream"), None, TRUNCATED),
    fault(
        "Status 204",
        (Send(b"HTTP/1.1 204 No Content\r\n\r\n"),),
        (Send(b"HTTP/1.1 204 X\r\n\r\n"),),
        TRUNCATED,
        GARBLED,
    ),
    both("Status 304", (Send(b"HTTP/1.1 304 Not Modified\r\n\r\n"),), GARBLED),
    *(
        both(f"Status {code}: a redirect", answer(b"", "location: /v1/elsewhere", status=f"{code} X"), GARBLED)
        for code in (301, 302, 307, 308)
    ),
)

# -- Retry-After ------------------------------------------------------------------------------------------------------

_ABSENT = {"retry-after": None, "retry-after-ms": None}
_FORMS: tuple[tuple[str, str, dict[str, str | tuple[str, ...] | None]], ...] = (
    ("in seconds", "retry-after: 7", {"retry-after": "7", "retry-after-ms": "7000"}),
    ("in milliseconds", "retry-after-ms: 1500", {"retry-after": "2", "retry-after-ms": "1500"}),
    ("as a date", f"retry-after: {DATE.decode()}", {"retry-after": ("28", "29", "31", "30")}),
    (
        "as a date that is over",
        "retry-after: Wed, 21 Oct 2015 07:28:00 GMT",
        {"retry-after": "0", "retry-after-ms": "0"},
    ),
    ("that is nonsense", "retry-after: soon", _ABSENT),
    ("that is negative", "retry-after: -5", _ABSENT),
    ("for three years", "retry-after: 99999999", {"retry-after": "3600", "retry-after-ms": "3600000"}),
    ("as a number beyond any", f"retry-after: {'9' * 40}", {"retry-after": "3600", "retry-after-ms": "3600000"}),
)


def _retry_after() -> tuple[Fault, ...]:
    found = []
    for form, sent, told in _FORMS:
        name, _, value = sent.partition(": ")
        passed = {name: value} if told is not _ABSENT else _ABSENT
        for code, gets in (
            (429, Refusal(429, "it_broke", outcome="upstream_throttled", body=SAID, headers=passed)),
            (500, Refusal(502, "upstream_unavailable", says="It broke.", headers=told)),
            (503, Refusal(503, "upstream_unavailable", says="It broke.", headers=told)),
        ):
            script = answer(SAID, sent, status=f"{code} X")
            found.append(both(f"Status {code}, and `Retry-After` {form}", script, gets))
    return tuple(found)


RETRY_AFTER = _retry_after()

# -- JSON, and events -------------------------------------------------------------------------------------------------

EMOJI = content("héllo 🙂")
AT = EMOJI.index("🙂".encode()) + 2
PARAGRAPH = b'data: {"choices":[{"index":0,"delta":{"content":"a\xe2\x80\xa8b\xe2\x80\xa9c\xc2\x85d"}}]}\n\n'
NOT_UTF8 = b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xfe"}}]}\n\n'
NOT_JSON = b'data: {"choices":[{"index":0,"delta":{"content":"a"}\n\n'
HALF_PAIR = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
REST = LO + FINISH + USAGE + DONE
HUGE = content("a" * 40_000)
EMOJI_BODY = completion("héllo 🙂")
EMOJI_AT = EMOJI_BODY.index("🙂".encode()) + 2


WITHOUT = "without that"
AS_IT_CAME = "that event as it came"
BARE, BARE_JSON = attrs.evolve(ALL, note=WITHOUT), attrs.evolve(ALL_JSON, note=WITHOUT)


def text(name: str, events: bytes, other: bytes | None, gets: Expected, gets_json: Expected | None = None) -> Fault:
    """A stream of these bytes in one piece, or this JSON."""
    return fault(name, stream(events), answer(other) if other is not None else None, gets, gets_json)


CONTENTS = (
    text("The first event, or the answer, is not JSON", NOT_JSON + REST, BODY[:-1], GARBLED),
    text(
        "A later event is not JSON",
        role() + HEL + NOT_JSON + REST,
        None,
        odd(role(), HEL, NOT_JSON, REST, note=AS_IT_CAME),
    ),
    text("The first event, or the answer, is `null`", b"data: null\n\n" + REST, b"null", GARBLED),
    text("The first event, or the answer, is an array", b"data: []\n\n" + REST, b"[" + BODY + b"]", GARBLED),
    text("The first event, or the answer, is a page of HTML", b"data: " + PAGE + b"\n\n" + REST, PAGE, GARBLED),
    text("Something is behind the JSON", HEL[:-2] + b"x\n\n" + REST, BODY + b"x", GARBLED),
    text("The first event, or the answer, is not UTF-8", NOT_UTF8 + REST, BODY.replace(b"Hello", b"\xff\xfe"), GARBLED),
    text(
        "A later event is not UTF-8",
        role() + HEL + NOT_UTF8 + REST,
        None,
        odd(role(), HEL, NOT_UTF8, REST, note=AS_IT_CAME),
    ),
    text(
        "Half a surrogate pair",
        HALF_PAIR + REST,
        BODY.replace(b"Hello", b"\\ud83d"),
        odd(HALF_PAIR, REST),
        Whole(BODY.replace(b"Hello", b"\\ud83d"), (3, 2)),
    ),
    fault(
        "A character is split between two packets",
        (Send(SSE + chunked(EMOJI[:AT])), Pause(0.05), Send(chunked(EMOJI[AT:] + REST) + END)),
        (Send(JSON + chunked(EMOJI_BODY[:EMOJI_AT])), Pause(0.05), Send(chunked(EMOJI_BODY[EMOJI_AT:]) + END)),
        odd(EMOJI, REST),
        Whole(EMOJI_BODY, (3, 2)),
    ),
    text("A byte order mark", b"\xef\xbb\xbf" + EVENTS, b"\xef\xbb\xbf" + BODY, BARE, BARE_JSON),
    text("Lines that end with CR", EVENTS.replace(b"\n", b"\r"), None, Whole(EVENTS.replace(b"\n", b"\r"), (3, 2))),
    text(
        "Lines that end with CRLF", EVENTS.replace(b"\n", b"\r\n"), None, Whole(EVENTS.replace(b"\n", b"\r\n"), (3, 2))
    ),
    text("U+2028, U+2029 and U+0085 in a text", PARAGRAPH + REST, None, odd(PARAGRAPH, REST)),
    text("Comments", b": a\n\n" + HEL + b": b\n\n" + REST, None, odd(HEL, REST, note=WITHOUT)),
    text("Blank lines", b"\n\n" + HEL + b"\n\n" + REST, None, odd(HEL, REST, note=WITHOUT)),
    text("`id` and `retry` fields", b"id: 7\nretry: 5\n" + HEL + REST, None, odd(HEL, REST, note=WITHOUT)),
    text(
        "No space behind `data:`", HEL.replace(b"data: ", b"data:") + REST, None, odd(HEL.replace(b": ", b":", 1), REST)
    ),
    text("The first event, or the answer, is larger than its limit", HUGE + REST, completion("a" * 140_000), GARBLED),
    fault(
        "A later event is larger than its limit",
        stream(role(), HEL, then=(Send(chunked(HUGE + REST) + END),)),
        None,
        garbled(role(), HEL),
    ),
    fault(
        "An event that never ends",
        stream(role(), HEL, then=(Repeat(chunked(b"data: aaaaaaaa" * 100)),)),
        (Send(JSON), Repeat(chunked(b"aaaaaaaaaaaaaa" * 100))),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault("Roles without end, and quickly", (Send(SSE), Repeat(chunked(role() * 10))), None, GARBLED),
)

# -- how a stream ends ------------------------------------------------------------------------------------------------

OTHER = FINISH.replace(b'"index":0', b'"index":1')
STARTED = HEL.replace(b'"index":0', b'"index":1')
SAYS = event({"error": {"message": "It broke.", "type": "some_error", "code": "it_broke"}})
NULL_ERROR = LO[:-3] + b',"error":null}\n\n'
UNCOUNTED = BODY.replace(b'"usage"', b'"x"')
REPORTED = Refusal(502, "it_broke", outcome="upstream_error", says="It broke.")


def reported(*came: bytes) -> Cut:
    """The provider's own error event, after these events."""
    return Cut(b"".join(came), "it_broke", outcome="upstream_error", says="It broke.")


def ends(name: str, came: bytes, rest: bytes, gets: Expected, *, asks: Mapping[str, object] | None = None) -> Fault:
    """A stream that is properly framed: what has come before the fault, and the rest."""
    said = [chunked(each) for each in (came, rest) if each]
    steps = [step for each in said for step in (Send(each), ARRIVES)]
    return fault(name, (Send(SSE), *steps, Send(END)), None, gets, asks=asks)


ENDINGS = (
    ends("No `[DONE]`", role() + HEL + FINISH, b"", truncated(role(), HEL, FINISH)),
    ends("No `finish_reason`", role() + HEL, DONE, truncated(role(), HEL)),
    ends("Neither `finish_reason` nor `[DONE]`", role() + HEL, b"", truncated(role(), HEL)),
    ends("Nothing but `[DONE]`", b"", DONE, TRUNCATED),
    ends("A role, and `[DONE]`", role(), DONE, TRUNCATED),
    ends("All at once, but no `finish_reason`", b"", role() + HEL + DONE, TRUNCATED),
    ends("An empty answer that says that it is one", role(), FINISH + DONE, odd(role(), FINISH, DONE)),
    ends(
        "Of two choices that were asked for, one does not end",
        HEL + STARTED + FINISH,
        DONE,
        truncated(HEL, STARTED, FINISH),
        asks={"n": 2},
    ),
    ends(
        "Two choices, each with its `finish_reason`",
        HEL + STARTED + FINISH,
        OTHER + DONE,
        odd(HEL, STARTED, FINISH, OTHER, DONE),
        asks={"n": 2},
    ),
    ends("`finish_reason` twice", HEL + FINISH, FINISH + DONE, odd(HEL, FINISH, FINISH, DONE)),
    ends("Content behind `finish_reason`", HEL + FINISH, LO + DONE, odd(HEL, FINISH, LO, DONE)),
    ends("No usage", role() + HEL, FINISH + DONE, odd(role(), HEL, FINISH, DONE)),
    ends("`[DONE]` twice", EVENTS, DONE, BARE),
    ends("Content behind `[DONE]`", EVENTS, HEL, BARE),
    ends("An error event behind `[DONE]`", EVENTS, SAYS, BARE),
    ends("Content behind `[DONE]`, at once", b"", EVENTS + HEL, BARE),
    ends("`[DONE]` without its blank line", EVENTS[:-2], b"", ALL),
    text("An error event first, or an error under status 200", SAYS, SAID, REPORTED, GARBLED),
    ends("An error event behind the role", role(), SAYS, REPORTED),
    ends("An error event in one packet with the first content", b"", role() + HEL + SAYS, REPORTED),
    ends("An error event in the middle", role() + HEL, SAYS + REST, reported(role(), HEL)),
    ends("An error event between `finish_reason` and `[DONE]`", HEL + FINISH, SAYS + DONE, reported(HEL, FINISH)),
    ends(
        "An error that is a text, in the middle",
        role() + HEL,
        event({"error": "It broke."}) + REST,
        Cut(role() + HEL, "upstream_error", says="It broke."),
    ),
    ends(
        "An error that only the event's name tells",
        role() + HEL,
        b'event: error\ndata: {"message":"It broke."}\n\n' + REST,
        Cut(role() + HEL, "upstream_error", says="It broke."),
    ),
    ends("An error that is `null`", HEL + NULL_ERROR, REST, odd(HEL, NULL_ERROR, REST)),
    fault("No usage, in JSON", GOOD_STREAM, answer(UNCOUNTED), ALL, Whole(UNCOUNTED)),
)
