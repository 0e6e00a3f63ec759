"""The spans of calls: which there are, whose children they are, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Refuse,
    Say,
    Stall,
    answers,
    completion,
    content,
    role,
    says,
    usage,
)
from trigate.tracing.context import SpanContext
from trigate.tracing.span import Span
from trigate.tracing.tracer import Tracer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
PATH = "/v1/chat/completions"


@attrs.define
class Kept:
    """Keeps spans instead of sending them."""

    is_on: bool = True
    asked: list[SpanContext | None] = attrs.field(factory=list)

    def samples(self, parent: SpanContext | None, trace_id: str, name: str) -> bool:
        self.asked.append(parent)
        return self.is_on

    def send(self, spans: Sequence[Span]) -> str | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def trace(served: Served, *, is_on: bool = True) -> list[Span]:
    """Has the calls of a gateway traced; returns the list of their spans, which grows."""
    spans: list[Span] = []
    tracer = Tracer(Kept(is_on))
    tracer.record = spans.extend  # type: ignore[method-assign, assignment]
    served.gateway.live.tracer = tracer
    return spans


def two(**sections: Any) -> Any:  # Any: a Config
    """Two upstreams behind the model ``both``."""
    url = "https://api.example:8443/v1"
    return make_config({"a": {}, "b": {"base_url": url}}, models={"both": {"targets": ["a/m", "b/m"]}}, **sections)


def named(span: Span) -> list[str]:
    """The names of a span's events."""
    return [event.name for event in span.events]


async def test_a_call_is_a_span_and_its_attempt_a_child(open_app: OpenApp) -> None:
    """Both have the names that the conventions give, the child's context goes upstream, and the tokens stand once."""
    provider = Provider((Say(role()), Say(content("Hi")), Say(usage(3, 5) + DONE)))
    async with open_app(make_config(), provider) as served:
        spans = trace(served)
        headers = {"traceparent": TRACEPARENT, "tracestate": "a=1,b=2", "baggage": "user=1"}
        call = await served.client.ask("POST", PATH, chat(stream=True, model="up/m"), headers=headers)
        assert call.status == 200
    exchange, attempt = spans
    assert (exchange.trace_id, exchange.parent_id, exchange.is_parent_remote) == (TRACE, PARENT, True)
    assert (attempt.trace_id, attempt.parent_id, attempt.is_parent_remote) == (TRACE, exchange.span_id, False)
    sent = provider.calls[0].headers
    assert sent["traceparent"] == f"00-{TRACE}-{attempt.span_id}-01"
    assert (sent["tracestate"], sent["baggage"]) == ("a=1,b=2", "user=1")
    assert (exchange.name, exchange.kind, exchange.failed) == ("chat up/m", "server", False)
    assert exchange.attributes["gen_ai.operation.name"] == "chat"
    assert exchange.attributes["gen_ai.provider.name"] == "openai"
    assert exchange.attributes["gen_ai.request.model"] == "up/m"
    assert exchange.attributes["gen_ai.response.model"] == "m"
    assert exchange.attributes["gen_ai.request.stream"] is True
    assert exchange.attributes["http.response.status_code"] == 200
    assert exchange.attributes["trigate.request_id"] == call.header("x-request-id")
    assert exchange.attributes["trigate.outcome"] == "complete"
    assert not [name for name in exchange.attributes if "usage" in name]
    assert sorted(named(exchange)) == ["trigate.commit", "trigate.first_token"]
    assert (attempt.name, attempt.kind, attempt.failed) == ("chat m", "client", False)
    assert attempt.attributes["gen_ai.request.model"] == "m"
    assert (attempt.attributes["server.address"], attempt.attributes["server.port"]) == ("up.invalid", 80)
    assert attempt.attributes["gen_ai.usage.input_tokens"] == 3
    assert attempt.attributes["gen_ai.usage.output_tokens"] == 5
    assert exchange.started_at <= attempt.started_at <= attempt.ended_at <= exchange.ended_at


