"""Decodes a message of Anthropic's that is not streamed, and makes a message of a stream or a stream of a message."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.dialects.anthropic.usage import decode_usage
from trigate.dialects.vocabulary import Answer, AnswerPart, Finish, FinishReason, Reasoning, Text, ToolCall
from trigate.errors import ProtocolViolation, Reported, Truncated
from trigate.openai import sse
from trigate.openai.accumulator import joined_surrogates
from trigate.openai.provider_error import is_error, reported
from trigate.openai.raw_json import decode_any

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

FINISH_OF: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop_sequence",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "refusal",
    "model_context_window_exceeded": "context_length",
    "pause_turn": "length",
}
"""The stop reasons. One that is not here is an ordinary stop: the provider may be newer than the gateway. A turn that
is paused (``pause_turn``) is not whole, as one that became too long."""

_STATUS_OF_TYPE: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 502,
    "overloaded_error": 503,
    "timeout_error": 504,
}
_MAX_ID_CHARS = 200


def error_of(upstream: str, value: object) -> Reported:
    """Returns the error that an upstream has reported with status 200, or as an event."""
    error = reported(upstream, value)
    status = _STATUS_OF_TYPE.get(str(error.payload.get("type")))
    if status is not None:
        error.status = status
    return error


def answer_id(value: object, data: bytes) -> str:
    """Returns the id of an answer: the provider's, or one made of its first event.

    >>> answer_id("msg_7", b""), len(answer_id(None, b"{}"))
    ('7', 24)
    """
    if isinstance(value, str) and value:
        return value.removeprefix("msg_")[:_MAX_ID_CHARS]
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def finish_of(reason: str, stop_sequence: object, usage: object, *, has_calls: bool) -> Finish:
    """Returns how an answer ended. An ordinary end is one for tools if, and only if, the answer calls some.

    >>> finish_of("tool_use", None, None, has_calls=False).reason
    'stop'
    """
    found = FINISH_OF.get(reason, "stop")
    if found in ("stop", "tool_calls"):
        found = "tool_calls" if has_calls else "stop"
    sequence = stop_sequence if found == "stop_sequence" and isinstance(stop_sequence, str) else None
    return Finish(found, sequence, decode_usage(usage))


def decode_answer(body: bytes, *, upstream: str) -> Answer:
    """Decodes an answer. Blocks of tools that the provider runs itself are left out: they were never asked for.

    Args:
        upstream: The upstream's name, for messages.

    Raises:
        ProtocolViolation: It is no message, or does not say how it ended.
        Reported: It is an error.
    """
    value = _message(body, upstream)
    answer = answer_id(value.get("id"), body)
    parts: list[AnswerPart] = []
    calls = 0
    for block in value["content"]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            if text := _text(block, "text"):
                parts.append(Text(text))
        elif kind == "thinking":
            text, signature = _text(block, "thinking"), _text(block, "signature")
            if text or signature:
                parts.append(Reasoning(text, {"anthropic": signature} if signature else {}))
        elif kind == "redacted_thinking":
            parts.append(Reasoning("", {"anthropic_redacted": _text(block, "data")}))
        elif kind == "tool_use":
            parts.append(_tool_call(block, f"call_{answer}_{calls}", upstream))
            calls += 1
    reason = value.get("stop_reason")
    if not isinstance(reason, str) or not reason:
        raise ProtocolViolation(f"The upstream {upstream} did not say how its answer ended (stop_reason).")
    finish = finish_of(reason, value.get("stop_sequence"), value.get("usage"), has_calls=calls > 0)
    return Answer(answer, tuple(parts), finish)


def _message(body: bytes, upstream: str) -> _Json:
    value = decode_any(body.removeprefix(sse.BOM))
    if isinstance(value, dict) and isinstance(value.get("content"), list) and value.get("type") != "error":
        return value
    if isinstance(value, dict) and is_error(value):
        raise error_of(upstream, value)
    raise ProtocolViolation(f"The upstream {upstream} answered with something that is not a message.")


def _text(block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    return joined_surrogates(value) if isinstance(value, str) else ""


def _tool_call(block: Mapping[str, Any], default_id: str, upstream: str) -> ToolCall:
    name, given, arguments = _text(block, "name"), _text(block, "id"), block.get("input")
    if not name:
        raise ProtocolViolation(f"The upstream {upstream} called a tool without a name.")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ProtocolViolation(
            f"The upstream {upstream} called the tool {name[:100]!r} with arguments that are no JSON object."
        )
    return ToolCall(given or default_id, name, msgspec.json.encode(arguments).decode())


# -- the other form than was asked for --------------------------------------------------------------------------------


def events_of(body: bytes, *, upstream: str) -> bytes:
    """Returns a message as the stream that the upstream should have sent. Raises as `decode_answer`."""
    value = _message(body, upstream)
    head = {**value, "content": [], "stop_reason": None, "stop_sequence": None}
    events = [_event("message_start", {"message": head})]
    for index, block in enumerate(value["content"]):
        if isinstance(block, dict):
            events += _block_events(index, block)
    end = {name: value.get(name) for name in ("stop_reason", "stop_sequence", "stop_details") if name in value}
    events.append(_event("message_delta", {"delta": end, "usage": value.get("usage") or {"output_tokens": 0}}))
    events.append(_event("message_stop", {}))
    return b"".join(events)


def _block_events(index: int, block: _Json) -> list[bytes]:
    start, deltas = dict(block), []
    for kind, name, delta in (
        ("text", "text", "text_delta"),
        ("thinking", "thinking", "thinking_delta"),
        ("thinking", "signature", "signature_delta"),
    ):
        if block.get("type") == kind and isinstance(block.get(name), str):
            start[name] = ""
            if block[name]:
                deltas.append({"type": delta, name: block[name]})
    if block.get("type") == "tool_use":
        start["input"] = {}
        deltas.append({"type": "input_json_delta", "partial_json": msgspec.json.encode(block.get("input")).decode()})
    events = [_event("content_block_start", {"index": index, "content_block": start})]
    events += [_event("content_block_delta", {"index": index, "delta": delta}) for delta in deltas]
    events.append(_event("content_block_stop", {"index": index}))
    return events


def _event(kind: str, fields: _Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def message_of(body: bytes, *, upstream: str) -> bytes:
    """Returns a stream as the message that the upstream should have sent.

    Raises:
        Truncated: It is not complete.
        Reported: It has an error.
        ProtocolViolation: No message can be made of it.
    """
    message: _Json | None = None
    blocks: dict[object, _Json] = {}
    arguments: dict[object, list[str]] = {}
    for event in sse.EventSplitter(max_event_bytes=len(body) + 2).feed(body + b"\n\n"):
        value = decode_any(sse.data_of(event) or b"null")
        if not isinstance(value, dict):
            continue
        kind, index = value.get("type"), value.get("index")
        if is_error(value):
            raise error_of(upstream, value)
        if kind == "message_start" and isinstance(value.get("message"), dict):
            message = value["message"]
        elif kind == "content_block_start" and isinstance(value.get("content_block"), dict):
            blocks[index] = value["content_block"]
        elif kind == "content_block_delta" and index in blocks and isinstance(value.get("delta"), dict):
            for name, piece in value["delta"].items():
                if name == "partial_json" and isinstance(piece, str):
                    arguments.setdefault(index, []).append(piece)
                elif name in ("text", "thinking", "signature") and isinstance(piece, str):
                    blocks[index][name] = str(blocks[index].get(name) or "") + piece
        elif kind == "message_delta" and message is not None:
            if isinstance(value.get("delta"), dict):
                message |= value["delta"]
            message["usage"] = merged_usage(message.get("usage"), value.get("usage"))
        elif kind == "message_stop" and message is not None:
            for at, pieces in arguments.items():
                made = decode_any("".join(pieces).encode())
                if made is None and message.get("stop_reason") == "max_tokens":
                    del blocks[at]  # cut off: nothing can be done with it
                else:
                    blocks[at]["input"] = made
            return msgspec.json.encode({**message, "content": list(blocks.values())})
    raise Truncated(f"The upstream {upstream} ended its stream before it was complete.")


def merged_usage(before: object, new: object) -> _Json:
    """Returns the counts after those of a later event, which are cumulative, and may lack some or have zeros for them.

    >>> merged_usage({"input_tokens": 9, "output_tokens": 1}, {"input_tokens": 0, "output_tokens": 5})
    {'input_tokens': 9, 'output_tokens': 5}
    """
    counts = dict(before) if isinstance(before, dict) else {}
    for name, value in new.items() if isinstance(new, dict) else ():
        if value is not None and (value or name == "output_tokens" or name not in counts):
            counts[name] = value
    return counts
