"""Polling an upstream for its models: its list, its state, and the pauses."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx2
import pytest
import trio
from trio.testing import MockClock

from tests.support.logs import Logs
from trigate.concurrency.notify import open_service
from trigate.config import structure as configuration
from trigate.upstream.connect import NoDescriptor
from trigate.upstream.model_list import REFRESH_S, ModelPoll
from trigate.upstream.upstream import Upstream

Answer = Callable[[], httpx2.Response]


def _lists(*models: str) -> httpx2.Response:
    return httpx2.Response(200, content=json.dumps({"data": [{"id": model} for model in models]}).encode())


class Answers(httpx2.AsyncBaseTransport):
    """Gives these answers in turn, the last one repeatedly, and keeps when it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked_at: list[float] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked_at.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer()


def _refused() -> httpx2.Response:
    raise httpx2.ConnectError("refused")


def _polled(*answers: Answer) -> tuple[Upstream, Answers, ModelPoll, list[tuple[str, ...]]]:
    config = configuration.structure({"upstreams": {"u": {"base_url": "http://u.invalid"}}}, env={}, source="test")
    transport = Answers(*answers)
    upstream = Upstream("u", config, transport)
    changes: list[tuple[str, ...]] = []
    poll = ModelPoll(upstream, lambda: changes.append(upstream.models))
    return upstream, transport, poll, changes


def _no_descriptor() -> httpx2.Response:
    raise NoDescriptor("the process can open no other connection")


async def test_a_shortage_of_the_gateway_says_nothing_about_the_upstream(autojump_clock: MockClock, logs: Logs) -> None:
    """An upstream that could not be asked for lack of a file descriptor is not down."""
    upstream, _, poll, _ = _polled(_no_descriptor)
    async with open_service(poll.run):
        await poll.tried.wait()
        assert upstream.state == "unknown"
    [entry] = logs.named("models_not_listed")
    assert "no file descriptor" in entry["error"]


async def test_the_list_is_refreshed(autojump_clock: MockClock) -> None:
    """Each list replaces the previous one and is reported, and the upstream is up."""
    upstream, transport, poll, changes = _polled(lambda: _lists("a"), lambda: _lists("a", "b"))
    assert upstream.polled
    async with open_service(poll.run):
        await poll.tried.wait()
        assert (upstream.models, upstream.state) == (("a",), "up")
        await trio.sleep(REFRESH_S + 1)
    assert changes == [("a",), ("a", "b")]
    assert transport.asked_at[1] - transport.asked_at[0] == pytest.approx(REFRESH_S)


async def test_the_last_list_stays_while_the_upstream_is_down(autojump_clock: MockClock, logs: Logs) -> None:
    """A failure makes the upstream down, once in the log, and changes no list; the pauses double up to a minute."""
    upstream, transport, poll, changes = _polled(_refused)
    upstream.models = ("a",)
    async with open_service(poll.run):
        await trio.sleep(200)
    assert (upstream.models, upstream.state, changes) == (("a",), "down", [])
    assert len(logs.named("models_not_listed")) == 1
    pauses = [after - before for before, after in zip(transport.asked_at, transport.asked_at[1:], strict=False)]
    assert pauses == pytest.approx([10, 20, 40, 60, 60])


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        *[(lambda status=status: httpx2.Response(status), "unknown") for status in (401, 403, 404, 405, 501)],
        (lambda: httpx2.Response(200, content=b"<html>"), "unknown"),
        (lambda: httpx2.Response(500), "down"),
        (_refused, "down"),
    ],
    ids=["401", "403", "404", "405", "501", "not a list", "failure", "unreachable"],
)
@pytest.mark.parametrize("before", ["unknown", "up", "down"])
async def test_the_state_after_an_answer(
    autojump_clock: MockClock, answer: Answer, state: str, before: str, logs: Logs
) -> None:
    """An upstream that answers, but not with a list, is not down for that: calls decide. One that fails is."""
    upstream, transport, poll, changes = _polled(answer)
    upstream.state = before
    async with open_service(poll.run):
        await poll.tried.wait()
        await trio.sleep(100)
    assert (upstream.state, changes) == ("up" if (state, before) == ("unknown", "up") else state, [])
    assert len(transport.asked_at) > 2
    assert len(logs.named("models_not_listed")) <= 1


async def test_a_silent_upstream(autojump_clock: MockClock) -> None:
    """An upstream that does not answer within 10 s is down."""
    upstream, transport, poll, _ = _polled(_refused)

    async def hang(request: httpx2.Request) -> httpx2.Response:
        await trio.sleep_forever()
        raise AssertionError

    transport.handle_async_request = hang  # type: ignore[method-assign]
    async with open_service(poll.run):
        await poll.tried.wait()
    assert upstream.reason == "GET /models of u was not answered within 10 s."


async def test_a_defect_does_not_end_the_poll(autojump_clock: MockClock, logs: Logs) -> None:
    """A defect is logged, and the upstream is asked again after a minute."""

    def crash() -> httpx2.Response:
        raise ZeroDivisionError

    logs.expect_error("models_refresh_crashed")
    upstream, _, poll, _ = _polled(crash, lambda: _lists("a"))
    async with open_service(poll.run):
        await trio.sleep(REFRESH_S + 1)
    assert upstream.models == ("a",)
