"""Encodes the events of an answer as the chunks of Gemini's streams.

A chunk has a piece of text or of a thought, or one whole call of a function; the last one has the ``finishReason`` and
the token counts. There is no last event of its own, such as ``[DONE]``: a stream ends where its body ends. The chunks
are server-sent events (``?alt=sse``) or the elements of one JSON array.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.gemini.answer import Estimate, call_part, last_chunk, tail
from trigate.dialects.gemini.content import FORMAT
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Event,
    Finish,
    PartStop,
    Payload,
    ReasoningDelta,
    ReasoningStart,
    Start,
    TextDelta,
    TextStart,
    ToolCallStart,
)
from trigate.openai.raw_json import decode_any

_json = msgspec.json.Encoder().encode
_HEAD = b'{"candidates":[{"content":{"parts":[{"text":'
_THOUGHT = b',"thought":true'
_REST = b'}],"role":"model"},"index":0}],'
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
"""Google's JavaScript SDK takes these characters for the end of a line, and then reads no chunk any more."""


class Framing:
    """Puts the chunks of one stream into the body of the response.

    Args:
        is_array: They are the elements of an array, not events.

    >>> framing = Framing(is_array=True)
    >>> framing.chunk(b"{}"), framing.chunk(b"{}"), framing.end()
    (b'[{}', b',\\r\\n{}', b']')
    """

    __slots__ = ("_before", "_is_array")

    def __init__(self, *, is_array: bool) -> None:
        self._is_array = is_array
        self._before = b"["

    def chunk(self, data: bytes) -> bytes:
        """Frames the next chunk: JSON without a line end."""
        if not self._is_array:
            return b"data: %b\n\n" % data
        before, self._before = self._before, b",\r\n"
        return before + data

    def end(self) -> bytes:
        """Ends the body."""
        return b"]" if self._is_array else b""


class GeminiEventEncoder:
    """Encodes one stream.

    Args:
        model: The public model id.
        wants_reasoning: Whether the client asked for thoughts; if not, it gets none.
        is_array: As in `Framing`.
        estimate: Used if the answer has no token counts.
    """

    __slots__ = ("_arguments", "_call", "_estimate", "_frame", "_model", "_rest", "_signature", "_size", "_wants")

    def __init__(self, *, model: str, wants_reasoning: bool, is_array: bool, estimate: Estimate) -> None:
        self._model = model
        self._wants = wants_reasoning
        self._frame = Framing(is_array=is_array)
        self._estimate = estimate
        self._size = 0
        self._rest = b""
        self._call: ToolCallStart | None = None
        self._arguments: list[str] = []
        self._signature: str | None = None

    def encode(self, event: Event) -> bytes:
        """Returns the chunks of the client for one event of the vocabulary; ``b""`` = none."""
        match event:
            case TextDelta(text):
                return self._text(text, b"")
            case ReasoningDelta(text):
                if self._wants:
                    return self._text(text, _THOUGHT)
                self._size += len(text.encode())
                return b""
            case ArgumentsDelta(text):
                self._arguments.append(text)
                return b""
            case ToolCallStart():
                self._call, self._arguments, self._signature = event, [], None
                return b""
            case Payload(form, value):
                if form == FORMAT:
                    self._signature = value
                return b""
            case PartStop():
                return self._stop()
            case TextStart() | ReasoningStart():
                self._signature = None
                return b""
            case Start(answer):
                self._rest = _json(tail(answer, self._model))[1:]
                return b""
            case Finish():
                return self._encoded(last_chunk(event, self._estimate, self._size)) + self._frame.end()

    def _text(self, text: str, thought: bytes) -> bytes:
        data = _json(text)
        self._size += len(data)
        return self._frame.chunk(_plain(b"".join((_HEAD, data, thought, _REST, self._rest))))

    def _stop(self) -> bytes:
        """Returns the call that is complete now. One whose arguments were cut off is left out: nothing can be done with
        it, and the end says that something is missing."""
        call, self._call = self._call, None
        if call is None:
            return b""
        arguments = "".join(self._arguments) or "{}"
        if not isinstance(decode_any(arguments.encode()), dict):
            return b""
        if "\n" in arguments or "\r" in arguments:  # an event is one line
            arguments = msgspec.json.format(arguments, indent=-1)
        self._size += len(call.name) + len(arguments)
        part = call_part(call.id, call.name, arguments, self._signature)
        return self._encoded({"candidates": [{"content": {"parts": [part], "role": "model"}, "index": 0}]})

    def _encoded(self, fields: dict[str, Any]) -> bytes:  # Any: JSON of any shape
        return self._frame.chunk(_plain(_json(fields)[:-1] + b"," + self._rest))


def _plain(data: bytes) -> bytes:
    """Returns JSON with the line ends of JavaScript escaped."""
    if b"\xe2\x80" in data:
        for raw, escape in _LINE_ENDS:
            data = data.replace(raw, escape)
    return data
