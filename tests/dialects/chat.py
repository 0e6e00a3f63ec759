"""Streams and answers of chat completions, translated to Anthropic's format, and a strict reader of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from bench import events
from trigate.dialects.anthropic import MessagesClient
from trigate.dialects.endpoints import MESSAGES
from trigate.dialects.marks import Marks
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.translated_call import Memory, TranslatedCall
from trigate.openai import sse
from trigate.openai.request import Call, decode_call

DONE = events.DONE
MARKS = Marks(bytes(range(32)))
mark_of = MARKS.mark_of
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
COUNTED = {
    "input_tokens": 30,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 60,
    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 20,
    "output_tokens_details": {"thinking_tokens": 5},
}
"""The same counts in Anthropic's format."""


def call(**fields: Any) -> Call:
    """Decodes a call in Anthropic's format, which asks for thinking."""
    body = {
        "model": "up/m",
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": "Hello"}],
        **fields,
    }
    return decode_call(MESSAGES, msgspec.json.encode(body))


def translated(asked: Call) -> TranslatedCall:
    """Returns a call over chat completions, by a gateway with `MARKS`."""
    made = TranslatedCall(asked, MessagesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS))
    return made


def chunk(delta: Mapping[str, Any] | None = None, finish_reason: str | None = None, **fields: Any) -> bytes:
    """Makes an event with one choice."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "choices": [choice], **fields}) + b"\n\n"


def usage(value: object = USAGE) -> bytes:
    """Makes the event with the usage."""
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "choices": [], "usage": value}) + b"\n\n"


def tool(index: int | None, name: str | None = None, arguments: str | None = None, call_id: str | None = None) -> bytes:
    """Makes an event with a piece of a tool call."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    piece: dict[str, Any] = {"function": function}
    if index is not None:
        piece["index"] = index
    if call_id is not None:
        piece["id"] = call_id
    return chunk({"tool_calls": [piece]})


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
    """The events of a stream in Anthropic's format. Each name is that of its type."""
    found = []
    for event in sse.EventSplitter(max_event_bytes=10**9).feed(stream):
        value = msgspec.json.decode(sse.data_of(event) or b"")
        assert event.startswith(b"event: %b\n" % value["type"].encode()), event
        found.append(value)
    return found


def message_of(stream: bytes) -> dict[str, Any]:
    """Puts the message of a complete stream together, as strictly as possible."""
    first, *rest = decoded(stream)
    assert first["type"] == "message_start"
    message: dict[str, Any] = first["message"]
    assert message["content"] == []
    assert message["stop_reason"] is None
    blocks: list[dict[str, Any]] = message["content"]
    arguments: list[str] | None = None
    is_open = False
    *middle, delta, stop = rest
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(blocks)
                is_open, arguments = True, []
                blocks.append(event["content_block"])
                assert not any(blocks[-1].get(name) for name in ("text", "thinking", "signature", "input"))
            case "content_block_stop":
                assert is_open
                assert event["index"] == len(blocks) - 1
                is_open = False
                if blocks[-1]["type"] == "tool_use" and arguments:
                    blocks[-1]["input"] = msgspec.json.decode("".join(arguments))
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(blocks) - 1
                match event["delta"]:
                    case {"type": "text_delta", "text": text}:
                        assert text
                        blocks[-1]["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        blocks[-1]["thinking"] += text
                    case {"type": "signature_delta", "signature": signature}:
                        assert not blocks[-1]["signature"]
                        blocks[-1]["signature"] = signature
                    case {"type": "input_json_delta", "partial_json": text}:
                        assert blocks[-1]["type"] == "tool_use"
                        assert arguments is not None
                        arguments.append(text)
                    case other:
                        raise AssertionError(other)
            case "ping":
                pass
            case other:
                raise AssertionError(other)
    assert not is_open
    assert delta["type"] == "message_delta"
    assert stop == {"type": "message_stop"}
    return {**message, **delta["delta"], "usage": delta["usage"]}


def answer_of(message: Mapping[str, Any], finish_reason: str = "stop", asked: Call | None = None) -> dict[str, Any]:
    """Translates an answer that is not streamed."""
    asked = asked or call()
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = msgspec.json.encode({"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": USAGE})
    data, _ = translated(asked).answer(asked, body, upstream="up")
    decoded: dict[str, Any] = msgspec.json.decode(data)
    return decoded
