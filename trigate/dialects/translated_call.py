"""A call in one format over an upstream that speaks another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.formats import Asked, ClientFormat, EventEncoder, UpstreamFormat
from trigate.dialects.marks import Marks
from trigate.dialects.memory import (
    AnswerMemory,
    Keep,
    Remembered,
    calls_without_reasoning,
    latest_calls,
    marked,
    memory_of,
    with_marks_checked,
    with_reasoning,
)
from trigate.dialects.stream import TranslatedStream, half_of_a_character
from trigate.dialects.vocabulary import Request
from trigate.errors import Untranslatable
from trigate.openai.answer import Usage
from trigate.openai.request import Call


@attrs.frozen(kw_only=True)
class Memory:
    """What the gateway knows beyond one call.

    Attributes:
        marks: Of the gateway.
        found: What it remembers of the tool calls that have lost their reasoning.
        keep: Takes what is to be remembered of the answer; None = nothing is.
        max_bytes: The most that is remembered of an answer.
    """

    marks: Marks
    found: Mapping[str, Remembered] = attrs.field(factory=dict)
    keep: Keep | None = None
    max_bytes: int = 0


class TranslatedCall:
    """One call, sent to one upstream. A `trigate.exchange.translation.Translation`.

    Args:
        at: When the call was made: Unix time, in seconds.
        payload: The name of the payload that the upstream needs of reasoning; None = it takes the text.
        takes_reasoning: Whether the upstream takes back the reasoning of its answers; if not, none is remembered.
        has_marks: Whether the client's format has a place for the mark of reasoning (`marks`).
        clock: As in `formats.Asked`.

    It is decoded when that is first needed. A method that needs it raises BadRequest if the call is malformed, or
    (`Untranslatable`) has something that cannot be expressed.

    Attributes:
        dropped: The names of the advisory fields that were dropped; complete once `body` has been called.
        stream_types: The content types of the upstream's streams, besides that of server-sent events.
    """

    def __init__(
        self,
        call: Call,
        client: ClientFormat,
        provider: UpstreamFormat,
        *,
        at: float = 0.0,
        payload: str | None = None,
        takes_reasoning: bool = True,
        has_marks: bool = False,
        clock: Callable[[], int] = lambda: 0,
    ) -> None:
        self.dropped: tuple[str, ...] = ()
        self._call = call
        self._at = at
        self._clock = clock
        self._decoded: Asked | None = None
        self._encoded: bytes | None = None
        self._client = client
        self._provider = provider
        self._payload = payload
        self._takes_reasoning = takes_reasoning
        self._has_marks = has_marks
        self._memory: Memory | None = None
        self.stream_types = provider.stream_types

    def decode(self) -> Asked:
        """Decodes the call; at the first time, this takes as long as the call is large."""
        if self._decoded is None:
            request, self.dropped = self._client.decode_request(self._call)
            self._decoded = Asked(self._call, request, self._at, self._clock)
        return self._decoded

    def _replace(self, request: Request) -> None:
        self._decoded = attrs.evolve(self.decode(), request=request)
        self._encoded = None

    def limit_answer(self, max_tokens: int | None) -> None:
        """Lowers the most tokens of the answer to what the model can give: providers refuse a request for more.

        Args:
            max_tokens: None = unknown.
        """
        request = self.decode().request
        if max_tokens is not None:
            asked = min(request.max_tokens, max_tokens) if request.max_tokens is not None else None
            request = msgspec.structs.replace(request, max_tokens=asked, model_max_tokens=max_tokens)
            self._replace(request)

    @property
    def lost(self) -> tuple[str, ...]:
        """The ids of the tool calls that have lost their reasoning."""
        return calls_without_reasoning(self.decode().request, self._payload) if self._takes_reasoning else ()

    @property
    def latest_calls(self) -> frozenset[str]:
        """The ids of the tool calls of the last message that has some."""
        return latest_calls(self.decode().request)

    def use(self, memory: Memory) -> None:
        """Checks the marks of the request, puts reasoning back that was lost, and remembers that of the answer."""
        self._memory = memory
        request = self.decode().request
        if self._has_marks:
            request, is_dropped = with_marks_checked(request, memory.marks)
            if is_dropped:
                self.dropped = tuple(sorted({*self.dropped, self._client.field_of.get("reasoning", "reasoning")}))
        if memory.found:
            request = with_reasoning(request, memory.found, self._payload)
        self._replace(request)

    def path(self, call: Call, model: str) -> str:
        """Where the call goes."""
        return self._provider.path(self.decode().request, model)

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers that are sent: none that only the client's format has."""
        return self._provider.headers(headers)

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body, encoded once.

        Raises:
            Untranslatable: The upstream cannot express a part of it, or is to continue an answer: the call then has the
                answer's beginning, and is not the one that was decoded.
        """
        if call is not self._call:
            raise Untranslatable(
                f"The upstream's answer broke off, and {model} cannot continue it: its API has another format."
            )
        if self._encoded is None:
            self._encoded = self._encode(model, upstream)
        return self._encoded

    def _encode(self, model: str, upstream: UpstreamConfig) -> bytes:
        names = self._client.field_of
        try:
            body, dropped = self._provider.encode_request(self.decode().request, model=model, upstream=upstream)
        except Untranslatable as error:
            error.param = names.get(error.param or "", error.param)
            raise
        self.dropped = tuple(sorted({*self.dropped, *(names.get(name, name) for name in dropped)}))
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
            self._provider.stream_parts(upstream=upstream, max_event_bytes=max_event_bytes),
            self._event_encoder(),
            upstream=upstream,
            max_event_bytes=max_event_bytes,
        )

    def _event_encoder(self) -> EventEncoder:
        encoder = self._client.event_encoder(self.decode())
        memory = self._memory
        if memory is None:
            return encoder
        marks = memory.marks if self._has_marks else None
        keep = memory.keep if self._takes_reasoning else None
        return AnswerMemory(encoder, marks=marks, keep=keep, max_bytes=memory.max_bytes)

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's stream of a JSON answer to a streamed call. Raises as `UpstreamFormat.events`."""
        return self._provider.events(body, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's JSON answer of a stream. Raises as `UpstreamFormat.collected`."""
        return self._provider.collected(body, upstream=upstream)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Translates a whole answer; returns it with the token counts in it. Raises ProtocolViolation."""
        try:
            return self._answer(body, upstream=upstream)
        except UnicodeEncodeError:
            raise half_of_a_character(upstream) from None

    def _answer(self, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        answer, usage = self._provider.decode_answer(body, upstream=upstream)
        if (memory := self._memory) is not None:
            if (
                memory.keep is not None
                and self._takes_reasoning
                and (found := memory_of(answer, max_bytes=memory.max_bytes))
            ):
                memory.keep(found)
            if self._has_marks:
                answer = marked(answer, memory.marks)
        return self._client.encode_answer(answer, self.decode()), usage
