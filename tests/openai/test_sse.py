"""Server-sent events: split at blank lines and nowhere else, however the bytes arrive."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from trigate.openai.sse import BOM, EventSplitter, EventTooLarge, comment, data_of, without_resumption

# Built from the bytes that matter to the splitter, so that every order of line ends, half a BOM and half a U+2028
# occur.
streams = st.lists(
    st.sampled_from(
        [b"\n", b"\r", b"\r\n", b"\n\n", b"data: x", b":", b"\xef", b"\xbb", b"\xbf", BOM, b"\xe2\x80\xa8"]
    ),
    max_size=24,
).map(b"".join)

LINE_SEPARATORS_IN_TEXT = "\u2028\u2029\u0085\x0b\x0c\x1c"


def _split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def _feed(pieces: Iterable[bytes]) -> tuple[list[bytes], int]:
    splitter = EventSplitter(max_event_bytes=10_000)
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.pending_bytes


def _every_way(data: bytes) -> list[list[bytes]]:
    """The whole data, byte by byte, and split in two at every place."""
    return [
        [data],
        [bytes([byte]) for byte in data],
        *([data[:place], data[place:]] for place in range(1, len(data))),
    ]


def _with_lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_each_line_end_ends_events(eol: bytes) -> None:
    """LF, CRLF and CR each end a line, and two in a row end an event, however the bytes are split."""
    stream = eol.join([b"data: 1", b"", b"event: e", b"data: 2", b"", b": c", b"", b"data: 3"])
    for pieces in _every_way(stream):
        events, pending_bytes = _feed(pieces)
        assert [data_of(event) for event in events] == [b"1", b"2", None], pieces
        # When a CR ends both an event and a piece, the reader must not wait for a LF that may follow.
        assert pending_bytes == len(b"data: 3"), pieces


@pytest.mark.parametrize(
    "blank", [first + second for first in (b"\n", b"\r\n", b"\r") for second in (b"\n", b"\r\n", b"\r")]
)
def test_mixed_line_ends_make_one_blank_line(blank: bytes) -> None:
    """Any two line ends in a row make exactly one blank line; CR followed by LF is one line end and makes none."""
    expected = [b"1", b"2"] if blank != b"\r\n" else [b"1\n2"]
    stream = b"data: 1" + blank + b"data: 2\n\n"
    for pieces in _every_way(stream):
        events, pending_bytes = _feed(pieces)
        assert [data_of(event) for event in events] == expected, pieces
        assert pending_bytes == 0


def test_a_byte_order_mark_opens_the_stream() -> None:
    """A BOM before the first event is dropped, even when it arrives in pieces, and only there."""
    for pieces in _every_way(BOM + b"data: 1\n\n" + BOM + b"data: 2\n\n"):
        events, _ = _feed(pieces)
        assert events == [b"data: 1\n\n", BOM + b"data: 2\n\n"], pieces


def test_half_a_byte_order_mark_is_content() -> None:
    """Bytes that only begin like a BOM are kept."""
    for pieces in _every_way(BOM[:2] + b"data: 1\n\n"):
        assert _feed(pieces) == ([BOM[:2] + b"data: 1\n\n"], 0), pieces
    assert _feed([BOM[:2]]) == ([], 2)


def test_unicode_line_separators_are_text() -> None:
    """U+2028, U+2029, U+0085 and the control characters at which `str.splitlines` splits belong to the data."""
    text = json.dumps({"content": LINE_SEPARATORS_IN_TEXT}, ensure_ascii=False).encode()
    assert LINE_SEPARATORS_IN_TEXT[:3].encode() in text
    stream = b"data: " + text + b"\n\n"
    for pieces in _every_way(stream):
        events, _ = _feed(pieces)
        assert events == [stream], pieces
        assert json.loads(data_of(events[0]) or b"") == {"content": LINE_SEPARATORS_IN_TEXT}


def test_trailing_bytes_stay() -> None:
    """Bytes after the last blank line are held and counted, and the next piece completes them."""
    splitter = EventSplitter(max_event_bytes=100)
    assert splitter.feed(b"data: 1\n\ndata: 2") == [b"data: 1\n\n"]
    assert splitter.pending_bytes == len(b"data: 2")
    assert splitter.feed(b"") == []
    assert splitter.feed(b"\n\n") == [b"data: 2\n\n"]
    assert splitter.pending_bytes == 0


def test_one_lf_is_dropped_after_a_cr() -> None:
    """The LF that completes a CRLF in the next piece is dropped once. The next LF is a line of its own."""
    splitter = EventSplitter(max_event_bytes=100)
    assert splitter.feed(b"data: 1\r\r") == [b"data: 1\r\r"]
    assert splitter.feed(b"") == []
    assert splitter.feed(b"\n") == []
    assert splitter.pending_bytes == 0
    assert splitter.feed(b"\n") == []
    assert splitter.pending_bytes == 1


@settings(deadline=None, max_examples=60)
@given(streams, st.lists(st.integers(0, 1000), max_size=8))
def test_any_split_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    """The events do not depend on the pieces and match the plain definition: LF for every line end, split after each
    blank line."""
    expected = re.findall(rb".*?\n\n", _with_lf(stream.removeprefix(BOM)), re.S)
    for pieces in ([stream], [bytes([byte]) for byte in stream], _split(stream, cuts)):
        events, _ = _feed(pieces)
        assert [_with_lf(event) for event in events] == expected


@settings(deadline=None, max_examples=60)
@given(streams, st.lists(st.integers(0, 1000), max_size=8))
def test_nothing_is_lost_or_added(stream: bytes, cuts: list[int]) -> None:
    """The events and the pending bytes equal the input byte for byte, except for a leading BOM and for a LF that opens
    a piece after an event that ended with CR."""
    splitter = EventSplitter(max_event_bytes=10_000)
    joined = kept = b""
    after_cr = False
    for piece in filter(None, _split(stream, cuts)):
        kept += piece[1:] if after_cr and piece.startswith(b"\n") else piece
        events = splitter.feed(piece)
        joined += b"".join(events)
        after_cr = bool(events) and events[-1].endswith(b"\r") and splitter.pending_bytes == 0
    kept = kept.removeprefix(BOM)
    assert kept.startswith(joined)
    assert len(kept) == len(joined) + splitter.pending_bytes


def test_an_event_over_the_limit_is_refused() -> None:
    """An unfinished event holds at most the limit and one piece. An event of exactly the limit passes."""
    splitter = EventSplitter(max_event_bytes=1000)
    for _ in range(10):
        assert splitter.feed(b"x" * 100) == []
    with pytest.raises(EventTooLarge, match="1000 bytes"):
        splitter.feed(b"x")
    assert splitter.pending_bytes == 1000

    exact = b"x" * 998 + b"\n\n"
    assert EventSplitter(max_event_bytes=1000).feed(exact) == [exact]


def test_a_complete_event_over_the_limit_is_refused_too() -> None:
    """The limit applies to an event that is complete in its first piece, even after a small one."""
    with pytest.raises(EventTooLarge):
        EventSplitter(max_event_bytes=1000).feed(b"data: 1\n\n" + b"x" * 999 + b"\n\n")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"event: e\nid: 7\ndata: a\nretry: 5\n\n", b"a"),
        (b": comment\ndata: a\n\n", b"a"),
        (b"\ndata: a\n\n", b"a"),
        (b"data: a: b\n\n", b"a: b"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b": data: a\n\n", None),
        (b"id: 1\n\n", None),
        (b"datax: a\n\n", None),
        (b"\n\n", None),
    ],
)
def test_data_of(event: bytes, data: bytes | None) -> None:
    """The ``data`` fields of an event are joined by LF, without one leading space each. Without such fields it is
    None."""
    assert data_of(event) == data


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_data_survives_the_round_trip(lines: list[str]) -> None:
    """Any text in any number of lines is read back as written."""
    event = b"".join(b"data: " + line.encode() + b"\n" for line in lines) + b"\n"
    assert data_of(event) == "\n".join(lines).encode()


def test_the_forms_of_a_comment() -> None:
    """A block is an event of its own, without data. A line is a part of the event behind it."""
    block, line = comment("keep-alive", "block"), comment("keep-alive", "line")
    assert _feed([block, b"data: 1\n\n"]) == ([b": keep-alive\n\n", b"data: 1\n\n"], 0)
    assert data_of(block) is None
    assert _feed([line, b"data: 1\n\n"]) == ([b": keep-alive\ndata: 1\n\n"], 0)
    assert data_of(b": keep-alive\ndata: 1\n\n") == b"1"


def _by_blocks(body: str) -> list[str]:
    """As many hand-written clients do, and @google/genai."""
    return [block.strip()[5:].strip() for block in body.split("\n\n") if block.strip().startswith("data:")]


def _by_lines(body: str) -> list[str]:
    """As other hand-written clients do."""
    return [line[5:].strip() for line in body.split("\n") if line.startswith("data:")]


def _by_blank_lines(body: str) -> list[str]:
    """As @microsoft/fetch-event-source does: every blank line dispatches what has come since the last one."""
    events, data = [], ""
    for line in body.split("\n")[:-1]:
        name, _, value = line.partition(":")
        if not line:
            events.append(data)
            data = ""
        elif name == "data":
            data = value.strip()
    return events


def _by_openai(body: str) -> list[str]:
    return [event.data for event in SSEDecoder().iter_bytes(iter([body.encode()]))]


@pytest.mark.parametrize(
    ("parse", "forms"),
    [
        (_by_blocks, {"block"}),
        (_by_lines, {"block", "line"}),
        (_by_blank_lines, {"line"}),
        (_by_openai, {"block", "line"}),
    ],
)
def test_which_parsers_understand_which_form(parse: Callable[[str], list[str]], forms: set[str]) -> None:
    """No form suits all of them. The one by default suits those that are common, and the setting offers the other."""
    events = ['{"n":1}', '{"n":2}', "[DONE]"]
    suited = set()
    each_form: tuple[Literal["block", "line"], ...] = ("block", "line")
    for form in each_form:
        keep_alive = comment("keep-alive", form)
        body = b"".join(keep_alive + b"data: " + each.encode() + b"\n\n" for each in events).decode()
        if parse(body) == events:
            suited.add(form)
    assert suited == forms


def test_resumption_fields_are_removed() -> None:
    """``id`` and ``retry`` lines are removed at any position with any line ends. Text that looks like them stays."""
    assert without_resumption(b"data: 1\r\nid\r\nretry: 5\r\n\r\n") == b"data: 1\n\n"
    assert without_resumption(b"event: x\rid: 7\rretry\rdata: 1\r\r") == b"event: x\ndata: 1\n\n"
    assert without_resumption(b"identity: 1\ndata: id: 2\n\n") == b"identity: 1\ndata: id: 2\n\n"
