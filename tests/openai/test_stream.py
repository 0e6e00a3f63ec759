"""A stream gives the same result wherever its pieces are split, with and without the shortcut for plain events."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.wire import CHAT, RESPONSES, make_event
from trigate.errors import ProtocolViolation
from trigate.openai.stream import StreamReader


def _chunk(content: str = "a", *, ids: str = "c-1", created: int = 1, model: str = "up", **more: object) -> bytes:
    choices = [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    value = {"id": ids, "created": created, "model": model, "choices": choices, **more}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


_PLAIN = _chunk("plain")
_ODD = [
    _PLAIN,
    _chunk('"model":"up"'),
    _chunk('the "error" and the "usage"'),
    _chunk("data: [DONE]"),
    _chunk("[DONE]"),
    _chunk("ein\u2028Wort\u0085", usage=None),
    _chunk(usage=None),
    _chunk(usage={"prompt_tokens": 1, "completion_tokens": 2}),
    _chunk(ids="c-2"),
    _chunk(created=2),
    _chunk(model="up-2"),
    _chunk(model="u"),
    _chunk(x={"model": "up"}),
    _chunk(x=["model", "up"]),
    _chunk(error=None),
    _chunk("response.completed"),
    _PLAIN.replace(b'"model"', b'"\\u006dodel"'),
    _PLAIN[:-1] + b',"\\u006dodel":"up-3"}',
    _PLAIN[:-1] + b',"mode\\u006C":"up-3"}',
    _PLAIN[:-1] + b',"t":"\\u006a"}',
    _PLAIN[:-1] + b',"usage":null',  # not JSON
    _PLAIN[:-1] + b',"\\u0065rror":{"message":"m"},"usage":null}',
    _PLAIN[:-1] + b',"usage": null}',
    _PLAIN.replace(b'"up"', b'"up"usage":1'),
    _PLAIN.replace(b'"up"', b'"up"model":1'),
    _PLAIN.replace(b":", b": "),
    _PLAIN[:-1] + b', "model": "up-3"}',
    _PLAIN[:-1] + b',"a\rb": 1}',
    b'{"x":{"model":"up"},"choices":[{"delta":{"content":"nested"}}]}',
    b'{"choices":[{"delta":{"content":"first"}}],"model":"up"}',
    b'{"choices":[{"delta":{"content":"none"}}]}',
    _PLAIN.replace(b'{"content":"plain"}', b'{"tool_calls":[{"id":"a","function":{"name":"f"}}]}'),
    _PLAIN.replace(b'{"content":"plain"}', b'{"content":"a","tool_calls":[{"id":"b","function":{"name":"f"}}]}'),
    _PLAIN.replace(b'{"content":"plain"}', b'{"tool_calls":[{"index":0,"function":{"arguments":"a"}}]}'),
    _PLAIN.replace(b'{"content":"plain"}', b'{"role":"assistant","content":"a"}'),
    _PLAIN.replace(b'{"content":"plain"}', b'{"content":null,"reasoning":"a"}'),
    _PLAIN.replace(b'"choices"', b'"x":null,"service_tier":"a","choices"'),
    _PLAIN.partition(b'"choices"')[0] + b'"choices":null}',
    _PLAIN.partition(b'"choices"')[0] + b'"choices":[]}',
    b'{"type":"ping"}',
    b"{}",
    b"null",
    b'{"choices":[{"delta":{"role":"assistant"}}],"model":"up"}',
    b'[{"model":"up"}]',
    b'{"type":"response.created","response":{"model":"up"}}',
    b'{"type":"response.output_text.delta","delta":"response.completed"}',
    b"5",
    b"",
]
_RARE = [
    b"[DONE]",
    b'{"error":{"message":"m"}}',
    _chunk(error={"message": "m"}),
    b'{"type":"response.completed","response":{"model":"up","usage":{"input_tokens":1,"output_tokens":2}}}',
    _chunk("long" * 200),
]
_LAYOUTS = [
    *(b"data: %b\n\n", b"data:%b\n\n", b"data: %b\r\n\r\n", b"data: %b\r\r", b"data: %b\r\n\n", b"data: %b\r\n\r\n\n"),
    *(b"data: %b\n\n\n", b"data: %b\n\n\n\n", b"\ndata: %b\n\n", b"data: %b\r: x\n\n", b"data: %b\rid: 1\n\n"),
    *(b"id: 1\ndata: %b\n\n", b"data: %b\nid: 1\n\n", b"event: x\ndata: %b\n\n", b": ping\n\ndata: %b\n\n"),
    *(b': "model":"up"\ndata: %b\n\n', b"data: %b\ndata: \n\n"),
]
_events = st.builds(
    lambda layout, data: layout % data,
    st.one_of(*[st.just(_LAYOUTS[0])] * 2, st.sampled_from(_LAYOUTS)),
    st.one_of(*[st.sampled_from(_ODD)] * 9, st.sampled_from(_RARE)),
)
_streams = st.builds(
    lambda opening, events, end: opening + b"".join(events) + end,
    st.sampled_from([b"", b"\xef\xbb\xbf", b": ping\n\n", b"data: " + _PLAIN + b"\n\n"]),
    st.lists(_events | st.just(b"data: " + _PLAIN + b"\n\n"), max_size=10),
    st.sampled_from([b"", b"data: [DONE]\n\n", b"data: [DONE]", b"data: [DONE]\n", b"data: " + _PLAIN, b"\n"]).flatmap(
        lambda end: st.sampled_from([end, make_event({"choices": [{"delta": {}, "finish_reason": "stop"}]}) + end])
    ),
)


class _SlowReader(StreamReader):
    """A reader that parses each event."""

    def _feed_plain(self, piece: bytes) -> None:
        return None


def _read(pieces: list[bytes], endpoint: Any, kind: type[StreamReader], max_bytes: int) -> tuple[bytes, list[object]]:
    """The result of a reader for a stream: the client's bytes and the final state."""
    reader = kind(endpoint, model="pub/lic", upstream="mock", max_event_bytes=max_bytes)
    out = []
    for piece in pieces:
        out.append(reader.feed(piece))
        if reader.complete or reader.error is not None:
            break
    else:
        out.append(reader.feed_end())
    known: list[object] = [
        reader.complete,
        reader.may_end,
        reader.has_content,
        reader.usage,
        reader.events,
        repr(reader.error),
    ]
    given_out = b"".join(out)
    if any(b"\r" in piece for piece in pieces):
        # An event split between its last CR and LF was passed on without that LF. It is the same event.
        given_out = re.sub(rb"\n\n+", b"\n\n", given_out.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return given_out, known


def _split(data: bytes, at: list[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(_streams, st.sampled_from([CHAT, RESPONSES]), st.lists(st.integers(0, 2**12), max_size=8), st.data())
def test_the_split_of_a_stream_does_not_matter(stream: bytes, endpoint: Any, at: list[int], data: Any) -> None:
    """A stream fed whole, byte by byte, event by event or split at random, with or without the shortcut for plain
    events, gives the client the same bytes and ends in the same state."""
    max_bytes = data.draw(st.sampled_from([2**20, 700]))
    ends = [place for place in range(1, len(stream)) if stream[:place].endswith(b"\n\n")]
    expected = _read([stream], endpoint, _SlowReader, max_bytes)
    splits = {
        "whole": [stream],
        "byte by byte": _split(stream, list(range(len(stream)))),
        "event by event": _split(stream, ends),
        "some events at once": _split(stream, data.draw(st.lists(st.sampled_from(ends), max_size=4)) if ends else []),
        "at random": _split(stream, at),
    }
    for split, pieces in splits.items():
        assert _read(pieces, endpoint, StreamReader, max_bytes) == expected, split
        assert _read(pieces, endpoint, _SlowReader, max_bytes) == expected, split


@pytest.mark.slow
def test_unusual_events_between_plain_ones() -> None:
    """Each unusual event, in each notation, gives the same result as when every event is parsed: before, after and
    between plain events, alone or in one piece with them."""
    plain = b"data: " + _PLAIN + b"\n\n"
    for layout in _LAYOUTS:
        for data in _ODD + _RARE:
            odd = layout % data
            expected = _read([plain * 3 + odd + plain * 2], CHAT, _SlowReader, 2**20)
            at = odd.find(b"\n") + 2
            for pieces in (
                [plain, plain * 2, odd, plain, plain],
                [plain, plain, plain + odd + plain, plain],
                [plain, plain * 2, odd[:at], odd[at:], plain, plain],
            ):
                assert _read(pieces, CHAT, StreamReader, 2**20) == expected, odd


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([data for data in _ODD if data.startswith(b"{")]), max_size=6), st.booleans())
def test_exactly_the_model_is_replaced(found: list[bytes], one_piece: bool) -> None:
    """The JSON of each event stays the same, except for the top-level model or that of its ``response``. Where no key
    is escaped, every other byte stays too."""
    found = [_PLAIN, *(data for data in found if _is_json(data) and not _is_changed(json.loads(data)))]
    pieces = [b"data: " + data + b"\n\n" for data in found]
    reader = StreamReader(CHAT, model="pub/lic", upstream="mock")
    out = b"".join(reader.feed(piece) for piece in ([b"".join(pieces)] if one_piece else pieces))
    assert reader.error is None
    given_out = out.split(b"\n\n")
    assert given_out.pop() == b""
    assert len(given_out) == len(found)
    for before, after in zip(found, given_out, strict=True):
        value = json.loads(before)
        holder = value if "model" in value or "response" not in value else value["response"]
        if "model" in holder:
            holder["model"] = "pub/lic"
        assert json.loads(after.removeprefix(b"data: ")) == value
        if b"\\u006" not in before and before.count(b'"model"') == 1 and b'{"model"' not in before:
            was = next(raw for raw in (b'"up"', b'"up-2"', b'"u"') if b'"model":' + raw in before.replace(b": ", b":"))
            assert after == b"data: " + before.replace(was, b'"pub/lic"', 1)


def _is_changed(value: dict[str, Any]) -> bool:
    """Whether it is an error or a heartbeat, or has a tool call without an index."""
    if value.get("error") or value in ({}, {"type": "ping"}) or value.get("choices", 0) is None:
        return True
    choices = value.get("choices") or [{}]
    return any("index" not in call for call in choices[0].get("delta", {}).get("tool_calls", ()))


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "delta",
    [
        b'{"content":"%d"}',
        b'{"role":"assistant","content":"%d"}',
        b'{"content":null,"reasoning_content":"%d"}',
        b'{"tool_calls":[{"index":0,"function":{"arguments":"%d"}}]}',
    ],
)
@pytest.mark.parametrize("more", [b"", b'"system_fingerprint":"fp","service_tier":null,"usage":null,'])
def test_runs_of_equal_events_are_plain(delta: bytes, more: bytes) -> None:
    """Texts, reasoning and the arguments of tool calls take the shortcut from their second event on, in the layouts of
    the usual providers."""
    taken = []

    class Reader(StreamReader):
        def _feed_plain(self, piece: bytes) -> bytes | None:
            taken.append(super()._feed_plain(piece))
            return taken[-1]

    reader = Reader(CHAT, model="pub/lic", upstream="mock")
    event = (
        b"data: " + _PLAIN.replace(b'{"content":"plain"}', delta).replace(b'"choices"', more + b'"choices"') + b"\n\n"
    )
    for piece in (b"data: " + _PLAIN + b"\n\n", event % 1, event % 2, (event % 3) * 2):
        reader.feed(piece)
    assert None not in taken[-2:]
    assert taken[-1] == (event % 3).replace(b'"up"', b'"pub/lic"') * 2


