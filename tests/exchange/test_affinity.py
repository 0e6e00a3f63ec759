"""Affinity end to end, in memory: the calls of a conversation stay at one target."""

from __future__ import annotations

import pytest

from tests.exchange.test_attempt import BUSY, two
from tests.support.gateway import OpenApp
from tests.support.provider import Provider, answers, completion


@pytest.mark.parametrize("strategy", ["failover", "balance"])
async def test_a_session(open_app: OpenApp, strategy: str) -> None:
    """Its calls go to one target. When that fails, the session moves, and stays where it has moved to."""
    good = answers(completion("yes"))
    providers = {"a": Provider(good), "b": Provider(good)}
    config = two(strategy=strategy, affinity="session", breaker={"failures": 0, "failure_rate": 0})
    async with open_app(config, providers) as served:

        async def target(session: str, text: str) -> str:
            body = {"model": "both", "messages": [{"role": "user", "content": text}]}
            headers = {"x-claude-code-session-id": session}
            call = await served.client.ask("POST", "/v1/chat/completions", body, headers=headers)
            assert call.status == 200
            return call.header("x-trigate-upstream")

        before = {f"s{number}": await target(f"s{number}", "one") for number in range(8)}
        assert {session: await target(session, "two") for session in before} == before
        assert set(before.values()) == ({"a"} if strategy == "failover" else {"a", "b"})
        session = next(session for session, name in before.items() if name == "a")
        providers["a"].play(BUSY, good)
        assert await target(session, "three") == "b"
        assert await target(session, "four") == "b", "its cache is there now, although the other one works again"
        assert await target("new", "one") in (("a",) if strategy == "failover" else ("a", "b"))


async def test_no_affinity_reads_nothing(open_app: OpenApp) -> None:
    """By default no conversation is remembered."""
    async with open_app(two(), {"a": Provider(), "b": Provider()}) as served:
        await served.client.chat(model="both").wait()
        assert repr(served.gateway.exchange_services.upstream.targets.pins) == "<Pins, 0 conversations>"
