"""Faults in an answer: statuses, `Retry-After`, JSON, events, the end of a stream. A part of `catalogue`."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec

from tests.faults.fault import DATE, Complete, Expected, Fault, Fin, Hang, Pause, Refusal, Repeat, Send, StreamError
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
    passed,
    stream,
    timed_out,
    truncated,
)
from tests.support.provider import completion, content, event, role

# -- statuses ---------------------------------------------------------------------------------------------------------

PAGE = b"<html><head><title>It broke</title></head><body><h1>It broke</h1>nginx</body></html>"
ERROR_BODY = b'{"error":{"message":"It broke.","type":"some_error","param":null,"code":"it_broke"}}'
REJECTED = {
    code: Refusal(code, "it_broke", outcome="upstream_rejected", body=ERROR_BODY, final=True)
    for code in range(400, 500)
}
THROTTLED = Refusal(429, "it_broke", outcome="upstream_throttled", body=ERROR_BODY)
TOO_LONG = "prompt is too long: 9 tokens > 8 maximum"
IN_OPENAI_S_WORDS = "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens."
STATUS_500 = head("application/json", status="500 X", coding="content-length: 99")


def status(line: str, gets: Refusal, sent: bytes = ERROR_BODY, *more: str, kind: str = "application/json") -> Fault:
    """Makes a fault with this status for streams and JSON answers."""
    body = {ERROR_BODY: "an error object", PAGE: "an HTML page"}[sent]
    return both(f"Status {line} with {body}", answer(sent, *more, status=f"{line} X", kind=kind), gets)


STATUSES = (
    *(status(str(code), REJECTED[code]) for code in (400, 401, 403, 404, 413, 422)),
    status("404", Refusal(404, "upstream_rejected", says="404", final=True), PAGE, kind="text/html"),
    *(
        both(
            f"Status {code} which says that the request is too long, without OpenAI's code",
            answer(b'{"error":{"message":"%b"}}' % TOO_LONG.encode(), status=f"{code} X"),
            Refusal(400, "context_length_exceeded", outcome="upstream_rejected", says=IN_OPENAI_S_WORDS, final=True),
        )
        for code in (400, 413)
    ),
    both(
        "Status 408 with an error object",
        answer(ERROR_BODY, status="408 X"),
        Refusal(408, "it_broke", outcome="upstream_rejected", body=ERROR_BODY),
    ),
    both(
        "Status 409 with an error object",
        answer(ERROR_BODY, status="409 X"),
        Refusal(409, "it_broke", outcome="upstream_rejected", body=ERROR_BODY),
    ),
    *(
        status(str(code), Refusal(code, "it_broke", outcome="upstream_unsupported", body=ERROR_BODY))
        for code in (405, 501)
    ),
    status("429", THROTTLED),
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
        "Status 500 with a truncated body",
        (Send(STATUS_500 + ERROR_BODY), Fin()),
        UNAVAILABLE,
    ),
    both("Status 500 with a body that never ends", (Send(STATUS_500 + ERROR_BODY), Hang()), timed_out(None)),
    both(
        "Status 500 with an error of 2 MB",
        answer(b'{"error":"' + b"a" * 2_000_000 + b'"}', status="500 X"),
        UNAVAILABLE,
    ),
    both("Status 200 with an HTML page", answer(PAGE, kind="text/html"), GARBLED),
    both("Status 200 with an empty body", answer(b""), GARBLED),
    fault("Status 200 with an empty stream", answer(b"", kind="text/event-stream"), None, TRUNCATED),
    fault(
        "Status 204",
        (Send(b"HTTP/1.1 204 No Content\r\n\r\n"),),
        (Send(b"HTTP/1.1 204 X\r\n\r\n"),),
        TRUNCATED,
        GARBLED,
    ),
    both("Status 304", (Send(b"HTTP/1.1 304 Not Modified\r\n\r\n"),), GARBLED),
    *(
        both(f"Status {code} (redirect)", answer(b"", "location: /v1/elsewhere", status=f"{code} X"), GARBLED)
        for code in (301, 302, 307, 308)
    ),
)

# -- Retry-After ------------------------------------------------------------------------------------------------------

_ABSENT: dict[str, str | tuple[str, ...] | None] = {"retry-after": None, "retry-after-ms": None}
_FORMS: tuple[tuple[str, str, dict[str, str | tuple[str, ...] | None]], ...] = (
    ("in seconds", "retry-after: 7", {"retry-after": "7", "retry-after-ms": "7000"}),
    ("in milliseconds", "retry-after-ms: 1500", {"retry-after": "2", "retry-after-ms": "1500"}),
    ("as a date", f"retry-after: {DATE.decode()}", {"retry-after": ("28", "29", "31", "30")}),
    (
        "as a date in the past",
        "retry-after: Wed, 21 Oct 2015 07:28:00 GMT",
        {"retry-after": "0", "retry-after-ms": "0"},
    ),
    ("that is not a number", "retry-after: soon", _ABSENT),
    ("that is negative", "retry-after: -5", _ABSENT),
    ("of three years", "retry-after: 99999999", {"retry-after": "3600", "retry-after-ms": "3600000"}),
    ("of 40 digits", f"retry-after: {'9' * 40}", {"retry-after": "3600", "retry-after-ms": "3600000"}),
)


def _retry_after() -> tuple[Fault, ...]:
    found = []
    for form, sent, expected in _FORMS:
        name, _, value = sent.partition(": ")
        unchanged = {name: value} if expected is not _ABSENT else _ABSENT
        for code, gets in (
            (429, Refusal(429, "it_broke", outcome="upstream_throttled", body=ERROR_BODY, headers=unchanged)),
            (500, Refusal(502, "upstream_unavailable", says="It broke.", headers=expected)),
            (503, Refusal(503, "upstream_unavailable", says="It broke.", headers=expected)),
        ):
            script = answer(ERROR_BODY, sent, status=f"{code} X")
            found.append(both(f"Status {code} with `Retry-After` {form}", script, gets))
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
DROPPED = passed(REST, note=WITHOUT)
BARE, BARE_JSON = attrs.evolve(ALL, note=WITHOUT), attrs.evolve(ALL_JSON, note=WITHOUT)


def text(name: str, events: bytes, other: bytes | None, gets: Expected, gets_json: Expected | None = None) -> Fault:
    """Makes a fault: a stream of these bytes in one piece, or this JSON answer."""
    return fault(name, stream(events), answer(other) if other is not None else None, gets, gets_json)


CONTENTS = (
    text("The first event, or the answer, is not JSON", NOT_JSON + REST, BODY[:-1], GARBLED),
    text(
        "A later event is not JSON",
        role() + HEL + NOT_JSON + REST,
        None,
        passed(role(), HEL, NOT_JSON, REST, note=AS_IT_CAME),
    ),
    text("The first event, or the answer, is `null`", b"data: null\n\n" + REST, b"null", DROPPED, GARBLED),
    text("The first event, or the answer, is `{}`", event({}) + REST, b"{}", DROPPED, GARBLED),
    text("The first event, or the answer, is an array", b"data: []\n\n" + REST, b"[" + BODY + b"]", GARBLED),
    text("The first event, or the answer, is an HTML page", b"data: " + PAGE + b"\n\n" + REST, PAGE, GARBLED),
    text("Bytes follow the JSON", HEL[:-2] + b"x\n\n" + REST, BODY + b"x", GARBLED),
    text("The first event, or the answer, is not UTF-8", NOT_UTF8 + REST, BODY.replace(b"Hello", b"\xff\xfe"), GARBLED),
    text(
        "A later event is not UTF-8",
        role() + HEL + NOT_UTF8 + REST,
        None,
        passed(role(), HEL, NOT_UTF8, REST, note=AS_IT_CAME),
    ),
    text(
        "An unpaired surrogate",
        HALF_PAIR + REST,
        BODY.replace(b"Hello", b"\\ud83d"),
        passed(HALF_PAIR, REST),
        Complete(BODY.replace(b"Hello", b"\\ud83d"), (3, 2)),
    ),
    fault(
        "A character is split between two packets",
        (Send(SSE + chunked(EMOJI[:AT])), Pause(0.05), Send(chunked(EMOJI[AT:] + REST) + END)),
        (Send(JSON + chunked(EMOJI_BODY[:EMOJI_AT])), Pause(0.05), Send(chunked(EMOJI_BODY[EMOJI_AT:]) + END)),
        passed(EMOJI, REST),
        Complete(EMOJI_BODY, (3, 2)),
    ),
    text("A byte order mark", b"\xef\xbb\xbf" + EVENTS, b"\xef\xbb\xbf" + BODY, BARE, BARE_JSON),
    text("Lines that end with CR", EVENTS.replace(b"\n", b"\r"), None, Complete(EVENTS.replace(b"\n", b"\r"), (3, 2))),
    text(
        "Lines that end with CRLF",
        EVENTS.replace(b"\n", b"\r\n"),
        None,
        Complete(EVENTS.replace(b"\n", b"\r\n"), (3, 2)),
    ),
    text("U+2028, U+2029 and U+0085 within a string", PARAGRAPH + REST, None, passed(PARAGRAPH, REST)),
    text("Comments", b": a\n\n" + HEL + b": b\n\n" + REST, None, passed(HEL, REST, note=WITHOUT)),
    text("Blank lines", b"\n\n" + HEL + b"\n\n" + REST, None, passed(HEL, REST, note=WITHOUT)),
    text("`id` and `retry` fields", b"id: 7\nretry: 5\n" + HEL + REST, None, passed(HEL, REST, note=WITHOUT)),
    text(
        "No space after `data:`",
        HEL.replace(b"data: ", b"data:") + REST,
        None,
        passed(HEL.replace(b": ", b":", 1), REST),
    ),
    text("The first event, or the answer, exceeds its size limit", HUGE + REST, completion("a" * 140_000), GARBLED),
    fault(
        "A later event exceeds its size limit",
        stream(role(), HEL, then=(Send(chunked(HUGE + REST) + END),)),
        None,
        garbled(role(), HEL),
    ),
    fault(
        "An event without end",
        stream(role(), HEL, then=(Repeat(chunked(b"data: aaaaaaaa" * 100)),)),
        (Send(JSON), Repeat(chunked(b"aaaaaaaaaaaaaa" * 100))),
        garbled(role(), HEL),
        GARBLED,
    ),
    fault("Roles without end, in quick succession", (Send(SSE), Repeat(chunked(role() * 10))), None, GARBLED),
)

# -- how a stream ends ------------------------------------------------------------------------------------------------

OTHER = FINISH.replace(b'"index":0', b'"index":1')
STARTED = HEL.replace(b'"index":0', b'"index":1')
ERROR_EVENT = event({"error": {"message": "It broke.", "type": "some_error", "code": "it_broke"}})
NULL_ERROR = LO[:-3] + b',"error":null}\n\n'
LIMIT = "rate limit: slow down"
UNCOUNTED = BODY.replace(b'"usage"', b'"x"')
REPORTED = Refusal(502, "it_broke", outcome="upstream_error", says="It broke.")


def reported(*came: bytes) -> StreamError:
    """Expects the provider's own error event after these events."""
    return StreamError(b"".join(came), "it_broke", outcome="upstream_error", says="It broke.")


