"""Measures calls in three formats, translated and as they are: ``./scripts/bench --formats``.

Six workloads: chat completions, Anthropic's Messages and OpenAI's Responses, each streamed and not. Each is measured
where the upstream speaks the same format, and where it speaks another one, as far as a gateway can do both
(``[formats]`` in its file). The number of clients is small, so that every gateway keeps up, and the result is CPU time:
of a plain call, of a stream, and of an event, which is what a stream costs beyond a plain call, by the number of its
events. Gateways and workloads are measured in turn.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import attrs

from bench.gateways import Gateway, cpu_spent, open_gateway, peers
from bench.load import Job
from bench.process import Generator, Upstream, open_generator, open_upstream
from bench.upstream import directive

EVENTS = 100
INTERVAL_MS = 10
STREAMS = 32
CALLERS = 4
CONTENT_BYTES = 200

TRANSLATED = "translated"


@attrs.frozen(kw_only=True)
class Format:
    """How a call of a format looks, and its answer.

    Attributes:
        ends: What is in the end of a complete stream.
        results: What is in a plain answer.
        repeats: Whether a stream has its text once more behind the content events.
    """

    path: str
    ends: str
    results: str
    repeats: bool = False

    def body(self, model: str, says: str, *, stream: bool) -> str:
        """The body of a call, as a client would send it."""
        call: dict[str, object] = {"model": model, "temperature": 0.7}
        if self.path == "/v1/responses":
            call |= {"input": says, "instructions": "Answer briefly.", "store": False}
        else:
            call |= {"messages": [{"role": "user", "content": says}], "max_tokens": 1000}
        if stream:
            call["stream"] = True
        return json.dumps(call)


FORMATS: Mapping[str, Format] = {
    "chat": Format(path="/v1/chat/completions", ends="[DONE]", results='"choices"'),
    "messages": Format(path="/v1/messages", ends="message_stop", results='"content"'),
    "responses": Format(path="/v1/responses", ends="total_tokens", results='"output"', repeats=True),
}


@attrs.frozen(kw_only=True)
class Cost:
    """What one gateway spends on one workload in one round, in microseconds of CPU time."""

    call_us: float
    stream_us: float

    @property
    def event_us(self) -> float:
        """What an event of the stream costs."""
        return (self.stream_us - self.call_us) / EVENTS


@attrs.define(kw_only=True)
class Measured:
    """The rounds of one gateway and workload; ``error`` says why there are none."""

    gateway: str
    workload: str
    rounds: list[Cost] = attrs.field(factory=list)
    error: str = ""


async def _measure(
    upstream: Upstream, generator: Generator, gateway: Gateway, form: Format, model: str, *, window_s: float
) -> Cost:
    def job(*, stream: bool, connections: int) -> Job:
        says = directive(events=EVENTS, interval_ms=INTERVAL_MS if stream else 0, content_bytes=CONTENT_BYTES)
        return Job(
            kind="closed",
            port=gateway.port,
            path=form.path,
            headers=gateway.headers,
            body=form.body(model, says, stream=stream),
            stream=stream,
            events=EVENTS,
            repeats=form.repeats,
            ends=form.ends,
            results=form.results,
            connections=connections,
            window_s=window_s,
        )

    for streams in (False, True):  # what a gateway does at its first call of a kind does not count
        await cpu_spent(upstream, generator, gateway, attrs.evolve(job(stream=streams, connections=1), window_s=0.1))
    # every call of a job counts: the window is the whole time, and the last calls are waited for
    plain_s, plain = await cpu_spent(upstream, generator, gateway, job(stream=False, connections=CALLERS))
    stream_s, stream = await cpu_spent(upstream, generator, gateway, job(stream=True, connections=STREAMS))
    return Cost(call_us=plain_s * 1e6 / plain.latency.count, stream_us=stream_s * 1e6 / stream.latency.count)


async def run(against: Iterable[str], *, rounds: int, window_s: float) -> list[Measured]:
    """Measures Trigate and other gateways in turn."""
    known = peers()
    found: list[Measured] = []
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(processes=1))
        generator = await stack.enter_async_context(open_generator(processes=1))
        running = []
        for name in ("trigate", *against):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peer = known[name]
            gateway = await stack.enter_async_context(
                open_gateway(peer, upstream_port=upstream.port, directory=directory, watch=True)
            )
            for workload, model in peer.formats.items():
                measured = Measured(gateway=peer.title, workload=workload)
                found.append(measured)
                running.append((measured, gateway, FORMATS[workload.split()[0]], model))
        for _ in range(rounds):
            for measured, gateway, form, model in running:
                if measured.error:
                    continue
                try:
                    cost = await _measure(upstream, generator, gateway, form, model, window_s=window_s)
                except RuntimeError as error:
                    measured.error = str(error)[:200]
                else:
                    measured.rounds.append(cost)
    return found


def lines(found: list[Measured]) -> list[str]:
    """The readable result: medians, and what translation costs, as a ratio by round."""
    made = [f"{'gateway':<10} {'workload':<22} {'µs/call':>8} {'µs/event':>9}  beside the same format"]
    for each in found:
        if each.error or not each.rounds:
            made.append(f"{each.gateway:<10} {each.workload:<22} {each.error or 'not measured'}")
            continue
        call = statistics.median([cost.call_us for cost in each.rounds])
        event = statistics.median([cost.event_us for cost in each.rounds])
        line = f"{each.gateway:<10} {each.workload:<22} {call:>8.0f} {event:>9.1f}"
        plain = each.workload.removesuffix(f" {TRANSLATED}")
        same = [other for other in found if (other.gateway, other.workload) == (each.gateway, plain)]
        if plain != each.workload and same and same[0].rounds:
            calls = [ours.call_us / theirs.call_us for ours, theirs in zip(each.rounds, same[0].rounds, strict=False)]
            added = [ours.event_us - theirs.event_us for ours, theirs in zip(each.rounds, same[0].rounds, strict=False)]
            line += f"  a call {statistics.median(calls):.2f}, an event {statistics.median(added):+.1f} µs"
        made.append(line)
    return made
