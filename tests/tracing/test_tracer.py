"""The queue of spans: what is sent, what is dropped, and that nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.tracing.context import SpanContext
from trigate.tracing.span import Span
from trigate.tracing.tracer import Tracer, open_tracer

SPAN = Span(
    name="chat m",
    kind="server",
    trace_id="0" * 31 + "1",
    span_id="0" * 15 + "1",
    parent_id=None,
    started_at=1.0,
    ended_at=2.0,
    attributes={},
)


class Scripted:
    """Sends nothing, and answers as it is told; while it is held, not at all."""

    def __init__(self, *results: str | None) -> None:
        self.results = list(results)
        self.sent: list[int] = []
        self.released = threading.Event()
        self.released.set()

    def samples(self, parent: SpanContext | None, trace_id: str, name: str) -> bool:
        return True

    def send(self, spans: Sequence[Span]) -> str | None:
        self.released.wait(5)
        self.sent.append(len(spans))
        return self.results.pop(0) if self.results else None

    def close(self) -> None:
        self.released.set()


async def wait_exported(tracer: Tracer, spans: int) -> None:
    """Waits until so many spans have been sent."""
    with trio.fail_after(5):
        while tracer.statistics().exported < spans:  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.002)


async def test_spans_go_in_batches() -> None:
    """A full batch does not wait for the delay, and the rest follows with it."""
    export = Scripted()
    tracer = Tracer(export, batch_spans=4, delay_s=1000.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        await wait_all_tasks_blocked()
        for _ in range(3):
            tracer.record([SPAN] * 2)
        await wait_exported(tracer, 6)
        nursery.cancel_scope.cancel()
    assert export.sent == [4, 2]


async def test_a_receiver_that_does_not_answer_costs_spans_only() -> None:
    """What finds no room is dropped and counted, and `record` returns at once."""
    export = Scripted()
    export.released.clear()
    tracer = Tracer(export, queue_spans=10, batch_spans=5, delay_s=0.001)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        tracer.record([SPAN] * 5)
        await trio.sleep(0.02)
        for _ in range(20):
            tracer.record([SPAN, SPAN])
        assert (tracer.statistics().waiting, tracer.statistics().dropped) == (10, 30)
        export.released.set()
        await wait_exported(tracer, 15)
        nursery.cancel_scope.cancel()
    assert tracer.statistics().dropped == 30


async def test_a_failure_is_logged_once(logs: Logs) -> None:
    """And so is its end; ``/status`` has the reason meanwhile."""
    tracer = Tracer(Scripted("refused", "refused again", None))
    for state, dropped in (("failing", 1), ("failing", 2), ("ok", 2)):
        tracer.record([SPAN])
        await tracer.flush()
        assert (tracer.statistics().state, tracer.statistics().dropped) == (state, dropped)
    assert [entry["error"] for entry in logs.named("traces_not_exported")] == ["refused"]
    assert len(logs.named("traces_exported")) == 1


async def test_nothing_is_imported_unless_it_is_asked_for(logs: Logs) -> None:
    """Traces that are asked for and cannot be had are a warning, and the gateway starts."""
    async with open_tracer({}, worker="w") as tracing:
        assert tracing.tracer is None
        assert tracing.statistics().state == "off"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    async with open_tracer(env, worker="w") as tracing:
        assert tracing.tracer is None
        assert tracing.statistics().state == "unavailable"
    assert "grpc" in logs.named("traces_unavailable")[0]["reason"]
