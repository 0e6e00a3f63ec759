"""The fault suite: a gateway, a provider on real sockets that does what a fault of the catalogue says, a second one
that is well, and a client. Each fault meets a stream and a JSON call, with one target and with both; and where a stream
is cut, one that the second target may go on with.

What the client gets is exactly what the catalogue says, in time; afterwards nothing is left of the calls, and each is
accounted for once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import attrs
import httpx2
import msgspec
import pytest
import trio

from tests.faults.catalogue import CATALOGUE, LIMITS
from tests.faults.hostile import Hostile, open_hostile, trust
from tests.faults.making import GOOD
from tests.faults.page import page
from tests.faults.steps import DATE, Case, Cut, Expected, Fault, Refusal, Whole
from tests.support.asgi_client import chat
from tests.support.gateway import make_config
from tests.support.logs import Logs
from trigate.config.sections import UpstreamConfig
from trigate.gateway.gateway import Gateway
from trigate.store.records import ExchangeRecord
from trigate.upstream.connect import Connection
from trigate.upstream.factory import http_transport
from trigate.upstream.transport import SocketTransport

OpenServer = Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, Any]]]

WITHIN_S = LIMITS["total_timeout_s"] + 0.5
FAULTS = {fault.name: fault for faults in CATALOGUE.values() for fault in faults}
CASES: tuple[Case, ...] = ("one-stream", "one-json", "two-stream", "two-json", "continued-stream")


@attrs.define(eq=False)
class Scene:
    """A gateway between a hostile provider, a good one, and a client."""

    gateway: Gateway
    hostile: Hostile
    good: Hostile
    client: httpx2.AsyncClient
    logs: Logs


@attrs.frozen(kw_only=True)
class Got:
    """What a client got, and when."""

    status: int
    headers: httpx2.Headers
    body: bytes
    took_s: float

    @property
    def request_id(self) -> str:
        """The call's, as the gateway says it."""
        return self.headers["x-request-id"]


