"""Anthropic's Messages as the format of clients."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.anthropic.answer import encode_answer
from trigate.dialects.anthropic.events import MessagesEventEncoder
from trigate.dialects.anthropic.fields import FIELD_OF
from trigate.dialects.anthropic.request import decode_request
from trigate.dialects.formats import Asked
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.request import Call


class MessagesClient:
    """A `formats.ClientFormat`."""

    field_of: Mapping[str, str] = FIELD_OF

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """As `ClientFormat.decode_request`."""
        return decode_request(call.fields)

    def event_encoder(self, asked: Asked) -> MessagesEventEncoder:
        """As `ClientFormat.event_encoder`."""
        return MessagesEventEncoder(
            model=asked.call.model, wants_reasoning=asked.request.wants_reasoning, estimate=asked.estimate
        )

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """As `ClientFormat.encode_answer`."""
        wants = asked.request.wants_reasoning
        return encode_answer(answer, model=asked.call.model, wants_reasoning=wants, estimate=asked.estimate)