def ends(name: str, came: bytes, rest: bytes, gets: Expected, *, asks: Mapping[str, object] | None = None) -> Fault:
    """Makes a fault: a stream with correct framing, of the events before the fault and the rest."""
    parts = [chunked(part) for part in (came, rest) if part]
    steps = [step for each in parts for step in (Send(each), ARRIVAL)]
    return fault(name, (Send(SSE), *steps, Send(END)), None, gets, asks=asks)


IN_200: tuple[tuple[str, object, int, str | int], ...] = (
    (
        "`base_resp`, and no choices",
        {"choices": None, "base_resp": {"status_code": 1002, "status_msg": LIMIT}},
        429,
        1002,
    ),
    ("`code` and `msg`", {"code": "1302", "msg": LIMIT}, 429, "1302"),
    ("`object: error`", {"object": "error", "message": "slow down", "code": 400}, 400, 400),
    ("`type: error`", {"type": "error", "error": {"message": "slow down"}}, 502, "upstream_error"),
    ("an array", [{"error": {"code": 429, "message": "slow down"}}], 429, 429),
    ("no choices beside it", {"id": "c", "choices": [], "error": {"message": LIMIT}}, 429, "upstream_error"),
)


def beats(name: str, beat: bytes) -> Fault:
    """Makes a stream with heartbeats between its events, which do not reach the client."""
    return ends(
        f"Heartbeats {name}", beat + role() + beat + HEL + beat, beat + REST, passed(role(), HEL, REST, note=WITHOUT)
    )


