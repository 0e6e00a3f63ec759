"""Gemini's ``generateContent`` as the format of upstreams, and on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from trigate.config.sections import UpstreamConfig
from trigate.dialects.formats import StreamParts
from trigate.dialects.gemini.conversion import answer_of, events_of
from trigate.dialects.gemini.decode import GeminiEventDecoder, decode_answer
from trigate.dialects.gemini.encode import encode_request
from trigate.dialects.gemini.tracker import GeminiSplitter, GeminiTracker
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.answer import Usage

_TUNED = "tunedModels/"


class GeminiUpstream:
    """A `formats.UpstreamFormat`."""

    stream_types: tuple[str, ...] = ()

    def path(self, request: Request, model: str) -> str:
        """As `UpstreamFormat.path`."""
        return method_path(model, "streamGenerateContent" if request.stream else "generateContent")

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """As `UpstreamFormat.headers`: none that only another provider knows."""
        return own_headers(headers)

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """As `UpstreamFormat.encode_request`."""
        return encode_request(request, model=model, with_ids=upstream.kind != "vertex")

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """As `UpstreamFormat.stream_parts`."""
        return StreamParts(
            GeminiSplitter(max_event_bytes=max_event_bytes),
            GeminiTracker(upstream=upstream, fails_by_reason=True),
            GeminiEventDecoder(upstream=upstream),
        )

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """As `UpstreamFormat.decode_answer`."""
        return decode_answer(body, upstream=upstream)

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.events`."""
        return events_of(body, upstream=upstream)

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.collected`."""
        return answer_of(body, upstream=upstream)


def method_path(model: str, method: str) -> str:
    """Returns the path of a method, below a base URL with the version.

    Nothing of the model's id can leave its segment of the path.

    >>> method_path("gemini-3-flash", "streamGenerateContent"), method_path("../../files/x?", "countTokens")
    ('/models/gemini-3-flash:streamGenerateContent?alt=sse', '/models/..%2F..%2Ffiles%2Fx%3F:countTokens')
    """
    place = _TUNED if model.startswith(_TUNED) else "models/"
    query = "?alt=sse" if method == "streamGenerateContent" else ""
    return f"/{place}{quote(model.removeprefix(_TUNED), safe='@')}:{method}{query}"


def own_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the headers without those of other providers."""
    return {name: value for name, value in headers.items() if not name.startswith(("anthropic-", "openai-"))}
