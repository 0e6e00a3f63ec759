"""Limits and budgets of calls: what is let through, how a refusal looks, and what is left afterwards."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import DONE, Pause, Provider, Say, content, says, usage
from trigate.config.sections import Config
from trigate.quotas.counters import Budget

ADA, BOB = "key-of-ada-0123", "key-of-bob-0123"
ANSWER = (Say(content("Hi")), Say(usage(100, 20)), Say(DONE))
"""An answer that costs 100 + 200 micro-dollars."""


PRICES = {"m": {"input_usd": 1, "output_usd": 10}}


def priced(*args: Any, **sections: Any) -> Config:
    """A configuration with prices."""
    return make_config(*args, prices=PRICES, **sections)


def ask(served: Served, secret: str = ADA, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    """Starts a call."""
    body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 20}
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return served.client.start("POST", path, {**body, **fields}, headers=headers)


def keys(**settings: Any) -> dict[str, Any]:
    """The table of two keys, of which ada's has settings."""
    return {"ada": {"secret": ADA, **settings}, "bob": BOB}


async def test_requests_per_minute(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A minute's calls may come at once; the next is refused with the time to wait, and let through after it."""
    async with open_app(priced(keys=keys(rpm=3)), Provider(says("x"))) as served:
        left = [(await ask(served).wait()).header("x-ratelimit-remaining-requests") for _ in range(3)]
        assert left == ["2", "1", "0"]
        refused = await ask(served).wait()
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.error["limit"] == {"of": "key:ada", "setting": "rpm", "value": 3}
        assert refused.error["message"].startswith("The key ada may make 3 calls a minute (rpm)")
        assert (refused.header("retry-after"), refused.header("x-ratelimit-limit-requests")) == ("20", "3")
        assert refused.header("x-ratelimit-remaining-requests") == "0"
        assert refused.header("x-ratelimit-reset-requests").startswith(("59", "1m"))
        assert (await ask(served, BOB).wait()).status == 200
        await trio.sleep(int(refused.header("retry-after-ms")) / 1000)
        assert (await ask(served).wait()).status == 200
        served.assert_clean()


async def test_tokens_per_minute(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The estimate is held before the call, and corrected by what the upstream reports."""
    async with open_app(priced(keys=keys(tpm=300)), Provider(ANSWER)) as served:
        first = await ask(served).wait()
        assert (first.status, first.header("x-ratelimit-limit-tokens")) == (200, "300")
        assert 240 < int(first.header("x-ratelimit-remaining-tokens")) < 280
        refused = await ask(served, max_tokens=190).wait()  # 180 are left
        assert (refused.status, refused.error["code"]) == (429, "tokens_exceeded")
        assert refused.header("x-ratelimit-remaining-tokens") == "180"
        assert int(refused.header("retry-after")) > 10
        too_large = await ask(served, max_tokens=400).wait()
        assert (too_large.status, too_large.header("x-should-retry")) == (429, "false")
        assert (await ask(served).wait()).status == 200
        served.assert_clean()


@pytest.mark.parametrize("of", ["key", "upstream"])
async def test_the_estimate_is_corrected(open_app: OpenApp, autojump_clock: MockClock, of: str) -> None:
    """What is held for a prompt is what prompts of its size have had at the target."""
    limit = {"tpm": 340}
    config = priced({"up": limit if of == "upstream" else {}}, keys=keys(**(limit if of == "key" else {})))
    async with open_app(config, Provider(ANSWER)) as served:
        assert (await ask(served).wait()).status == 200
        assert (await ask(served, max_tokens=119).wait()).status == 200  # 220 are left
        await trio.sleep(60)
        assert (await ask(served).wait()).status == 200
        refused = await ask(served, max_tokens=121).wait()
        assert (refused.status, refused.error["code"]) == (429, "tokens_exceeded")
        served.assert_clean()


async def test_exchanges_in_flight(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call beyond the limit of exchanges in flight is refused; one that ends makes room."""
    slow = (Pause(10), *says("x"))
    async with open_app(priced(keys=keys(max_exchanges=1)), Provider(slow)) as served:
        call = ask(served)
        await wait_all_tasks_blocked()
        refused = await ask(served).wait()
        assert (refused.status, refused.error["code"]) == (429, "concurrency_exceeded")
        call.disconnect()
        await call.wait()
        assert (await ask(served).wait()).status == 200
        served.assert_clean()


async def test_a_budget(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """When it is spent, a call is refused in a way that no SDK repeats, until the next period begins."""
    async with open_app(priced(keys=keys(budget_usd="0.0007")), Provider(ANSWER)) as served:
        for _ in range(2):
            assert (await ask(served).wait()).status == 200
        refused = await ask(served).wait()
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert refused.error["type"] == "insufficient_quota"
        assert refused.header("x-should-retry") == "false"
        assert int(refused.header("retry-after")) > 0
        assert "The key ada may spend 0.0007 USD a month. 0.0006 USD are spent" in refused.error["message"]
        assert refused.error["limit"] == {"of": "key:ada", "setting": "budgets.month", "value": 700}
        assert (await ask(served, BOB).wait()).status == 200
        await ask(served).wait()
        assert [event["scope"] for event in logs.named("budget_reached")] == ["key:ada"], "once in a period"
        served.assert_clean()


async def test_a_refusal_to_claude_code(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """On Anthropic's path it is a ``billing_error``, with the headers that Claude Code shows."""
    async with open_app(priced(keys=keys(budget_usd="0.0007", rpm=9)), Provider(ANSWER)) as served:
        first = await ask(served, path="/v1/messages").wait()
        assert first.header("anthropic-ratelimit-unified-status") == "allowed"
        assert first.header("anthropic-ratelimit-requests-remaining") == "8"
        assert first.header("anthropic-ratelimit-requests-reset").endswith("Z")
        await ask(served, path="/v1/messages").wait()
        refused = await ask(served, path="/v1/messages").wait()
        assert (refused.status, refused.error["type"]) == (429, "billing_error")
        assert refused.header("x-should-retry") == "false"
        assert refused.header("anthropic-ratelimit-unified-status") == "rejected"
        assert refused.header("anthropic-ratelimit-unified-overage-utilization") == "0.8571"
        assert int(refused.header("anthropic-ratelimit-unified-reset")) > 1_700_000_000


async def test_a_soft_budget(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """It refuses nothing: the answers have a warning, and the log has it once."""
    async with open_app(priced(keys=keys(soft_budget_usd="0.0005")), Provider(ANSWER)) as served:
        events: list[Any] = []
        served.gateway.exchange_services.quotas.on_budget = events.append
        calls = [await ask(served).wait() for _ in range(4)]
        assert [call.status for call in calls] == [200] * 4
        warned = [call.header("x-trigate-budget-warning") for call in calls[2:]]
        assert warned == ["key:ada has spent 0.0006 USD", "key:ada has spent 0.0009 USD"]
        [event] = events
        assert (event.kind, event.scope, event.limit, event.spent) == ("soft_budget", "key:ada", 500, 600)
        assert len(logs.named("budget_reached")) == 1


@pytest.mark.parametrize(
    ("sections", "scope"),
    [
        ({"groups": {"team": {"rpm": 1}}, "keys": keys(group="team")}, "group:team"),
        ({"models": {"up/m": {"targets": ["up/m"], "rpm": 1}}, "keys": keys()}, "model:up/m"),
        ({"allowance": {"rpm": 1}, "keys": keys()}, "all"),
        ({"allowance": {"rpm": 1}}, "all"),
    ],
    ids=["group", "model", "all", "no keys"],
)
async def test_every_scope(open_app: OpenApp, autojump_clock: MockClock, sections: dict[str, Any], scope: str) -> None:
    """A group, a model and the whole gateway have limits as a key has them."""
    async with open_app(priced(**sections), Provider(says("x"))) as served:
        secret = ADA if "keys" in sections else ""
        assert (await ask(served, secret).wait()).status == 200
        refused = await ask(served, secret).wait()
        assert (refused.status, refused.error["limit"]["of"]) == (429, scope)
        served.assert_clean()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1beta/models/up/m:generateContent", "/api/chat"])
async def test_every_format(open_app: OpenApp, autojump_clock: MockClock, path: str) -> None:
    """A refusal has the shape of its format, with the headers that every format has."""
    autojump_clock.autojump_threshold = 0.005  # it does not wait for threads
    async with open_app(priced(keys=keys(rpm=1)), Provider(says("x"))) as served:
        extra: dict[str, Any] = {"input": "Hi", "contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
        await ask(served, path=path, **extra).wait()
        refused = await ask(served, path=path, **extra).wait()
        assert (refused.status, refused.header("x-ratelimit-limit-requests")) == (429, "1")
        assert b"The key ada may make 1 calls a minute" in refused.body


async def test_a_hundred_calls_on_a_budget_for_ten(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """100 calls at once, each of which can be paid ten times, spend no more than the budget."""
    slow = (Pause(1), *ANSWER)
    async with open_app(priced(keys=keys(budget_usd="0.003")), Provider(slow)) as served:
        calls = [ask(served) for _ in range(100)]
        statuses = sorted([(await call.wait()).status for call in calls])
        spent = sum(exchange.record.cost or 0 for exchange in served.settled)
        # a call holds at most its prompt (29 estimated tokens) and its 20 tokens: about 229 of the 300 that it costs
        assert 10 <= statuses.count(200) <= 13
        assert spent <= 3000 + statuses.count(200) * 71
        served.assert_clean()


async def test_what_is_spent_is_the_sum_of_the_ledger(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """By key, group, model, upstream and in all, to the micro-dollar."""
    config = priced(
        keys={"ada": {"secret": ADA, "group": "team"}, "bob": BOB},
        groups={"team": {"budget_usd": 1}},
        models={"fast": {"targets": ["up/m"]}},
    )
    async with open_app(config, Provider(ANSWER)) as served:
        for secret, model in ((ADA, "up/m"), (ADA, "fast"), (BOB, "fast")):
            await ask(served, secret, model=model).wait()
        await served.gateway.ledger.flush()
        quotas = served.gateway.store.quotas
        spent = {
            scope: await quotas.spent(scope, first_day=0, end_day=10**7)
            for scope in ("all", "key:ada", "key:bob", "group:team", "model:fast", "model:up/m", "upstream:up")
        }
        assert spent == {
            "all": 900,
            "key:ada": 600,
            "key:bob": 300,
            "group:team": 600,
            "model:fast": 600,
            "model:up/m": 0,
            "upstream:up": 900,
        }


async def test_a_new_configuration(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A limit that is raised counts at once, and what has been used stays used."""
    async with open_app(priced(keys=keys(rpm=1)), Provider(says("x"))) as served:
        await ask(served).wait()
        assert (await ask(served).wait()).status == 429
        config = priced(keys=keys(rpm=3))
        served.gateway.keys.apply(config)
        served.gateway.exchange_services.quotas.apply(config)
        assert [(await ask(served).wait()).status for _ in range(3)] == [200, 200, 429]


async def test_without_limits_nothing_is_counted(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A gateway without limits has no counters, and its answers no headers of limits."""
    async with open_app(priced(keys=keys()), Provider(says("x"))) as served:
        call = await ask(served).wait()
        assert not [name for name, _ in call.headers if b"ratelimit" in name]
        assert not list(served.gateway.exchange_services.quotas.all_counters())


async def test_a_call_that_fails_settles(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A refused call gives back its tokens and money, and keeps its request."""
    config = priced(keys=keys(rpm=9, tpm=1000, budget_usd=1, max_exchanges=3))
    async with open_app(config, Provider()) as served:
        call = await ask(served, model="nope").wait()
        assert call.status == 404
        served.providers["up"].play((Say(b"x"),))
        await ask(served).wait()
        await ask(served, stream=False).wait()
        served.assert_clean()
        left = {
            c.name: c.available(trio.current_time()) for c in served.gateway.exchange_services.quotas.all_counters()
        }
        assert left["key:ada/max_exchanges"] == 3


def test_bodies_that_say_how_long_an_answer_may_be() -> None:
    """In every format."""
    from trigate.exchange.call_amounts import _asked
    from trigate.openai.endpoints import ENDPOINTS
    from trigate.openai.request import decode_call

    for fields, expected in (
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"generationConfig": {"maxOutputTokens": 9}}, 9),
        ({"options": {"num_predict": -1}}, None),
        ({"max_tokens": "7"}, None),
    ):
        body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
        assert _asked(decode_call(ENDPOINTS["/v1/chat/completions"], body)) == expected


async def test_an_upstream_at_its_limit_is_passed_over(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The next target serves the call; if there is none, the call is refused with the upstream's limit."""
    config = priced(
        {"a": {"rpm": 2, "max_exchanges": 1}, "b": {"rpm": 1}}, models={"both": {"targets": ["a/m", "b/m"]}}
    )
    async with open_app(config, {"a": Provider(says("x")), "b": Provider(says("y"))}) as served:
        calls = [await ask(served, "", model="both").wait() for _ in range(4)]
        assert [call.header("x-trigate-upstream") for call in calls] == ["a", "a", "b", ""]
        assert (calls[3].status, calls[3].error["code"]) == (429, "rate_limit_exceeded")
        assert calls[3].error["limit"] == {"of": "upstream:a", "setting": "rpm", "value": 2}
        assert calls[3].header("retry-after") == "30"
        assert (await ask(served, "", model="b/m").wait()).error["limit"]["of"] == "upstream:b"
        served.assert_clean()


async def test_the_budget_of_an_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What its calls have cost counts, and a call whose attempts fail gives back what it held."""
    config = priced({"a": {"budget_usd": "0.0007"}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}})
    async with open_app(config, {"a": Provider(ANSWER), "b": Provider(says("y"))}) as served:
        calls = [await ask(served, "", model="both").wait() for _ in range(4)]
        assert [call.header("x-trigate-upstream") for call in calls] == ["a", "a", "b", "b"]
        refused = await ask(served, "", model="a/m").wait()
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        served.assert_clean()


def change(served: Served, config: Config) -> None:
    """Applies a configuration to the keys and the quotas of a gateway."""
    served.gateway.keys.apply(config)
    served.gateway.exchange_services.quotas.apply(config)


async def test_lowered_slots(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What calls in flight give back is not used again, beyond a limit that has been lowered meanwhile."""
    async with open_app(priced(keys=keys(max_exchanges=3)), Provider((Pause(1), *says("x")))) as served:
        calls = [ask(served) for _ in range(3)]
        await wait_all_tasks_blocked()
        change(served, priced(keys=keys(max_exchanges=1)))
        assert (await ask(served).wait()).status == 429
        assert [(await call.wait()).status for call in calls] == [200] * 3
        await trio.sleep(1)
        calls = [ask(served) for _ in range(3)]
        assert sorted([(await call.wait()).status for call in calls]) == [200, 429, 429]


@pytest.mark.slow
async def test_a_lowered_rate(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It fills at the new limit, after what has been used beyond that."""
    async with open_app(priced(keys=keys(rpm=60)), Provider(says("x"))) as served:
        assert {(await ask(served).wait()).status for _ in range(50)} == {200}
        change(served, priced(keys=keys(rpm=6)))
        passed = []
        for _ in range(1000):
            passed.append((await ask(served).wait()).status)
            await trio.sleep(1)
        assert passed.count(200) == pytest.approx((1000 - 440) / 10, abs=2), "44 beyond the limit take 440 s to fill"


async def test_a_lowered_budget(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What a call held and has not cost is not used again."""
    async with open_app(priced(keys=keys(budget_usd="0.1")), Provider((Pause(1), *ANSWER))) as served:
        call = ask(served, max_tokens=4000)  # holds 0.04
        await wait_all_tasks_blocked()
        change(served, priced(keys=keys(budget_usd="0.0004")))
        assert (await ask(served).wait()).status == 429
        assert (await call.wait()).status == 200
        assert [(await ask(served).wait()).status for _ in range(3)] == [429] * 3, "of 400, 300 are spent"
        served.assert_clean()


async def test_a_call_that_knows_the_former_limit(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A key is found before its request's body is read. So a call may come with a key from before a change; the calls
    after it follow the change all the same."""
    async with open_app(priced(keys=keys(max_exchanges=3)), Provider(says("x"))) as served:
        quotas, find = served.gateway.exchange_services.quotas, served.gateway.keys.find
        former = find(ADA.encode())
        change(served, priced(keys=keys(max_exchanges=1)))
        now = find(ADA.encode())
        assert former is not None
        assert now is not None
        for key, limit in ((now, 1), (former, 3), (now, 1)):
            [counter] = quotas.limits(key, "m", 0.0).all
            assert counter.limit == limit


async def test_what_began_yesterday(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that ends after midnight counts on the day on which it began, also with its upstream."""
    async with open_app(priced({"up": {"budgets": {"day": 1}}})) as served:
        quotas = served.gateway.exchange_services.quotas
        [yesterday], [today] = [quotas.upstream_limits("up", at).all for at in (86_399.0, 86_400.0)]
        quotas.spend_at("up", 5, 86_399.0)
        assert isinstance(yesterday, Budget)
        assert isinstance(today, Budget)
        assert (yesterday.settled, today.settled) == (5, 0)


async def test_a_call_without_time_left(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The upload has taken the time of a call that then needs more of a limit: it is over, as without a limit."""
    async with open_app(priced(keys=keys(rpm=1)), Provider(says("x"))) as served:
        body = served.client.encode({"model": "up/m", "messages": [{"role": "user", "content": "Hi"}]})
        headers = [
            ("authorization", f"Bearer {ADA}"),
            ("x-request-timeout", "0.5"),
            ("content-type", "application/json"),
        ]
        call = served.client.start("POST", "/v1/chat/completions", raw=[body[:9], Pause(1), body[9:]], headers=headers)
        assert ((await call.wait()).status, call.error["code"]) == (504, "upstream_timeout")
        assert "longer than 0.5 s" in call.error["message"]
