"""Follows and decodes the events of ConverseStream, as `framing` gives them.

A stream is ``messageStart``, for each block its deltas between ``contentBlockStart`` and ``contentBlockStop``,
``messageStop`` with the reason, and ``metadata`` with the token counts. Texts and reasoning have no
``contentBlockStart``, so a block begins with its first delta.
"""

from __future__ import annotations

from typing import Any

from trigate.dialects.bedrock.answer import checked_arguments, counts_of, finish_of, usage_of
from trigate.dialects.bedrock.framing import END, EXCEPTION, FAULT
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
    TokenCounts,
    ToolCallStart,
)
from trigate.errors import GatewayError, ProtocolViolation, Reported
from trigate.openai.answer import Usage
from trigate.openai.provider_error import find_message
from trigate.openai.raw_json import decode_any

_DELTA = b'{"contentBlockDelta"'
_START = b'{"contentBlockStart"'
_STOP = b'{"messageStop"'
_METADATA = b'{"metadata"'
_STATUSES = {
    "validationException": 400,
    "accessDeniedException": 403,
    "resourceNotFoundException": 404,
    "modelTimeoutException": 503,
    "modelStreamErrorException": 502,
    "modelErrorException": 502,
    "throttlingException": 429,
    "modelNotReadyException": 429,
    "internalServerException": 502,
    "serviceUnavailableException": 503,
}
"""The statuses of the exceptions in a stream. Those of the model itself are the provider's fault."""

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def exception_of(data: bytes, upstream: str) -> GatewayError:
    """Returns the error that an exception in a stream stands for.

    Args:
        data: The data of its event.
    """
    name, fields = _named(data) or ("error", {})
    name = name[:1].lower() + name[1:]
    message = find_message(fields) or f"The upstream {upstream} reported {name}."
    return Reported(message, error={"message": message, "type": name, "code": name}, status=_STATUSES.get(name, 502))


def _named(data: bytes) -> tuple[str, _Json] | None:
    """Returns the name and the fields of a message; None if it makes no sense."""
    value = decode_any(data)
    if not isinstance(value, dict) or len(value) != 1:
        return None
    [(name, fields)] = value.items()
    return (name, fields) if isinstance(fields, dict) else None


class BedrockTracker:
    """Knows when a stream has content, is complete or has failed. A `formats.Tracker`."""

    __slots__ = ("_upstream", "all_finished", "complete", "error", "has_content", "usage")

    def __init__(self, *, upstream: str) -> None:
        self._upstream = upstream
        self.error: GatewayError | None = None
        self.has_content = False
        self.complete = False
        self.all_finished = False
        self.usage: Usage | None = None

    def observe(self, event: bytes, data: bytes) -> bool:
        """As `formats.Tracker.observe`."""
        if data.startswith(_DELTA):
            self.has_content = True
        elif event.startswith(b"event: !"):
            self._fail(event, data)
            return False
        elif data.startswith(_START):
            self.has_content = True
        elif data.startswith(_STOP):
            self.has_content = self.all_finished = True
        elif data.startswith(_METADATA):
            named = _named(data)
            end = named[1] if named is not None else {}
            self.usage = usage_of(counts_of(end.get("usage")), end.get("serviceTier"))
        elif data == END:
            self.complete = self.all_finished
            return self.complete
        return True

    def _fail(self, event: bytes, data: bytes) -> None:
        if event.startswith(EXCEPTION):
            self.error = exception_of(data, self._upstream)
        else:
            assert event.startswith(FAULT)
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent a broken stream: {data.decode()}.")


