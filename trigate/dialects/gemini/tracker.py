"""Follows a stream of Gemini's: splits it into events, and knows its first content, its end, its errors and its usage.

A stream has no last event. It is complete when its body ends after a ``finishReason``, or after a prompt that was
blocked; without either, it was truncated.
"""

from __future__ import annotations

import re
from typing import Any

from trigate.dialects.gemini.finish import failure, is_failure
from trigate.dialects.gemini.usage import reported_usage
from trigate.errors import GatewayError, ProtocolViolation
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.provider_error import reported
from trigate.openai.raw_json import decode_any

_LINE_END = re.compile(rb"[\r\n]+[ \t]*")


class GeminiSplitter:
    r"""Splits a stream into events. Google sends an error as JSON without ``data:`` before it, in one line or several:
    it becomes an event.

    >>> splitter = GeminiSplitter(max_event_bytes=100)
    >>> splitter.feed(b'data: {}\n\n{\n  "error": {}\n}\n\n')
    [b'data: {}\n\n', b'data: {"error": {}}\n\n']
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        self._events = sse.EventSplitter(max_event_bytes=max_event_bytes)

    @property
    def pending(self) -> bytes:
        """The beginning of an event whose end has not come."""
        return _as_event(self._events.pending)

    def feed(self, piece: bytes) -> list[bytes]:
        """Takes the next piece, and returns the events that are whole now. Raises EventTooLarge."""
        events = self._events.feed(piece)
        for at, event in enumerate(events):
            if event.startswith((b"{", b"[")):
                events[at] = _as_event(event) + b"\n\n"
        return events


def _as_event(data: bytes) -> bytes:
    if not data.startswith((b"{", b"[")):
        return data
    return b"data: " + _LINE_END.sub(b"", data)


class GeminiTracker:
    """A `formats.Tracker`.

    Args:
        upstream: The upstream's name, for messages.
        fails_by_reason: Whether a ``finishReason`` that stands for a failure is an error. A client of the same format
            sees it itself.

    Attributes:
        complete: Always False: only the end of the body completes a stream.
    """

    complete = False

    def __init__(self, *, upstream: str, fails_by_reason: bool) -> None:
        self._upstream = upstream
        self._fails = fails_by_reason
        self.error: GatewayError | None = None
        self.has_content = False
        self.all_finished = False
        self._counted = b""

    @property
    def usage(self) -> Usage | None:
        """The counts that were reported last. They are in every event, so they are decoded when they are asked for."""
        value = decode_any(self._counted) if self._counted else None
        return reported_usage(value.get("usageMetadata")) if isinstance(value, dict) else None

    def observe(self, event: bytes, data: bytes) -> bool:
        """As `formats.Tracker.observe`."""
        if data.count(b'"usageMetadata"'):
            self._counted = data
        if self.has_content and not data.count(b'"finishReason"') and not data.count(b'"error"'):
            return True
        value = decode_any(data)
        if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].get("error"):
            value = value[0]
        if not isinstance(value, dict):
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent an event that is not a JSON object.")
            return False
        if value.get("error") and not value.get("candidates"):
            self.error = reported(self._upstream, value)
            return False
        candidates = value.get("candidates")
        for candidate in candidates if isinstance(candidates, list) else ():
            if isinstance(candidate, dict):
                self._take(candidate)
        if is_blocked(value):
            self.has_content = self.all_finished = True
        return self.error is None

    def _take(self, candidate: dict[str, Any]) -> None:  # Any: JSON of any shape
        reason = candidate.get("finishReason")
        if isinstance(reason, str) and reason and reason != "FINISH_REASON_UNSPECIFIED":
            self.all_finished = True
            if self._fails and is_failure(reason):
                self.error = failure(reason, candidate.get("finishMessage"), upstream=self._upstream)
                return
            self.has_content = True
        content = candidate.get("content")
        parts = content.get("parts") if isinstance(content, dict) else None
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and any(value for name, value in part.items() if name != "thought"):
                self.has_content = True


def is_blocked(value: dict[str, Any]) -> bool:  # Any: JSON of any shape
    """Whether an answer or an event says that the prompt was blocked, so that there is no candidate."""
    feedback = value.get("promptFeedback")
    reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
    return bool(reason) and reason != "BLOCK_REASON_UNSPECIFIED" and not value.get("candidates")
