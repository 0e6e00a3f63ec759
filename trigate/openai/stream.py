"""A stream on its way through the gateway: bytes of the upstream in, bytes for the client out, in whole events.

Four parts work on a stream, and none of them decodes more than it needs:

- `trigate.openai.sse.EventSplitter` finds the events;
- `trigate.openai.completion.CompletionTracker` learns what the gateway must know: the first content, the end, an error,
  the usage;
- `trigate.openai.model_rewriter.ModelRewriter` replaces the upstream's model id by the public one;
- `trigate.openai.tool_calls.ToolCallIndexes` adds indexes that tool calls lack.

`StreamReader` connects them, and has a shortcut. Nearly every event of nearly every stream is one line, begins like the
one before it up to the model id, and in a chat up to the text, and holds nothing that the tracker must see. Such an
event is *plain*:
the public prefix replaces the upstream's, and a few searches check that the rest is as harmless as it looks. That costs
a quarter of the general way. An event with the same prefix as one that was parsed has its model at the same place, so
both ways give the same result; a test feeds the same streams to both.

Rules for editing this: the shortcut runs for every event of every stream, so `./scripts/bench --micro` decides. The
reader keeps its own copy of the prefix because an attribute of another object costs a lookup for each event. Bytes are
searched with ``count``: ``in`` first tries its left side as a number, which costs three times the search itself.
"""

from __future__ import annotations

from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.completion import CompletionTracker
from trigate.openai.continuation import ContinuationHead, continued
from trigate.openai.endpoints import DONE, Endpoint
from trigate.openai.model_rewriter import ModelRewriter
from trigate.openai.raw_json import decode_any
from trigate.openai.tool_calls import ToolCallIndexes


