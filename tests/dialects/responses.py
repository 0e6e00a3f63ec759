"""Response calls over chat completions, and a strict reader of what the client gets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import msgspec

from trigate.dialects.endpoints import RESPONSES
from trigate.dialects.marks import Marks
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.openai_responses import ResponsesClient
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.translated_call import Memory, TranslatedCall
from trigate.openai import sse
from trigate.openai.request import Call, Identity, decode_call

MARKS = Marks(bytes(32))
IDENTITY = Identity(id="resp_1", created_at=1_700_000_000)
REQUIRED = frozenset(
    (
        *("id", "object", "created_at", "status", "model", "output", "error", "incomplete_details", "instructions"),
        *("metadata", "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p", "text", "reasoning"),
        *("usage", "store", "background", "truncation", "previous_response_id", "max_output_tokens", "user"),
    )
)


def call(**fields: Any) -> Call:
    """Decodes a response call."""
    body = {"model": "up/m", "input": "Hello", "stream": True, **fields}
    return attrs.evolve(decode_call(RESPONSES, msgspec.json.encode(body)), identity=IDENTITY)


def translated(asked: Call) -> TranslatedCall:
    """Returns a call over chat completions."""
    made = TranslatedCall(asked, ResponsesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS))
    return made


def make_reader(asked: Call | None = None) -> TranslatedStream:
    """Makes the reader of a streamed answer."""
    asked = asked or call()
    return translated(asked).stream_reader(asked, upstream="up", max_event_bytes=100_000, keep_bytes=0, continues=None)


def translate(pieces: Iterable[bytes], asked: Call | None = None) -> tuple[bytes, TranslatedStream]:
    """Feeds a stream and its end; returns what the client gets, and the reader."""
    reader = make_reader(asked)
    out = []
    for piece in pieces:
        out.append(reader.feed(piece))
        if reader.error is not None or reader.complete:
            break
    if reader.error is None and not reader.complete:
        out.append(reader.feed_end())
    return b"".join(out), reader


def decoded(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named by its type and counted from 0."""
    found: list[dict[str, Any]] = []
    for event in sse.EventSplitter(max_event_bytes=10**9).feed(stream):
        data = sse.data_of(event)
        if not data:
            continue  # a comment
        value = msgspec.json.decode(data)
        assert event.startswith(b"event: %b\n" % value["type"].encode()), event
        assert value["sequence_number"] == len(found), event
        found.append(value)
    return found


def response_of(stream: bytes) -> dict[str, Any]:
    """Puts the response of a stream together from its events, as strictly as possible; returns that of the last one."""
    created, in_progress, *middle, last = decoded(stream)
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    assert created["response"].keys() >= REQUIRED
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    items: list[dict[str, Any]] = []
    is_open = False
    text = ""
    kinds: list[str] = []
    for event in middle:
        kind, index = event["type"], event["output_index"]
        kinds.append(kind)
        if kind == "response.output_item.added":
            assert not is_open
            assert index == len(items)
            items.append(event["item"])
            is_open, text, kinds = True, "", [kind]
            assert event["item"]["status"] == "in_progress"
            continue
        assert is_open
        assert index == len(items) - 1
        item = items[-1]
        if kind == "response.output_item.done":
            assert event["item"]["id"] == item["id"]
            assert event["item"]["type"] == item["type"]
            items[-1] = event["item"]
            is_open = False
            _check_item(event["item"], text, kinds)
            continue
        assert event["item_id"] == item["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            text += event["delta"]
        elif kind.endswith("_text.done"):
            assert event["text"] == text
        elif kind == "response.function_call_arguments.done":
            assert event["name"] == item["name"]
            assert event["arguments"] == (text or "{}")
        elif kind == "response.custom_tool_call_input.done":
            assert event["input"] == text
        elif kind.endswith("part.done"):
            assert event["part"]["text"] == text
    response: dict[str, Any] = last["response"]
    assert last["type"] == f"response.{response['status']}"
    assert response.keys() >= REQUIRED
    assert response["id"] == created["response"]["id"]
    if response["status"] != "failed":
        assert not is_open
        assert response["output"] == items
        assert response["error"] is None
    return response


def _check_item(item: dict[str, Any], text: str, kinds: list[str]) -> None:
    """Compares a whole item with its events."""
    match item["type"]:
        case "message":
            assert kinds[:2] == ["response.output_item.added", "response.content_part.added"]
            assert kinds[-3:] == [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
            ]
            [part] = item["content"]
            assert part == {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        case "function_call":
            assert kinds[-2] == "response.function_call_arguments.done"
            assert item["arguments"] == (text or "{}")
        case "custom_tool_call":
            assert kinds[-2] == "response.custom_tool_call_input.done"
            assert item["input"] == text
        case "reasoning":
            assert [part["text"] for part in [*item["summary"], *item.get("content", ())]] == ([text] if text else [])