ENDINGS = (
    ends("No `[DONE]`", role() + HEL + FINISH, b"", passed(role(), HEL, FINISH, DONE, note="with that")),
    ends("No `[DONE]`, and no blank line at the end", HEL, FINISH[:-2], passed(HEL, FINISH, DONE, note="with both")),
    ends("No `finish_reason`", role() + HEL, DONE, truncated(role(), HEL)),
    ends("Neither `finish_reason` nor `[DONE]`", role() + HEL, b"", truncated(role(), HEL)),
    ends("Only `[DONE]`", b"", DONE, TRUNCATED),
    ends("Only a role and `[DONE]`", role(), DONE, TRUNCATED),
    ends("The whole stream in one packet, without `finish_reason`", b"", role() + HEL + DONE, TRUNCATED),
    ends("An empty answer with `finish_reason` and `[DONE]`", role(), FINISH + DONE, passed(role(), FINISH, DONE)),
    ends(
        "One of two requested choices has no `finish_reason`",
        HEL + STARTED + FINISH,
        DONE,
        truncated(HEL, STARTED, FINISH),
        asks={"n": 2},
    ),
    ends(
        "Two choices, each with its `finish_reason`",
        HEL + STARTED + FINISH,
        OTHER + DONE,
        passed(HEL, STARTED, FINISH, OTHER, DONE),
        asks={"n": 2},
    ),
    ends("`finish_reason` twice", HEL + FINISH, FINISH + DONE, passed(HEL, FINISH, FINISH, DONE)),
    ends("Content after `finish_reason`", HEL + FINISH, LO + DONE, passed(HEL, FINISH, LO, DONE)),
    beats("as events of their own", event({"type": "ping"})),
    beats("with a name", b"event: ping\n" + event({"type": "ping"})),
    beats("that are empty objects", event({})),
    beats("that are `null`", b"data: null\n\n"),
    beats("whose `choices` are null", event({"id": "c", "model": "m", "choices": None})),
    ends("No usage", role() + HEL, FINISH + DONE, passed(role(), HEL, FINISH, DONE)),
    ends("`[DONE]` twice", EVENTS, DONE, BARE),
    ends("Content after `[DONE]`", EVENTS, HEL, BARE),
    ends("An error event after `[DONE]`", EVENTS, ERROR_EVENT, BARE),
    ends("Content after `[DONE]`, in the same packet", b"", EVENTS + HEL, BARE),
    ends("`[DONE]` without its blank line", EVENTS[:-2], b"", ALL),
    text("An error event first, or an error object with status 200", ERROR_EVENT, ERROR_BODY, REPORTED),
    *(
        text(
            f"An error first, or with status 200: {shape}",
            event(value),
            msgspec.json.encode(value),
            Refusal(code, said, outcome="upstream_error", says="slow down"),
        )
        for shape, value, code, said in IN_200
    ),
    text(
        "An error first, or with status 200: that the request is too long",
        event({"error": {"message": TOO_LONG}}),
        msgspec.json.encode({"error": {"message": TOO_LONG}}),
        Refusal(400, "context_length_exceeded", outcome="upstream_error", says=IN_OPENAI_S_WORDS),
    ),
    ends("An error event after the role", role(), ERROR_EVENT, REPORTED),
    ends("An error event in one packet with the first content", b"", role() + HEL + ERROR_EVENT, REPORTED),
    ends("An error event within the content", role() + HEL, ERROR_EVENT + REST, reported(role(), HEL)),
    ends(
        "An error event between `finish_reason` and `[DONE]`", HEL + FINISH, ERROR_EVENT + DONE, reported(HEL, FINISH)
    ),
    ends(
        "An error that is a string, within the content",
        role() + HEL,
        event({"error": "It broke."}) + REST,
        StreamError(role() + HEL, "upstream_error", says="It broke."),
    ),
    ends(
        "An error that only the name of the event shows",
        role() + HEL,
        b'event: error\ndata: {"message":"It broke."}\n\n' + REST,
        StreamError(role() + HEL, "upstream_error", says="It broke."),
    ),
    ends("An error that is `null`", HEL + NULL_ERROR, REST, passed(HEL, NULL_ERROR, REST)),
    fault("No usage in a JSON answer", GOOD_STREAM, answer(UNCOUNTED), ALL, Complete(UNCOUNTED)),
)
