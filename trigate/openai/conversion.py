"""Events from a JSON answer, and a JSON answer from events, where a provider sends the other one than it was asked for.
Pure.

Nothing is lost, and nothing is made up: a stream is collected only if it is complete, and an answer that is sent as an
event has the ``finish_reason`` that the provider gave.

Source: how deltas become a message is from openai-python ``lib/streaming/_deltas.py`` (texts are joined, items of a
list belong together by their ``index``), except that labels (a role, a type, an id, a name) are replaced, since some
providers repeat them.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from trigate.errors import ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import decode_answer
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call
from trigate.openai.stream import StreamReader

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
BLANKS = b"\xef\xbb\xbf \t\r\n"
"""What may stand before JSON or events: blanks, and the bytes of a byte order mark."""
_LABELS = {"role", "type", "id", "name", "index", "object", "finish_reason"}
_DONE = b"data: [DONE]\n\n"
_STREAMED = {"chat.completion.chunk": "chat.completion"}


def are_events(start: bytes) -> bool:
    """Whether a body that begins like this, after blanks, may be a stream of events.

    >>> [are_events(start) for start in (b"data: {}", b": ping", b"ev", b"{}", b"<html>", b"dates", b"")]
    [True, True, True, False, False, False, False]
    """
    return bool(start) and any(start.startswith(field) or field.startswith(start) for field in _FIELDS)


def events_of(body: bytes, call: Call, *, upstream: str) -> bytes:
    """Returns a JSON answer to a streamed call as a stream of one event with all of it, and ``[DONE]``.

    Raises:
        ProtocolViolation: It is not an answer, or one that events cannot express.
        Reported: It is an error with status 200.
    """
    body, _ = decode_answer(body, call.endpoint, model=call.public_model, upstream=upstream)
    value = decode_any(body)
    chunks = _chunks(value, call) if call.endpoint.needs_finish_reason else None
    if chunks is None:
        raise ProtocolViolation(f"The upstream {upstream} was asked for a stream and answered with JSON.")
    return b"".join([b"data: " + _encoded(chunk) + b"\n\n" for chunk in chunks]) + _DONE


def _chunks(value: dict[str, Any], call: Call) -> list[dict[str, Any]] | None:  # Any: JSON of any shape
    choices = []
    for number, choice in enumerate(value["choices"]):
        if not isinstance(choice, dict):
            return None
        choice = {"index": number, **choice}
        if call.endpoint.path == "/chat/completions":
            message = choice.get("message")
            if not isinstance(message, dict):
                return None
            calls = message.get("tool_calls")
            if isinstance(calls, list) and all(isinstance(each, dict) for each in calls):
                message = message | {"tool_calls": [{"index": place, **each} for place, each in enumerate(calls)]}
            choice = {"delta" if name == "message" else name: part for name, part in choice.items()} | {
                "delta": message
            }
        choices.append(choice)
    chunk = value | {"choices": choices}
    if "object" in value and call.endpoint.path == "/chat/completions":
        chunk["object"] = "chat.completion.chunk"
    options = decode_any(bytes(call.fields["stream_options"])) if "stream_options" in call.fields else None
    if not (isinstance(options, dict) and options.get("include_usage") and value.get("usage")):
        return [chunk]
    del chunk["usage"]
    return [chunk, chunk | {"choices": [], "usage": value["usage"]}]


def answer_of(body: bytes, call: Call, *, upstream: str) -> bytes:
    """Returns a stream that answers a call without ``stream`` as one JSON answer.

    Raises:
        GatewayError: The stream is truncated, has an error, or is one that no answer can be made of.
    """
    reader = StreamReader(call.endpoint, model=call.public_model, upstream=upstream, choices=call.choices)
    out = reader.feed(body)
    if reader.error is None and not reader.complete:
        out += reader.feed_end()
    if reader.error is not None:
        raise reader.error
    events = sse.EventSplitter(max_event_bytes=len(out)).feed(out) if out else []
    values = [value for event in events if isinstance(value := decode_any(sse.data_of(event) or b""), dict)]
    if not values:
        raise Truncated(f"The upstream {upstream} ended its stream before it was complete.")
    if call.endpoint.path == "/responses" and isinstance(values[-1].get("response"), dict):
        return _encoded(values[-1]["response"])  # the last event has the whole answer
    if not call.endpoint.needs_finish_reason:
        raise ProtocolViolation(f"The upstream {upstream} was asked for JSON and answered with a stream.")
    return _encoded(_collected(values))


def _collected(values: list[dict[str, Any]]) -> dict[str, Any]:  # Any: JSON of any shape
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for value in values:
        for choice in value.get("choices") or ():
            if isinstance(choice, dict):
                number = choice.get("index")
                number = number if isinstance(number, int) else 0
                _merge(choices.setdefault(number, {"index": number}), choice)
        answer |= {
            name: field
            for name, field in value.items()
            if name != "choices" and (field is not None or name not in answer)
        }
    if isinstance(kind := answer.get("object"), str):
        answer["object"] = _STREAMED.get(kind, kind)
    found = []
    for number in sorted(choices):
        choice = _joined(choices[number])
        delta = choice.pop("delta", None)
        if isinstance(delta, dict):
            for call in delta.get("tool_calls") or ():
                call.pop("index", None)
            choice["message"] = {"role": "assistant", "content": None} | delta
        found.append(choice)
    return answer | {"choices": found}


def _merge(into: dict[str, Any], delta: dict[str, Any]) -> None:  # Any: JSON of any shape
    """Adds the fields of a delta. A text is kept as a `_Text` of its pieces."""
    for name, part in delta.items():
        old = into.get(name)
        if isinstance(part, str) and name not in _LABELS:
            if isinstance(old, _Text):
                old.append(part)
            else:
                into[name] = _Text([part])
        elif isinstance(part, dict):
            if not isinstance(old, dict):
                old = into[name] = {}
            _merge(old, part)
        elif isinstance(part, list):
            if type(old) is not list:
                old = into[name] = []
            _merge_items(old, part)
        elif old is None or (part is not None and part != ""):
            into[name] = part


def _merge_items(into: list[Any], items: list[Any]) -> None:  # Any: JSON of any shape
    for item in items:
        if not isinstance(item, dict):
            into.append(item)
            continue
        same = (
            next((each for each in into if isinstance(each, dict) and each.get("index") == item["index"]), None)
            if (type(item.get("index")) is int)
            else None
        )
        if same is None:
            same = {}
            into.append(same)
        _merge(same, item)


class _Text(list[str]):
    """The pieces of a text."""


def _joined(value: Any) -> Any:  # Any: JSON of any shape
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _joined(part) for name, part in value.items()}
    return [_joined(part) for part in value] if isinstance(value, list) else value


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, separators=(",", ":")).encode()
