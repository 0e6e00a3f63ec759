"""Translates between the client's format and the upstream's format.

A call that arrives in one format may be sent in another one, and its answer is then translated back, event by event
(`trigate.dialects`). A `Translation` is such a pair of formats, and `translation_of` chooses it. Where both sides have
the same format, it costs nothing: only the model id of the request body changes, and events go to the client as bytes,
without parsing the JSON of each.

A call in a format that cannot be translated for an upstream is never sent there as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Protocol

import msgspec

from trigate.config.sections import ResponsesMode, UpstreamConfig
from trigate.dialects.anthropic import (
    MessagesClient,
    MessagesUpstream,
    may_have_own_reasoning,
    with_betas,
    without_own_reasoning,
)
from trigate.dialects.bedrock import BETAS, BedrockUpstream, InvokeReader, invoke_body, is_claude, path_of
from trigate.dialects.bedrock.framing import EVENT_STREAM
from trigate.dialects.endpoints import CHAT, GENERATE, MESSAGES, RESPONSES, STREAM_GENERATE, STREAM_GENERATE_ARRAY
from trigate.dialects.formats import ClientFormat, UpstreamFormat
from trigate.dialects.gemini import GeminiClient, GeminiRelay, GeminiUpstream
from trigate.dialects.ollama import CLIENTS as OLLAMA_CLIENTS
from trigate.dialects.ollama import EMBEDDINGS, OllamaRelay, OllamaUpstream
from trigate.dialects.openai_chat import (
    ChatClient,
    ChatUpstream,
    TagSplitter,
    takes_developer,
    with_reasoning_field,
    with_system_role,
)
from trigate.dialects.openai_chat.usage_request import (
    is_counted_for_gateway,
    takes_include_usage,
    with_include_usage,
)
from trigate.dialects.openai_responses import ResponsesClient
from trigate.dialects.openai_responses import without_own_reasoning as without_sealed_reasoning
from trigate.dialects.translated_call import TranslatedCall
from trigate.errors import GatewayError, ProtocolViolation, Unsupported
from trigate.openai import sse
from trigate.openai.answer import Usage, decode_answer
from trigate.openai.conversion import answer_of, events_of
from trigate.openai.endpoints import Format
from trigate.openai.history_fields import history_fields_of
from trigate.openai.raw_json import split_fields
from trigate.openai.request import Call
from trigate.openai.stream import StreamReader


class Reader(Protocol):
    """Turns the bytes of an upstream's stream into whole events for the client. `openai.stream.StreamReader` is one.

    Attributes:
        events: How many events `feed` has returned.
    """

    events: int

    @property
    def has_content(self) -> bool:
        """Part of the answer has arrived. Before that, `feed` returns nothing."""

    @property
    def complete(self) -> bool:
        """The last event of the stream has arrived."""

    @property
    def error(self) -> GatewayError | None:
        """The error in the stream; the reader must not be fed afterwards."""

    @property
    def usage(self) -> Usage | None:
        """The last token counts that were reported."""

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the upstream's body; returns the frames that are ready for the client."""

    def feed_end(self) -> bytes:
        """The upstream's body has ended: returns the last frames, and sets ``error`` if the stream is incomplete."""

    @property
    def kept(self) -> list[bytes] | None:
        """The frames returned so far, which another upstream can continue; None = they exceed ``keep_bytes``."""

    @property
    def all_finished(self) -> bool:
        """Every choice that has begun has ended: nothing is left to continue."""


class Translation(Protocol):
    """A client's format and an upstream's format."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names of the fields that the upstream did not get, since they are advisory; complete once `body` has been
        called."""

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Which headers go to the upstream."""

    @property
    def stream_types(self) -> tuple[str, ...]:
        """The content types of the upstream's streams, besides that of server-sent events."""

    def path(self, call: Call, model: str) -> str:
        """Where the call goes, below the upstream's base URL.

        Args:
            model: The upstream's own model id.
        """

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body, for an upstream and its own model id."""

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> Reader:
        """Makes the reader of a streamed answer.

        Args:
            upstream: The upstream's name, for messages.
            max_event_bytes: The size limit of an event, and of everything before the first content.
            keep_bytes: How many bytes of the returned frames are kept for another upstream to continue.
            continues: The fields that all events of the continued stream have in common; None = it is a new stream.
        """

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes a stream, as the upstream would have sent it, of a JSON answer to a streamed call.

        Raises:
            GatewayError: It is not an answer, or one that no stream can be made of.
        """

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes a JSON answer, as the upstream would have sent it, of a stream that answers a call without ``stream``.

        Raises:
            GatewayError: It is not complete, or no answer can be made of it.
        """

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Translates a whole JSON answer; returns it with the token counts in it.

        Raises:
            ProtocolViolation: It is not an answer.
        """


