"""A translated stream: bytes of one format in, bytes of another one out, in whole events.

`TranslatedStream` joins the parts that read the upstream's format (`formats.StreamParts`) to the encoder of the
client's. It is used as `trigate.openai.stream.StreamReader`, which relays a stream of one format.

An event costs the parsing of its JSON, a decoded event and an encoded one. Nothing here keeps the answer, except what a
decoder holds back of a later part.
"""

from __future__ import annotations

from trigate.dialects.formats import ErrorEncoder, EventEncoder, StreamParts
from trigate.dialects.memory import AnswerMemory
from trigate.dialects.vocabulary import ArgumentsDelta, TextDelta
from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.endpoints import DONE
from trigate.openai.raw_json import decode_any


class TranslatedStream:
    """Turns the body of an upstream's stream into what the client gets. Nothing is returned before the first content.

    Args:
        parts: Read the upstream's stream.
        encoder: Encodes what the client gets.
        upstream: The upstream's name, for messages.
        max_event_bytes: The largest event, and the most bytes before the first content.

    Attributes:
        events: How many events of the upstream have been translated.
        complete: The answer has ended, and all of it has been returned.
        error: What is wrong with the stream; no more may be fed after it.
        kept: Always None: another upstream cannot continue a translated stream.
    """

    __slots__ = (
        "_decoder",
        "_encode_delta",
        "_encoder",
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

    def __init__(
        self,
        parts: StreamParts,
        encoder: EventEncoder,
        *,
        upstream: str,
        max_event_bytes: int = 2**24,
    ) -> None:
        self._decoder = parts.decoder
        self._encoder = encoder
        self._encode_delta = encoder.encoder.encode if isinstance(encoder, AnswerMemory) else encoder.encode
        self._upstream = upstream
        self._max_bytes = max_event_bytes
        self._splitter = parts.splitter
        self._tracker = parts.tracker
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
            events = [] if self.complete else self._splitter.feed(piece)
        except sse.EventTooLarge as error:
            events, too_large = error.before, str(error)
        frames: list[bytes] = []
        try:
            for event in events:
                self._take(event, frames)
                if self.complete or self.error is not None:
                    break
        except ProtocolViolation as error:
            self.error = error.with_traceback(None)
        except UnicodeEncodeError:
            self.error = half_of_a_character(self._upstream)
        if too_large and not self.complete and self.error is None:
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent too much: {too_large}.")
        if not self._tracker.has_content and self.error is None:
            self._held += frames
            self._held_bytes += len(piece)
            if self._held_bytes > self._max_bytes:
                self.error = ProtocolViolation(
                    f"The upstream {self._upstream} sent {self._held_bytes} bytes without any content."
                )
            return b""
        if self._held:
            frames = self._held + frames
            self._held = []
        return b"".join(frames)

    def _take(self, event: bytes, frames: list[bytes]) -> None:
        """Translates one event, and appends what the client gets for it."""
        data = sse.data_of(event)
        if not data:
            return  # a comment, which is the upstream's keep-alive
        tracker = self._tracker
        belongs = tracker.observe(event, data)
        if not belongs:
            self.error = tracker.error
            return
        self.events += 1
        if tracker.complete:
            self._finish(frames)
            return
        encode, encode_delta = self._encoder.encode, self._encode_delta
        for each in self._decoder.feed(data):
            kind = type(each)
            is_delta = kind is TextDelta or kind is ArgumentsDelta  # nearly all are
            frames.append(encode_delta(each) if is_delta else encode(each))

    def _finish(self, frames: list[bytes]) -> None:
        frames += map(self._encoder.encode, self._decoder.feed_end())
        self.complete = True

    def feed_end(self) -> bytes:
        """Takes the end of the body, and returns the rest for the client. Sets `complete`, or `error` if the stream was
        truncated.

        A stream that has said how it ended is complete, also without its last event, which some providers do not send.
        """
        rest = self._feed_pending()
        if self.complete or self.error is not None:
            return rest
        if not self._tracker.all_finished or self._splitter.pending.strip():
            self.error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
            return rest
        frames = [rest]
        try:
            self._finish(frames)
        except ProtocolViolation as error:
            self.error = error.with_traceback(None)
            return rest
        except UnicodeEncodeError:
            self.error = half_of_a_character(self._upstream)
            return rest
        return b"".join(frames)

    def error_frame(self, error: GatewayError, request_id: str = "") -> bytes | None:
        """Returns the last events of a stream that has failed; None = they do not depend on what was sent before."""
        encoder = self._encoder
        return encoder.encode_error(error, request_id) if isinstance(encoder, ErrorEncoder) else None

    def _feed_pending(self) -> bytes:
        """Takes a last event that is whole, except for its blank line."""
        if self.complete or self.error is not None or not self._splitter.pending:
            return b""
        pending = sse.data_of(self._splitter.pending + b"\n\n")
        is_whole = pending is not None and (pending == DONE or isinstance(decode_any(pending), dict))
        return self.feed(b"\n\n") if is_whole else b""


def half_of_a_character(upstream: str) -> ProtocolViolation:
    """The failure of an upstream that sends a lone surrogate in a name, an id or a payload: only text may have one, in
    which a decoder puts the halves together."""
    return ProtocolViolation(f"The upstream {upstream} sent half of a character in a name or an id.")
