"""``GET /metrics``: scrapes of one worker and of two, as the parsers of Prometheus' own client library read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bench import events
from tests.metrics.test_exposition import parsed
from tests.status.test_inflight import STREAMING, Mute
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import FINISH, Pause, Provider, Say, answers, content, event, says
from trigate.exchange import call_metrics
from trigate.metrics.exposition import OPENMETRICS_TYPE, TEXT_TYPE
from trigate.metrics.families import FAMILIES, SECONDS
from trigate.metrics.histogram import Histogram
from trigate.status import scrape

TOKENS = {
    "prompt_tokens": 11,
    "completion_tokens": 3,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
COUNTED = (
    *(Say(content("a")), Pause(0.5), Say(content("b")), Say(FINISH)),
    Say(event(events.usage_chunk(TOKENS)) + events.DONE),
)
"""A stream of half a second, with its tokens."""


class Scraped:
    """The samples of a scrape."""

    def __init__(self, body: bytes, *, openmetrics: bool = False) -> None:
        self.families = parsed(body, openmetrics=openmetrics)
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the samples with these labels; None = there is none."""
        found = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def values(self, name: str, label: str) -> set[str]:
        """The values of a label of a metric."""
        return {sample.labels[label] for sample in self.samples if sample.name == name}


async def scraped(served: Served, accept: str = "") -> Scraped:
    """Scrapes a gateway."""
    answer = await served.client.ask("GET", "/metrics", headers={"accept": accept} if accept else {})
    is_open = "openmetrics" in accept
    assert answer.status == 200
    assert answer.header("content-type") == (OPENMETRICS_TYPE if is_open else TEXT_TYPE)
    return Scraped(answer.body, openmetrics=is_open)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_new_gateway(open_app: OpenApp, accept: str) -> None:
    """What can be known before the first call is there, with 0: a rate is right from the first call on."""
    async with open_app(make_config({"up": {}, "other": {}}), {"up": Provider(), "other": Provider()}) as served:
        found = await scraped(served, accept)
        assert found.value("trigate_workers") == 1
        assert found.values("trigate_draining", "worker") == {served.gateway.workers.id}
        for name, labels in (
            ("trigate_exchanges_total", {"outcome": "complete"}),
            ("trigate_exchanges_total", {"outcome": "upstream_timeout"}),
            ("trigate_attempts_total", {"upstream": "other", "outcome": "complete"}),
            ("trigate_attempts_by_reason_total", {"reason": "retry"}),
            ("trigate_hedges_total", {"result": "won"}),
            ("trigate_breakers", {"upstream": "up", "state": "open"}),
            ("trigate_live_exchanges", {"phase": "streaming"}),
            ("trigate_gateway_overhead_seconds_count", {}),
            ("trigate_relay_events_total", {}),
            ("trigate_stalled_clients_total", {}),
            ("trigate_sessions", {"state": "total"}),
            ("trigate_outbox_waiting", {}),
        ):
            assert found.value(name, **labels) == 0, name
        assert (found.value("process_resident_memory_bytes") or 0) > 1e6
        assert (found.value("process_open_fds") or 0) > 3


