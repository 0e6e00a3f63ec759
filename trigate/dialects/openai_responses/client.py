"""The Responses API as the format of clients."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.formats import Asked
from trigate.dialects.openai_responses.events import ResponsesEventEncoder
from trigate.dialects.openai_responses.fields import FIELD_OF
from trigate.dialects.openai_responses.request import decode_request
from trigate.dialects.openai_responses.response import encode_answer
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.request import Call


class ResponsesClient:
    """A `formats.ClientFormat`."""

    field_of: Mapping[str, str] = FIELD_OF

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """As `ClientFormat.decode_request`."""
        return decode_request(call.fields, stream=call.stream)

    def event_encoder(self, asked: Asked) -> ResponsesEventEncoder:
        """As `ClientFormat.event_encoder`."""
        return ResponsesEventEncoder(asked)

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """As `ClientFormat.encode_answer`."""
        return encode_answer(answer, asked)
