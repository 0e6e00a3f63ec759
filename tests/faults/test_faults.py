"""The fault suite: each fault of the catalogue, between a client and a second provider that works.

A gateway has two upstreams: a provider on real sockets that plays the fault, and one that answers well. Each fault
meets a stream and a JSON call, with one target and with both, and a stream that the second target may continue. The
client must get exactly what the catalogue says, in time. Afterwards no connection, slot or task is left, and each call
is recorded once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx2
import msgspec
import pytest
import trio
import trio.testing

from tests.faults.catalogue import CATALOGUE, LIMITS
from tests.faults.fault import DATE, Case, Complete, Expected, Fault, Refusal, StreamError
from tests.faults.page import page
from tests.faults.provider import FaultyProvider, open_faulty_provider, trust
from tests.faults.replies import GOOD
from tests.support.asgi_client import chat
from tests.support.gateway import OpenServer, make_config
from tests.support.logs import Logs
from trigate.config.sections import UpstreamConfig
from trigate.gateway.gateway import Gateway
from trigate.store.records import ExchangeRecord
from trigate.upstream.connect import Connection
from trigate.upstream.factory import http_transport
from trigate.upstream.transport import SocketTransport

WITHIN_S = LIMITS["total_timeout_s"] + 0.5
FAULTS = {fault.name: fault for faults in CATALOGUE.values() for fault in faults}
CASES: tuple[Case, ...] = ("one-stream", "one-json", "two-stream", "two-json", "continued-stream")


@attrs.define(eq=False)
class Scene:
    """A gateway between a client, a provider with a fault, and a provider that works."""

    gateway: Gateway
    hostile: FaultyProvider
    good: FaultyProvider
    client: httpx2.AsyncClient
    logs: Logs


@attrs.frozen(kw_only=True)
class Answer:
    """The answer that a client got.

    Attributes:
        took_s: Seconds from the request to the end of the answer.
    """

    status: int
    headers: httpx2.Headers
    body: bytes
    took_s: float

    @property
    def request_id(self) -> str:
        """The request id that the gateway reported."""
        return self.headers["x-request-id"]


@contextlib.asynccontextmanager
async def open_scene(fault: Fault, open_server: OpenServer, logs: Logs) -> AsyncIterator[Scene]:
    """Opens a scene. Each case has a model of its own, so that no case affects the health of another case's target."""

    def transport(name: str, upstream: UpstreamConfig) -> httpx2.AsyncBaseTransport:
        secure = str(upstream.base_url).startswith("https:")
        return SocketTransport(trust=trust) if secure else http_transport(name, upstream)

    async with open_faulty_provider(fault) as hostile, open_faulty_provider(GOOD) as good:
        config = make_config(
            {
                "hostile": {"base_url": hostile.base_url, "models": list(CASES), "include_usage": False},
                "good": {"base_url": good.base_url, "models": ["m"], "include_usage": False},
            },
            models={
                case: {
                    "targets": [f"hostile/{case}", *(["good/m"] if not case.startswith("one") else [])],
                    "on_truncation": "continue" if case.startswith("continued") else "error",
                }
                for case in CASES
            },
            limits=LIMITS,
        )
        async with open_server(config, transports=transport) as (client, app):
            yield Scene(app.gateway, hostile, good, client, logs)


async def call(scene: Scene, case: Case, asks: Mapping[str, Any]) -> Answer:
    """Makes a call and reads its answer to the end, which must be properly framed."""
    body = chat(stream=case.endswith("stream"), model=case, **asks)
    begun = trio.current_time()
    # a connection of its own, which is closed afterwards
    response = await scene.client.post("/v1/chat/completions", json=body, headers={"connection": "close"})
    return Answer(
        status=response.status_code,
        headers=response.headers,
        body=response.content,
        took_s=trio.current_time() - begun,
    )


# -- comparisons -------------------------------------------------------------------------------------------------


def check(expected: Expected, got: Answer, case: Case, dates: list[str]) -> None:
    """Asserts that the client got what is expected."""
    match expected:
        case Complete():
            assert (got.status, got.body) == (200, public(expected.body, case))
        case Refusal():
            assert got.status == expected.status, got.body
            assert expected.body is None or got.body == expected.body
            check_error(msgspec.json.decode(got.body), expected)
            assert got.headers["x-should-retry"] == "false"
            for name, value in expected.headers.items():
                told = got.headers.get(name)
                assert told in (dates if value == DATE.decode() else value if isinstance(value, tuple) else (value,)), (
                    name
                )
        case StreamError():
            assert got.status == 200
            came, error = split_error(got.body)
            body = public(expected.body, case)
            assert came == body * (came.count(body) if expected.endless else 1)
            check_error(msgspec.json.decode(error), expected)
    kind = "text/event-stream" if case.endswith("stream") and got.status == 200 else "application/json"
    assert got.headers["content-type"].partition(";")[0] == kind


