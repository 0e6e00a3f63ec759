"""A call in Anthropic's format over an upstream that speaks chat completions."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic import MessagesEventEncoder, decode_request, encode_answer
from trigate.dialects.anthropic.fields import FIELD_OF
from trigate.dialects.endpoints import CHAT
from trigate.dialects.openai_chat import ChatEventDecoder, decode_answer, encode_request, traits_of
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.vocabulary import TokenCounts
from trigate.openai import answer as openai_answer
from trigate.openai.answer import Usage
from trigate.openai.conversion import answer_of, events_of
from trigate.openai.request import Call
from trigate.openai.token_estimate import estimated_tokens, tokens_of_size


class MessagesOverChat:
    """One call, sent to one upstream. A `trigate.exchange.translation.Translation`.

    Raises:
        BadRequest: The call is malformed, or (`Untranslatable`) has something that cannot be expressed.

    Attributes:
        dropped: The names of the advisory fields that were dropped; complete once `body` has been called.
    """

    def __init__(self, call: Call) -> None:
        self._request, self.dropped = decode_request(call.fields)

    def path(self, call: Call) -> str:
        """Where the call goes."""
        return CHAT.path

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers that are sent: none of Anthropic's own."""
        return {name: value for name, value in headers.items() if not name.startswith("anthropic-")}

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body. Raises Untranslatable if the upstream cannot express a part of it."""
        traits = traits_of(upstream.base_url, history_fields=upstream.history_fields)
        body, dropped = encode_request(self._request, model=model, traits=traits)
        self.dropped = tuple(sorted({*self.dropped, *(FIELD_OF[name] for name in dropped)}))
        return body

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> TranslatedStream:
        """Makes the reader of a streamed answer."""
        return TranslatedStream(
            CHAT,
            ChatEventDecoder(upstream=upstream),
            MessagesEventEncoder(
                model=call.model,
                wants_reasoning=self._request.wants_reasoning,
                estimate=lambda size_bytes: _estimate(call, size_bytes),
            ),
            upstream=upstream,
            max_event_bytes=max_event_bytes,
        )

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's stream of a JSON answer to a streamed call. Raises as `conversion.events_of`."""
        return events_of(body, attrs.evolve(call, endpoint=CHAT), upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's JSON answer of a stream that answers a plain call. Raises as `conversion.answer_of`."""
        return answer_of(body, attrs.evolve(call, endpoint=CHAT), upstream=upstream)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Translates a whole answer; returns it with the token counts in it. Raises ProtocolViolation."""
        _, usage = openai_answer.decode_answer(body, CHAT, model=None, upstream=upstream)
        encoded = encode_answer(
            decode_answer(body, upstream=upstream),
            model=call.model,
            wants_reasoning=self._request.wants_reasoning,
            estimate=lambda size_bytes: _estimate(call, size_bytes),
        )
        return encoded, usage


def _estimate(call: Call, size_bytes: int) -> TokenCounts:
    """Estimates the token counts of an answer of this size, where the provider has not counted."""
    return TokenCounts(input=estimated_tokens(call.body), output=tokens_of_size(size_bytes))