@contextlib.asynccontextmanager
async def open_scene(fault: Fault, open_server: OpenServer, logs: Logs) -> AsyncIterator[Scene]:
    """Opens all of it. Each case has a model of its own, so that none is left alone for what another one was told."""

    def transport(name: str, upstream: UpstreamConfig) -> httpx2.AsyncBaseTransport:
        secure = str(upstream.base_url).startswith("https:")
        return SocketTransport(trust=trust) if secure else http_transport(name, upstream)

    async with open_hostile(fault) as hostile, open_hostile(GOOD) as good:
        config = make_config(
            {
                "hostile": {"base_url": hostile.base_url, "models": list(CASES)},
                "good": {"base_url": good.base_url, "models": ["m"]},
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


async def call(scene: Scene, case: Case, asks: Mapping[str, Any]) -> Got:
    """Makes a call as a client does, and reads its answer to the end, which has to be a proper one."""
    body = chat(stream=case.endswith("stream"), model=case, **asks)
    begun = trio.current_time()
    # a connection of its own, so that nothing is left of it
    response = await scene.client.post("/v1/chat/completions", json=body, headers={"connection": "close"})
    return Got(
        status=response.status_code,
        headers=response.headers,
        body=response.content,
        took_s=trio.current_time() - begun,
    )


# -- what is compared -------------------------------------------------------------------------------------------------


def check(expected: Expected, got: Got, case: Case, dates: list[str]) -> None:
    """What the client got is what is expected."""
    match expected:
        case Whole():
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
        case Cut():
            assert got.status == 200
            came, error = parted(got.body)
            body = public(expected.body, case)
            assert came == body * (came.count(body) if expected.endless else 1)
            check_error(msgspec.json.decode(error), expected)
    kind = "text/event-stream" if case.endswith("stream") and got.status == 200 else "application/json"
    assert got.headers["content-type"].partition(";")[0] == kind


def parted(body: bytes) -> tuple[bytes, bytes]:
    """A stream that was cut: what came, and the data of the error event, which is its last one."""
    came, found, error = body.rpartition(b"\n\ndata: ")
    assert found
    assert error.endswith(b"\n\n")
    return came + b"\n\n", error


def check_error(told: Any, expected: Refusal | Cut) -> None:
    """It is an error object of OpenAI's shape, and says what is expected."""
    error = told["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "<" not in error["message"], "a provider's page is not for the client"
    assert isinstance(error["type"], str)
    assert error["code"] == expected.code, error
    assert expected.says in error["message"]
    assert expected.phase is None or error["phase"] == expected.phase, error


def public(body: bytes, case: Case) -> bytes:
    """A body with the id of the model that was asked for."""
    return body.replace(b'"model":"m"', b'"model":"%b"' % case.encode())


def alone(fault: Fault, case: Case) -> Expected:
    """What the client would get if there were no second target."""
    return fault.expected["one-stream" if case.endswith("stream") else "one-json"]


def targets(fault: Fault, case: Case) -> list[str]:
    """Which targets are tried: the second one where it has to help."""
    helped = not case.startswith("one") and fault.expected[case] != alone(fault, case)
    return [f"hostile/{case}", *(["good/m"] if helped else [])]


async def settled(scene: Scene, got: Mapping[Case, Got]) -> dict[Case, ExchangeRecord]:
    """What is accounted of each call: one record in the ledger, one line in the log, one in the totals; and nothing of
    anything else."""
    ids = sorted(each.request_id for each in got.values())
    records = await scene.gateway.ledger.list(limit=100)
    assert sorted(record.request_id for record in records) == ids
    assert sorted(line["request_id"] for line in scene.logs.named("exchange")) == ids
    assert scene.gateway.live.totals.exchanges == len(got)
    return {case: record for case, each in got.items() for record in records if record.request_id == each.request_id}


def check_record(record: ExchangeRecord, fault: Fault, case: Case, got: Got) -> None:
    """The record says what became of the call, at which targets, and what the client was sent."""
    expected = fault.expected[case]
    outcomes = [expected.outcome]
    if len(targets(fault, case)) > 1:
        outcomes.insert(0, alone(fault, case).outcome)
    assert record.outcome == outcomes[-1]
    assert [(each.target, each.outcome) for each in record.attempts] == list(
        zip(targets(fault, case), outcomes, strict=True)
    )
    assert record.target == targets(fault, case)[-1]
    assert record.stream == case.endswith("stream")
    assert record.ended_at is not None
    assert 0 <= record.ended_at - record.started_at <= WITHIN_S
    match expected:
        case Whole():
            assert (record.status, record.bytes) == (200, len(got.body))
            assert record.counted == (expected.tokens is None)
            assert expected.tokens in (None, (record.prompt_tokens, record.completion_tokens))
        case Refusal():
            assert (record.status, record.bytes, record.events) == (expected.status, 0, 0)
            assert record.prompt_tokens is record.completion_tokens is None
        case Cut():
            assert record.status == (504 if expected.phase is not None else 502)
            came, _ = parted(got.body)
            assert (record.bytes, record.events) == (len(came), came.count(b"\n\n"))
            assert record.counted


def descriptors() -> int:
    """How many this process has open; 0 where that cannot be seen."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


async def check_left(scene: Scene, before: tuple[int, int], *, steps: int = 200) -> None:
    """Soon nothing is left of any call but idle connections, each with its two ends and one task at the provider's."""
    upstreams = list(scene.gateway.generations.current.upstreams.values())

    def left() -> dict[str, object]:
        pools = [each.transport.statistics() for each in upstreams if isinstance(each.transport, SocketTransport)]
        assert len(pools) == len(upstreams)
        idle = sum(pool.idle for pool in pools)
        return {
            "exchanges": len(scene.gateway.live) + scene.gateway.generations.current.exchanges,
            "places": sum(each.in_flight + each.statistics().queued for each in upstreams),
            "admitted": scene.gateway.exchange_services.admission.slots.taken,
            "carried": scene.gateway.exchange_services.upstream.socket_relay.streams
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
class Seen:
    """What came of the calls of a fault.

    Attributes:
        late_s: How late the event loop was, at worst: the limits in time are those of a machine that goes on.
    """

    scene: Scene
    got: Mapping[Case, Got]
    records: Mapping[Case, ExchangeRecord]
    late_s: float


async def meet(fault: Fault, open_server: OpenServer, logs: Logs) -> Seen:
    """Has all calls of a fault meet it at once, and sees to it that nothing is left of them."""
    got: dict[Case, Got] = {}
    late_s = 0.0

    async def one(scene: Scene, case: Case) -> None:
        got[case] = await call(scene, case, fault.asks)

    async def watch() -> None:
        nonlocal late_s
        while True:
            due_at = trio.current_time() + 0.02
            await trio.sleep_until(due_at)
            late_s = max(late_s, trio.current_time() - due_at)

    async with open_scene(fault, open_server, logs) as scene:
        before = trio.lowlevel.current_statistics().tasks_living, descriptors()
        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                for case in fault.expected:
                    nursery.start_soon(one, scene, case)
            watching.cancel_scope.cancel()
        await check_left(scene, before)
        return Seen(scene=scene, got=got, records=await settled(scene, got), late_s=late_s)


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault(open_server: OpenServer, logs: Logs, name: str) -> None:
    """The client gets what the catalogue says, in time, and nothing is left."""
    fault = FAULTS[name]
    for _ in range(3):  # where the machine stood still, limits are over that were not meant
        logs.entries.clear()
        seen = await meet(fault, open_server, logs)
        if seen.late_s < 0.1:
            break
    for case, expected in fault.expected.items():
        got, tried = seen.got[case], targets(fault, case)
        assert got.took_s <= WITHIN_S, f"{case}; the event loop was {seen.late_s:.3f} s late; {seen.records[case]}"
        check(expected, got, case, seen.scene.hostile.dates)
        told = tried[:1] if case.startswith("continued") else tried  # the head was out by then
        assert got.headers["x-trigate-attempts"] == str(len(told))
        assert got.headers["x-trigate-upstream"] == told[-1].partition("/")[0]
        check_record(seen.records[case], fault, case, got)
    assert len(seen.scene.hostile.asked) <= len(fault.expected), "no target is asked twice"
    assert set(seen.scene.hostile.asked) <= {b"POST /v1/chat/completions HTTP/1.1"}, "no redirect is followed"
    assert len(seen.scene.good.asked) == sum(len(targets(fault, case)) - 1 for case in fault.expected)


async def test_the_suite_finds_a_leak(open_server: OpenServer, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is kept open is found: the suite can fail."""
    kept: list[Connection] = []
    monkeypatch.setattr("trigate.upstream.pool.ConnectionPool._discard", lambda _, connection: kept.append(connection))
    async with open_scene(FAULTS["It falls silent between two events"], open_server, logs) as scene:
        before = trio.lowlevel.current_statistics().tasks_living, descriptors()
        await call(scene, "one-stream", {})
        try:
            with pytest.raises(pytest.fail.Exception, match="'pooled': 1, 'providers': 1, 'tasks': 1"):
                await check_left(scene, before, steps=2)
        finally:
            for connection in kept:
                connection.close()


def test_the_catalogue_is_large_enough() -> None:
    """At least sixty faults concern streams and JSON alike; and no two have the same name."""
    assert sum(fault.json is not None for fault in FAULTS.values()) >= 60
    assert len(FAULTS) == sum(map(len, CATALOGUE.values()))


def test_the_page_is_the_catalogue() -> None:
    """``docs/reference/faults.md`` says what the catalogue says; ``python tests/faults/page.py`` writes it."""
    written = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"
    assert written.read_text(encoding="utf-8") == page()