class BedrockEventDecoder:
    """Decodes one stream. A `formats.EventDecoder`.

    Args:
        answer_id: The id of the answer.
        upstream: The upstream's name, for messages.
    """

    __slots__ = ("_calls", "_id", "_index", "_is_started", "_open", "_reason", "_upstream", "_usage")

    def __init__(self, *, answer_id: str, upstream: str) -> None:
        self._upstream = upstream
        self._id = answer_id
        self._is_started = False
        self._open: type[Event] | None = None
        self._index = -1
        self._calls: list[tuple[str, list[str]]] = []
        self._reason: object = None
        self._usage: TokenCounts | None = None

    def feed(self, data: bytes) -> list[Event]:
        """As `formats.EventDecoder.feed`."""
        named = _named(data)
        if named is None:
            raise ProtocolViolation(f"The upstream {self._upstream} sent an event that is not a JSON object.")
        kind, fields = named
        events: list[Event] = []
        if not self._is_started:
            self._is_started = True
            events.append(Start(self._id))
        match kind:
            case "contentBlockDelta":
                self._take_delta(fields, events)
            case "contentBlockStart":
                self._take_start(fields, events)
            case "contentBlockStop":
                self._close(events)
            case "messageStop":
                self._reason = fields.get("stopReason")
            case "metadata":
                self._usage = counts_of(fields.get("usage"))
        return events

    def feed_end(self) -> list[Event]:
        """As `formats.EventDecoder.feed_end`."""
        events: list[Event] = []
        self._close(events)
        finish = finish_of(self._reason, self._usage, has_calls=bool(self._calls), upstream=self._upstream)
        for at, (name, pieces) in enumerate(self._calls):
            if finish.reason in ("stop", "tool_calls", "stop_sequence") or at < len(self._calls) - 1:
                checked_arguments("".join(pieces), name, self._upstream)
        events.append(finish)
        return events

    def _take_start(self, fields: _Json, events: list[Event]) -> None:
        self._close(events)
        self._index = self._index_of(fields)
        start = fields.get("start")
        call = start.get("toolUse") if isinstance(start, dict) else None
        if not isinstance(call, dict):
            return
        id_, name = call.get("toolUseId"), call.get("name")
        if not isinstance(id_, str) or not isinstance(name, str) or not id_ or not name:
            raise ProtocolViolation(f"The upstream {self._upstream} called a tool without a name.")
        self._calls.append((name, []))
        self._open = ToolCallStart
        events.append(ToolCallStart(id_, name))

    def _take_delta(self, fields: _Json, events: list[Event]) -> None:
        index, delta = self._index_of(fields), fields.get("delta")
        if index != self._index:
            self._close(events)
            self._index = index
        if not isinstance(delta, dict):
            return
        if isinstance(text := delta.get("text"), str):
            if text:
                self._begin(TextStart, events)
                events.append(TextDelta(text))
        elif isinstance(call := delta.get("toolUse"), dict):
            if self._open is not ToolCallStart:
                raise ProtocolViolation(f"The upstream {self._upstream} sent arguments of no tool call.")
            if isinstance(piece := call.get("input"), str) and piece:
                self._calls[-1][1].append(piece)
                events.append(ArgumentsDelta(piece))
        elif isinstance(reasoning := delta.get("reasoningContent"), dict):
            self._begin(ReasoningStart, events)
            if isinstance(text := reasoning.get("text"), str) and text:
                events.append(ReasoningDelta(text))
            if isinstance(signature := reasoning.get("signature"), str) and signature:
                events.append(Payload("anthropic", signature))
            if isinstance(hidden := reasoning.get("redactedContent"), str) and hidden:
                events.append(Payload("bedrock", hidden))

    def _index_of(self, fields: _Json) -> int:
        index = fields.get("contentBlockIndex", self._index)
        if type(index) is not int or index < self._index:
            raise ProtocolViolation(f"The upstream {self._upstream} added to a block that was complete.")
        return index

    def _begin(self, start: type[TextStart] | type[ReasoningStart], events: list[Event]) -> None:
        if self._open is not start:
            self._close(events)
            self._open = start
            events.append(start())

    def _close(self, events: list[Event]) -> None:
        if self._open is not None:
            self._open = None
            events.append(PartStop())
