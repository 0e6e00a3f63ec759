"""A span, as a plain value: it refers to nothing of the call that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

Value = str | int | float | bool
Attributes = Mapping[str, Value]


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened in a span."""

    name: str
    at: float
    attributes: Attributes = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Span:
    """A piece of work with a beginning and an end.

    Attributes:
        trace_id, span_id: Hexadecimal digits.
        parent_id: The span that it is a part of; None = it begins its trace.
        is_parent_remote: That span is the caller's.
        tracestate: Of the trace, as the caller sent it.
        link: The ids of the trace and of a span that it shares its work with.
        failed: It ended in an error.

    **Units:** times in POSIX seconds.
    """

    name: str
    kind: Literal["server", "client"]
    trace_id: str
    span_id: str
    parent_id: str | None
    is_parent_remote: bool = False
    tracestate: str = ""
    started_at: float
    ended_at: float
    attributes: Attributes
    events: tuple[Event, ...] = ()
    link: tuple[str, str] | None = None
    failed: bool = False
