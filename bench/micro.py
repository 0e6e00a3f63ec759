"""Micro-benchmarks of pure modules: ``./scripts/bench --micro``.

They measure the cost of an event in `trigate.openai.sse`, `trigate.openai.stream` and `trigate.dialects`, of a request
in `trigate.openai` and `trigate.routing`, and of a worker's heartbeat in `trigate.status.reporter`, without sockets.
pytest-benchmark calls each function many times and reports the minimum, the median and the spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from bench import events
from bench.wire import MODEL
from trigate.config import structure
from trigate.dialects.anthropic import MessagesClient, MessagesUpstream
from trigate.dialects.endpoints import MESSAGES
from trigate.dialects.marks import Marks
from trigate.dialects.openai_chat import ChatClient, ChatUpstream
from trigate.dialects.translated_call import Memory, TranslatedCall
from trigate.exchange.exchange import Exchange
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.upstream_call import UpstreamCall
from trigate.gateway.gateway import open_gateway
from trigate.openai.answer import decode_answer
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call
from trigate.openai.sse import EventSplitter
from trigate.openai.stream import StreamReader
from trigate.routing.routes import Aliases, Known, Target, plan
from trigate.store import opening

EVENTS = 100
CHAT = ENDPOINTS["/v1/chat/completions"]
Benchmark = Any  # pytest-benchmark's fixture, which has no types


def _event(content: str) -> bytes:
    return events.event(events.chunk({"content": content}, model=MODEL, id="chatcmpl-bench", created=1750000000))


def _native(kind: str, **fields: Any) -> bytes:
    return b"event: %b\n" % kind.encode() + events.event({"type": kind, **fields})


STREAM = [_event(f" word{number}") for number in range(EVENTS)]
NATIVE_START = [
    _native("message_start", message={"id": "msg_bench", "usage": {"input_tokens": 9, "output_tokens": 1}}),
    _native("content_block_start", index=0, content_block={"type": "text", "text": ""}),
]
NATIVE_STREAM = [
    _native("content_block_delta", index=0, delta={"type": "text_delta", "text": f" word{number}"})
    for number in range(EVENTS)
]
BODY = json.dumps(
    {
        "model": "default",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Name three colors. " * 20},
        ],
        "temperature": 0.7,
        "stream": True,
    }
).encode()
MESSAGES_BODY = json.dumps(
    {
        "model": "default",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "Name three colors."}],
        "stream": True,
    }
).encode()
ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1750000000,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "red " * 50}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 17, "total_tokens": 26},
    }
).encode()


@pytest.fixture
def per_event(benchmark: Benchmark) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Benchmarks a function that handles `EVENTS` events."""

    def run(function: Callable[[], object]) -> None:
        benchmark(function)

    yield run
    if benchmark.stats is not None:
        benchmark.extra_info["us_per_event"] = round(benchmark.stats.stats.median * 1e6 / EVENTS, 3)
        print(f"{benchmark.name}: {benchmark.extra_info['us_per_event']:.2f} µs per event")


def test_split_events_one_by_one(per_event: Callable[[Callable[[], object]], None]) -> None:
    """sse: events that arrive one by one."""

    def split() -> None:
        splitter = EventSplitter(max_event_bytes=1 << 20)
        for event in STREAM:
            splitter.feed(event)

    per_event(split)


def test_split_events_together(per_event: Callable[[Callable[[], object]], None]) -> None:
    """sse: events that arrive in pieces of ten."""
    pieces = [b"".join(STREAM[start : start + 10]) for start in range(0, EVENTS, 10)]

    def split() -> None:
        splitter = EventSplitter(max_event_bytes=1 << 20)
        for piece in pieces:
            splitter.feed(piece)

    per_event(split)


def test_read_events(per_event: Callable[[Callable[[], object]], None]) -> None:
    """stream: content, finish reason, usage and model id of each event."""

    def read() -> None:
        reader = StreamReader(CHAT, model="default", upstream="mock")
        for event in STREAM:
            reader.read(event)

    per_event(read)


