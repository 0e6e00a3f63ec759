"""Encodes answers in Ollama's format: whole ones, and the lines of a stream (newline-delimited JSON).

A line has a piece of the answer, and ``done: false``; the last one has ``done: true``, the reason and the counts. The
arguments of a tool call are an object, so a call waits for its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from trigate.dialects.formats import Asked
from trigate.dialects.ollama.lines import in_one_line
from trigate.dialects.ollama.values import asked_model
from trigate.dialects.vocabulary import (
    Answer,
    ArgumentsDelta,
    Event,
    Finish,
    FinishReason,
    PartStop,
    Reasoning,
    ReasoningDelta,
    Text,
    TextDelta,
    TokenCounts,
    ToolCall,
    ToolCallStart,
)
from trigate.openai.raw_json import decode_any

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

DONE_REASONS: Mapping[FinishReason, str] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "stop",
    "refusal": "content_filter",
    "context_length": "length",
}

Kind = Literal["chat", "generate"]
"""Of an answer: with a ``message``, or with a ``response``."""


@functools.lru_cache(maxsize=2)
def _second(epoch_s: int) -> str:
    """Returns a second as RFC 3339 has it, without its end. The years begin in March, so that a leap day ends one."""
    days, rest = divmod(epoch_s, 86400)
    days += 719468  # from 1 March of the year 0 to the epoch
    era, day = divmod(days, 146097)  # 400 years
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    month = month + 3 if month < 10 else month - 9
    year += 400 * era + (month <= 2)
    return f"{year}-{month:02d}-{day + 1:02d}T{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def timestamp(epoch_ns: int) -> str:
    """Returns a time as RFC 3339 has it.

    >>> timestamp(1_700_000_000_123_456_789)
    '2023-11-14T22:13:20.123456789Z'
    """
    seconds, ns = divmod(epoch_ns, 10**9)
    return f"{_second(seconds)}.{ns:09d}Z"


def encode_answer(answer: Answer, asked: Asked, kind: Kind) -> bytes:
    """Encodes a whole answer."""
    text = "".join([part.text for part in answer.parts if isinstance(part, Text)])
    thinking = "".join([part.text for part in answer.parts if isinstance(part, Reasoning)])
    calls = [part for part in answer.parts if isinstance(part, ToolCall)]
    fields = _content(
        kind,
        text,
        thinking if asked.request.wants_reasoning else "",
        [_call(call, index) for index, call in enumerate(calls)],
    )
    usage = answer.finish.usage
    if usage is None:
        sizes = [len(part.arguments if isinstance(part, ToolCall) else part.text) for part in answer.parts]
        usage = asked.estimate(sum(sizes))
    now = asked.clock()
    counts = _counts(usage, total_ns=now - round(asked.at * 10**9), prompt_ns=None)
    head = {"model": asked_model(asked.call), "created_at": timestamp(now)}
    return in_one_line({**head, **fields, **_end(answer.finish), **counts})


def _content(kind: Kind, text: str, thinking: str = "", calls: Iterable[_Json] = ()) -> _Json:
    fields: _Json = {"content" if kind == "chat" else "response": text}
    if thinking:
        fields["thinking"] = thinking
    if calls := list(calls):
        fields["tool_calls"] = calls
    return {"message": {"role": "assistant", **fields}} if kind == "chat" else fields


def _call(call: ToolCall, index: int) -> _Json:
    arguments = msgspec.Raw(msgspec.json.format(call.arguments.encode(), indent=-1))  # without line ends
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}


def _end(finish: Finish) -> _Json:
    return {"done": True, "done_reason": DONE_REASONS[finish.reason]}


def _counts(usage: TokenCounts, *, total_ns: int, prompt_ns: int | None) -> _Json:
    """Returns the counts, and the durations as the gateway sees them.

    Args:
        prompt_ns: The time until the first content; None = unknown.
    """
    total_ns = max(total_ns, 1)  # clients divide by it
    counts = {
        "total_duration": total_ns,
        "load_duration": 0,
        "prompt_eval_count": usage.input + usage.cache_read + usage.cache_write,
        "eval_count": usage.output,
    }
    if prompt_ns is None:
        return {**counts, "eval_duration": total_ns}
    return {**counts, "prompt_eval_duration": max(prompt_ns, 1), "eval_duration": max(total_ns - prompt_ns, 1)}


class LineEncoder:
    """Encodes one stream. A `formats.EventEncoder`.

    Args:
        asked: The call.
        kind: Which path was asked.
    """

    __slots__ = (
        "_asked",
        "_call",
        "_calls",
        "_clock",
        "_end",
        "_first_ns",
        "_head",
        "_kind",
        "_pieces",
        "_size_bytes",
        "_start",
        "_think",
    )

    def __init__(self, asked: Asked, kind: Kind) -> None:
        self._asked = asked
        self._kind = kind
        self._clock: Callable[[], int] = asked.clock
        self._head = b'{"model":%b,"created_at":"' % in_one_line(asked_model(asked.call))
        if kind == "chat":
            self._start = b'","message":{"role":"assistant","content":'
            self._think = b'","message":{"role":"assistant","content":"","thinking":'
            self._end = b'},"done":false}\n'
        else:
            self._start, self._think, self._end = b'","response":', b'","response":"","thinking":', b',"done":false}\n'
        self._call: ToolCallStart | None = None
        self._pieces: list[str] = []
        self._calls = 0
        self._size_bytes = 0
        self._first_ns: int | None = None

    def encode(self, event: Event) -> bytes:
        """Returns the line for an event; ``b""`` = none."""
        match event:
            case TextDelta(text):
                return self._line(self._start, text)
            case ReasoningDelta(text):
                if self._asked.request.wants_reasoning:
                    return self._line(self._think, text)
                self._size_bytes += len(text)
            case ToolCallStart():
                self._call, self._pieces = event, []
            case ArgumentsDelta(text):
                self._pieces.append(text)
            case PartStop() if self._call is not None:
                return self._tool_call()
            case Finish():
                return self._finish(event)
        return b""

    def _line(self, start: bytes, text: str) -> bytes:
        data = in_one_line(text)
        self._size_bytes += len(data)
        return b"%b%b%b%b%b" % (self._head, self._now(), start, data, self._end)

    def _now(self) -> bytes:
        now = self._clock()
        if self._first_ns is None:
            self._first_ns = now
        return timestamp(now).encode()

    def _tool_call(self) -> bytes:
        assert self._call is not None
        call = ToolCall(self._call.id, self._call.name, "".join(self._pieces) or "{}")
        self._call, self._pieces = None, []
        self._size_bytes += len(call.name) + len(call.arguments)
        if not isinstance(decode_any(call.arguments.encode()), dict):
            return b""  # cut off, as the answer is as long as allowed; nothing can be done with it
        calls = in_one_line([_call(call, self._calls)])
        self._calls += 1
        return b'%b%b%b"","tool_calls":%b%b' % (self._head, self._now(), self._start, calls, self._end)

    def _finish(self, finish: Finish) -> bytes:
        usage = finish.usage if finish.usage is not None else self._asked.estimate(self._size_bytes)
        now, began = self._clock(), round(self._asked.at * 10**9)
        first = now if self._first_ns is None else self._first_ns
        counts = _counts(usage, total_ns=now - began, prompt_ns=first - began)
        head = {"model": asked_model(self._asked.call), "created_at": timestamp(now)}
        return in_one_line({**head, **_content(self._kind, ""), **_end(finish), **counts}) + b"\n"


def encode_loaded(model: str, now_ns: int, kind: Kind, reason: Literal["load", "unload"]) -> bytes:
    """Encodes the answer to a request without a prompt, which asks Ollama to load a model, or to unload it."""
    head = {"model": model, "created_at": timestamp(now_ns)}
    return in_one_line({**head, **_content(kind, ""), "done": True, "done_reason": reason}) + b"\n"
