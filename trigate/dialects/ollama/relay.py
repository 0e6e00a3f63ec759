"""A stream of Ollama's format on its way to a client of the same format: whole lines, with the public model id."""

from __future__ import annotations

import msgspec

from trigate.dialects.ollama.upstream_answer import LineSplitter, usage_of
from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.provider_error import reported
from trigate.openai.raw_json import decode_any, split_provider_fields, with_model

_MODEL = b'{"model":"'
_CONTENT = ("content", "thinking", "tool_calls", "response")


class LineRelay:
    """Used as `trigate.openai.stream.StreamReader`. After the first content, only lines are parsed that may be the last
    one or an error.

    Args:
        model: The public model id, which replaces the upstream's in every line.
        upstream: The upstream's name, for messages.
        max_event_bytes: The largest line, and the most bytes before the first content.

    Attributes:
        events: How many lines have been returned.
        has_content, complete, error, usage: As those of `formats.Tracker`.
        kept: Always None: another upstream cannot continue it.
    """

    __slots__ = (
        "_held",
        "_held_bytes",
        "_max_bytes",
        "_model",
        "_splitter",
        "_upstream",
        "complete",
        "error",
        "events",
        "has_content",
        "usage",
    )
    kept: None = None

    def __init__(self, *, model: str, upstream: str, max_event_bytes: int) -> None:
        self._model = msgspec.json.encode(model)
        self._upstream = upstream
        self._max_bytes = max_event_bytes
        self._splitter = LineSplitter(max_event_bytes=max_event_bytes)
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.events = 0
        self.has_content = False
        self.complete = False
        self.error: GatewayError | None = None
        self.usage: Usage | None = None

    @property
    def all_finished(self) -> bool:
        """The last line has come."""
        return self.complete

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body, and returns what can be sent to the client now (``b""`` = nothing yet)."""
        lines: list[bytes] = []
        try:
            lines = [] if self.complete else self._splitter.lines(piece)
        except sse.EventTooLarge as error:
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent too much: {error}.")
        found = self._held
        self._held = []
        for line in lines:
            self._observe(line)
            if self.error is not None:
                break
            found.append(self._renamed(line))
            self.events += 1
            if self.complete:
                break
        if self.has_content or self.error is not None:
            return b"".join(found) if self.has_content else b""
        self._held = found
        self._held_bytes += len(piece)
        if self._held_bytes > self._max_bytes:
            self.error = ProtocolViolation(
                f"The upstream {self._upstream} sent {self._held_bytes} bytes without any content."
            )
        return b""

    def feed_end(self) -> bytes:
        """Takes the end of the body, and returns the rest for the client. Sets `complete`, or `error` if the stream was
        truncated. The last line may lack its end."""
        rest = b""
        if not self.complete and self.error is None and isinstance(decode_any(self._splitter.pending[6:]), dict):
            rest = self.feed(b"\n")
        if not self.complete and self.error is None:
            self.error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
        return rest

    def _observe(self, line: bytes) -> None:
        may_end = b'"done"' in line and b'"done":false' not in line
        if self.has_content and not may_end and b'"error"' not in line:
            return
        value = decode_any(line)
        if not isinstance(value, dict):
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent a line that is not a JSON object.")
        elif value.get("error"):
            self.error = reported(self._upstream, value)
        elif value.get("done") is True:
            self.complete = self.has_content = True
            self.usage = usage_of(value)
        elif not self.has_content:
            message = value.get("message")
            holders = (value, message if isinstance(message, dict) else {})
            self.has_content = any(holder.get(name) for holder in holders for name in _CONTENT)

    def _renamed(self, line: bytes) -> bytes:
        end = line.find(b'"', len(_MODEL))
        if line.startswith(_MODEL) and end > 0 and b"\\" not in line[:end]:
            return b'{"model":%b%b\n' % (self._model, line[end + 1 :])
        try:
            fields = split_provider_fields(line)
        except (ValueError, RecursionError):
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent a line that is not a JSON object.")
            return b""
        return (with_model(line, fields, self._model) if "model" in fields else line) + b"\n"