def test_plain_events_take_the_shortcut() -> None:
    """Every piece of plain events after the first takes the shortcut. Otherwise the tests above would not cover it."""
    taken = []

    class Reader(StreamReader):
        def _feed_plain(self, piece: bytes) -> bytes | None:
            taken.append(super()._feed_plain(piece))
            return taken[-1]

    reader = Reader(CHAT, model="pub/lic", upstream="mock")
    event = b"data: " + _PLAIN + b"\n\n"
    for piece in (event, event, event * 3, event + b": ping\n\n", event):
        reader.feed(piece)
    public = event.replace(b'"up"', b'"pub/lic"')
    assert taken == [public, public * 3, None, public]


def test_events_before_an_oversized_event_are_passed_on() -> None:
    """The limit refuses the oversized event only. Complete events before it are passed on, even from the same piece."""
    event = b"data: " + _PLAIN + b"\n\n"
    for pieces in ([event * 2 + b"data: " + b"x" * 500], [event, event, b"data: " + b"x" * 500]):
        reader = StreamReader(CHAT, model="up", upstream="mock", max_event_bytes=300)
        assert b"".join(map(reader.feed, pieces)) == event * 2
        assert isinstance(reader.error, ProtocolViolation)


def test_a_done_that_is_not_the_end() -> None:
    """A stream of responses ends with ``response.completed``. With a ``[DONE]`` instead, whole or not, it is
    truncated."""
    for end in (b"", b"\n", b"\n\n"):
        reader = StreamReader(RESPONSES, model="public", upstream="up")
        reader.feed(b'data: {"type":"response.output_text.delta","delta":"a"}\n\ndata: [DONE]' + end)
        reader.feed_end()
        assert reader.error is not None
        assert reader.error.code == "upstream_truncated"
