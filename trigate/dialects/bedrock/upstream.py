"""Converse as the format of upstreams."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from trigate.config.sections import UpstreamConfig
from trigate.dialects.bedrock.answer import AnswerIds, decode_answer
from trigate.dialects.bedrock.events import BedrockEventDecoder, BedrockTracker
from trigate.dialects.bedrock.framing import EVENT_STREAM, EventStreamSplitter
from trigate.dialects.bedrock.request import encode_request
from trigate.dialects.formats import StreamParts
from trigate.dialects.vocabulary import Answer, Request
from trigate.errors import ProtocolViolation, UnknownModel
from trigate.openai.answer import Usage


def path_of(model: str, operation: str) -> str:
    """Returns where an operation of a model is; its id may be an ARN, with colons and slashes.

    Raises:
        UnknownModel: The id would lead to another path.

    >>> path_of("arn:aws:bedrock:us-east-1::foundation-model/a.b-v1:0", "converse")
    '/model/arn%3Aaws%3Abedrock%3Aus-east-1%3A%3Afoundation-model%2Fa.b-v1%3A0/converse'
    """
    if model in (".", ".."):
        raise UnknownModel(model)
    return f"/model/{quote(model, safe='')}/{operation}"


class BedrockUpstream:
    """A `formats.UpstreamFormat`.

    Args:
        seed: Random bytes, from which the ids of answers are made.
    """

    stream_types: tuple[str, ...] = (EVENT_STREAM,)

    def __init__(self, seed: bytes) -> None:
        self._ids = AnswerIds(seed)

    def path(self, request: Request, model: str) -> str:
        """As `UpstreamFormat.path`."""
        return path_of(model, "converse-stream" if request.stream else "converse")

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """As `UpstreamFormat.headers`: none of Anthropic's or OpenAI's own."""
        return {
            name: value for name, value in headers.items() if not name.startswith(("anthropic-", "openai-", "x-goog-"))
        }

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """As `UpstreamFormat.encode_request`."""
        return encode_request(request, model=model, guardrail=upstream.guardrail)

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """As `UpstreamFormat.stream_parts`."""
        return StreamParts(
            EventStreamSplitter(max_event_bytes=max_event_bytes),
            BedrockTracker(upstream=upstream),
            BedrockEventDecoder(answer_id=next(self._ids), upstream=upstream),
        )

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """As `UpstreamFormat.decode_answer`."""
        return decode_answer(body, answer_id=next(self._ids), upstream=upstream)

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.events`: Bedrock never answers so, and a proxy before it cannot make it whole."""
        raise ProtocolViolation(f"The upstream {upstream} was asked for a stream and answered with JSON.")

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.collected`. Raises as `events`."""
        raise ProtocolViolation(f"The upstream {upstream} was asked for JSON and answered with a stream.")