def test_translate_events(per_event: Callable[[Callable[[], object]], None]) -> None:
    """dialects: events of chat completions that go to the client in Anthropic's format."""
    call = decode_call(MESSAGES, MESSAGES_BODY)
    translation = TranslatedCall(call, MessagesClient(), ChatUpstream(), has_marks=True)
    translation.use(Memory(marks=Marks(bytes(32)), keep=lambda found: None, max_bytes=1 << 18))

    def translate() -> None:
        reader = translation.stream_reader(call, upstream="mock", max_event_bytes=1 << 20, keep_bytes=0, continues=None)
        for event in STREAM:
            reader.feed(event)

    per_event(translate)


def test_translate_native_events(per_event: Callable[[Callable[[], object]], None]) -> None:
    """dialects: events of Anthropic's format that go to the client as chat completions."""
    call = decode_call(CHAT, BODY)
    translation = TranslatedCall(call, ChatClient(), MessagesUpstream())

    def translate() -> None:
        reader = translation.stream_reader(call, upstream="mock", max_event_bytes=1 << 20, keep_bytes=0, continues=None)
        for event in NATIVE_START:
            reader.feed(event)
        for event in NATIVE_STREAM:
            reader.feed(event)

    per_event(translate)


def test_translate_call(benchmark: Benchmark) -> None:
    """dialects: decodes a call for a chat completion and encodes it in Anthropic's format."""
    upstream = structure.structure({"upstreams": {"mock": {"kind": "echo"}}}, env={}, source="bench").upstreams["mock"]
    call = decode_call(CHAT, BODY)
    benchmark(lambda: TranslatedCall(call, ChatClient(), MessagesUpstream()).body(call, "claude-opus-5", upstream))


def test_decode_call(benchmark: Benchmark) -> None:
    """request: decodes a body and encodes the body for the upstream."""
    benchmark(lambda: decode_call(CHAT, BODY).body_for(MODEL))


def test_decode_answer(benchmark: Benchmark) -> None:
    """answer: decodes a whole answer and replaces its model id."""
    benchmark(lambda: decode_answer(ANSWER, CHAT, model="default", upstream="mock"))


@pytest.mark.parametrize("model", ["default", "mock/mock-model", MODEL])
def test_plan(benchmark: Benchmark, model: str) -> None:
    """routes: an alias, an upstream and its model, a bare model id."""
    upstreams = {"other": Known(models=("a", "b")), "mock": Known(models=(MODEL,), default_model=MODEL)}
    aliases = Aliases({"default": (Target("mock", MODEL),)})
    benchmark(lambda: plan(model, aliases=aliases, upstreams=upstreams))


@pytest.mark.parametrize("live", [0, 10_000])
def test_heartbeat(benchmark: Benchmark, live: int) -> None:
    """snapshot: a worker's report, made each second and for ``/status``, with this many exchanges in flight."""
    settings = structure.structure({"upstreams": {"mock": {"kind": "echo"}}}, env={}, source="bench")

    async def measure() -> None:
        async with open_gateway(settings, env={"TRIGATE_STORE": opening.MEMORY}) as gateway:
            for number in range(live):
                generation = gateway.generations.current
                request = ExchangeRequest(id=f"req_{number}", call=decode_call(CHAT, BODY), generation=generation)
                exchange = Exchange(request=request, services=gateway.exchange_services)
                exchange.source = UpstreamCall(
                    request=request,
                    services=gateway.exchange_services.upstream,
                    route=generation.route("mock/echo"),
                    started_at=exchange.started_at,
                    deadline_at=math.inf,
                    target=Target("mock", MODEL),
                )
                gateway.live._live[exchange] = None
            benchmark(gateway.status.snapshot)
            gateway.live._live.clear()

    trio.run(measure)