async def test_a_failover_is_an_event_between_two_attempts(open_app: OpenApp) -> None:
    """The failed attempt says why, and the second one has a span of its own, which its request names."""
    providers = {"a": Provider(answers(b'{"error":{"message":"no SECRET"}}', status=500)), "b": Provider(says("Hi"))}
    async with open_app(two(), providers) as served:
        spans = trace(served)
        assert (await served.client.chat(model="both").wait()).status == 200
    exchange, first, second = spans
    assert first.failed
    assert first.attributes["error.type"] == first.attributes["trigate.outcome"] == "upstream_unavailable"
    assert not second.failed
    assert second.attributes["server.port"] == 8443
    assert second.attributes["trigate.why"] == "failover"
    assert first.span_id != second.span_id
    assert providers["b"].calls[0].headers["traceparent"].split("-")[2] == second.span_id
    assert named(exchange)[0] == "trigate.failover"
    assert exchange.events[0].attributes == {"trigate.from": "a/m", "trigate.to": "b/m"}
    assert not exchange.failed
    assert "SECRET" not in repr(spans)


async def test_a_client_that_leaves_is_an_event(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is no error."""
    provider = Provider((Say(role()), Say(content("Hi")), Stall()))
    async with open_app(make_config(), provider) as served:
        spans = trace(served)
        call = served.client.chat()
        await call.wait_for(b"Hi")
        call.disconnect()
        await call.wait()
    exchange, attempt = spans
    assert exchange.events[-1].name == "trigate.cancel"
    assert exchange.events[-1].attributes == {"trigate.reason": "client_disconnected"}
    assert "http.response.status_code" not in exchange.attributes
    assert "error.type" not in exchange.attributes
    assert attempt.attributes["trigate.outcome"] == "cancelled"
    assert not attempt.failed


async def test_a_call_that_ends_in_an_error(open_app: OpenApp) -> None:
    """A fault of an upstream fails the span; the client's does not, though both have their type."""
    async with open_app(make_config(), Provider((Refuse(),))) as served:
        spans = trace(served)
        await served.client.chat().wait()
        await served.client.chat(model="none").wait()
    failed, _, unknown = spans
    assert (failed.failed, failed.attributes["error.type"]) == (True, "upstream_unavailable")
    assert (unknown.failed, unknown.attributes["error.type"]) == (False, "model_not_found")
    assert unknown.attributes["http.response.status_code"] == 404


async def test_a_stream_that_breaks_fails_its_span(open_app: OpenApp) -> None:
    """Although its status was 200."""
    async with open_app(make_config(), Provider((Say(role()), Say(content("Hi")), Break()))) as served:
        spans = trace(served)
        await served.client.chat().wait()
    assert spans[0].failed
    assert spans[0].attributes["error.type"] == "upstream_truncated"


async def test_what_is_not_sampled_has_no_spans(open_app: OpenApp, logs: Logs) -> None:
    """Its context goes on all the same, and says so."""
    provider = Provider()
    async with open_app(make_config(), provider) as served:
        spans = trace(served, is_on=False)
        await served.client.ask("POST", PATH, chat(), headers={"traceparent": TRACEPARENT})
        await served.client.chat().wait()
    assert spans == []
    given, made = [call.headers["traceparent"].split("-") for call in provider.calls]
    assert (given[1], given[3]) == (TRACE, "00")
    assert given[2] != PARENT
    assert made[1] != TRACE
    assert [entry["trace_id"] for entry in logs.named("exchange")] == [TRACE, made[1]]


@pytest.mark.parametrize("value", ["00-1-2-01", TRACEPARENT.upper(), f"{TRACEPARENT}-more", "ff" + TRACEPARENT[2:]])
async def test_a_context_that_is_not_valid_begins_a_new_trace(open_app: OpenApp, value: str) -> None:
    """And what its client said of the trace is dropped with it."""
    provider = Provider()
    async with open_app(make_config(), provider) as served:
        spans = trace(served)
        await served.client.ask("POST", PATH, chat(), headers={"traceparent": value, "tracestate": "a=1"})
    assert spans[0].parent_id is None
    assert spans[0].trace_id != TRACE
    assert "tracestate" not in provider.calls[0].headers


async def test_repeated_headers_of_a_trace(open_app: OpenApp) -> None:
    """Two are lists; of the third, a client sends one or none."""
    provider = Provider()
    state = [("tracestate", "a=1"), ("tracestate", "b=2"), ("baggage", "c=3"), ("baggage", "d=4")]
    async with open_app(make_config(), provider) as served:
        await served.client.ask("POST", PATH, chat(), headers=[("traceparent", TRACEPARENT), *state])
        await served.client.ask("POST", PATH, chat(), headers=[("traceparent", TRACEPARENT)] * 2 + state)
    first, second = [call.headers for call in provider.calls]
    assert (first["traceparent"], first["tracestate"], first["baggage"]) == (TRACEPARENT, "a=1,b=2", "c=3,d=4")
    assert "traceparent" not in second
    assert "tracestate" not in second


async def test_without_traces_the_headers_go_on_as_they_are(open_app: OpenApp, logs: Logs) -> None:
    """And the log names the client's trace."""
    provider = Provider()
    async with open_app(make_config(), provider) as served:
        await served.client.ask("POST", PATH, chat(), headers={"traceparent": TRACEPARENT, "tracestate": "a=1"})
        await served.client.chat().wait()
    assert provider.calls[0].headers["traceparent"] == TRACEPARENT
    assert provider.calls[0].headers["tracestate"] == "a=1"
    assert "traceparent" not in provider.calls[1].headers
    first, second = logs.named("exchange")
    assert first["trace_id"] == TRACE
    assert "trace_id" not in second


async def test_calls_that_share_one_have_a_link(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The attempt is a child of the call that began it, whichever of them ends first."""
    provider = Provider((Say(role()), Pause(1), Say(content("Hi")), Pause(1), Say(DONE)))
    config = make_config(models={"shared": {"targets": ["up/m"], "coalesce": True}})
    async with open_app(config, provider) as served:
        spans = trace(served)
        leader = served.client.chat(model="shared", temperature=0)
        await trio.sleep(0.5)
        joined = served.client.chat(model="shared", temperature=0)
        await joined.wait_for(b"Hi")
        leader.disconnect()
        await joined.wait()
    assert len(provider.calls) == 1
    by_role = {span.attributes["trigate.coalesced"]: span for span in spans if "trigate.coalesced" in span.attributes}
    [attempt] = [span for span in spans if span.kind == "client"]
    assert attempt.parent_id == by_role["leader"].span_id
    assert attempt.attributes["trigate.outcome"] == "complete"
    assert by_role["joined"].link == (by_role["leader"].trace_id, by_role["leader"].span_id)
    assert by_role["leader"].link is None


async def test_a_request_that_is_passed_through(open_app: OpenApp) -> None:
    """It has its method and its path, and no model if it names none."""
    async with open_app(make_config(), Provider(answers(b'{"object":"list","data":[]}'))) as served:
        spans = trace(served)
        await served.client.ask("GET", "/v1/files")
    assert spans[0].attributes["http.request.method"] == "GET"
    assert "gen_ai.request.model" not in spans[0].attributes
    assert [span.name for span in spans] == ["/files", "/files"]


async def test_an_answer_that_is_no_stream(open_app: OpenApp) -> None:
    """Its tokens stand in the attempt, and it is not marked as a stream."""
    async with open_app(make_config(), Provider((Head(200, "application/json"), Say(completion("Hi"))))) as served:
        spans = trace(served)
        assert (await served.client.chat(stream=False).wait()).status == 200
    assert "gen_ai.request.stream" not in spans[0].attributes
    assert "gen_ai.usage.output_tokens" in spans[1].attributes
