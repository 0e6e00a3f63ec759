"""Decides which calls are traced, and exports their spans: in a thread, in batches, from a bounded queue.

A call that ends appends its spans to the queue, which takes no longer when the receiver is slow or gone: what finds no
room is dropped and counted. A task takes them out in batches and has a thread encode and send each. One thread, so that
encoding never competes with more than itself for the interpreter.

Everything is set by OpenTelemetry's own environment variables (`open_tracer`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import attrs
import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.logs import log, message_of
from trigate.tracing.context import SpanContext, flags_for, parse_traceparent
from trigate.tracing.span import Span

if TYPE_CHECKING:
    from trigate.tracing.otlp import OtlpExport

CLOSE_TIMEOUT_S = 3.0
"""How long the last spans may take when the gateway closes."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_QUEUE_SPANS = 2048
_BATCH_SPANS = 512
_DELAY_MS = 5000


class Export(Protocol):
    """Samples calls, and sends spans."""

    def samples(self, parent: SpanContext | None, trace_id: str, name: str) -> bool:
        """Whether a call is to be traced."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """Sends spans, in a thread; returns why they could not be sent."""

    def close(self) -> None:
        """Ends a `send` that is waiting to try again."""


@attrs.frozen(kw_only=True)
class TracingStatistics:
    """A snapshot of the export of traces.

    Attributes:
        state: ``failing`` = the last batch could not be sent; ``unavailable`` = traces are asked for and cannot be had.
        exported, dropped: Spans since the start.
        waiting: Spans in the queue.
        error: Why it fails, or is not available.
    """

    state: Literal["off", "ok", "failing", "unavailable"] = "off"
    exported: int = 0
    dropped: int = 0
    waiting: int = 0
    error: str | None = None


def new_span_id() -> str:
    """Makes the id of a span."""
    return f"{random.getrandbits(64) or 1:016x}"


@attrs.frozen(kw_only=True)
class Trace:
    """The place of a call in its trace.

    Attributes:
        own: The span of the call.
        parent: The caller's span; None = the trace begins here.
        tracestate: As the caller sent it.
    """

    tracer: Tracer
    own: SpanContext
    parent: SpanContext | None
    tracestate: str

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are exported."""
        return self.own.is_sampled

    def headers(self, headers: Mapping[str, str], span_id: str) -> dict[str, str]:
        """Returns the headers of a request that is a part of the call.

        Args:
            headers: Those of the client that go upstream.
            span_id: The span of the request.
        """
        own = {**headers, "traceparent": attrs.evolve(self.own, span_id=span_id).traceparent()}
        if not self.tracestate:
            own.pop("tracestate", None)
        return own


