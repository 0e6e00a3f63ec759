"""Decodes answers of Ollama's ``/api/chat``: the lines of a stream, and whole ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from trigate.dialects.ollama.values import Json
from trigate.dialects.vocabulary import (
    Answer,
    AnswerPart,
    ArgumentsDelta,
    Event,
    Finish,
    PartStop,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Start,
    Text,
    TextDelta,
    TextStart,
    TokenCounts,
    ToolCall,
    ToolCallStart,
)
from trigate.errors import GatewayError, ProtocolViolation
from trigate.openai import sse
from trigate.openai.answer import MAX_TOKENS, Usage
from trigate.openai.provider_error import reported
from trigate.openai.raw_json import decode_any


class LineSplitter:
    r"""Splits newline-delimited JSON into events. A `formats.Splitter`.

    >>> splitter = LineSplitter(max_event_bytes=100)
    >>> splitter.feed(b'{"a":1}\r\n\n{"b"'), splitter.pending
    ([b'data: {"a":1}\n\n'], b'data: {"b"')

    Args:
        max_event_bytes: A longer line raises `EventTooLarge`.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._pieces: list[bytes] = []  # of the last line; none of them has an end
        self._size_bytes = 0

    @property
    def pending(self) -> bytes:
        """The beginning of a line whose end has not come, as an event."""
        rest = b"".join(self._pieces)
        return b"data: " + rest if rest.strip() else b""

    def feed(self, piece: bytes) -> list[bytes]:
        """As `Splitter.feed`."""
        return [b"data: %b\n\n" % line for line in self.lines(piece)]

    def lines(self, piece: bytes) -> list[bytes]:
        """Takes the next piece, and returns the lines that are whole now, without their ends; no blank ones.

        Raises:
            EventTooLarge: A line is larger than allowed.
        """
        first, *more = piece.split(b"\n")
        self._pieces.append(first)
        self._size_bytes += len(first)
        found: list[bytes] = []
        for part in more:
            self._check(found)
            if line := b"".join(self._pieces).strip():
                found.append(line)
            self._pieces, self._size_bytes = [part], len(part)
        self._check(found)
        return found

    def _check(self, before: list[bytes]) -> None:
        if self._size_bytes > self._max:
            events = [b"data: %b\n\n" % line for line in before]
            raise sse.EventTooLarge(f"a line is larger than {self._max} bytes", events)


class OllamaDecoder:
    """Decodes one stream. A `formats.Tracker` and a `formats.EventDecoder`: each line is parsed once.

    Args:
        upstream: The upstream's name, for messages.

    Attributes:
        has_content, complete, error, usage: As those of `formats.Tracker`.
    """

    __slots__ = (
        "_calls",
        "_id",
        "_is_started",
        "_open",
        "_upstream",
        "_value",
        "complete",
        "error",
        "has_content",
        "usage",
    )

    def __init__(self, *, upstream: str) -> None:
        self._upstream = upstream
        self._value: Json = {}
        self._id = ""
        self._open = ""  # the field whose text is open
        self._calls = 0
        self._is_started = False
        self.has_content = False
        self.complete = False
        self.error: GatewayError | None = None
        self.usage: Usage | None = None

    @property
    def all_finished(self) -> bool:
        """The last line has come."""
        return self.complete

    def observe(self, event: bytes, data: bytes) -> bool:
        """As `Tracker.observe`."""
        value = decode_any(data)
        if not isinstance(value, dict):
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent a line that is not a JSON object.")
            return False
        if value.get("error"):
            self.error = reported(self._upstream, value)
            return False
        self._value = value
        if not self._id:
            self._id = _id_of(data)
        message = value.get("message")
        if value.get("done") is True:
            self.complete = self.has_content = True
            self.usage = usage_of(value)
        elif isinstance(message, dict) and any(message.get(name) for name in ("content", "thinking", "tool_calls")):
            self.has_content = True
        return True

    def feed(self, data: bytes) -> list[Event]:
        """Takes the line that was observed last. As `EventDecoder.feed`."""
        events: list[Event] = []
        self._take(events)
        return events

    def feed_end(self) -> list[Event]:
        """As `EventDecoder.feed_end`."""
        events: list[Event] = []
        self._take(events)
        self._start(events)
        self._close(events)
        events.append(_finish(self._value, has_calls=self._calls > 0))
        return events

    def _take(self, events: list[Event]) -> None:
        message = self._value.get("message")
        message = message if isinstance(message, dict) else {}
        for name in ("thinking", "content"):
            text = message.get(name)
            if text and isinstance(text, str):
                self._take_text(name, text, events)
        for call in _calls_of(message):
            self._start(events)
            self._close(events)
            made = _tool_call(call, f"call_{self._id}_{self._calls}", self._upstream)
            self._calls += 1
            events += (ToolCallStart(made.id, made.name), ArgumentsDelta(made.arguments), PartStop())

    def _start(self, events: list[Event]) -> None:
        if not self._is_started:
            self._is_started = True
            events.append(Start(self._id))

    def _take_text(self, name: str, text: str, events: list[Event]) -> None:
        self._start(events)
        is_thinking = name == "thinking"
        if self._open != name:
            self._close(events)
            self._open = name
            events.append(ReasoningStart() if is_thinking else TextStart())
        events.append(ReasoningDelta(text) if is_thinking else TextDelta(text))

    def _close(self, events: list[Event]) -> None:
        if self._open:
            self._open = ""
            events.append(PartStop())


