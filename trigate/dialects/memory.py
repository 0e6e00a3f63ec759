"""What the gateway remembers of the reasoning before a tool call, and where it puts it back.

A provider that reasons wants its reasoning back with the result of a tool: Anthropic with its signature, Gemini with
its ``thoughtSignature``, DeepSeek as text. A client's format may have no place for it, and many clients do not send it
back. So the gateway remembers it by the id of the tool call, which comes back in any case, and puts it into the
conversation where it is missing.

`AnswerMemory` collects it from an answer while that is encoded; `calls_without_reasoning` and `with_reasoning` deal
with a request. Who keeps it, for whom and for how long, is decided elsewhere (`trigate.exchange.reasoning_memory`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import attrs
import msgspec

from trigate.dialects.formats import ErrorEncoder, EventEncoder
from trigate.dialects.marks import PAYLOAD, Marker, Marks
from trigate.dialects.vocabulary import (
    Answer,
    AnswerPart,
    ArgumentsDelta,
    Event,
    Finish,
    Message,
    Part,
    PartStop,
    Payload,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Request,
    TextDelta,
    ToolCall,
    ToolCallStart,
)
from trigate.errors import GatewayError


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """What is remembered of a tool call.

    Attributes:
        reasoning: The reasoning of its answer, since the call before it.
        payloads: Its own (`ToolCall.payloads`).
        is_first: It is the first call of its answer.
    """

    reasoning: tuple[Reasoning, ...]
    payloads: dict[str, str] = {}
    is_first: bool = True

    def has(self, payload: str | None) -> bool:
        """Whether there is something for a provider that needs this payload; None = one that takes the text."""
        if payload is None:
            return any(part.text for part in self.reasoning)
        return payload in self.payloads or any(_is_for(payload, part.payloads) for part in self.reasoning)


Keep = Callable[[Mapping[str, Remembered]], None]
"""Keeps what is remembered, by the ids of tool calls."""


def _is_for(payload: str, payloads: Mapping[str, str]) -> bool:
    return payload in payloads or f"{payload}_redacted" in payloads


# -- a request --------------------------------------------------------------------------------------------------------


def calls_without_reasoning(request: Request, payload: str | None) -> tuple[str, ...]:
    """Returns the ids of the tool calls that have lost their reasoning, in the order of the conversation.

    An id that occurs twice stands for neither call, and is left out.

    Args:
        payload: The name of the payload that the upstream needs; None = it takes the text.
    """
    lost: list[str] = []
    ids: Counter[str] = Counter()
    for message in request.messages:
        if message.role == "assistant":
            calls = [part.id for part in message.parts if isinstance(part, ToolCall)]
            ids.update(calls)
            if calls and not _has_reasoning(message, payload):
                lost += calls
    return tuple([call for call in lost if ids[call] == 1])


def latest_calls(request: Request) -> frozenset[str]:
    """Returns the ids of the tool calls of the last message that has some."""
    for message in reversed(request.messages):
        if calls := [part.id for part in message.parts if isinstance(part, ToolCall)]:
            return frozenset(calls)
    return frozenset()


def with_reasoning(request: Request, found: Mapping[str, Remembered], payload: str | None) -> Request:
    """Returns the request with what was remembered.

    Args:
        found: By the ids of `calls_without_reasoning`.
        payload: As there.
    """
    useful = {call: remembered for call, remembered in found.items() if remembered.has(payload)}
    if not useful:
        return request
    messages = tuple([_restored(message, useful) for message in request.messages])
    return msgspec.structs.replace(request, messages=messages)


def _has_reasoning(message: Message, payload: str | None) -> bool:
    for part in message.parts:
        if isinstance(part, Reasoning) and (payload is None or _is_for(payload, part.payloads)):
            return True
        if payload is not None and isinstance(part, ToolCall) and payload in part.payloads:
            return True
    return False


def _restored(message: Message, useful: Mapping[str, Remembered]) -> Message:
    """Reasoning comes before everything else of its answer, or before a later call. What the client has kept of it is
    the same text without the payload, and is replaced."""
    if not any(isinstance(part, ToolCall) and part.id in useful for part in message.parts):
        return message
    parts: list[Part] = []
    for part in message.parts:
        if isinstance(part, Reasoning):
            continue
        remembered = useful.get(part.id) if isinstance(part, ToolCall) else None
        if remembered is None or not isinstance(part, ToolCall):
            parts.append(part)
            continue
        if remembered.is_first:
            # a message may hold several answers: this one begins behind the last call before it
            begins = max([at for at, each in enumerate(parts) if isinstance(each, ToolCall)], default=-1) + 1
            parts[begins:begins] = remembered.reasoning
        else:
            parts += remembered.reasoning
        parts.append(msgspec.structs.replace(part, payloads={**remembered.payloads, **part.payloads}))
    return Message("assistant", tuple(parts))


def with_marks_checked(request: Request, marks: Marks) -> tuple[Request, bool]:
    """Takes the marks off the reasoning of a request, and the reasoning away whose mark does not fit.

    Returns:
        The request, and whether something was taken away.
    """
    is_dropped = False
    messages: list[Message] = []
    for message in request.messages:
        if not any(isinstance(part, Reasoning) and PAYLOAD in part.payloads for part in message.parts):
            messages.append(message)
            continue
        parts: list[Part] = []
        for part in message.parts:
            if not isinstance(part, Reasoning) or (mark := part.payloads.get(PAYLOAD)) is None:
                parts.append(part)
            elif marks.fits(mark, part.text):
                rest = {name: value for name, value in part.payloads.items() if name != PAYLOAD}
                parts.append(Reasoning(part.text, rest))
            else:
                is_dropped = True
        if parts:
            messages.append(Message(message.role, tuple(parts)))
    if len(messages) == len(request.messages) and all(map(_is_same, messages, request.messages)):
        return request, False
    return msgspec.structs.replace(request, messages=tuple(messages)), is_dropped


def _is_same(one: Message, other: Message) -> bool:
    return one is other


# -- an answer --------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Collected:
    """The reasoning and the calls of an answer, as far as they are known."""

    max_bytes: int
    size_bytes: int = 0
    reasoning: list[Reasoning] = attrs.field(factory=list)
    calls: dict[str, Remembered] = attrs.field(factory=dict)

    def add_reasoning(self, part: Reasoning) -> None:
        self.reasoning.append(part)

    def add_call(self, call: str, payloads: dict[str, str]) -> None:
        self.calls[call] = Remembered(tuple(self.reasoning), payloads, not self.calls)
        self.reasoning.clear()

    def result(self) -> Mapping[str, Remembered]:
        """What is to be remembered; empty = nothing, since no call has any, or it is too large."""
        if self.size_bytes > self.max_bytes or not any(each.reasoning or each.payloads for each in self.calls.values()):
            return {}
        return self.calls


def memory_of(answer: Answer, *, max_bytes: int) -> Mapping[str, Remembered]:
    """Returns what is to be remembered of a whole answer."""
    collected = _Collected(max_bytes)
    for part in answer.parts:
        if isinstance(part, Reasoning):
            collected.size_bytes += len(part.text) + sum(map(len, part.payloads.values()))
            collected.add_reasoning(part)
        elif isinstance(part, ToolCall):
            collected.size_bytes += sum(map(len, part.payloads.values()))
            collected.add_call(part.id, part.payloads)
    return collected.result()


def marked(answer: Answer, marks: Marks) -> Answer:
    """Returns an answer whose reasoning has marks."""
    if not any(isinstance(part, Reasoning) for part in answer.parts):
        return answer
    parts: list[AnswerPart] = [
        Reasoning(part.text, {**part.payloads, PAYLOAD: marks.mark_of(part.text)})
        if isinstance(part, Reasoning)
        else part
        for part in answer.parts
    ]
    return msgspec.structs.replace(answer, parts=tuple(parts))


class AnswerMemory:
    """The encoder of a streamed answer, which also collects what is to be remembered, and marks the reasoning.

    Args:
        encoder: Encodes what the client gets.
        marks: None = the client's format has no place for a mark.
        keep: Takes what is to be remembered, before the last event is returned; None = nothing is.
        max_bytes: The most that is remembered of an answer.
    """

    __slots__ = ("_call", "_collected", "_encode", "_keep", "_marker", "_marks", "_payloads", "_pieces", "encoder")

    def __init__(self, encoder: EventEncoder, *, marks: Marks | None, keep: Keep | None, max_bytes: int) -> None:
        self.encoder = encoder
        self._encode = encoder.encode
        self._marks = marks
        self._keep = keep
        self._collected = _Collected(max_bytes)
        self._marker: Marker | None = None
        self._pieces: list[str] | None = None  # of the reasoning that is open
        self._call: str | None = None  # the call that is open
        self._payloads: dict[str, str] = {}

    def encode(self, event: Event) -> bytes:
        """As `EventEncoder.encode`."""
        kind = type(event)
        if kind is TextDelta or kind is ArgumentsDelta:  # nearly all events
            return self._encode(event)
        match event:
            case ReasoningDelta(text):
                self._add(text)
            case ReasoningStart():
                self._pieces, self._payloads = [], {}
                self._marker = self._marks.marker() if self._marks is not None else None
            case ToolCallStart(call):
                self._call, self._payloads = call, {}
            case Payload(form, value):
                self._collected.size_bytes += len(value)
                self._payloads[form] = value
            case PartStop():
                return self._stop_part(event)
            case Finish():
                if self._keep is not None and (found := self._collected.result()):
                    self._keep(found)
        return self._encode(event)

    def encode_error(self, error: GatewayError, request_id: str) -> bytes | None:
        """As `ErrorEncoder.encode_error`; reasoning that is open has the mark of what there is of it."""
        if not isinstance(self.encoder, ErrorEncoder):
            return None
        mark = self._encode(Payload(PAYLOAD, self._marker.mark())) if self._marker is not None else b""
        end = self.encoder.encode_error(error, request_id)
        return None if end is None else mark + end

    def _add(self, text: str) -> None:
        collected = self._collected
        collected.size_bytes += len(text)
        if self._marker is not None:
            self._marker.feed(text)
        if self._pieces is not None and collected.size_bytes <= collected.max_bytes:
            self._pieces.append(text)

    def _stop_part(self, event: PartStop) -> bytes:
        mark = b""
        if self._pieces is not None:
            self._collected.add_reasoning(Reasoning("".join(self._pieces), self._payloads))
            self._pieces = None
            if self._marker is not None:
                mark = self._encode(Payload(PAYLOAD, self._marker.mark()))
                self._marker = None
        elif self._call is not None:
            self._collected.add_call(self._call, self._payloads)
            self._call = None
        return mark + self._encode(event)
