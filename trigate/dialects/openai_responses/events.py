"""Encodes the events of an answer as those of a response.

Each part of the answer is one item of the output, with one id wherever it occurs. An item begins when its content
comes, so there is no empty message before a tool call. The end of an item is held until the next event, which says
whether the answer was cut off there. ``response.completed``, ``response.incomplete`` or ``response.failed`` is the last
event; there is no ``[DONE]``.

Source: OpenAI API reference ("Streaming events" of the Responses API).
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.formats import Asked
from trigate.dialects.openai_responses.errors import code_of
from trigate.dialects.openai_responses.response import INCOMPLETE, Context, context_of, text_part
from trigate.dialects.openai_responses.tools import own_input
from trigate.dialects.request_values import Json
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Event,
    Finish,
    PartStop,
    Payload,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Start,
    TextDelta,
    TextStart,
    ToolCall,
    ToolCallStart,
)
from trigate.errors import GatewayError

_json = msgspec.json.Encoder().encode


class ResponsesEventEncoder:
    """Encodes one stream. It keeps the answer, since the end of each item, and of the response, repeats it.

    Args:
        asked: The call.
    """

    __slots__ = (
        "_asked",
        "_context",
        "_delta_head",
        "_delta_tail",
        "_is_closing",
        "_open",
        "_output",
        "_payloads",
        "_pieces",
        "_sequence",
        "_size_bytes",
    )

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._context: Context | None = None
        self._sequence = 0
        self._size_bytes = 0
        self._output: list[Json] = []
        self._open: TextStart | ReasoningStart | ToolCallStart | None = None
        self._is_closing = False
        self._pieces: list[str] = []
        self._payloads: dict[str, str] = {}
        self._delta_head = b""
        self._delta_tail = b""

    def encode(self, event: Event) -> bytes:
        """Returns the events of the client for one of the vocabulary; ``b""`` = none.

        Raises:
            ProtocolViolation: The model called a tool that the client does not have.
        """
        if isinstance(event, TextDelta | ReasoningDelta | ArgumentsDelta):
            return self._delta(event.text)
        match event:
            case PartStop():
                self._is_closing = True
                return b""
            case Payload(form, value):
                self._payloads[form] = value
                return b""
            case Start(answer):
                self._context = context_of(self._asked, answer)
                response = self._context.head("in_progress")
                return self._event("response.created", response=response) + self._event(
                    "response.in_progress", response=response
                )
            case Finish():
                return self._close(is_cut=event.reason in INCOMPLETE) + self._finish(event)
            case _:
                if isinstance(event, ToolCallStart) and self._context is not None:
                    self._context.own_tool(event.name)  # before anything is encoded
                return self._close() + self._start(event)

    # -- items --------------------------------------------------------------------------------------------------------

    def _start(self, event: TextStart | ReasoningStart | ToolCallStart) -> bytes:
        assert self._context is not None, "an answer begins with Start"
        context, index = self._context, len(self._output)
        self._open, self._is_closing = event, False
        self._pieces, self._payloads = [], {}
        match event:
            case TextStart():
                item = {**context.message_item(index, "", "in_progress"), "content": []}
                self._note_deltas("response.output_text.delta", item, b',"content_index":0', b',"logprobs":[]')
                return self._added(item) + self._part_added("response.content_part", item, text_part(""))
            case ReasoningStart():
                item = context.reasoning_item(index, Reasoning(""), "in_progress")
                if context.has_summary:
                    self._note_deltas("response.reasoning_summary_text.delta", item, b',"summary_index":0', b"")
                else:
                    self._note_deltas("response.reasoning_text.delta", item, b',"content_index":0', b"")
                return self._added(item)
            case ToolCallStart(call, name):
                item = context.call_item(index, ToolCall(call, name, ""), "in_progress")
                self._note_deltas("response.function_call_arguments.delta", item, b"", b"")
                return self._added(item)

    def _note_deltas(self, kind: str, item: Json, where: bytes, tail: bytes) -> None:
        """Prepares what all deltas of an item have in common: a stream consists of them."""
        name = kind.encode()
        self._delta_head = b'event: %b\ndata: {"type":"%b","item_id":"%b","output_index":%d%b,"sequence_number":' % (
            name,
            name,
            item["id"].encode(),
            len(self._output),
            where,
        )
        self._delta_tail = tail + b"}\n\n"

    def _delta(self, text: str) -> bytes:
        data = _json(text)
        self._size_bytes += len(data)
        is_first = not self._pieces
        self._pieces.append(text)
        part = self._open
        before = b""
        if is_first and isinstance(part, ReasoningStart):
            before = self._reasoning_part("added", "")
        elif isinstance(part, ToolCallStart) and self._is_custom(part):
            return b""  # its text is known when the arguments are whole
        sequence, self._sequence = self._sequence, self._sequence + 1
        return b'%b%b%d,"delta":%b%b' % (before, self._delta_head, sequence, data, self._delta_tail)

    def _is_custom(self, part: ToolCallStart) -> bool:
        assert self._context is not None, "an answer begins with Start"
        return self._context.own_tool(part.name).kind == "custom"

    def _close(self, *, is_cut: bool = False) -> bytes:
        """Ends the item that is open. ``is_cut``: the answer was cut off there."""
        part, context = self._open, self._context
        if part is None or context is None:
            return b""
        self._open = None
        text = "".join(self._pieces)
        index = len(self._output)
        status = "incomplete" if is_cut else "completed"
        match part:
            case TextStart():
                item = context.message_item(index, text, status)
                frames = self._event(
                    "response.output_text.done", **_at(item, index), content_index=0, text=text, logprobs=[]
                ) + self._part_added("response.content_part", item, text_part(text), "done")
            case ReasoningStart():
                item = context.reasoning_item(index, Reasoning(text, self._payloads), status)
                frames = self._reasoning_part("done", text) if text else b""
            case ToolCallStart(call, name):
                arguments = text or ("" if is_cut else "{}")
                item = context.call_item(index, ToolCall(call, name, arguments), status)
                frames = self._call_done(item, index, arguments, name)
        self._output.append(item)
        return frames + self._event("response.output_item.done", output_index=index, item=item)

    def _call_done(self, item: Json, index: int, arguments: str, name: str) -> bytes:
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            return self._event(kind, **_at(item, index), name=item["name"], arguments=arguments)
        kind, text = "response.custom_tool_call_input", own_input(arguments)
        delta = self._event(f"{kind}.delta", **_at(item, index), delta=text) if text else b""
        return delta + self._event(f"{kind}.done", **_at(item, index), input=text)

    def _reasoning_part(self, what: str, text: str) -> bytes:
        """Returns the events of the beginning or the end of the reasoning's text."""
        assert self._context is not None, "an answer begins with Start"
        index = len(self._output)
        at = {"item_id": self._context.item_id("rs", index), "output_index": index}
        if self._context.has_summary:
            kind, where = "response.reasoning_summary", {"summary_index": 0}
            part = {"type": "summary_text", "text": text}
            part_kind = f"{kind}_part.{what}"
        else:
            kind, where = "response.reasoning", {"content_index": 0}
            part = {"type": "reasoning_text", "text": text}
            part_kind = f"response.content_part.{what}"
        before = self._event(f"{kind}_text.done", **at, **where, text=text) if what == "done" else b""
        return before + self._event(part_kind, **at, **where, part=part)

    def _part_added(self, kind: str, item: Json, part: Json, what: str = "added") -> bytes:
        return self._event(f"{kind}.{what}", **_at(item, len(self._output)), content_index=0, part=part)

    def _added(self, item: Json) -> bytes:
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, finish: Finish) -> bytes:
        assert self._context is not None, "an answer begins with Start"
        response = self._context.end(finish, self._output, self._size_bytes)
        return self._event(f"response.{response['status']}", response=response)

    def encode_error(self, error: GatewayError, request_id: str) -> bytes:
        """Returns the last event of a stream that has failed: ``response.failed``, with what there is of the answer."""
        if self._context is None:
            self._context = context_of(self._asked, "failed")
        response = self._context.head("failed")
        response |= {"output": self._output, "error": {"code": code_of(error), "message": error.message}}
        return self._event("response.failed", response=response, error=error.payload)

    def _event(self, kind: str, **fields: Any) -> bytes:  # Any: JSON of any shape
        sequence, self._sequence = self._sequence, self._sequence + 1
        data = _json({"type": kind, **fields, "sequence_number": sequence})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _at(item: Json, index: int) -> Json:
    return {"item_id": item["id"], "output_index": index}