def split_error(body: bytes) -> tuple[bytes, bytes]:
    """Splits a truncated stream into the events that arrived and the data of the final error event."""
    came, found, error = body.rpartition(b"\n\ndata: ")
    assert found
    assert error.endswith(b"\n\n")
    return came + b"\n\n", error


def check_error(told: Any, expected: Refusal | StreamError) -> None:
    """Asserts that it is an error object of OpenAI's shape with the expected values."""
    error = told["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "<" not in error["message"], "the client must not get a provider's page"
    assert isinstance(error["type"], str)
    assert error["code"] == expected.code, error
    assert expected.says in error["message"]
    assert expected.phase is None or error["phase"] == expected.phase, error


def public(body: bytes, case: Case) -> bytes:
    """Replaces the model id of a body by the requested one."""
    return body.replace(b'"model":"m"', b'"model":"%b"' % case.encode())


def with_one_target(fault: Fault, case: Case) -> Expected:
    """Returns the expectation without a second target."""
    return fault.expected["one-stream" if case.endswith("stream") else "one-json"]


def targets(fault: Fault, case: Case) -> list[str]:
    """Returns the targets that are tried: the second one only if its answer is expected."""
    helped = not case.startswith("one") and fault.expected[case] != with_one_target(fault, case)
    return [f"hostile/{case}", *(["good/m"] if helped else [])]


async def settled(scene: Scene, got: Mapping[Case, Answer]) -> dict[Case, ExchangeRecord]:
    """Returns the record of each call. Asserts that ledger, log and totals have each call once, and no other."""
    ids = sorted(each.request_id for each in got.values())
    records = await scene.gateway.ledger.list(limit=100)
    assert sorted(record.request_id for record in records) == ids
    assert sorted(line["request_id"] for line in scene.logs.named("exchange")) == ids
    assert scene.gateway.live.totals.exchanges == len(got)
    return {case: record for case, each in got.items() for record in records if record.request_id == each.request_id}


def check_record(record: ExchangeRecord, fault: Fault, case: Case, got: Answer) -> None:
    """Asserts that the record has the outcome of the call, its targets, and what the client was sent."""
    expected = fault.expected[case]
    outcomes = [expected.outcome]
    if len(targets(fault, case)) > 1:
        outcomes.insert(0, with_one_target(fault, case).outcome)
    assert record.outcome == outcomes[-1]
    assert [(each.target, each.outcome) for each in record.attempts] == list(
        zip(targets(fault, case), outcomes, strict=True)
    )
    assert record.target == targets(fault, case)[-1]
    assert record.stream == case.endswith("stream")
    assert record.ended_at is not None
    assert 0 <= record.ended_at - record.started_at <= WITHIN_S
    match expected:
        case Complete():
            assert (record.status, record.bytes) == (200, len(got.body))
            tokens = (record.prompt_tokens or 0, record.completion_tokens or 0)
            # A target that had content before it failed costs something as well, which is estimated.
            had_content = "in one packet" in fault.name or record.attempts[-1].why == "continue"
            is_sum = len(record.attempts) > 1 and had_content
            assert record.counted == (is_sum or expected.tokens is None)
            if is_sum and expected.tokens is not None:
                assert tokens > expected.tokens
            else:
                assert expected.tokens in (None, tokens)
        case Refusal():
            assert (record.status, record.bytes, record.events) == (expected.status, 0, 0)
            assert record.prompt_tokens is record.completion_tokens is None
        case StreamError():
            assert record.status == (504 if expected.phase is not None else 502)
            came, _ = split_error(got.body)
            assert (record.bytes, record.events) == (len(came), came.count(b"\n\n"))
            assert record.counted


def descriptors() -> int:
    """Returns the number of open file descriptors of this process; 0 where the system does not show it."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


async def check_left(scene: Scene, before: tuple[int, int], *, steps: int = 200) -> None:
    """Asserts that soon only idle connections are left, each with two descriptors and one task of the provider."""
    upstreams = list(scene.gateway.generations.current.upstreams.values())

    def left() -> dict[str, object]:
        pools = [each.transport.statistics() for each in upstreams if isinstance(each.transport, SocketTransport)]
        assert len(pools) == len(upstreams)
        idle = sum(pool.idle for pool in pools)
        return {
            "exchanges": len(scene.gateway.live) + scene.gateway.generations.current.exchanges,
            "slots": sum(each.in_flight + each.statistics().queued for each in upstreams),
            "admitted": scene.gateway.exchange_services.admission.slots.taken,
            "relayed": scene.gateway.exchange_services.upstream.socket_relay.streams
            if scene.gateway.exchange_services.upstream.socket_relay is not None
            else 0,
            "pooled": sum(pool.open - pool.idle + pool.waiting for pool in pools),
            "providers": scene.hostile.open_now + scene.good.open_now - idle,
            "tasks": trio.lowlevel.current_statistics().tasks_living - idle - before[0],
            "descriptors": descriptors() and descriptors() - 2 * idle - before[1],
        }

    for _ in range(steps):
        if not any(left().values()):
            break
        await trio.sleep(0.005)
    else:
        pytest.fail(f"left behind: { ({what: number for what, number in left().items() if number}) }")


# -- the suite --------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Observed:
    """The answers and records of all calls of a fault.

    Attributes:
        late_s: The largest delay of the event loop. A machine that stalls exceeds timeouts that the test did not mean.
    """

    scene: Scene
    got: Mapping[Case, Answer]
    records: Mapping[Case, ExchangeRecord]
    late_s: float


async def observe(fault: Fault, open_server: OpenServer, logs: Logs) -> Observed:
    """Makes all calls of a fault concurrently, and asserts that nothing is left of them."""
    got: dict[Case, Answer] = {}
    late_s = 0.0

    async def make_call(scene: Scene, case: Case) -> None:
        got[case] = await call(scene, case, fault.asks)

    async def watch() -> None:
        nonlocal late_s
        while True:
            due_at = trio.current_time() + 0.02
            await trio.sleep_until(due_at)
            late_s = max(late_s, trio.current_time() - due_at)

    async with open_scene(fault, open_server, logs) as scene:
        await trio.testing.wait_all_tasks_blocked(0.01)  # the servers keep a spare descriptor each
        before = trio.lowlevel.current_statistics().tasks_living, descriptors()
        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                for case in fault.expected:
                    nursery.start_soon(make_call, scene, case)
            watching.cancel_scope.cancel()
        await check_left(scene, before)
        return Observed(scene=scene, got=got, records=await settled(scene, got), late_s=late_s)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault(open_server: OpenServer, logs: Logs, name: str) -> None:
    """The client gets what the catalogue says, in time, and nothing is left of the call."""
    fault = FAULTS[name]
    for _ in range(3):  # if the machine stalled, timeouts expired that the test did not mean
        logs.entries.clear()
        observed = await observe(fault, open_server, logs)
        if observed.late_s < 0.1:
            break
    for case, expected in fault.expected.items():
        got, tried = observed.got[case], targets(fault, case)
        assert got.took_s <= WITHIN_S, f"{case}; event loop delay {observed.late_s:.3f} s; {observed.records[case]}"
        check(expected, got, case, observed.scene.hostile.dates)
        told = (
            tried[:1] if case.startswith("continued") else tried
        )  # the head was sent before the second target was tried
        assert got.headers["x-trigate-attempts"] == str(len(told))
        assert got.headers["x-trigate-upstream"] == told[-1].partition("/")[0]
        check_record(observed.records[case], fault, case, got)
    assert len(observed.scene.hostile.asked) <= len(fault.expected), "no target is asked twice"
    assert set(observed.scene.hostile.asked) <= {b"POST /v1/chat/completions HTTP/1.1"}, "no redirect is followed"
    assert len(observed.scene.good.asked) == sum(len(targets(fault, case)) - 1 for case in fault.expected)


@pytest.mark.slow
async def test_the_suite_finds_a_leak(open_server: OpenServer, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite finds a connection that stays open."""
    kept: list[Connection] = []
    monkeypatch.setattr("trigate.upstream.pool.ConnectionPool._discard", lambda _, connection: kept.append(connection))
    async with open_scene(FAULTS["It stops sending between two events"], open_server, logs) as scene:
        await trio.testing.wait_all_tasks_blocked(0.01)  # the servers keep a spare descriptor each
        before = trio.lowlevel.current_statistics().tasks_living, descriptors()
        await call(scene, "one-stream", {})
        try:
            with pytest.raises(pytest.fail.Exception, match="'pooled': 1, 'providers': 1, 'tasks': 1"):
                await check_left(scene, before, steps=2)
        finally:
            for connection in kept:
                connection.close()


def test_the_catalogue_is_large_enough() -> None:
    """At least sixty faults apply to both streams and JSON answers, and all names differ."""
    assert sum(fault.json is not None for fault in FAULTS.values()) >= 60
    assert len(FAULTS) == sum(map(len, CATALOGUE.values()))


def test_the_page_is_the_catalogue() -> None:
    """``docs/reference/faults.md`` is up to date; ``python -m tests.faults.page`` writes it."""
    written = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"
    assert written.read_text(encoding="utf-8") == page()