def decode_answer(body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
    """Decodes an answer that is not streamed; one that is streamed all the same is put together.

    Raises:
        ProtocolViolation: It is no answer, or not complete.
        Reported: It is an error.
    """
    texts: dict[str, list[str]] = {"thinking": [], "content": []}
    calls: list[ToolCall] = []
    answer_id, value = _id_of(body), {}
    for value in values_of(body, upstream):
        message = value.get("message")
        message = message if isinstance(message, dict) else {}
        for name, pieces in texts.items():
            if isinstance(text := message.get(name), str):
                pieces.append(text)
        for call in _calls_of(message):
            calls.append(_tool_call(call, f"call_{answer_id}_{len(calls)}", upstream))
    if value.get("done") is not True:
        raise ProtocolViolation(f"The upstream {upstream} answered with something that is no complete answer (done).")
    thinking, content = map("".join, texts.values())
    parts: list[AnswerPart] = [Reasoning(thinking)] if thinking else []
    parts += [Text(content)] if content else []
    return Answer(answer_id, (*parts, *calls), _finish(value, has_calls=bool(calls))), usage_of(value)


def values_of(body: bytes, upstream: str) -> list[Json]:
    """Decodes the lines of a body. Raises as `decode_answer`."""
    whole = decode_any(body)
    values = [whole] if isinstance(whole, dict) else [decode_any(line) for line in body.split(b"\n") if line.strip()]
    for value in values:
        if not isinstance(value, dict):
            raise ProtocolViolation(f"The upstream {upstream} answered with something that is not a JSON object.")
        if value.get("error"):
            raise reported(upstream, value)
    return values


def usage_of(value: Json) -> Usage | None:
    """Returns the token counts of the last line; None = it has none."""
    counts = [value.get("prompt_eval_count", 0), value.get("eval_count", 0)]
    if "eval_count" not in value and "prompt_eval_count" not in value:
        return None
    if not all(type(count) is int and 0 <= count <= MAX_TOKENS for count in counts):
        return None
    return Usage(*counts)


def _finish(value: Json, *, has_calls: bool) -> Finish:
    usage = usage_of(value)
    counts = TokenCounts(input=usage.prompt_tokens, output=usage.completion_tokens) if usage is not None else None
    reason = value.get("done_reason")
    if reason == "length":
        return Finish("length", None, counts)
    return Finish("tool_calls" if has_calls else "refusal" if reason == "content_filter" else "stop", None, counts)


def _id_of(data: bytes) -> str:
    """Makes an id, since Ollama has none."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _calls_of(message: Json) -> list[Any]:  # Any: JSON of any shape
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _tool_call(call: Any, default_id: str, upstream: str) -> ToolCall:  # Any: JSON of any shape
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ProtocolViolation(f"The upstream {upstream} called a tool without a name.")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = decode_any(arguments.encode())
    if not isinstance(arguments, dict):
        raise ProtocolViolation(
            f"The upstream {upstream} called the tool {name[:100]!r} with arguments that are no JSON object."
        )
    given = call.get("id")
    try:
        text = msgspec.json.encode(arguments).decode()
    except UnicodeEncodeError:  # half of a character
        text = json.dumps(arguments)
    return ToolCall(given if isinstance(given, str) and given else default_id, name, text)
