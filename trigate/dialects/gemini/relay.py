"""Gemini's format on both sides: bytes in, bytes out.

The model is in the path, so the body goes as it came, unless it names its model as well. Thoughts and their signatures,
parts and fields that are newer than the gateway are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.gemini.conversion import answer_of, events_of
from trigate.dialects.gemini.decode import answer_object
from trigate.dialects.gemini.events import Framing
from trigate.dialects.gemini.tracker import GeminiSplitter, GeminiTracker
from trigate.dialects.gemini.upstream import method_path, own_headers
from trigate.dialects.gemini.usage import reported_usage
from trigate.dialects.gemini.values import camel
from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.provider_error import reported
from trigate.openai.raw_json import decode_any, join_fields, split_fields
from trigate.openai.request import Call

_GENERATE = ("generateContent", "streamGenerateContent")


class GeminiRelay:
    """A `trigate.exchange.translation.Translation` between two ends of the same format."""

    dropped: tuple[str, ...] = ()
    stream_types: tuple[str, ...] = ()

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers that are sent."""
        return own_headers(headers)

    def path(self, call: Call, model: str) -> str:
        """Where the call goes."""
        return method_path(model, method_of(call))

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body, as it came; where it names a model, the upstream's own one."""
        if b'"model"' not in call.body:
            return call.body
        return _with_model(call, model if model.startswith("tunedModels/") else f"models/{model}")

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> RelayedEvents:
        """Makes the reader of a streamed answer."""
        is_array = call.endpoint.stream_type.startswith("application/json")
        return RelayedEvents(upstream=upstream, max_event_bytes=max_event_bytes, is_array=is_array)

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's stream of a JSON answer to a streamed call."""
        return events_of(body, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """Makes the upstream's JSON answer of a stream."""
        return answer_of(body, upstream=upstream)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Checks a whole answer; returns it as it is, with the token counts in it.

        Raises:
            Reported: It is an error.
            ProtocolViolation: It is no answer.
        """
        if method_of(call) in _GENERATE:
            return body, reported_usage(answer_object(body, upstream=upstream).get("usageMetadata"))
        value = decode_any(body)
        if isinstance(value, dict) and value.get("error"):
            raise reported(upstream, value)
        if not isinstance(value, dict) or call.endpoint.results not in value:
            raise ProtocolViolation(f"The upstream {upstream} answered 200 without {call.endpoint.results}.")
        return body, None


def method_of(call: Call) -> str:
    """Returns the method that a call's path names."""
    return call.endpoint.path.rpartition(":")[2].partition("?")[0]


def _with_model(call: Call, model: str) -> bytes:
    """Returns the body with another model, where one is: at the top, or in the requests within it."""
    name = msgspec.Raw(msgspec.json.encode(model))
    fields = dict(call.fields)
    for key, raw in call.fields.items():
        if key == "model":
            fields[key] = name
        elif camel(key) == "generateContentRequest":
            fields[key] = _renamed(raw, name)
        elif key == "requests" and (rows := _rows(raw)) is not None:
            fields[key] = msgspec.Raw(b"[" + b",".join([bytes(_renamed(row, name)) for row in rows]) + b"]")
    return call.body if fields == dict(call.fields) else join_fields(fields)


def _renamed(raw: msgspec.Raw, name: msgspec.Raw) -> msgspec.Raw:
    try:
        fields = split_fields(raw)
    except (ValueError, RecursionError):
        return raw  # the upstream says what is wrong with it
    return msgspec.Raw(join_fields({**fields, "model": name})) if "model" in fields else raw


def _rows(raw: msgspec.Raw) -> list[msgspec.Raw] | None:
    try:
        return msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (ValueError, RecursionError):
        return None


def _whole(event: bytes) -> bytes:
    """Returns an event with the whole of its blank line: where a piece of the body ended within it, the splitter has
    left the last byte out, and Google's JavaScript SDK looks for that."""
    return sse.without_resumption(event) if event.endswith(b"\n") else event + b"\n"


class RelayedEvents:
    """A `trigate.exchange.translation.Reader`: the events go to the client as they came.

    Args:
        upstream: The upstream's name, for messages.
        max_event_bytes: The largest event, and the most bytes before the first content.
        is_array: The client gets the data of the events as the elements of an array.
    """

    __slots__ = (
        "_framing",
        "_held",
        "_held_bytes",
        "_max_bytes",
        "_splitter",
        "_tracker",
        "_upstream",
        "complete",
        "error",
        "events",
    )
    kept: None = None

    def __init__(self, *, upstream: str, max_event_bytes: int, is_array: bool) -> None:
        self._upstream = upstream
        self._max_bytes = max_event_bytes
        self._splitter = GeminiSplitter(max_event_bytes=max_event_bytes)
        self._tracker = GeminiTracker(upstream=upstream, fails_by_reason=False)
        self._framing = Framing(is_array=True) if is_array else None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.events = 0
        self.complete = False
        self.error: GatewayError | None = None

    @property
    def has_content(self) -> bool:
        """A part of the answer has come."""
        return self._tracker.has_content

    @property
    def all_finished(self) -> bool:
        """The answer has said how it ended."""
        return self._tracker.all_finished

    @property
    def usage(self) -> Usage | None:
        """The usage that was reported last."""
        return self._tracker.usage

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body, and returns what can be sent to the client now (``b""`` = nothing yet)."""
        too_large = ""  # the message: the error itself would keep this frame
        try:
            events = self._splitter.feed(piece)
        except sse.EventTooLarge as error:
            events, too_large = error.before, str(error)
        frames = self._held
        for event in events:
            data = sse.data_of(event)
            if not data:
                continue  # a comment, which Google's clients cannot read
            if not self._tracker.observe(event, data):
                self.error = self._tracker.error
                break
            self.events += 1
            frames.append(_whole(event) if self._framing is None else self._framing.chunk(data))
        if too_large and self.error is None:
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent too much: {too_large}.")
        if not self._tracker.has_content and self.error is None:
            self._held_bytes += len(piece)
            if self._held_bytes > self._max_bytes:
                self.error = ProtocolViolation(
                    f"The upstream {self._upstream} sent {self._held_bytes} bytes without any content."
                )
            return b""
        self._held = []
        return b"".join(frames)

    def feed_end(self) -> bytes:
        """Takes the end of the body, and returns the rest for the client. Sets `complete`, or `error` if the stream was
        truncated."""
        rest = b""
        pending = sse.data_of(self._splitter.pending + b"\n\n") if self._splitter.pending else None
        if self.error is None and pending and isinstance(decode_any(pending), dict):
            rest = self.feed(b"\n\n")
        if self.error is not None:
            return rest
        if not self._tracker.all_finished or self._splitter.pending.strip():
            self.error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
            return rest
        self.complete = True
        return rest + (self._framing.end() if self._framing is not None else b"")