async def test_calls(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Calls are counted by how they ended, with their times, tokens and attempts."""
    config = make_config(
        {"up": {}, "down": {}},
        models={"both": {"targets": ["down/m", "up/m"]}},
        prices={"m": {"input_usd": 1, "output_usd": 2}},
    )
    providers = {"up": Provider(STREAMING, COUNTED), "down": Provider(answers(b"{}", status=500))}
    async with open_app(config, providers) as served:
        left = served.client.chat()
        await left.wait_for(b'"a"')
        found = await scraped(served)
        assert found.value("trigate_live_exchanges", phase="streaming") == 1
        assert found.value("trigate_relay_events_total") == 1
        left.disconnect()
        await left.wait()
        assert (await served.client.chat(model="both").wait()).status == 200
        assert (await served.client.chat(model="absent/x").wait()).status == 404
        found = await scraped(served, "application/openmetrics-text")
        for outcome in ("complete", "cancelled", "model_not_found"):
            assert found.value("trigate_exchanges_total", outcome=outcome) == 1, outcome
        assert found.value("trigate_attempts_total", upstream="down", outcome="upstream_unavailable") == 1
        assert found.value("trigate_attempts_by_reason_total", reason="failover") == 1
        assert found.value("trigate_cancel_latency_seconds_count") == 1
        assert found.value("trigate_gateway_overhead_seconds_count") == 3
        call = {
            "gen_ai_operation_name": "chat",
            "gen_ai_provider_name": "openai",
            "gen_ai_request_model": "m",
            "upstream": "up",
        }
        duration = "gen_ai_server_request_duration_seconds_count"
        assert found.value(duration, **call, error_type="") == 1
        assert found.value(duration, **call, error_type="cancelled") == 1
        assert found.value("gen_ai_server_time_to_first_token_seconds_count", **call) == 1
        assert found.value("gen_ai_server_time_per_output_token_seconds_count", **call) == 1
        usage = "gen_ai_client_inference_usage"
        for part, tokens in (("input", 11), ("output", 3), ("cache_read_input", 4), ("reasoning_output", 2)):
            assert found.value(f"{usage}_{part}_tokens_total", **call) == tokens
        assert found.value("gen_ai_client_inference_operation_input_tokens_sum", **call) == 11
        assert (found.value("trigate_cost_usd_total", upstream="up") or 0) > 0


async def test_a_client_creates_no_label(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Whatever model, path, id or key a client names: no label has it, and the number of samples does not grow."""
    config = make_config({"up": {"models": [f"m{number}" for number in range(5)]}})
    monkeypatch.setattr(call_metrics, "MAX_MODELS", 3)
    forged = 'x"} 1\ntrigate_forged{a="'
    async with open_app(config, Provider(*[says("a")] * 30)) as served:
        for number in range(5):
            await served.client.chat(model=f"up/m{number}").wait()
        for model in ("up/invented", "invented", forged, f"up/{forged}"):
            await served.client.chat(model=model).wait()
        before = await scraped(served)
        for number in range(5):
            await served.client.ask(
                "POST",
                "/v1/chat/completions",
                {"model": f"up/invented{number}", "messages": [{"role": "user", "content": "Hi"}]},
                headers={"x-request-id": f"invented{number}", "x-session-key": f"invented{number}"},
            )
        after = await scraped(served)
        names = after.values("gen_ai_server_time_to_first_token_seconds_count", "gen_ai_request_model")
        assert names == {"m0", "m1", "m2", "other"}
        assert len({str(sample.labels) for sample in after.samples}) == len(
            {str(sample.labels) for sample in before.samples}
        )
        assert not [sample for sample in after.samples if "invented" in str(sample) or "forged" in str(sample)]


async def test_two_workers(open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker answers for both, each sample once, as it is now. One that does not answer in time is counted."""
    store = tmp_path / "s.db"
    monkeypatch.setattr(scrape, "ANSWER_TIMEOUT_S", 5.0)
    async with (
        open_app(make_config(), Provider(says("a")), store=store) as one,
        open_app(make_config(), Provider(says("a"), (Say(content("a")),)), store=store) as two,
    ):
        await one.gateway.workers.join()
        await two.gateway.workers.join()
        while not (one.gateway.workers.count == two.gateway.workers.count == 2):  # noqa: ASYNC110 - nothing notifies of it
            await trio.sleep(0.005)
        await one.client.chat().wait()
        await two.client.chat().wait()
        await two.client.chat().wait()
        ids = {one.gateway.workers.id, two.gateway.workers.id}
        for served in (one, two):
            found = await scraped(served)
            assert found.value("trigate_workers") == 2
            assert found.value("trigate_scrape_missing_workers") == 0
            assert found.value("trigate_exchanges_total", outcome="complete") == 2
            assert (
                found.value("trigate_exchanges_total", outcome="upstream_truncated", worker=two.gateway.workers.id) == 1
            )
            for family in FAMILIES:
                for sample in found.families[family.name].samples if family.name in found.families else ():
                    assert family.is_shared or sample.labels["worker"] in ids
            keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in found.samples]
            assert len(set(keys)) == len(keys)
        monkeypatch.setattr(scrape, "ANSWER_TIMEOUT_S", 0.05)
        two.gateway.scrapes._workers = Mute()  # type: ignore[assignment]
        found = await scraped(one)
        assert (found.value("trigate_workers"), found.value("trigate_scrape_missing_workers")) == (2, 1)
        assert found.values("trigate_draining", "worker") == {one.gateway.workers.id}


async def test_an_answer_fits_into_a_datagram(open_app: OpenApp) -> None:
    """The most models that are counted, each with errors, fit into the answer of one worker to another."""
    models = [f"a-model-with-a-long-name-{number}" for number in range(call_metrics.MAX_MODELS)]
    async with open_app(make_config({"up": {"models": models}}), Provider()) as served:
        metrics = served.gateway.live.metrics
        for number, model in enumerate(models):
            counts = call_metrics._Model()
            for error in ("", "cancelled", "upstream_timeout", "upstream_unavailable"):
                histogram = counts.durations[error] = Histogram(SECONDS)
                for value in range(200):
                    histogram.observe(value * 0.37 * (number % 7))
            metrics._models["chat", "openai", model, "up"] = counts
        sent: list[bytes] = []
        workers: Any = Mute()
        workers.notify = lambda topic, body=b"": sent.append(body)
        served.gateway.scrapes._workers = workers
        served.gateway.scrapes._on_question(b"q")
        [answer] = sent
        assert len(answer) <= scrape.MAX_ANSWER_BYTES


async def test_old_names(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The variable of the conventions exposes the names that they have replaced."""
    async with open_app(make_config(), Provider(COUNTED)) as served:
        await served.client.chat().wait()
        assert (await scraped(served)).value("gen_ai_client_token_usage_sum") is None
        served.gateway.scrapes._old_names = True
        found = await scraped(served)
        assert found.value("gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 11


async def test_limits(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A limit and a budget are there with what is left of them, once a call has counted for them."""
    key = {"secret": "a-key-of-ada", "rpm": 10, "budget_usd": 5}
    config = make_config(keys={"ada": key}, prices={"m": {"input_usd": 0, "output_usd": 0, "call_usd": 2}})
    headers = {"authorization": "Bearer a-key-of-ada"}
    async with open_app(config, Provider(COUNTED)) as served:
        call = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        assert (await served.client.ask("POST", "/v1/chat/completions", call, headers=headers)).status == 200
        found = Scraped((await served.client.ask("GET", "/metrics", headers=headers)).body)
        assert found.value("trigate_limit", scope="key:ada", limit="rpm") == 10
        assert 9 <= (found.value("trigate_limit_available", scope="key:ada", limit="rpm") or 0) < 10
        assert found.value("trigate_budget_usd", scope="key:ada") == 5
        assert found.value("trigate_budget_left_usd", scope="key:ada") == 3


async def test_access(open_app: OpenApp) -> None:
    """A gateway with keys shows its metrics to those who have one."""
    async with open_app(make_config(keys={"ada": "a-key-of-ada"})) as served:
        assert (await served.client.ask("GET", "/metrics")).status == 401
        headers = {"authorization": "Bearer a-key-of-ada"}
        assert (await served.client.ask("GET", "/metrics", headers=headers)).status == 200
