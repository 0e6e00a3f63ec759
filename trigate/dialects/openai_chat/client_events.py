"""Encodes the events of an answer as chunks of a chat completion.

The first chunk has the role, the one before the last has the ``finish_reason``, and ``[DONE]`` is the end. A chunk with
the token counts comes between them only if the client asked for it; every other chunk then has ``"usage": null``.

Reasoning goes out as ``reasoning_content``, piece by piece. If its provider needs it again, one item of
``reasoning_details`` follows with the whole text and its signature: clients send such an item back as it came, and one
without its text would be refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.openai_chat.client_answer import (
    Estimate,
    completion_head,
    encode_usage,
    extra_content,
    finish_reason,
    reasoning_details,
)
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

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


class ChatEventEncoder:
    """Encodes one stream.

    Args:
        model: The public model id.
        created: When the call was made: Unix time, in seconds.
        includes_usage: The client asked for the token counts.
        is_legacy: Tool calls are a ``function_call``.
        estimate: Used if the answer has no token counts.
    """

    __slots__ = (
        "_calls",
        "_created",
        "_details",
        "_estimate",
        "_has_arguments",
        "_head",
        "_includes_usage",
        "_is_legacy",
        "_model",
        "_open",
        "_payloads",
        "_reasoning",
        "_role_is_due",
        "_size_bytes",
        "_start",
        "_tail",
    )

    def __init__(self, *, model: str, created: int, includes_usage: bool, is_legacy: bool, estimate: Estimate) -> None:
        self._model = model
        self._created = created
        self._includes_usage = includes_usage
        self._is_legacy = is_legacy
        self._estimate = estimate
        self._head = self._start = b""
        self._tail = b'},"logprobs":null,"finish_reason":null}]%b}\n\n' % self._no_usage
        self._role_is_due = True
        self._open: type[Event] | None = None
        self._calls = 0
        self._has_arguments = False
        self._reasoning: list[str] = []
        self._payloads: dict[str, str] = {}
        self._details = 0
        self._size_bytes = 0

    @property
    def _no_usage(self) -> bytes:
        return b',"usage":null' if self._includes_usage else b""

    def encode(self, event: Event) -> bytes:
        """Returns the chunks of the client for one event of the vocabulary; ``b""`` = none."""
        match event:
            case TextDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                return b'%b"content":%b%b' % (self._start, data, self._tail)
            case ArgumentsDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                self._has_arguments = True
                return self._arguments_chunk(data)
            case ReasoningDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                self._reasoning.append(text)
                return b'%b"reasoning_content":%b%b' % (self._start, data, self._tail)
            case TextStart():
                self._open = TextStart
                return self._role(b'""')
            case ReasoningStart():
                self._open = ReasoningStart
                self._reasoning.clear()
                self._payloads = {}
                return self._role(b"null")
            case ToolCallStart(call, name):
                return self._role(b"null") + self._start_call(call, name)
            case Payload(form, value):
                self._payloads[form] = value
                return b""
            case PartStop():
                return self._stop_part()
            case Start(answer):
                head = completion_head(answer, "chat.completion.chunk", model=self._model, created=self._created)
                self._head = b"data: " + _json(head)[:-1]
                self._start = self._head + b',"choices":[{"index":0,"delta":{'
                return b""
            case Finish():
                return self._finish(event)

    def _chunk(self, delta: dict[str, Any]) -> bytes:  # Any: JSON of any shape
        return self._start + _json(delta)[1:-1] + self._tail

    def _role(self, content: bytes) -> bytes:
        """The first chunk. Its content is null if the answer does not begin with a text, as OpenAI has it."""
        if not self._role_is_due:
            return b""
        self._role_is_due = False
        return b'%b"role":"assistant","content":%b%b' % (self._start, content, self._tail)

    # -- tool calls ---------------------------------------------------------------------------------------------------

    def _start_call(self, call: str, name: str) -> bytes:
        self._open = ToolCallStart
        self._calls += 1
        self._has_arguments = False
        self._payloads = {}
        function = {"name": name, "arguments": ""}
        if self._is_legacy:  # there can be one
            return self._chunk({"function_call": function}) if self._calls == 1 else b""
        index = self._calls - 1
        return self._chunk({"tool_calls": [{"index": index, "id": call, "type": "function", "function": function}]})

    def _arguments_chunk(self, data: bytes) -> bytes:
        if self._is_legacy:
            return (
                b'%b"function_call":{"arguments":%b}%b' % (self._start, data, self._tail) if self._calls == 1 else b""
            )
        return b'%b"tool_calls":[{"index":%d,"function":{"arguments":%b}}]%b' % (
            self._start,
            self._calls - 1,
            data,
            self._tail,
        )

    def _stop_part(self) -> bytes:
        out = b""
        if self._open is ToolCallStart:
            if not self._has_arguments:
                out = self._arguments_chunk(b'"{}"')
            if (extra := extra_content(self._payloads)) and not self._is_legacy:
                piece = {"index": self._calls - 1, "function": {"arguments": ""}, **extra}  # clients read a function
                out += self._chunk({"tool_calls": [piece]})
        elif self._open is ReasoningStart:
            details = reasoning_details([("".join(self._reasoning), self._payloads)], self._details)
            self._details += len(details)
            if details:
                out = self._chunk({"reasoning_details": details})
        self._open = None
        return out

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, finish: Finish) -> bytes:
        reason = finish_reason(finish.reason, is_legacy=self._is_legacy)
        end = b'%b},"logprobs":null,"finish_reason":%b}]%b}\n\n' % (self._start, _json(reason), self._no_usage)
        out = self._role(b'""') + end
        if self._includes_usage:
            usage = finish.usage if finish.usage is not None else self._estimate(self._size_bytes)
            out += b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _json(encode_usage(usage)))
        return out + _DONE
