"""Ollama's ``/api/chat`` as the format of upstreams, and calls in the same format as they are."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.formats import StreamParts
from trigate.dialects.ollama.relay import LineRelay
from trigate.dialects.ollama.upstream_answer import LineSplitter, OllamaDecoder, decode_answer, usage_of, values_of
from trigate.dialects.ollama.upstream_request import encode_request
from trigate.dialects.ollama.values import asked_model
from trigate.dialects.vocabulary import Answer, Request
from trigate.errors import ProtocolViolation
from trigate.openai.answer import Usage
from trigate.openai.raw_json import split_provider_fields, with_model
from trigate.openai.request import Call

_STREAM_TYPES = ("application/x-ndjson",)


class OllamaUpstream:
    """A `formats.UpstreamFormat`."""

    stream_types: tuple[str, ...] = _STREAM_TYPES

    def path(self, request: Request, model: str) -> str:
        """As `UpstreamFormat.path`."""
        return "/api/chat"

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """As `UpstreamFormat.headers`: none that only another format has."""
        return {name: value for name, value in headers.items() if not name.startswith(("openai-", "anthropic-"))}

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """As `UpstreamFormat.encode_request`."""
        return encode_request(request, model=model)

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """As `UpstreamFormat.stream_parts`."""
        both = OllamaDecoder(upstream=upstream)
        return StreamParts(LineSplitter(max_event_bytes=max_event_bytes), both, both)

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """As `UpstreamFormat.decode_answer`."""
        return decode_answer(body, upstream=upstream)

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.events`: a whole answer is the last line of a stream."""
        return b"".join([msgspec.json.encode(value) + b"\n" for value in values_of(body, upstream)])

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.collected`: `decode_answer` takes lines as well."""
        return body


class OllamaRelay:
    """Ollama's format on both sides. A `trigate.exchange.translation.Translation`."""

    dropped: tuple[str, ...] = ()
    stream_types: tuple[str, ...] = _STREAM_TYPES

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """All of them."""
        return headers

    def path(self, call: Call, model: str) -> str:
        """The path of the call."""
        return call.endpoint.path

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The body with the upstream's own model id."""
        return call.body_for(model)

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> LineRelay:
        """Makes the reader of a streamed answer."""
        return LineRelay(model=asked_model(call), upstream=upstream, max_event_bytes=max_event_bytes)

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """As `OllamaUpstream.events`."""
        return OllamaUpstream().events(body, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """A stream where none was asked for is no answer. Raises ProtocolViolation."""
        raise ProtocolViolation(f"The upstream {upstream} answered with a stream that was not asked for.")

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """The answer with the public model id. Raises ProtocolViolation."""
        body = body.strip()
        values = values_of(body, upstream)
        if len(values) != 1 or values[0].get(call.endpoint.results) is None:
            raise ProtocolViolation(f"The upstream {upstream} answered without {call.endpoint.results}.")
        if "model" in values[0]:
            body = with_model(body, split_provider_fields(body), msgspec.json.encode(asked_model(call)))
        return body, usage_of(values[0])
