"""Calls and streams in Gemini's format for tests of both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trigate.dialects.anthropic import MessagesClient
from trigate.dialects.endpoints import MESSAGES, STREAM_GENERATE, STREAM_GENERATE_ARRAY
from trigate.dialects.formats import ClientFormat
from trigate.dialects.gemini import GeminiClient, GeminiRelay, GeminiUpstream
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.translated_call import TranslatedCall
from trigate.openai import sse
from trigate.openai.request import Call, InPath, decode_call

Json = dict[str, Any]

COUNTED = {
    "promptTokenCount": 100,
    "candidatesTokenCount": 15,
    "cachedContentTokenCount": 60,
    "thoughtsTokenCount": 5,
    "totalTokenCount": 120,
}


def call(*, is_array: bool = False, **fields: Any) -> Call:
    """Decodes a call in Gemini's format, which asks for thoughts."""
    body = {
        "contents": [{"role": "user", "parts": [{"text": "Hello"}]}],
        "generationConfig": {"thinkingConfig": {"includeThoughts": True}},
        **fields,
    }
    endpoint = STREAM_GENERATE_ARRAY if is_array else STREAM_GENERATE
    return decode_call(endpoint, msgspec.json.encode(body), InPath("up/m", stream=True))


def over_chat(asked: Call) -> TranslatedCall:
    """Returns a call over chat completions."""
    is_array = asked.endpoint is STREAM_GENERATE_ARRAY
    return TranslatedCall(asked, GeminiClient(is_array=is_array), ChatUpstream())


def messages_call(**fields: Any) -> TranslatedCall:
    """Returns a call in Anthropic's format, over Gemini's."""
    body = {
        "model": "up/m",
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        **fields,
    }
    client: ClientFormat = MessagesClient()
    return TranslatedCall(decode_call(MESSAGES, msgspec.json.encode(body)), client, GeminiUpstream())


def chunk(*parts: Mapping[str, Any], finish: str | None = None, **fields: Any) -> bytes:
    """Makes an event with one candidate."""
    candidate: Json = {"index": 0, "content": {"role": "model", "parts": list(parts)}}
    if finish is not None:
        candidate["finishReason"] = finish
    value = {"candidates": [candidate], "responseId": "r1", "modelVersion": "m-1", **fields}
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def function(name: str, args: Mapping[str, Any], **fields: Any) -> Json:
    """Makes a part that calls a function."""
    return {"functionCall": {"name": name, "args": args}, **fields}


def feed(reader: Any, pieces: Iterable[bytes]) -> bytes:
    """Feeds a stream and its end to a reader; returns what the client gets."""
    out = []
    for piece in pieces:
        out.append(reader.feed(piece))
        if reader.error is not None or reader.complete:
            break
    if reader.error is None and not reader.complete:
        out.append(reader.feed_end())
    return b"".join(out)


def reader_of(translation: TranslatedCall | GeminiRelay, asked: Call) -> Any:
    """Makes the reader of a streamed answer."""
    return translation.stream_reader(asked, upstream="up", max_event_bytes=100_000, keep_bytes=0, continues=None)


def decoded(stream: bytes) -> list[Json]:
    """The chunks of a stream of events."""
    return [
        msgspec.json.decode(sse.data_of(event) or b"")
        for event in sse.EventSplitter(max_event_bytes=10**9).feed(stream)
    ]


def parts_of(chunks: Iterable[Json]) -> list[Json]:
    """The parts of an answer, texts in a row joined; the last chunk has its end."""
    parts: list[Json] = []
    *_, last = chunks = list(chunks)
    assert [bool(each["candidates"][0].get("finishReason")) for each in chunks] == [False] * (len(chunks) - 1) + [True]
    assert last["usageMetadata"]["totalTokenCount"] >= last["usageMetadata"]["promptTokenCount"]
    for each in chunks:
        [candidate] = each["candidates"]
        assert candidate["content"]["role"] == "model"
        for part in candidate["content"].get("parts", ()):
            same = parts and "text" in part and "text" in parts[-1]
            if same and part.get("thought") == parts[-1].get("thought"):
                parts[-1] = {**parts[-1], "text": parts[-1]["text"] + part["text"]}
            elif part != {"text": ""}:
                parts.append(part)
    return parts