class Tracer:
    """The traces of this worker. Made by `open_tracer`.

    Args:
        queue_spans: How many spans may wait.
        batch_spans: How many are sent at once.
        delay_s: How long a span waits for others.
    """

    def __init__(
        self,
        export: Export,
        *,
        queue_spans: int = _QUEUE_SPANS,
        batch_spans: int = _BATCH_SPANS,
        delay_s: float = _DELAY_MS / 1000,
    ) -> None:
        self._export = export
        self._queue: deque[Span] = deque()
        self._queue_spans = queue_spans
        self._batch_spans = min(batch_spans, queue_spans)
        self._delay_s = delay_s
        self._batch_is_full = Wakeup()
        self._sending = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._exported = self._dropped = 0
        self._error: str | None = None

    def __repr__(self) -> str:
        return f"<Tracer, {len(self._queue)} spans waiting, {self._exported} exported, {self._dropped} dropped>"

    def statistics(self) -> TracingStatistics:
        """Returns a snapshot."""
        return TracingStatistics(
            state="ok" if self._error is None else "failing",
            exported=self._exported,
            dropped=self._dropped,
            waiting=len(self._queue),
            error=self._error,
        )

    def begin(self, headers: Mapping[str, str], name: str) -> Trace:
        """Gives a call its place in a trace: that of its caller, or a new one.

        Args:
            headers: Those of its request.
            name: Of its span.
        """
        given = headers.get("traceparent")
        parent = parse_traceparent(given) if given is not None else None
        trace_id = parent.trace_id if parent is not None else f"{random.getrandbits(128) or 1:032x}"
        flags = flags_for(parent, is_sampled=self._export.samples(parent, trace_id, name))
        return Trace(
            tracer=self,
            own=SpanContext(trace_id, new_span_id(), flags),
            parent=parent,
            tracestate=headers.get("tracestate", "") if parent is not None else "",
        )

    def record(self, spans: Sequence[Span]) -> None:
        """Takes the spans of a call that has ended. Synchronous; never fails."""
        if len(self._queue) + len(spans) > self._queue_spans:
            self._dropped += len(spans)
            return
        self._queue.extend(spans)
        if len(self._queue) >= self._batch_spans and not self._batch_is_full.is_set:
            self._batch_is_full.set()

    async def run(self) -> None:
        """Sends spans; never returns."""
        while True:
            with trio.move_on_after(self._delay_s):
                await self._batch_is_full.wait()
            await self.flush()

    async def flush(self) -> None:
        """Sends the spans that wait now.

        **Cancels:** at once; a batch that is being sent counts as dropped, and may arrive.
        """
        async with self._sending:
            left = len(self._queue)
            while left > 0:
                left -= await self._send()

    async def _send(self) -> int:
        """Sends a batch; returns how many spans it has."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch_spans))]
        error: str | None = "the gateway stopped"
        try:
            error = await trio.to_thread.run_sync(
                self._export.send, batch, abandon_on_cancel=True, limiter=self._thread
            )
        finally:
            if error is None:
                self._exported += len(batch)
            else:
                self._dropped += len(batch)
        self._note(error)
        return len(batch)

    def _note(self, error: str | None) -> None:
        """Logs that the export has begun to fail, or works again."""
        if error is not None and self._error is None:
            log.warning("traces_not_exported", error=error, dropped=self._dropped)
        elif error is None and self._error is not None:
            log.info("traces_exported", dropped=self._dropped)
        self._error = error

    def close(self) -> None:
        """Ends a batch that waits to be sent again. Later spans are dropped."""
        self._queue_spans = 0
        self._export.close()


class Tracing:
    """The traces of this worker, or why there are none.

    Attributes:
        tracer: None = calls are not traced.
    """

    def __init__(self, tracer: Tracer | None = None, *, unavailable: str | None = None) -> None:
        self.tracer = tracer
        self._unavailable = unavailable

    def statistics(self) -> TracingStatistics:
        """Returns a snapshot."""
        if self.tracer is not None:
            return self.tracer.statistics()
        if self._unavailable is not None:
            return TracingStatistics(state="unavailable", error=self._unavailable)
        return TracingStatistics()


def is_asked_for(env: Mapping[str, str]) -> bool:
    """Whether the environment switches traces on: with ``OTEL_TRACES_EXPORTER=otlp``, or with the address of a
    receiver.

    >>> is_asked_for({}), is_asked_for({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})
    (False, True)
    >>> is_asked_for({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_TRACES_EXPORTER": "none"})
    False
    """
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = env.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporters:
        return "otlp" in [name.strip() for name in exporters.split(",")]
    return any(env.get(name, "").strip() for name in _ENDPOINTS)


def _load(env: Mapping[str, str], worker: str) -> OtlpExport | str:
    """Imports OpenTelemetry, in a thread; returns why that is not possible."""
    protocol = next((env[name].strip() for name in _PROTOCOLS if env.get(name, "").strip()), "http/protobuf")
    if protocol != "http/protobuf":
        return f"the protocol {protocol!r} is not supported: set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf"
    try:
        from trigate.tracing.otlp import OtlpExport
    except ImportError as error:
        return f"pip install trigate[otel] ({message_of(error)})"
    try:
        return OtlpExport(worker)
    except Exception as error:  # what the variables say is not valid
        return message_of(error)


@asynccontextmanager
async def open_tracer(env: Mapping[str, str], *, worker: str) -> AsyncIterator[Tracing]:
    """Opens the export of traces for a block, if the environment asks for it. The variables are OpenTelemetry's own,
    and its SDK reads those of the process: the receiver (``OTEL_EXPORTER_OTLP_…``), the sampling
    (``OTEL_TRACES_SAMPLER``), the queue (``OTEL_BSP_…``), the resource (``OTEL_RESOURCE_ATTRIBUTES``).

    Args:
        worker: The id of this worker, for the resource.
    """
    if not is_asked_for(env):
        yield Tracing()
        return
    loaded = await trio.to_thread.run_sync(_load, env, worker)
    if isinstance(loaded, str):
        log.warning("traces_unavailable", reason=loaded)
        yield Tracing(unavailable=loaded)
        return
    tracer = Tracer(
        loaded,
        queue_spans=_number(env, "OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE_SPANS),
        batch_spans=_number(env, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _BATCH_SPANS),
        delay_s=_number(env, "OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS) / 1000,
    )
    async with open_service(tracer.run):
        try:
            yield Tracing(tracer)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT_S):
                await tracer.flush()
            tracer.close()


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    """The value of a variable; the default, if it is no number above 0.

    >>> _number({"A": "5"}, "A", 7), _number({"A": "x"}, "A", 7), _number({"A": "0"}, "A", 7), _number({}, "A", 7)
    (5, 7, 7, 7)
    """
    value = env.get(name, "").strip()
    return int(value) if value.isascii() and value.isdigit() and 0 < int(value) < 2**31 else default
