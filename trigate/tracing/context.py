"""The headers of W3C Trace Context: ``traceparent`` and ``tracestate``. Pure.

**Source:** https://www.w3.org/TR/trace-context-2/
"""

from __future__ import annotations

import re

import attrs

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_SAMPLED = 0x01
_KNOWN_FLAGS = 0x03  # sampled, and "the trace id is random"; all others have to be 0


@attrs.frozen
class SpanContext:
    """A span, as its children know it.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        flags: Those that the specification knows.
    """

    trace_id: str
    span_id: str
    flags: int = 0

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records the trace."""
        return bool(self.flags & _SAMPLED)

    def traceparent(self) -> str:
        """The value of the header ``traceparent``.

        >>> SpanContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1).traceparent()
        '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
        """
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def flags_for(parent: SpanContext | None, *, is_sampled: bool) -> int:
    """The flags of a span, by those of its parent."""
    kept = parent.flags & ~_SAMPLED if parent is not None else 0
    return kept | _SAMPLED if is_sampled else kept


def parse_traceparent(value: str) -> SpanContext | None:
    """Reads ``traceparent``; None = it is not valid, and then ``tracestate`` counts for nothing either.

    >>> parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    SpanContext(trace_id='4bf92f3577b34da6a3ce929d0e0e4736', span_id='00f067aa0ba902b7', flags=1)
    >>> parse_traceparent("00-00000000000000000000000000000000-00f067aa0ba902b7-01") is None
    True

    A later version may have more behind the flags; version 00 may not.

    >>> parse_traceparent("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-09-more").flags
    1
    >>> parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more") is None
    True
    """
    match = _TRACEPARENT.match(value.strip(" \t"))
    if match is None or (match[5] and match[1] == "00"):
        return None
    return SpanContext(match[2], match[3], int(match[4], 16) & _KNOWN_FLAGS)
