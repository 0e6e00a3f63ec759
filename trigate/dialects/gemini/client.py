"""Gemini's ``generateContent`` as the format of clients."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.formats import Asked
from trigate.dialects.gemini.answer import encode_answer
from trigate.dialects.gemini.events import GeminiEventEncoder
from trigate.dialects.gemini.fields import FIELD_OF
from trigate.dialects.gemini.request import decode_request
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.request import Call


class GeminiClient:
    """A `formats.ClientFormat`.

    Args:
        is_array: A stream is one JSON array, and has no events.
    """

    field_of: Mapping[str, str] = FIELD_OF

    def __init__(self, *, is_array: bool = False) -> None:
        self._is_array = is_array

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """As `ClientFormat.decode_request`."""
        return decode_request(call.fields, stream=call.stream)

    def event_encoder(self, asked: Asked) -> GeminiEventEncoder:
        """As `ClientFormat.event_encoder`."""
        return GeminiEventEncoder(
            model=asked.call.model,
            wants_reasoning=asked.request.wants_reasoning,
            is_array=self._is_array,
            estimate=asked.estimate,
        )

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """As `ClientFormat.encode_answer`."""
        wants = asked.request.wants_reasoning
        return encode_answer(answer, model=asked.call.model, wants_reasoning=wants, estimate=asked.estimate)
