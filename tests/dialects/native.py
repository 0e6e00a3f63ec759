"""Calls for chat completions over Anthropic's format, and a strict reader of what the client gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tests.support.messages_rules import problem_of
from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic import MessagesUpstream
from trigate.dialects.endpoints import CHAT
from trigate.dialects.openai_chat import ChatClient
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.translated_call import TranslatedCall
from trigate.openai import sse
from trigate.openai.request import Call, decode_call

NEW, OLD = "claude-opus-5", "claude-sonnet-4-5-20250929"
"""A model that is asked to think by an effort, and one that is asked by a budget."""
USER = {"role": "user", "content": "Hello"}
USAGE = {
    "input_tokens": 30,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 60,
    "output_tokens": 1,
}
COUNTED = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
"""The counts of `START` and `end` in OpenAI's format."""


def call(**fields: Any) -> Call:
    """Decodes a call for a chat completion."""
    return decode_call(CHAT, msgspec.json.encode({"model": "up/m", "messages": [USER], **fields}))


def translated(asked: Call) -> TranslatedCall:
    """Returns a call over Anthropic's format, made at 1700000000.5."""
    return TranslatedCall(asked, ChatClient(), MessagesUpstream(), at=1700000000.5)


def sent(model: str = NEW, *, limit: int | None = None, **fields: Any) -> dict[str, Any]:
    """Returns the request that is sent, with what was dropped as ``dropped``. Anthropic accepts it.

    Args:
        limit: The most tokens that the model is known to give.
    """
    asked = call(**fields)
    translation = translated(asked)
    translation.limit_answer(limit)
    body = translation.body(asked, model, UpstreamConfig(kind="anthropic"))
    assert problem_of(body) is None
    return {**msgspec.json.decode(body), "dropped": list(translation.dropped)}


# -- what the upstream sends ------------------------------------------------------------------------------------------


def named(kind: str, **fields: Any) -> bytes:
    """Makes an event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


MESSAGE = {"id": "msg_7", "type": "message", "role": "assistant", "model": "c", "content": [], "usage": USAGE}
START = named("message_start", message=MESSAGE)
PING = named("ping")
STOP = named("message_stop")


def block(index: int, kind: str, *deltas: Mapping[str, Any], **fields: Any) -> list[bytes]:
    """Makes the events of a block."""
    return [
        named("content_block_start", index=index, content_block={"type": kind, **fields}),
        *(named("content_block_delta", index=index, delta=delta) for delta in deltas),
        named("content_block_stop", index=index),
    ]


def text(index: int, *pieces: str) -> list[bytes]:
    """Makes the events of a text."""
    return block(index, "text", *({"type": "text_delta", "text": piece} for piece in pieces), text="")


def thinking(index: int, *pieces: str, signature: str = "sig") -> list[bytes]:
    """Makes the events of a thinking block."""
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    signed = {"type": "signature_delta", "signature": signature}
    return block(index, "thinking", *deltas, signed, thinking="", signature="")


def tool(index: int, *pieces: str, call_id: str = "toolu_1", name: str = "f") -> list[bytes]:
    """Makes the events of a tool call."""
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return block(index, "tool_use", *deltas, id=call_id, name=name, input={})


def end(reason: str | None = "end_turn", sequence: str | None = None, **usage: Any) -> list[bytes]:
    """Makes the last two events."""
    counts = usage or {"output_tokens": 20, "output_tokens_details": {"thinking_tokens": 5}}
    return [named("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=counts), STOP]


# -- what the client gets ---------------------------------------------------------------------------------------------


def translate(pieces: Iterable[bytes], **fields: Any) -> tuple[bytes, TranslatedStream]:
    """Feeds a stream and its end; returns what the client gets, and the reader."""
    asked = call(**{"stream": True, "stream_options": {"include_usage": True}, **fields})
    reader = translated(asked).stream_reader(
        asked, upstream="up", max_event_bytes=100_000, keep_bytes=0, continues=None
    )
    out = []
    for piece in pieces:
        out.append(reader.feed(piece))
        if reader.error is not None or reader.complete:
            break
    if reader.error is None and not reader.complete:
        out.append(reader.feed_end())
    return b"".join(out), reader


def completion_of(stream: bytes) -> dict[str, Any]:
    """Puts the chat completion of a complete stream together, as strictly as possible."""
    events = [sse.data_of(event) or b"" for event in sse.EventSplitter(max_event_bytes=10**9).feed(stream)]
    assert events[-1] == b"[DONE]"
    chunks = [msgspec.json.decode(event) for event in events[:-1]]
    heads = [{name: value for name, value in chunk.items() if name not in ("choices", "usage")} for chunk in chunks]
    assert all(head == heads[0] for head in heads)
    assert heads[0]["object"] == "chat.completion.chunk"
    usage = None
    if chunks[-1]["choices"] == []:
        usage = chunks.pop()["usage"]
        assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    deltas = []
    for at, chunk in enumerate(chunks):
        [choice] = chunk["choices"]
        assert choice["index"] == 0
        assert choice["logprobs"] is None
        assert (choice["finish_reason"] is not None) == (at == len(chunks) - 1)
        deltas.append(choice["delta"])
    assert deltas.pop() == {}
    assert deltas[0]["role"] == "assistant"
    assert deltas[0].keys() == {"role", "content"}
    message: dict[str, Any] = {"role": "assistant", "content": deltas[0]["content"], "refusal": None}
    for delta in deltas[1:]:
        _add(message, delta)
    return {
        **heads[0],
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": chunks[-1]["choices"][0]["finish_reason"],
            }
        ],
        **({"usage": usage} if usage is not None else {}),
    }


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    [(name, value)] = delta.items()
    match name:
        case "content" | "reasoning_content":
            assert value
            message[name] = (message.get(name) or "") + value
        case "reasoning_details":
            details = message.setdefault(name, [])
            assert [item["index"] for item in value] == [len(details)]
            details += value
        case "function_call":
            function = message.setdefault(name, {"name": value.get("name"), "arguments": ""})
            function["arguments"] += value["arguments"]
        case "tool_calls":
            [piece] = value
            calls = message.setdefault(name, [])
            index = piece.pop("index")
            if "id" in piece:
                assert index == len(calls)
                assert piece["function"]["arguments"] == ""
                calls.append(piece)
            else:
                assert index == len(calls) - 1
                calls[index]["function"]["arguments"] += piece["function"]["arguments"]
        case other:
            raise AssertionError(other)


def message_of(stream: bytes) -> dict[str, Any]:
    """Returns the message of a complete stream."""
    message: dict[str, Any] = completion_of(stream)["choices"][0]["message"]
    return message


def answer_of(*content: Mapping[str, Any], reason: str | None = "end_turn", **fields: Any) -> dict[str, Any]:
    """Translates an answer that is not streamed."""
    asked = call(**fields)
    usage = {**USAGE, "output_tokens": 20, "output_tokens_details": {"thinking_tokens": 5}}
    body = msgspec.json.encode({**MESSAGE, "content": content, "stop_reason": reason, "usage": usage})
    data, _ = translated(asked).answer(asked, body, upstream="up")
    decoded: dict[str, Any] = msgspec.json.decode(data)
    return decoded
