"""Chat completions as the format of upstreams."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.formats import StreamParts
from trigate.dialects.openai_chat.answer import decode_answer
from trigate.dialects.openai_chat.events import ChatEventDecoder
from trigate.dialects.openai_chat.request import encode_request
from trigate.dialects.openai_chat.think_tags import TagSplitter, with_reasoning_field
from trigate.dialects.openai_chat.traits import traits_of
from trigate.dialects.openai_chat.usage_request import takes_include_usage
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai import answer as openai_answer
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.completion import CompletionTracker
from trigate.openai.conversion import answer_of, events_of
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call

_CHAT = ENDPOINTS["/v1/chat/completions"]


class ChatUpstream:
    """A `formats.UpstreamFormat`.

    Args:
        think_tags: The reasoning is in the text of an answer (`think_tags`).
    """

    stream_types: tuple[str, ...] = ()

    def __init__(self, *, think_tags: bool = False) -> None:
        self._think_tags = think_tags

    def path(self, request: Request, model: str) -> str:
        """As `UpstreamFormat.path`."""
        return _CHAT.path

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """As `UpstreamFormat.headers`: none of Anthropic's own."""
        return {name: value for name, value in headers.items() if not name.startswith("anthropic-")}

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """As `UpstreamFormat.encode_request`."""
        traits = traits_of(
            upstream.base_url,
            history_fields=upstream.history_fields,
            system_role=upstream.system_role,
            takes_include_usage=takes_include_usage(upstream),
        )
        return encode_request(request, model=model, traits=traits)

    def takes_reasoning(self, upstream: UpstreamConfig) -> bool:
        """Whether an upstream takes back the reasoning of its answers."""
        return traits_of(upstream.base_url, history_fields=upstream.history_fields).reasoning_field is not None

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """As `UpstreamFormat.stream_parts`."""
        return StreamParts(
            TagSplitter(max_event_bytes=max_event_bytes, choices=1)
            if self._think_tags
            else sse.EventSplitter(max_event_bytes=max_event_bytes),
            CompletionTracker(_CHAT, upstream=upstream, choices=1),
            ChatEventDecoder(upstream=upstream),
        )

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """As `UpstreamFormat.decode_answer`."""
        body, usage = openai_answer.decode_answer(body, _CHAT, model=None, upstream=upstream)
        return decode_answer(with_reasoning_field(body) if self._think_tags else body, upstream=upstream), usage

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.events`."""
        return events_of(body, _sent(stream=True), upstream=upstream)

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """As `UpstreamFormat.collected`."""
        return answer_of(body, _sent(stream=False), upstream=upstream)


def _sent(*, stream: bool) -> Call:
    """What the conversions of answers have to know of the call that was sent."""
    fields = {"stream_options": msgspec.Raw(b'{"include_usage":true}')} if stream else {}
    return Call(endpoint=_CHAT, model="", names_model=False, stream=stream, body=b"", fields=fields)
