"""Encodes the events of an answer in Anthropic's format.

One ``message_start``; blocks with the indexes 0, 1, 2, …, one after the other; one ``message_delta`` with the end and
the token counts of the whole; ``message_stop``. There is no ``[DONE]``: the clients parse every event as JSON.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.anthropic.answer import Estimate, message_head, stop_fields
from trigate.dialects.anthropic.errors import error_frame
from trigate.dialects.anthropic.usage import NOTHING, encode_usage
from trigate.dialects.marks import PAYLOAD
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
from trigate.errors import Fault, GatewayError

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
"""Sent in a silence, once ``message_start`` is out."""

_json = msgspec.json.Encoder().encode
_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b":%b}}\n\n'
_TEXT = b'text_delta","text'
_THINKING = b'thinking_delta","thinking'
_SIGNATURE = b'signature_delta","signature'
_ARGUMENTS = b'input_json_delta","partial_json'


class MessagesEventEncoder:
    """Encodes one stream.

    Args:
        model: The public model id.
        wants_reasoning: Whether the client asked for reasoning; if not, it gets none.
        estimate: Used if the answer has no token counts.
    """

    __slots__ = ("_estimate", "_index", "_is_hidden", "_may_be_closed", "_model", "_size_bytes", "_wants_reasoning")

    def __init__(self, *, model: str, wants_reasoning: bool, estimate: Estimate) -> None:
        self._model = model
        self._wants_reasoning = wants_reasoning
        self._estimate = estimate
        self._index = 0
        self._size_bytes = 0
        self._is_hidden = False
        self._may_be_closed = False  # a text or reasoning is open

    def encode(self, event: Event) -> bytes:
        """Returns the events of the client for one of the vocabulary; ``b""`` = none."""
        match event:
            case TextDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                return _DELTA % (self._index, _TEXT, data)
            case ArgumentsDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                return _DELTA % (self._index, _ARGUMENTS, data)
            case ReasoningDelta(text):
                data = _json(text)
                self._size_bytes += len(data)
                if self._is_hidden:
                    return b""
                return _DELTA % (self._index, _THINKING, data)
            case TextStart():
                self._may_be_closed = True
                return self._start_block({"type": "text", "text": ""})
            case ReasoningStart():
                self._is_hidden = not self._wants_reasoning
                if self._is_hidden:
                    return b""
                self._may_be_closed = True
                return self._start_block({"type": "thinking", "thinking": "", "signature": ""})
            case ToolCallStart(call, name):
                return self._start_block({"type": "tool_use", "id": call, "name": name, "input": {}})
            case PartStop():
                return self._stop_block()
            case Payload(form, value):
                if form != PAYLOAD or self._is_hidden:  # another provider's: only the mark is for the client
                    return b""
                return _DELTA % (self._index, _SIGNATURE, _json(value))
            case Start(answer):
                message = {**message_head(answer, self._model), "usage": encode_usage(NOTHING)}
                return _event("message_start", {"message": message})
            case Finish():
                usage = event.usage if event.usage is not None else self._estimate(self._size_bytes)
                end = {"delta": stop_fields(event), "usage": encode_usage(usage)}
                return _event("message_delta", end) + _event("message_stop", {})

    def encode_error(self, error: GatewayError, request_id: str) -> bytes | None:
        """Returns the last events of a stream that has failed.

        Claude Code answers an error within an open block with the whole call again, without streaming. So a text or
        reasoning ends before the error, with what there is of it. A tool call does not: it would look complete. Nor
        does a stream that this gateway cannot go on with, since another instance can.
        """
        if isinstance(error, Fault) or not self._may_be_closed:
            return None
        return self._stop_block() + error_frame(error, request_id, is_closed=True)

    def _start_block(self, block: dict[str, Any]) -> bytes:  # Any: JSON of any shape
        return _event("content_block_start", {"index": self._index, "content_block": block})

    def _stop_block(self) -> bytes:
        self._may_be_closed = False
        if self._is_hidden:
            self._is_hidden = False
            return b""
        index, self._index = self._index, self._index + 1
        return _event("content_block_stop", {"index": index})


def _event(kind: str, fields: dict[str, Any]) -> bytes:  # Any: JSON of any shape
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json({"type": kind, **fields}))
