"""Decodes answers of Gemini's: whole ones, and the events of a stream.

A call of a function comes whole, within one event. Its ``thoughtSignature`` is an opaque payload: without it, Google
refuses the conversation that has the call.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from trigate.dialects.gemini.content import FORMAT
from trigate.dialects.gemini.finish import failure, finish_of, is_failure
from trigate.dialects.gemini.tracker import is_blocked
from trigate.dialects.gemini.usage import reported_usage
from trigate.dialects.vocabulary import (
    Answer,
    AnswerPart,
    ArgumentsDelta,
    Event,
    PartStop,
    Payload,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Start,
    Text,
    TextDelta,
    TextStart,
    ToolCall,
    ToolCallStart,
)
from trigate.errors import ProtocolViolation, Truncated
from trigate.openai.accumulator import joined_surrogates
from trigate.openai.answer import Usage
from trigate.openai.provider_error import reported
from trigate.openai.raw_json import decode_any

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

_BESIDE = frozenset(("thought", "thoughtSignature", "partMetadata", "videoMetadata", "mediaResolution"))
"""What a part may have besides its content."""


def answer_object(body: bytes, *, upstream: str) -> _Json:
    """Returns a whole ``GenerateContentResponse``.

    Raises:
        Reported: It is an error.
        ProtocolViolation: It is neither.
    """
    value = decode_any(body)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise ProtocolViolation(f"The upstream {upstream} answered with something that is not a JSON object.")
    if value.get("error"):
        raise reported(upstream, value)
    candidates = value.get("candidates")
    if not is_blocked(value) and not (isinstance(candidates, list) and candidates and isinstance(candidates[0], dict)):
        raise ProtocolViolation(f"The upstream {upstream} answered 200 without candidates.")
    return value


def decode_answer(body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
    """Decodes an answer; returns it with the counts for the ledger.

    Raises:
        Reported: It is an error.
        ProtocolViolation: It is no answer, or by its own words not complete.
    """
    value = answer_object(body, upstream=upstream)
    decoder = GeminiEventDecoder(upstream=upstream)
    parts: list[AnswerPart] = []
    for event in (*decoder.take(value, body), *decoder.feed_end()):
        match event:
            case Start(answer_id):
                made = answer_id
            case TextStart():
                parts.append(Text(""))
            case ReasoningStart():
                parts.append(Reasoning(""))
            case ToolCallStart(call, name):
                parts.append(ToolCall(call, name, "{}"))
            case PartStop():
                pass
            case TextDelta(text) | ReasoningDelta(text) | ArgumentsDelta(text) | Payload(_, text):
                parts[-1] = _added(parts[-1], event, text)
            case finish:
                answer = Answer(made, tuple(parts), finish)
    return answer, reported_usage(value.get("usageMetadata"))


def _added(part: AnswerPart, event: Event, text: str) -> AnswerPart:
    if isinstance(event, Payload) and isinstance(part, Reasoning | ToolCall):
        return msgspec.structs.replace(part, payloads={**part.payloads, event.format: text})
    if isinstance(part, ToolCall):
        return msgspec.structs.replace(part, arguments=text)  # they come whole
    return msgspec.structs.replace(part, text=part.text + text)


class GeminiEventDecoder:
    """Decodes the first candidate of one stream.

    Args:
        upstream: The upstream's name, for messages.
    """

    __slots__ = ("_calls", "_id", "_open", "_reason", "_upstream", "_usage")

    def __init__(self, *, upstream: str) -> None:
        self._upstream = upstream
        self._id: str | None = None
        self._open: type[TextStart] | type[ReasoningStart] | None = None
        self._calls = 0
        self._reason = ""
        self._usage: object = None

    def feed(self, data: bytes) -> list[Event]:
        """Takes the data of one event, and returns what is known now.

        Raises:
            ProtocolViolation: It is no chunk, or has something that no client's format can express.
        """
        value = decode_any(data)
        if not isinstance(value, dict):
            raise ProtocolViolation(f"The upstream {self._upstream} sent an event that is not a JSON object.")
        return self.take(value, data)

    def take(self, value: _Json, data: bytes) -> list[Event]:
        """As `feed`, with the decoded data as well."""
        if value.get("usageMetadata") is not None:
            self._usage = value["usageMetadata"]
        events: list[Event] = []
        if self._id is None:
            given = value.get("responseId")
            is_given = isinstance(given, str) and given != ""
            self._id = str(given)[:200] if is_given else hashlib.blake2b(data, digest_size=12).hexdigest()
            events.append(Start(self._id))
        if is_blocked(value):
            self._reason = "PROHIBITED_CONTENT"
        candidates = value.get("candidates")
        for candidate in candidates if isinstance(candidates, list) else ():
            if not isinstance(candidate, dict) or candidate.get("index") not in (0, None):
                continue
            content = candidate.get("content")
            parts = content.get("parts") if isinstance(content, dict) else None
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    self._take_part(part, events)
            reason = candidate.get("finishReason")
            if isinstance(reason, str) and reason and reason != "FINISH_REASON_UNSPECIFIED":
                if is_failure(reason):
                    raise failure(reason, candidate.get("finishMessage"), upstream=self._upstream)
                self._reason = reason
        return events

    def feed_end(self) -> list[Event]:
        """Takes the end of the stream, and returns the rest.

        Raises:
            Truncated: The answer does not say how it ended.
        """
        if not self._reason:
            raise Truncated(f"The upstream {self._upstream} did not say how its answer ended (finishReason).")
        events: list[Event] = []
        self._close(events)
        events.append(finish_of(self._reason, self._usage, has_calls=self._calls > 0))
        return events

    def _take_part(self, part: _Json, events: list[Event]) -> None:
        if "functionCall" in part:
            self._take_call(part, events)
        elif isinstance(part.get("text"), str):
            self._take_text(part, events)
        elif part.keys() - _BESIDE:
            kind = str(min(part.keys() - _BESIDE))
            raise ProtocolViolation(
                f"The upstream {self._upstream} answered with a part of the kind {kind[:50]!r}, which cannot be "
                "translated to the client's format."
            )

    def _take_text(self, part: _Json, events: list[Event]) -> None:
        text, signature = part["text"], part.get("thoughtSignature")
        is_thought = part.get("thought") is True
        if text:
            kind = ReasoningStart if is_thought else TextStart
            if self._open is not kind:
                self._close(events)
                self._open = kind
                events.append(kind())
            text = joined_surrogates(text)
            events.append(ReasoningDelta(text) if is_thought else TextDelta(text))
        if is_thought and self._open is ReasoningStart and isinstance(signature, str) and signature:
            events.append(Payload(FORMAT, signature))

    def _take_call(self, part: _Json, events: list[Event]) -> None:
        call = part["functionCall"]
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name:
            raise ProtocolViolation(f"The upstream {self._upstream} called a tool without a name.")
        arguments = call.get("args") or {}
        if not isinstance(arguments, dict):
            raise ProtocolViolation(
                f"The upstream {self._upstream} called the tool {name[:100]!r} with arguments that are no JSON object."
            )
        self._close(events)
        given, signature = call.get("id"), part.get("thoughtSignature")
        events.append(
            ToolCallStart(given if isinstance(given, str) and given else f"call_{self._id}_{self._calls}", name)
        )
        self._calls += 1
        if arguments:
            events.append(ArgumentsDelta(_encoded(arguments)))
        if isinstance(signature, str) and signature:
            events.append(Payload(FORMAT, signature))
        events.append(PartStop())

    def _close(self, events: list[Event]) -> None:
        if self._open is not None:
            self._open = None
            events.append(PartStop())


def _encoded(arguments: _Json) -> str:
    try:
        return msgspec.json.encode(arguments).decode()
    except (TypeError, ValueError):  # half of a character, which JSON can express and UTF-8 cannot
        return msgspec.json.encode(_whole(arguments)).decode()


def _whole(value: Any) -> Any:  # Any: JSON of any shape
    if isinstance(value, str):
        return joined_surrogates(value)
    if isinstance(value, dict):
        return {_whole(name): _whole(inner) for name, inner in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value