class _PassThrough:
    """OpenAI's format on both sides.

    Args:
        asks_usage: The token counts of a stream are asked for, and the client that did not ask does not get them.
    """

    def __init__(self, *, asks_usage: bool = True) -> None:
        self._asks_usage = asks_usage

    dropped: tuple[str, ...] = ()
    stream_types: tuple[str, ...] = ()

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        return headers

    def path(self, call: Call, model: str) -> str:
        return call.endpoint.path

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        if call.remembered:
            fields = upstream.history_fields
            call = call.with_history_fields(history_fields_of(upstream.base_url) if fields is None else fields)
        if upstream.system_role is not None and call.endpoint.path == CHAT.path:
            known = takes_developer(upstream.base_url)
            messages = with_system_role(bytes(call.fields["messages"]), upstream.system_role, takes_developer=known)
            call = call.with_messages(messages) if messages is not None else call
        body = call.body_for(model)
        if self._asks_usage and is_counted_for_gateway(call):
            body = with_include_usage(body, call, msgspec.json.encode(model))
        return without_sealed_reasoning(body) if call.endpoint is RESPONSES else body

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> Reader:
        return StreamReader(
            call.endpoint,
            model=call.public_model,
            upstream=upstream,
            max_event_bytes=max_event_bytes,
            choices=call.choices,
            keep_bytes=keep_bytes,
            head=continues,
            splitter=self.splitter(call, max_event_bytes),
            hides_usage=self._asks_usage and is_counted_for_gateway(call),
        )

    def splitter(self, call: Call, max_event_bytes: int) -> sse.EventSplitter | None:
        """Makes what splits the body and changes its events; None = they stay as they are."""
        return None

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return events_of(body, call, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return answer_of(body, call, upstream=upstream)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        return decode_answer(body, call.endpoint, model=call.public_model, upstream=upstream)


class _ThinkTagsPassThrough(_PassThrough):
    """Chat completions on both sides, with the reasoning in the text of the upstream's answers."""

    def splitter(self, call: Call, max_event_bytes: int) -> sse.EventSplitter | None:
        return TagSplitter(max_event_bytes=max_event_bytes, choices=call.choices)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        body, usage = super().answer(call, body, upstream=upstream)
        return with_reasoning_field(body), usage


class _AnthropicPassThrough(_PassThrough):
    """Anthropic's format on both sides. One object serves all calls that go out as they came, and one each of the
    others.

    Args:
        betas: Which of the client's betas are sent; None = all.
    """

    def __init__(self, betas: tuple[str, ...] | None = None) -> None:
        super().__init__(asks_usage=False)
        self._betas = betas
        self.dropped: tuple[str, ...] = ()

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        if self._betas is None:
            return headers
        rest = with_betas(headers, self._betas)
        if rest != headers:
            self.dropped = ("anthropic-beta",)
        return rest

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        body = call.body_for(model)
        if not may_have_own_reasoning(body):
            return body
        rest = without_own_reasoning(body)
        if rest is not body:
            self.dropped = (*self.dropped, "thinking")
        return rest

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return _UPSTREAMS["anthropic"].events(body, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return _UPSTREAMS["anthropic"].collected(body, upstream=upstream)


class _Invoke(_AnthropicPassThrough):
    """Anthropic's format on both sides, in Bedrock's envelope. One for each call."""

    stream_types = (EVENT_STREAM,)

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        self._given = [beta.strip() for beta in headers.get("anthropic-beta", "").split(",") if beta.strip()]
        return {name: value for name, value in headers.items() if not name.startswith("anthropic-")}

    def path(self, call: Call, model: str) -> str:
        return path_of(model, "invoke-with-response-stream" if call.stream else "invoke")

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        fields = split_fields(super().body(call, model, upstream))
        allowed = BETAS if upstream.betas is None else upstream.betas
        body, dropped = invoke_body(fields, model=model, betas=self._given, allowed=allowed)
        self.dropped = (*self.dropped, *dropped)
        return body

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> Reader:
        inner = super().stream_reader(
            call, upstream=upstream, max_event_bytes=max_event_bytes, keep_bytes=keep_bytes, continues=continues
        )
        assert isinstance(inner, StreamReader)
        return InvokeReader(inner, upstream=upstream, max_event_bytes=max_event_bytes)

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        raise ProtocolViolation(f"The upstream {upstream} was asked for a stream and answered with JSON.")


FORMAT_OF_KIND: Mapping[str, Format] = {
    "openai": "openai",
    "echo": "openai",
    "local": "openai",
    "anthropic": "anthropic",
    "azure": "openai",
    "bedrock": "bedrock",
    "gemini": "gemini",
    "vertex": "gemini",
    "ollama": "ollama",
}
"""The format that an upstream of a kind speaks."""

_PASS_THROUGH: Mapping[Format, Translation] = {
    "openai": _PassThrough(),
    "anthropic": _AnthropicPassThrough(),
    "gemini": GeminiRelay(),
    "ollama": OllamaRelay(),
}
"""By the format of both sides."""
_CLIENTS: Mapping[str, ClientFormat] = {
    CHAT.path: ChatClient(),
    MESSAGES.path: MessagesClient(),
    RESPONSES.path: ResponsesClient(),
    GENERATE.path: GeminiClient(),
    STREAM_GENERATE.path: GeminiClient(),
    STREAM_GENERATE_ARRAY.path: GeminiClient(is_array=True),
    **OLLAMA_CLIENTS,
}
"""The formats of the calls that can be translated, by the path of their endpoint."""
_UPSTREAMS: Mapping[Format, UpstreamFormat] = {
    "openai": ChatUpstream(),
    "anthropic": MessagesUpstream(),
    "bedrock": BedrockUpstream(os.urandom(16)),
    "gemini": GeminiUpstream(),
    "ollama": OllamaUpstream(),
}
"""The formats to which calls can be translated."""
_UNCOUNTED = _PassThrough(asks_usage=False)
_THINK_TAGS = _ThinkTagsPassThrough()
_THINK_TAGS_UNCOUNTED = _ThinkTagsPassThrough(asks_usage=False)
_WITH_THINK_TAGS = ChatUpstream(think_tags=True)
_PAYLOADS: Mapping[Format, str] = {"anthropic": "anthropic", "bedrock": "anthropic", "gemini": "gemini"}
"""What an upstream of a format needs of reasoning, by its name in the vocabulary. The others take its text."""
_MARKED = frozenset((MESSAGES.path, RESPONSES.path))
"""The paths whose format has a place for the mark of reasoning (`trigate.dialects.marks`)."""


def translation_of(
    call: Call, upstream: str, config: UpstreamConfig, responses: ResponsesMode = "translate", model: str = ""
) -> Translation:
    """Chooses the translation of a call for an upstream.

    Args:
        upstream: The upstream's name, for messages.
        config: Its configuration.
        responses: How response calls go to it.
        model: The upstream's own model id.

    Raises:
        BadRequest: The call has something that cannot be translated.
        Unsupported: The upstream speaks a format to which such calls are not translated.
    """
    spoken = FORMAT_OF_KIND[config.kind]
    if call.endpoint.format == spoken and not (call.endpoint is RESPONSES and responses == "translate"):
        if spoken == "anthropic" and (config.betas is not None or may_have_own_reasoning(call.body)):
            return _AnthropicPassThrough(config.betas)
        asks_usage = takes_include_usage(config)
        if config.think_tags and call.endpoint.path == CHAT.path:
            return _THINK_TAGS if asks_usage else _THINK_TAGS_UNCOUNTED
        if spoken == "openai" and not asks_usage:
            return _UNCOUNTED
        return _PASS_THROUGH[spoken]
    if spoken == "bedrock" and call.endpoint is MESSAGES and is_claude(model):
        return _Invoke()
    client = _CLIENTS.get(call.endpoint.path)
    provider = _WITH_THINK_TAGS if config.think_tags else _UPSTREAMS.get(spoken)
    if client is not None and provider is not None:
        return TranslatedCall(
            call,
            client,
            provider,
            at=time.time(),
            clock=time.time_ns,
            payload=_PAYLOADS.get(spoken),
            takes_reasoning=not isinstance(provider, ChatUpstream) or provider.takes_reasoning(config),
            has_marks=call.endpoint.path in _MARKED,
        )
    if (make := EMBEDDINGS.get((call.endpoint.path, spoken))) is not None:
        return make(call, time.time_ns)
    path = call.endpoint.path if call.endpoint.format == "ollama" else f"/v1{call.endpoint.path}"
    raise Unsupported(
        f"The upstream {upstream} speaks {NAMES[spoken]} format (kind {config.kind!r}), and calls to {path} "
        "are not translated to it.",
        status=501,
    )


NAMES: Mapping[Format, str] = {
    "openai": "OpenAI's",
    "anthropic": "Anthropic's",
    "gemini": "Gemini's",
    "ollama": "Ollama's",
    "bedrock": "Bedrock's",
}
