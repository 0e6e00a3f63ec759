"""What a format has to be able to do, as that of clients and as that of upstreams.

A `ClientFormat` decodes requests and encodes answers; an `UpstreamFormat` encodes requests and decodes answers. Each
translates to or from `vocabulary` only, so any client's format can be joined to any upstream's
(`translated_call.TranslatedCall`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import attrs

from trigate.config.sections import UpstreamConfig
from trigate.dialects.vocabulary import Answer, Event, Request, TokenCounts
from trigate.errors import GatewayError
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.openai.token_estimate import estimated_tokens, tokens_of_size

# -- the client's side ------------------------------------------------------------------------------------------------


@attrs.frozen
class Asked:
    """A call and what has been decoded of it: what an encoder of its answer needs.

    Attributes:
        at: When the call was made: Unix time, in seconds.
        clock: Returns the time, in nanoseconds since the epoch; for answers whose parts say when they were made.
    """

    call: Call
    request: Request
    at: float = 0.0
    clock: Callable[[], int] = lambda: 0

    def estimate(self, size_bytes: int) -> TokenCounts:
        """Estimates the token counts of an answer of this size, where the provider has not counted."""
        return TokenCounts(input=estimated_tokens(self.call.body), output=tokens_of_size(size_bytes))


class EventEncoder(Protocol):
    """Turns the events of the vocabulary into bytes of a client's format."""

    def encode(self, event: Event) -> bytes:
        """Returns whole events; ``b""`` if the client's format has none for it."""


@runtime_checkable
class ErrorEncoder(Protocol):
    """An `EventEncoder` whose last events, where a stream fails, depend on the events before them."""

    def encode_error(self, error: GatewayError, request_id: str) -> bytes | None:
        """Returns those events; None = they are those of any stream of the format."""


class ClientFormat(Protocol):
    """A format of calls: that of one endpoint."""

    @property
    def field_of(self) -> Mapping[str, str]:
        """How the format calls those fields of `vocabulary.Request` that an encoder may drop or refuse. A field that is
        not here has the same name."""

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """Decodes a request.

        Returns:
            The request, and the names of the advisory fields that the vocabulary has no place for.

        Raises:
            BadRequest: A field is malformed; ``param`` names it.
            Untranslatable: A field cannot be expressed; ``param`` names it.
        """

    def event_encoder(self, asked: Asked) -> EventEncoder:
        """Makes the encoder of a streamed answer."""

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """Encodes an answer that is not streamed."""


# -- the upstream's side ----------------------------------------------------------------------------------------------


class Splitter(Protocol):
    """Splits the body of a stream into server-sent events: what comes in another framing is turned into them.
    `openai.sse.EventSplitter` is one."""

    @property
    def pending(self) -> bytes:
        """The beginning of an event whose end has not come."""

    def feed(self, piece: bytes) -> list[bytes]:
        """Takes the next piece of the body, and returns the events that are whole now.

        Raises:
            EventTooLarge: An event is larger than allowed.
        """


class Tracker(Protocol):
    """Knows when a stream has content, is complete or has failed. `openai.completion.CompletionTracker` is one."""

    error: GatewayError | None
    has_content: bool
    complete: bool

    @property
    def usage(self) -> Usage | None:
        """The token counts that were reported last."""

    @property
    def all_finished(self) -> bool:
        """The answer has said how it ended: the stream may close."""

    def observe(self, event: bytes, data: bytes) -> bool:
        """Takes the next event, and its data. Returns whether it belongs to the answer; False if it is a heartbeat, or
        an error, which is then in ``error``."""


class EventDecoder(Protocol):
    """Turns the events of an upstream's format into those of the vocabulary."""

    def feed(self, data: bytes) -> Iterable[Event]:
        """Takes the data of one event that belongs to the answer and does not complete it.

        Raises:
            ProtocolViolation: It makes no sense.
        """

    def feed_end(self) -> Iterable[Event]:
        """The stream is complete: returns the rest, which ends with `vocabulary.Finish`. Raises as `feed`."""


@attrs.frozen
class StreamParts:
    """The parts that read one stream of an upstream."""

    splitter: Splitter
    tracker: Tracker
    decoder: EventDecoder


class UpstreamFormat(Protocol):
    """A format that upstreams speak."""

    @property
    def stream_types(self) -> tuple[str, ...]:
        """The content types of its streams, besides that of server-sent events."""

    def path(self, request: Request, model: str) -> str:
        """Where a request goes, below the upstream's base URL; with its query.

        Args:
            model: The upstream's own model id.
        """

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Which of the client's headers go to the upstream."""

    def encode_request(
        self, request: Request, *, model: str, upstream: UpstreamConfig
    ) -> tuple[bytes, tuple[str, ...]]:
        """Encodes a request.

        Returns:
            The body, and the names of the advisory fields that were dropped: of `vocabulary.Request`.

        Raises:
            BadRequest: The request makes no sense.
            Untranslatable: Something in it cannot be expressed; ``param`` names it.
        """

    def stream_parts(self, *, upstream: str, max_event_bytes: int) -> StreamParts:
        """Makes the parts that read a streamed answer.

        Args:
            upstream: The upstream's name, for messages.
        """

    def decode_answer(self, body: bytes, *, upstream: str) -> tuple[Answer, Usage | None]:
        """Decodes an answer that is not streamed; returns it with the token counts for the ledger.

        Raises:
            ProtocolViolation: It is no answer.
            Reported: It is an error.
        """

    def events(self, body: bytes, *, upstream: str) -> bytes:
        """Makes a stream, as the upstream would have sent it, of a JSON answer to a streamed call.

        Raises:
            GatewayError: It is not an answer, or one that no stream can be made of.
        """

    def collected(self, body: bytes, *, upstream: str) -> bytes:
        """Makes a JSON answer, as the upstream would have sent it, of a stream that answers a call without ``stream``.

        Raises:
            GatewayError: It is not complete, or no answer can be made of it.
        """
