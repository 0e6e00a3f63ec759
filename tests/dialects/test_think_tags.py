"""Reasoning between tags in the text of an answer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from tests.dialects.chat import DONE, chunk, tool
from trigate.dialects.openai_chat.think_tags import TagSplitter, ThinkTags, with_reasoning_field
from trigate.openai import sse

CASES = {
    "both": ("<think>Hm.</think>Yes.", "Hm.", "Yes."),
    "with blanks": (" \n<think>\n\nHm, <b>.\n</think>\n\n Yes. ", "Hm, <b>.\n", "Yes. "),
    "without the end tag": ("<think>Hm, </thin", "Hm, </thin", ""),
    "without an answer": ("<think>Hm.</think>\n", "Hm.", ""),
    "empty": ("<think>\n\n</think>\n\nYes.", "", "Yes."),
    "nested": ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
    "twice": ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
    "in the middle": ("No <think>tag</think>.", "", "No <think>tag</think>."),
    "other tags": ("<thinking>a</thinking>b", "", "<thinking>a</thinking>b"),
    "a part of a tag": ("<thi", "", "<thi"),
    "only an end tag": ("</think>\nYes.", "", "Yes."),
    "without the start tag": ("Hm.</think>Yes.", "", "Hm.</think>Yes."),
    "nearly an end tag": ("<think>a</</think</think>b", "a</</think", "b"),
    "an emoji": ("<think>\U0001f914</think>\U0001f600", "\U0001f914", "\U0001f600"),
    "many blanks": (" " * 65 + "<think>a</think>b", "", " " * 65 + "<think>a</think>b"),
    "no text": ("", "", ""),
}
"""The text as it comes, the reasoning in it, and the text of the answer."""


def event(text: str, finish_reason: str | None = None) -> bytes:
    """Makes an event with a piece of the text."""
    return chunk({"content": text}, finish_reason, model="m", big=12345678901234567890123)


def collected(events: list[bytes], choice: int = 0) -> tuple[str, str]:
    """Puts the reasoning and the text of a choice together. No text comes before the reasoning."""
    reasoning = text = ""
    for each in events:
        value = msgspec.json.decode(sse.data_of(each) or b"null") if b"[DONE]" not in each else {"choices": []}
        for piece in value["choices"]:
            delta = piece["delta"]
            if piece["index"] == choice and (more := delta.get("reasoning_content")):
                assert not text
                reasoning += more
            if piece["index"] == choice:
                text += delta.get("content") or ""
    return reasoning, text


def split(stream: bytes, *ends: int, choices: int = 1) -> list[bytes]:
    """Splits a stream that comes in pieces with these ends."""
    splitter = TagSplitter(max_event_bytes=100_000, choices=choices)
    return [each for start, end in pairwise((0, *ends, len(stream))) for each in splitter.feed(stream[start:end])]


@pytest.mark.parametrize("case", CASES)
def test_text(case: str) -> None:
    """The result is the same whole, character by character, and with every split in two."""
    text, *expected = CASES[case]
    for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(len(text)))):
        tags = ThinkTags()
        found = [*map(tags.feed, pieces), tags.feed_end()]
        assert ["".join(parts) for parts in zip(*found, strict=True)] == expected


@pytest.mark.parametrize("case", CASES)
def test_streams(case: str) -> None:
    """So it is in the events of a stream, which are split at every byte and at every character of the text; and the
    last piece of the text may come with the reason of the end, or before it."""
    text, *expected = CASES[case]
    whole = event(text) + chunk({}, "stop") + DONE
    assert list(collected(split(whole))) == expected
    assert split(whole, *range(len(whole))) == split(whole)
    for at in range(0, len(whole), 3):
        assert split(whole, at) == split(whole)
    assert list(collected(split(b"".join(map(event, text)) + chunk({}, "stop")))) == expected
    for at in range(len(text)):
        assert list(collected(split(event(text[:at]) + event(text[at:], "stop")))) == expected


@pytest.mark.parametrize("case", CASES)
def test_answers(case: str) -> None:
    """A plain answer has the same; nothing else in it changes."""
    text, reasoning, expected = CASES[case]
    body = b'{"n":1.0,"choices":[{"index":0,"message":{"role":"assistant","content":%b},"x":[]}],"big":%d}'
    before = body % (msgspec.json.encode(text), 10**40)
    found = with_reasoning_field(before)
    message = msgspec.json.encode(expected or (None if reasoning else expected))
    if reasoning:
        message += b',"reasoning_content":' + msgspec.json.encode(reasoning)
    assert found == body % (message, 10**40)
    assert (found is before) == (text == expected)


def test_other_events_keep_their_bytes() -> None:
    """Without reasoning nothing changes, and behind it no event is parsed."""
    for stream in (event("Hello") + event("</think>"), chunk({"role": "assistant", "content": ""}) + b": ping\n\n"):
        assert b"".join(split(stream)) == stream
    rest = b'data:{ "choices": [{"delta":  {"content":"<think>"}}]}\n\n'
    assert split(event("<think>a</think>b") + rest)[1] == rest
    odd = b'data: {"choices":7}\n\ndata: {"choices":[7]}\n\ndata: "choices"\n\ndata: {"choices":[{"delta":[]}]}\n\n'
    assert b"".join(split(odd)) == odd


def test_a_tool_call_ends_the_reasoning() -> None:
    """What was held back comes before the call."""
    found = split(event("<think>a</th") + tool(0, "f", "{}", "c1") + event("<think>b</think>"))
    assert collected(found) == ("a</th", "<think>b</think>")
    delta = msgspec.json.decode(sse.data_of(found[1]) or b"")["choices"][0]["delta"]
    assert (delta["reasoning_content"], delta["tool_calls"][0]["id"]) == ("</th", "c1")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_server_with_a_field_for_reasoning(name: str) -> None:
    """Its text is text."""
    stream = chunk({name: "Hm."}) + event("<think>a</think>")
    assert b"".join(split(stream)) == stream


def test_choices_count_for_themselves() -> None:
    """Each choice has its own tags."""

    def of(index: int, text: str) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": {"content": text}}
        return b"data: %b\n\n" % msgspec.json.encode({"choices": [choice]})

    found = split(of(0, "<thi") + of(1, "<think>b") + of(0, "nk>a</think>A") + of(1, "</think>B"), choices=2)
    assert (collected(found), collected(found, 1)) == (("a", "A"), ("b", "B"))


def test_half_an_emoji() -> None:
    """Some servers split one: its halves stay as they are."""
    stream = rb'data: {"choices":[{"index":0,"delta":{"content":"<think>\ud83e"}}]}' + b"\n\n"
    assert rb'"reasoning_content":"\ud83e"' in b"".join(split(stream)).replace(b": ", b":")


def test_events_before_an_event_that_is_too_large() -> None:
    """They are separated as well."""
    with pytest.raises(sse.EventTooLarge) as caught:
        split(event("<think>a") + b"data: " + b"x" * 100_001)
    assert collected(caught.value.before) == ("a", "")
