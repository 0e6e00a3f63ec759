"""Chat completions as the format of clients."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.formats import Asked
from trigate.dialects.openai_chat.client_answer import encode_answer
from trigate.dialects.openai_chat.client_events import ChatEventEncoder
from trigate.dialects.openai_chat.client_fields import FIELD_OF
from trigate.dialects.openai_chat.client_request import decode_request, is_legacy
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call


class ChatClient:
    """A `formats.ClientFormat`."""

    field_of: Mapping[str, str] = FIELD_OF

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """As `ClientFormat.decode_request`."""
        return decode_request(call.fields)

    def event_encoder(self, asked: Asked) -> ChatEventEncoder:
        """As `ClientFormat.event_encoder`."""
        call = asked.call
        options = decode_any(bytes(call.fields["stream_options"])) if "stream_options" in call.fields else None
        return ChatEventEncoder(
            model=call.model,
            created=int(asked.at),
            includes_usage=isinstance(options, dict) and options.get("include_usage") is True,
            is_legacy=is_legacy(call.fields),
            estimate=asked.estimate,
        )

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """As `ClientFormat.encode_answer`."""
        call = asked.call
        return encode_answer(
            answer,
            model=call.model,
            created=int(asked.at),
            is_legacy=is_legacy(call.fields),
            estimate=asked.estimate,
        )
