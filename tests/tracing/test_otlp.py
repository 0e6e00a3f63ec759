"""Traces over the wire: a gateway, a receiver that decodes protobuf, and OpenTelemetry's own variables."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest
import trio

from tests.support.asgi_client import chat
from tests.support.gateway import OpenServer, make_config
from tests.support.logs import Logs
from tests.support.otlp import Receiver, attributes_of, open_receiver
from tests.support.processes import environment
from tests.support.provider import DONE, Provider, Say, content, open_socket_provider, role, usage
from tests.tracing.test_tracer import SPAN, wait_exported
from trigate.tracing import otlp
from trigate.tracing.context import SpanContext
from trigate.tracing.tracer import Tracer, open_tracer

STREAM = (Say(role()), Say(content("a private word")), Say(usage(3, 5) + DONE))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
PATH = "/chat/completions"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver, which the environment of the process names."""
    with open_receiver() as opened:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", opened.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield opened


@contextlib.asynccontextmanager
async def _opened() -> AsyncIterator[Tracer]:
    """The export that the environment asks for."""
    async with open_tracer(os.environ, worker="w_1") as tracing:
        assert tracing.tracer is not None
        yield tracing.tracer


@contextlib.asynccontextmanager
async def _gateway(open_server: OpenServer) -> AsyncIterator[tuple[httpx2.AsyncClient, Provider, Tracer]]:
    """A gateway on real sockets whose calls are traced, as its environment says."""
    async with (
        open_socket_provider(STREAM) as (provider, url),
        _opened() as tracer,
        open_server(make_config({"up": {"base_url": url}})) as (client, app),
    ):
        app.gateway.live.tracer = tracer
        yield client, provider, tracer


@pytest.mark.slow
async def test_a_call_arrives_as_spans(open_server: OpenServer, receiver: Receiver) -> None:
    """With the ids that its caller and its upstream know, and without a word of its messages."""
    async with _gateway(open_server) as (client, provider, tracer):
        body = chat(stream=True, messages=[{"role": "user", "content": "a private word"}])
        headers = {"traceparent": TRACEPARENT, "tracestate": "a=1"}
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        await wait_exported(tracer, 2)
    assert receiver.paths == ["/v1/traces"]
    assert receiver.resources[0]["service.name"] == "trigate"
    assert receiver.resources[0]["trigate.worker"] == "w_1"
    exchange, attempt = receiver.spans
    assert (exchange.trace_id.hex(), exchange.parent_span_id.hex(), exchange.trace_state) == (TRACE, PARENT, "a=1")
    assert (attempt.trace_id.hex(), attempt.parent_span_id) == (TRACE, exchange.span_id)
    assert provider.calls[0].headers["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
    assert attributes_of(exchange)["gen_ai.response.model"] == "m"
    assert attributes_of(attempt)["gen_ai.usage.output_tokens"] == 5
    assert {event.name for event in exchange.events} == {"trigate.first_token", "trigate.commit"}
    assert exchange.start_time_unix_nano <= attempt.start_time_unix_nano
    assert attempt.end_time_unix_nano <= exchange.end_time_unix_nano
    assert b"private" not in b"".join(receiver.bodies)


@pytest.mark.parametrize(
    ("sampler", "given", "sampled"),
    [
        ("parentbased_always_on", None, True),
        ("parentbased_always_on", 0, False),
        ("parentbased_always_off", None, False),
        ("parentbased_always_off", 1, True),
        ("always_off", 1, False),
        ("always_on", 0, True),
    ],
)
def test_the_sampler_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, sampler: str, given: int | None, sampled: bool
) -> None:
    """By default the caller decides, and the gateway only where there is no caller."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    parent = SpanContext(TRACE, PARENT, given) if given is not None else None
    assert otlp.OtlpExport("w").samples(parent, TRACE, "chat") is sampled


async def test_a_share_of_the_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their ids, so that all services agree."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    export = otlp.OtlpExport("w")
    assert export.samples(None, "0" * 31 + "1", "chat")
    assert not export.samples(None, "f" * 32, "chat")


async def test_a_receiver_that_refuses(receiver: Receiver, logs: Logs) -> None:
    """The spans are dropped and counted, and the reason is known."""
    receiver.status = 401
    async with _opened() as tracer:
        tracer.record([SPAN])
        await tracer.flush()
        assert (tracer.statistics().state, tracer.statistics().dropped) == ("failing", 1)
    assert "401" in logs.named("traces_not_exported")[0]["error"]


async def test_the_last_spans_are_sent_at_the_end(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the delay."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    async with _opened() as tracer:
        tracer.record([SPAN])
    assert len(receiver.spans) == 1
    assert receiver.resources[0]["service.name"] == "mine"


@pytest.mark.slow
async def test_a_receiver_that_does_not_answer_holds_up_neither_calls_nor_the_end(
    open_server: OpenServer, receiver: Receiver
) -> None:
    """Calls are answered meanwhile; what finds no room is dropped; closing takes no longer than its limit."""
    receiver.released.clear()
    async with _gateway(open_server) as (client, _, tracer):
        for _ in range(3):
            answer = await client.post("/v1/chat/completions", json=chat(stream=True))
            assert answer.status_code == 200
            await trio.sleep(0.05)
        for _ in range(2000):
            tracer.record([SPAN, SPAN])
        assert tracer.statistics().dropped > 0
        assert tracer.statistics().waiting <= 2048
        closing_at = trio.current_time()
    assert trio.current_time() - closing_at < 4


@pytest.mark.slow
def test_a_gateway_without_traces_imports_nothing_of_it() -> None:
    """Nor does one that is traced before it opens."""
    script = "import sys, trigate.gateway.gateway; sys.exit('opentelemetry' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=60)
