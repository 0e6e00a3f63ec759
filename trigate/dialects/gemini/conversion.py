"""Events from a JSON answer, and a JSON answer from events, where an upstream sends the other one than asked for."""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.gemini.decode import answer_object
from trigate.dialects.gemini.tracker import GeminiSplitter, GeminiTracker
from trigate.errors import ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.raw_json import decode_any

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def events_of(body: bytes, *, upstream: str) -> bytes:
    """Returns a JSON answer to a streamed call as events: one object, or an array of the chunks.

    Raises:
        Reported: It is an error.
        ProtocolViolation: It is no answer.
    """
    value = decode_any(body)
    if not isinstance(value, list) or len(value) < 2:
        value = [answer_object(body, upstream=upstream)]
    if not all(isinstance(each, dict) for each in value):
        raise ProtocolViolation(f"The upstream {upstream} answered with an array that has no chunks.")
    return b"".join([b"data: %b\n\n" % msgspec.json.encode(each) for each in value])


def answer_of(body: bytes, *, upstream: str) -> bytes:
    """Returns a stream that answers a call without a stream as one JSON answer.

    Raises:
        GatewayError: The stream is truncated, or has an error.
    """
    splitter = GeminiSplitter(max_event_bytes=len(body) + 16)
    tracker = GeminiTracker(upstream=upstream, fails_by_reason=False)
    chunks: list[_Json] = []
    for event in (*splitter.feed(body), splitter.pending):
        data = sse.data_of(event + b"\n\n") if event else None
        if not data:
            continue
        if not tracker.observe(event, data) and tracker.error is not None:
            raise tracker.error
        if isinstance(value := decode_any(data), dict):
            chunks.append(value)
    if not tracker.all_finished:
        raise Truncated(f"The upstream {upstream} ended its stream before it was complete.")
    return msgspec.json.encode(_joined(chunks))


def _joined(chunks: list[_Json]) -> _Json:
    answer: _Json = {}
    candidates: dict[int, _Json] = {}
    for chunk in chunks:
        for candidate in chunk.get("candidates") or ():
            if isinstance(candidate, dict):
                index = candidate.get("index")
                index = index if isinstance(index, int) else 0
                _add(candidates.setdefault(index, {"content": {"parts": [], "role": "model"}}), candidate)
        answer |= {name: value for name, value in chunk.items() if name != "candidates"}
    if candidates:
        answer["candidates"] = [candidates[index] for index in sorted(candidates)]
    return answer


def _add(whole: _Json, candidate: _Json) -> None:
    content = candidate.get("content")
    given = content.get("parts") if isinstance(content, dict) else None
    parts: list[_Json] = whole["content"]["parts"]
    for part in given if isinstance(given, list) else ():
        last = parts[-1] if parts else None
        if last is not None and _is_plain(last) and _is_plain(part) and last.get("thought") == part.get("thought"):
            parts[-1] = {**last, "text": last["text"] + part["text"]}
        elif part != {"text": ""}:
            parts.append(part)
    whole |= {name: value for name, value in candidate.items() if name != "content"}


def _is_plain(part: object) -> bool:
    """Whether a part has a text and nothing that belongs to this piece of it alone."""
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part.keys() <= {"text", "thought"}
