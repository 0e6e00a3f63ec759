"""Sends spans with OpenTelemetry's SDK. The only module that imports it, which takes a quarter of a second.

The SDK's tracer sees only spans that have ended (`Span`). It makes its own of them in the thread that sends, with the
ids that they have, so its limits on attributes hold. Its sampler, from ``OTEL_TRACES_SAMPLER``, is asked when a call
begins.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision
from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, Status, StatusCode, TraceState, set_span_in_context
from opentelemetry.trace import SpanContext as SdkContext
from opentelemetry.trace import TraceFlags as SdkFlags

from trigate.logs import message_of
from trigate.tracing.context import SpanContext
from trigate.tracing.span import Span
from trigate.version import __version__

_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_ERROR = Status(StatusCode.ERROR)
_NOT_KEPT = re.compile(r"\?[^\s'\")]*| object at 0x[0-9a-f]+|, retrying in [0-9.]+s")


class OtlpExport:
    """Samples calls and sends spans, as the environment variables of the process say. `tracer.Export`.

    Args:
        worker: The id of this worker, for the resource.

    Raises:
        Exception: A variable has no valid value.
    """

    def __init__(self, worker: str) -> None:
        self._failures = _Failures()
        logger = logging.getLogger("opentelemetry")
        logger.handlers = [self._failures]  # else Python writes what it logs to standard error, in a form of its own
        logger.propagate = False
        found = Resource.create({})
        own = {"service.version": __version__, "trigate.worker": worker}
        own = {name: value for name, value in own.items() if name not in found.attributes}
        if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
            own["service.name"] = "trigate"
        resource = found.merge(Resource(own))
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        self._exporter = OTLPSpanExporter()
        self._ids = _GivenIds()
        self._ended = _Collector()
        provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        provider.add_span_processor(self._ended)
        self._tracer = provider.get_tracer("trigate", __version__)

    def samples(self, parent: SpanContext | None, trace_id: str, name: str) -> bool:
        """Whether a call is to be traced."""
        context = _context_of(parent.trace_id, parent.span_id, parent.flags, is_remote=True) if parent else None
        result = self._sampler.should_sample(context, int(trace_id, 16), name, SpanKind.SERVER)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def send(self, spans: Sequence[Span]) -> str | None:
        """Sends spans; returns why they could not be sent. Waits for the receiver; for a thread."""
        self._failures.text = ""
        try:
            result = self._exporter.export(_Yielding(self._make, spans))
        except Exception as defect:
            return message_of(defect)
        return None if result is SpanExportResult.SUCCESS else self._failures.text or "the receiver refused them"

    def close(self) -> None:
        """Ends a `send` that is waiting to try again."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _make(self, span: Span) -> ReadableSpan:
        """Has the SDK make its own span."""
        self._ids.trace_id, self._ids.span_id = int(span.trace_id, 16), int(span.span_id, 16)
        context = Context()
        if span.parent_id is not None:
            context = _context_of(
                span.trace_id, span.parent_id, 1, is_remote=span.is_parent_remote, tracestate=span.tracestate
            )
        made = self._tracer.start_span(
            span.name,
            context,
            _KINDS[span.kind],
            span.attributes,
            links=[Link(_sdk_context(*span.link, 1, is_remote=False))] if span.link is not None else (),
            start_time=_nanoseconds(span.started_at),
        )
        for event in span.events:
            made.add_event(event.name, event.attributes, _nanoseconds(event.at))
        if span.failed:
            made.set_status(_ERROR)
        made.end(_nanoseconds(span.ended_at))
        return self._ended.last


class _GivenIds(IdGenerator):
    """Gives a span the ids that it has already."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Collector(SpanProcessor):
    """Keeps the last span that has ended."""

    last: ReadableSpan

    def on_end(self, span: ReadableSpan) -> None:
        self.last = span


class _Yielding(Sequence[ReadableSpan]):
    """Spans that are made while they are encoded. Behind each, the thread lets others have the interpreter.

    A thread that only computes gives it up every 5 ms, and the event loop asks for it at each system call. While 512
    spans were made, three system calls took 8 ms instead of 0.6; like this, they take 1 ms.
    """

    def __init__(self, make: Callable[[Span], ReadableSpan], spans: Sequence[Span]) -> None:
        self._make = make
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> ReadableSpan: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ReadableSpan]: ...

    def __getitem__(self, index: int | slice) -> ReadableSpan | Sequence[ReadableSpan]:
        found = self._spans[index]
        return self._make(found) if isinstance(found, Span) else [self._make(span) for span in found]

    def __iter__(self) -> Iterator[ReadableSpan]:
        for span in self._spans:
            yield self._make(span)
            time.sleep(0)


class _Failures(logging.Handler):
    """Keeps the first thing that the SDK says of a failure, without the query of a URL, which may have a key in it."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or _NOT_KEPT.sub("", record.getMessage())[:500]


def _sdk_context(trace_id: str, span_id: str, flags: int, *, is_remote: bool, tracestate: str = "") -> SdkContext:
    state = TraceState.from_header([tracestate]) if tracestate else None
    return SdkContext(int(trace_id, 16), int(span_id, 16), is_remote, SdkFlags(flags), state)


def _context_of(trace_id: str, span_id: str, flags: int, *, is_remote: bool, tracestate: str = "") -> Context:
    own = _sdk_context(trace_id, span_id, flags, is_remote=is_remote, tracestate=tracestate)
    return set_span_in_context(NonRecordingSpan(own), Context())


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)
