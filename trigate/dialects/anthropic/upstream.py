"""Anthropic's Messages as the format of upstreams."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic.traits import traits_of
from trigate.dialects.anthropic.upstream_answer import decode_answer, events_of, message_of
from trigate.dialects.anthropic.upstream_events import MessagesEventDecoder
from trigate.dialects.anthropic.upstream_request import encode_request
from trigate.dialects.formats import StreamParts
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai import sse
from trigate.openai.answer import Usage, find_usage
from trigate.openai.raw_json import decode_any


class MessagesUpstream:
    """A `formats.UpstreamFormat`."""

    stream_types: tuple[str, ...] = ()

    def path(self, request: Request, model: str) -> str:
        """As `UpstreamFormat.path`."""
        return "/messages"

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """As `UpstreamFormat.headers`: none of OpenAI's own."""
        return {name: value for name, value in headers.items() if not name.startswith("openai-")}

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """As `UpstreamFormat.encode_request`."""
        return encode_request(request, model=model, traits=traits_of(model))

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """As `UpstreamFormat.stream_parts`."""
        both = MessagesEventDecoder(upstream=upstream)
        return StreamParts(sse.EventSplitter(max_event_bytes=max_event_bytes), both, both)

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """As `UpstreamFormat.decode_answer`."""
        return decode_answer(body, upstream=upstream), find_usage(decode_any(body) or {})

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.events`."""
        return events_of(body, upstream=upstream)

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.collected`."""
        return message_of(body, upstream=upstream)
