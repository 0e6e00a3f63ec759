"""Decodes the events of a message that is streamed in Anthropic's format.

A block is open from its ``content_block_start`` to its ``content_block_stop``, and the next one begins behind it, so
the events of the vocabulary come one for one. Some servers leave out the stop, send it twice, or give each block the
same index: a new block ends the one that is open, and a stop without a block is ignored.

The arguments of a tool are checked at the end of the stream: only then it is known whether they were cut off because
the answer is as long as allowed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.anthropic.upstream_answer import answer_id, error_of, finish_of, merged_usage
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Event,
    PartStop,
    Payload,
    ReasoningDelta,
    ReasoningStart,
    Start,
    TextDelta,
    TextStart,
    ToolCallStart,
)
from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai.accumulator import joined_surrogates
from trigate.openai.answer import Usage, find_usage
from trigate.openai.provider_error import is_error
from trigate.openai.raw_json import decode_any

_decode = msgspec.json.Decoder().decode
_NO_EVENTS: tuple[Event, ...] = ()


class MessagesEventDecoder:
    """Reads one stream: a `formats.Tracker` and a `formats.EventDecoder` at once, so that the JSON of an event is
    decoded once.

    Args:
        upstream: The upstream's name, for messages.
    """

    __slots__ = (
        "_arguments",
        "_calls",
        "_id",
        "_invalid",
        "_open",
        "_signature",
        "_stop_reason",
        "_stop_sequence",
        "_upstream",
        "_usage",
        "_value",
        "complete",
        "error",
        "has_content",
        "usage",
    )

    def __init__(self, *, upstream: str) -> None:
        self._upstream = upstream
        self._id: str | None = None
        self._open: str | None = None
        """The type of the block that is open; ``""`` = one that the client does not get; None = none is open."""
        self._arguments: list[str] = []
        self._signature: list[str] = []
        self._calls = 0
        self._invalid = ""
        """The name of the last tool whose arguments are no JSON object."""
        self._stop_reason = ""
        self._stop_sequence: object = None
        self._usage: dict[str, Any] = {}  # Any: JSON of any shape
        self._value: dict[str, Any] = {}
        self.error: GatewayError | None = None
        self.has_content = False
        self.complete = False
        self.usage: Usage | None = None

    @property
    def all_finished(self) -> bool:
        """Whether the stream may close. Its last event says so, and nothing before it."""
        return self.complete

    # -- as a tracker -------------------------------------------------------------------------------------------------

    def observe(self, event: bytes, data: bytes) -> bool:
        """As `formats.Tracker.observe`."""
        try:
            value = _decode(data)
        except (ValueError, RecursionError):
            value = decode_any(data)
        if not isinstance(value, dict):
            if value is not None or data.strip() != b"null":
                self.error = ProtocolViolation(
                    f"The upstream {self._upstream} sent an event that is not a JSON object."
                )
            return False
        self._value = value
        kind = value.get("type")
        if kind == "content_block_delta":  # most events
            self.has_content = True
            return True
        if kind == "message_stop":
            if not self._stop_reason:
                self.error = Truncated(
                    f"The upstream {self._upstream} ended its stream without saying how the answer ended (stop_reason)."
                )
                return False
            self.complete = self.has_content = True
            return True
        if kind in ("message_start", "message_delta"):
            self.usage = find_usage(value, self.usage) or self.usage
            self.has_content = self.has_content or kind == "message_delta"
            return True
        if kind in ("content_block_start", "content_block_stop"):
            return True
        if is_error(value) or event.startswith((b"event: error", b"event:error")):
            self.error = error_of(self._upstream, value if is_error(value) else {"error": value})
        return False  # a ping, or an event that is newer than the gateway

    # -- as a decoder -------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> list[Event] | tuple[Event, ...]:
        """As `formats.EventDecoder.feed`: the event that was observed last."""
        value = self._value
        kind = value["type"]
        if kind == "content_block_delta":
            delta = value.get("delta")
            return self._take_delta(delta, data) if isinstance(delta, dict) else _NO_EVENTS
        events: list[Event] = []
        if kind == "content_block_start":
            self._start(data, events)
            block = value.get("content_block")
            self._open_block(block if isinstance(block, dict) else {}, data, events)
        elif kind == "content_block_stop":
            self._close(events)
        elif kind == "message_start":
            self._start(data, events)
            message = value.get("message")
            self._usage = merged_usage(self._usage, message.get("usage") if isinstance(message, dict) else None)
        else:
            self._usage = merged_usage(self._usage, value.get("usage"))
            delta = value.get("delta")
            if isinstance(delta, dict) and isinstance(delta.get("stop_reason"), str):
                self._stop_reason, self._stop_sequence = delta["stop_reason"], delta.get("stop_sequence")
        return events

    def feed_end(self) -> list[Event]:
        """As `formats.EventDecoder.feed_end`."""
        events: list[Event] = []
        self._start(b"", events)
        self._close(events)
        finish = finish_of(self._stop_reason, self._stop_sequence, self._usage, has_calls=self._calls > 0)
        if self._invalid and finish.reason not in ("length", "context_length"):
            raise ProtocolViolation(
                f"The upstream {self._upstream} called the tool {self._invalid[:100]!r} with arguments that are no "
                "JSON object."
            )
        events.append(finish)
        return events

    def _start(self, data: bytes, events: list[Event]) -> None:
        if self._id is None:
            message = self._value.get("message")
            self._id = answer_id(message.get("id") if isinstance(message, dict) else None, data)
            events.append(Start(self._id))

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _open_block(self, block: dict[str, Any], data: bytes, events: list[Event]) -> None:  # Any: JSON of any shape
        self._close(events)
        kind = block.get("type")
        self._open = kind if kind in ("text", "thinking", "tool_use", "redacted_thinking") else ""
        if kind == "text":
            events.append(TextStart())
            if text := _text(block, "text"):
                events.append(TextDelta(text))
                self.has_content = True
        elif kind == "thinking":
            events.append(ReasoningStart())
            if text := _text(block, "thinking"):
                events.append(ReasoningDelta(text))
            self._signature = [_text(block, "signature")]
        elif kind == "redacted_thinking":
            self.has_content = True
            events += (ReasoningStart(), Payload("anthropic_redacted", _text(block, "data")))
        elif kind == "tool_use":
            self.has_content = True
            name = _text(block, "name")
            if not name:
                raise ProtocolViolation(f"The upstream {self._upstream} called a tool without a name.")
            events.append(ToolCallStart(_text(block, "id") or f"call_{self._id}_{self._calls}", name))
            self._calls += 1
            self._arguments = []
            self._invalid = name
            if block.get("input"):
                text = msgspec.json.encode(block["input"]).decode()
                self._arguments.append(text)
                events.append(ArgumentsDelta(text))

    def _take_delta(self, delta: dict[str, Any], data: bytes) -> list[Event] | tuple[Event, ...]:
        kind = delta.get("type")
        if self._open == "":
            return _NO_EVENTS
        if kind == "text_delta" and self._open == "text":
            text = _piece(delta.get("text"), data)
            return (TextDelta(text),) if text else _NO_EVENTS
        if kind == "input_json_delta" and self._open == "tool_use":
            text = _piece(delta.get("partial_json"), data)
            if not text:
                return _NO_EVENTS
            self._arguments.append(text)
            return (ArgumentsDelta(text),)
        if kind == "thinking_delta" and self._open == "thinking":
            text = _piece(delta.get("thinking"), data)
            return (ReasoningDelta(text),) if text else _NO_EVENTS
        if kind == "signature_delta" and self._open == "thinking":
            self._signature.append(_text(delta, "signature"))
            return _NO_EVENTS
        if kind in ("text_delta", "input_json_delta", "thinking_delta"):
            raise ProtocolViolation(f"The upstream {self._upstream} sent a {kind} for a block that is not open.")
        return _NO_EVENTS  # a citation, or one that is newer than the gateway

    def _close(self, events: list[Event]) -> None:
        kind, self._open = self._open, None
        if not kind:
            return
        if kind == "thinking" and (signature := "".join(self._signature)):
            events.append(Payload("anthropic", signature))
        elif kind == "tool_use" and _is_object("".join(self._arguments)):
            self._invalid = ""
        events.append(PartStop())


def _text(block: dict[str, Any], name: str) -> str:  # Any: JSON of any shape
    value = block.get(name)
    return joined_surrogates(value) if isinstance(value, str) else ""


def _piece(value: object, data: bytes) -> str:
    if not isinstance(value, str):
        return ""
    return joined_surrogates(value) if data.count(b"\\ud") or data.count(b"\\uD") else value


def _is_object(arguments: str) -> bool:
    if not arguments.strip():
        return True
    try:
        return isinstance(_decode(arguments), dict)
    except (ValueError, RecursionError):
        return False
