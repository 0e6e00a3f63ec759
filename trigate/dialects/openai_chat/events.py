"""Decodes the events of a streamed chat completion.

A chunk may have a piece of the text, of the reasoning and of several tool calls at once, and the pieces of several
calls may be interleaved. The events of the vocabulary never overlap, so one part is open at a time, and pieces of other
parts wait:

* A text or reasoning is open until anything else comes.
* A tool call is open until something else comes *and* its arguments are a whole JSON object. Until then, everything
  else waits, in the order in which it came. So an ordinary stream is not delayed, and an interleaved one is put in
  order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from trigate.dialects.openai_chat.fields import (
    answer_id,
    call_id,
    checked_arguments,
    is_object,
    reasoning_of,
    text_of,
)
from trigate.dialects.openai_chat.finish import finish_of
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Event,
    PartStop,
    ReasoningDelta,
    ReasoningStart,
    Start,
    TextDelta,
    TextStart,
    ToolCallStart,
)
from trigate.errors import ProtocolViolation
from trigate.openai.accumulator import joined_surrogates
from trigate.openai.raw_json import decode_any

_TEXT = "text"
_REASONING = "reasoning"
_FUNCTION_CALL = -1
"""Stands for the index of a ``function_call``, which has none."""


@attrs.define(eq=False)
class _ToolCall:
    """A tool call while it arrives.

    Attributes:
        pieces: Its arguments so far.
        is_started: Its beginning has been returned.
    """

    index: int
    id: str = ""
    name: str = ""
    pieces: list[str] = attrs.field(factory=list)
    is_started: bool = False

    @property
    def arguments(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


@attrs.define(eq=False)
class _Waiting:
    """A text or reasoning that waits for the end of a tool call."""

    kind: str
    pieces: list[str]


class ChatEventDecoder:
    """Decodes the first choice of one stream.

    Args:
        upstream: The upstream's name, for messages.
    """

    __slots__ = (
        "_calls",
        "_finish_reason",
        "_has_refusal",
        "_has_surrogates",
        "_high",
        "_id",
        "_open",
        "_stop_reason",
        "_upstream",
        "_usage",
        "_waiting",
    )

    def __init__(self, *, upstream: str) -> None:
        self._upstream = upstream
        self._id: str | None = None
        self._open: str | _ToolCall | None = None
        self._calls: dict[int, _ToolCall] = {}
        self._waiting: list[_Waiting | _ToolCall] = []
        self._high = ""  # the first half of a surrogate pair whose second half is in the next piece
        self._has_surrogates = False
        self._has_refusal = False
        self._finish_reason = ""
        self._stop_reason: object = None
        self._usage: object = None

    def feed(self, data: bytes) -> list[Event]:
        """Takes the data of one event, and returns what is known now.

        Raises:
            ProtocolViolation: It is no chunk, or adds to a tool call that was complete.
        """
        chunk = decode_any(data)
        if not isinstance(chunk, dict):
            raise ProtocolViolation(f"The upstream {self._upstream} sent an event that is not a JSON object.")
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return []
        events: list[Event] = []
        if self._id is None:
            self._id = answer_id(chunk.get("id"), data)
            events.append(Start(self._id))
        self._has_surrogates = bool(data.count(b"\\ud") or data.count(b"\\uD"))
        for choice in choices:
            if not isinstance(choice, dict) or choice.get("index") not in (0, None):
                continue
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._take_delta(delta, events)
            reason = choice.get("finish_reason")
            if isinstance(reason, str) and reason:
                self._finish_reason, self._stop_reason = reason, choice.get("stop_reason")
        return events

    def feed_end(self) -> list[Event]:
        """Takes the end of the stream, and returns the rest.

        Raises:
            ProtocolViolation: A tool call has no name or no valid arguments; or the answer does not say how it ended,
                or by its own words is not complete.
        """
        if not self._finish_reason:
            raise ProtocolViolation(f"The upstream {self._upstream} did not say how its answer ended (finish_reason).")
        assert self._id is not None, "a finish_reason comes with an id"
        events: list[Event] = []
        finish = finish_of(
            self._finish_reason,
            self._stop_reason,
            self._usage,
            has_calls=bool(self._calls),
            has_refusal=self._has_refusal,
            upstream=self._upstream,
        )
        may_be_cut = finish.reason in ("length", "context_length")
        self._close(events, may_be_cut=may_be_cut)
        while self._waiting:
            if may_be_cut and isinstance(part := self._waiting[0], _ToolCall) and not part.name:
                self._waiting.pop(0)  # cut off before its name came
                continue
            self._open_next(events)
            self._close(events, may_be_cut=may_be_cut)
        events.append(finish)
        return events

    def _take_delta(self, delta: Mapping[str, Any], events: list[Event]) -> None:
        if reasoning := reasoning_of(delta):
            self._take_text(_REASONING, reasoning, events)
        content = delta.get("content")
        if content and (text := text_of(content)):
            self._take_text(_TEXT, text, events)
        refusal = delta.get("refusal")
        if refusal and isinstance(refusal, str):
            self._has_refusal = True
            self._take_text(_TEXT, refusal, events)
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            for call in calls:
                if isinstance(call, dict):
                    self._take_call(call, self._index_of(call), events)
        function = delta.get("function_call")
        if isinstance(function, dict):
            self._take_call({"function": function}, _FUNCTION_CALL, events)

    # -- texts and reasoning ------------------------------------------------------------------------------------------

    def _take_text(self, kind: str, text: str, events: list[Event]) -> None:
        if self._open == kind:
            if self._has_surrogates or self._high:
                text = self._whole_characters(text)
            if text:
                events.append(TextDelta(text) if kind is _TEXT else ReasoningDelta(text))
        elif self._waiting or not self._may_close():
            last = self._waiting[-1] if self._waiting else None
            if isinstance(last, _Waiting) and last.kind == kind:
                last.pieces.append(text)
            else:
                self._waiting.append(_Waiting(kind, [text]))
        else:
            self._close(events)
            self._open_text(kind, text, events)

    def _open_text(self, kind: str, text: str, events: list[Event]) -> None:
        self._open = kind
        events.append(TextStart() if kind == _TEXT else ReasoningStart())
        if text := self._whole_characters(text):
            self._add(text, kind, events)

    def _whole_characters(self, text: str) -> str:
        """Returns a piece with the half of a character that the piece before it ended with, and without the one that it
        ends with itself: some providers split an emoji."""
        text, self._high = self._high + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._high = text[:-1], text[-1]
        return joined_surrogates(text)

    @staticmethod
    def _add(text: str, part: str | _ToolCall, events: list[Event]) -> None:
        """Adds to the part that is open."""
        if isinstance(part, _ToolCall):
            part.pieces.append(text)
            events.append(ArgumentsDelta(text))
        else:
            events.append(TextDelta(text) if part == _TEXT else ReasoningDelta(text))

    # -- tool calls ---------------------------------------------------------------------------------------------------

    def _index_of(self, call: Mapping[str, Any]) -> int:
        """Returns the position of a call. Some servers send no index, or the same one for each call."""
        index = call.get("index")
        given = call.get("id")
        last = max(self._calls, default=-1)
        if type(index) is not int or index < 0:
            return last + 1 if last < 0 or (given and given != self._calls[last].id) else last
        known = self._calls.get(index)
        if known is not None and given and known.id and given != known.id:
            # another call under the same index: the last one that has this id, or a new one
            return next((at for at in reversed(self._calls) if self._calls[at].id == given), last + 1)
        return index

    def _take_call(self, delta: Mapping[str, Any], index: int, events: list[Event]) -> None:
        call = self._calls.get(index)
        if call is None:
            call = self._calls[index] = _ToolCall(index)
            self._waiting.append(call)
        function = delta.get("function")
        function = function if isinstance(function, dict) else {}
        given, name, arguments = delta.get("id"), function.get("name"), function.get("arguments")
        if isinstance(given, str) and given and not call.id:
            call.id = given
        if isinstance(name, str) and name and not call.name:
            call.name = joined_surrogates(name)
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and arguments:
            if self._open is call:
                if self._has_surrogates or self._high:
                    arguments = self._whole_characters(arguments)
                if arguments:
                    self._add(arguments, call, events)
            elif not call.is_started:
                call.pieces.append(arguments)
            elif arguments.strip():
                raise ProtocolViolation(f"The upstream {self._upstream} added to a tool call that was complete.")
        self._open_waiting(events)

    def _open_waiting(self, events: list[Event]) -> None:
        """Opens what waits, as far as the parts before it are complete."""
        while self._waiting and self._may_close():
            first = self._waiting[0]
            if isinstance(first, _ToolCall) and not (first.name and (first.id or first.pieces)):
                return  # its id may be in the next event
            self._close(events)
            self._open_next(events)

    def _open_next(self, events: list[Event]) -> None:
        part = self._waiting.pop(0)
        if isinstance(part, _Waiting):
            self._open_text(part.kind, "".join(part.pieces), events)
            return
        if not part.name:
            raise ProtocolViolation(f"The upstream {self._upstream} called a tool without a name.")
        part.id = part.id or call_id(self._id or "", max(part.index, 0))
        part.is_started = True
        self._open = part
        events.append(ToolCallStart(part.id, part.name))
        if arguments := self._whole_characters(part.arguments):
            events.append(ArgumentsDelta(arguments))
        part.pieces = [arguments]

    def _may_close(self) -> bool:
        """Whether the part that is open may be complete."""
        part = self._open
        if not isinstance(part, _ToolCall):
            return True
        # the last piece is looked at first: to join and parse all of them at each event would take too long
        return bool(part.pieces) and part.pieces[-1].rstrip().endswith("}") and is_object(part.arguments)

    def _close(self, events: list[Event], *, may_be_cut: bool = False) -> None:
        """Ends the part that is open. Raises ProtocolViolation if it is a tool call without valid arguments."""
        part = self._open
        if part is None:
            return
        if self._high:  # the other half never came
            self._high = ""
            self._add("\ufffd", part, events)
        self._open = None
        if isinstance(part, _ToolCall) and not may_be_cut:
            checked_arguments(part.arguments, part.name, self._upstream)
        events.append(PartStop())