class StreamReader:
    """Turns the body of an upstream's stream into what the client gets.

    Nothing is returned before the first content: until then, another target can still be tried.

    Args:
        endpoint: Decides how the stream ends.
        model: The public model id, which replaces the upstream's in every event; None = the upstream's stays.
        upstream: The upstream's name, for messages.
        max_event_bytes: The largest event, and the most bytes before the first content.
        choices: How many choices the client asked for.
        keep_bytes: How much of the returned data is kept for another upstream to continue the stream (`kept`).
        head: The continuation head of the stream that this one continues; None if it continues none.
        splitter: Splits the body, and may change the events; None = one that does not.
        hides_usage: The event that has nothing but token counts is not for the client.

    Attributes:
        events: How many events have been returned.
    """

    __slots__ = (
        "_head",
        "_held",
        "_keep_bytes",
        "_kept",
        "_max_bytes",
        "_prefix",
        "_public_prefix",
        "_rewriter",
        "_shortcut",
        "_splitter",
        "_tool_calls",
        "_tracker",
        "_upstream",
        "events",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str | None,
        upstream: str,
        max_event_bytes: int = 2**24,
        choices: int = 1,
        keep_bytes: int = 0,
        head: ContinuationHead | None = None,
        splitter: sse.EventSplitter | None = None,
        hides_usage: bool = False,
    ) -> None:
        self._upstream = upstream
        self._max_bytes = max_event_bytes
        self._keep_bytes = keep_bytes
        self._kept: list[bytes] = []
        self._head = head
        self._splitter = splitter or sse.EventSplitter(max_event_bytes=max_event_bytes)
        self._tracker = CompletionTracker(endpoint, upstream=upstream, choices=choices, hides_usage=hides_usage)
        in_choices = endpoint.needs_finish_reason
        self._rewriter = ModelRewriter(model, watched=self._tracker.watched, in_choices=in_choices)
        self._tool_calls = ToolCallIndexes() if in_choices else None
        self._shortcut = choices == 1 and head is None and splitter is None
        self._prefix = b""  # b"" = the next piece is not tried as plain events
        self._public_prefix = b""
        self._held = b""  # the events before the first content
        self.events = 0

    @property
    def has_content(self) -> bool:
        """A part of the answer has come."""
        return self._tracker.has_content

    @property
    def complete(self) -> bool:
        """The stream's last event has come; the bytes after it are ignored."""
        return self._tracker.complete

    @property
    def may_end(self) -> bool:
        """The stream is complete if it closes now, but it may also continue."""
        return self._tracker.may_end

    @property
    def all_finished(self) -> bool:
        """At least one choice has come, and every choice that came has had its ``finish_reason``."""
        return self._tracker.all_finished

    @property
    def usage(self) -> Usage | None:
        """The usage that was reported last."""
        return self._tracker.usage

    @property
    def error(self) -> GatewayError | None:
        """What is wrong with the stream, or the error that the upstream reported; no more may be fed after it."""
        return self._tracker.error

    @property
    def kept(self) -> list[bytes] | None:
        """Everything that was returned, if it was to be kept; None if not, or if it was more than ``keep_bytes``."""
        return self._kept if self._keep_bytes else None

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body, and returns what can be sent to the client now (``b""`` = nothing yet)."""
        if self._prefix:
            plain = self._feed_plain(piece)
            if plain is not None:
                if self._keep_bytes:
                    self._keep(plain)
                return plain
        tracker = self._tracker
        too_large = ""  # the message: the error itself would keep this frame
        try:
            events = self._splitter.feed(piece) if not tracker.complete else []
        except sse.EventTooLarge as error:
            events, too_large = error.before, str(error)
        frames = [self._held]
        held_bytes = len(self._held)
        for event in events:
            frame = self.read(event)
            if tracker.error is not None:
                break
            if frame:
                frames.append(frame)
            if tracker.complete:
                break
            if not tracker.has_content:
                held_bytes += len(frame)
                if held_bytes > self._max_bytes:
                    tracker.error = ProtocolViolation(
                        f"The upstream {self._upstream} sent {held_bytes} bytes without any content."
                    )
                    break
        if too_large and not tracker.complete and tracker.error is None:
            tracker.error = ProtocolViolation(f"The upstream {self._upstream} sent too much: {too_large}.")
        self.events += len(frames) - 1
        out = b"".join(frames)
        if not tracker.has_content and tracker.error is None:
            self._held = out
            return b""
        self._held = b""
        if self._shortcut and not tracker.complete and tracker.error is None and self._splitter.is_between_events:
            self._prefix, self._public_prefix = self._rewriter.prefix, self._rewriter.public_prefix
        else:
            self._prefix = b""
        if self._keep_bytes:
            self._keep(out)
        return out

    def feed_end(self) -> bytes:
        """Takes the end of the body, and returns the rest for the client. Sets `complete`, or `error` if the stream was
        truncated.

        A last event may lack its blank line, and a stream whose choices have all ended may lack its ``[DONE]``, which
        is then added.
        """
        tracker = self._tracker
        rest = b""
        pending = sse.data_of(self._splitter.pending + b"\n\n") if self._splitter.pending else None
        if pending and not tracker.complete and (pending == DONE or isinstance(decode_any(pending), dict)):
            rest = self.feed(b"\n\n")
        if tracker.complete or tracker.error is not None:
            return rest
        if tracker.may_end:
            tracker.complete = True
        elif tracker.lacks_only_its_end:
            tracker.complete = True
            self.events += 1
            return rest + b"data: " + DONE + b"\n\n"
        else:
            tracker.error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
        return rest

    def read(self, event: bytes) -> bytes:
        """Takes one whole event, and returns it as the client gets it; ``b""`` if it is not for the client.

        Sets `complete` at the stream's last event, `may_end` where the stream may close or continue, and `error` at an
        error event (which is then not returned).
        """
        data = sse.data_of(event)
        if not data:
            return b""  # comments are the upstream's keep-alive; the gateway sends its own
        if not self._tracker.observe(event, data):
            return b""
        if self._tool_calls is not None and data.count(b'"tool_calls"'):
            indexed = self._tool_calls.added(data)
            if indexed is not data:
                event, data = sse.with_data(event, indexed), indexed
        rewritten = self._rewriter.rewrite(sse.without_resumption(event), data)
        if self._head is None:
            return rewritten
        # the client has already received what comes before the first content
        return continued(rewritten, self._head) if self._tracker.has_content else b""

    def _keep(self, frames: bytes) -> None:
        self._kept.append(frames)
        self._keep_bytes = max(0, self._keep_bytes - len(frames))

    def _feed_plain(self, piece: bytes) -> bytes | None:
        """Returns what the client gets for a piece of plain events; None if any event in it may not be plain."""
        if not piece.startswith(self._prefix) or not piece.endswith(b"\n\n") or len(piece) > self._max_bytes:
            return None
        size = len(self._prefix) - 1  # the last quote of the prefix is examined together with what follows it
        rest = piece[size:]
        if rest.find(b"\n") == len(rest) - 2:
            if rest.count(b'"model"') or rest.count(b"\\u006") or rest.count(b"\r") or self._tracker.may_matter(rest):
                return None
            self.events += 1
            return self._public_prefix + rest
        events = piece.split(b"\n\n")
        if events.pop():  # what follows the last blank line
            return None
        rests = [event[size:] for event in events]
        for event, rest in zip(events, rests, strict=True):
            if not event.startswith(self._prefix) or b"\n" in rest:
                return None
            if rest.count(b'"model"') or rest.count(b"\\u006") or rest.count(b"\r") or self._tracker.may_matter(rest):
                return None
        self.events += len(rests)
        return b"".join([part for rest in rests for part in (self._public_prefix, rest, b"\n\n")])
