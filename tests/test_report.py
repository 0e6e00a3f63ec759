"""What the gateway says of itself: at its start, and in ``GET /status``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs
import pytest
import trio
from conftest import Served, make_config
from provider import Provider, Refuse, Say, Stall, answers, content
from trio.testing import MockClock

from trigate import __version__, report
from trigate.config import Config

OpenApp = Callable[..., AbstractAsyncContextManager[Served]]

GATEWAY_KEY = "key-of-the-gateway"
PROVIDER_KEY = "key-of-the-provider"
HEADER = "value-of-a-header"
WITH_SECRETS = make_config(
    {"up": {"api_key": PROVIDER_KEY, "headers": {"x-team": HEADER}}},
    keys={"alice": GATEWAY_KEY},
)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0:00:00"),
        (59.99, "0:00:59"),
        (60, "0:01:00"),
        (3_599, "0:59:59"),
        (86_400, "24:00:00"),
        (1e7, "2777:46:40"),
    ],
)
def test_clock(seconds: float, written: str) -> None:
    """Whole seconds, rounded down; hours go on beyond a day."""
    assert report.clock(seconds) == written


# -- status -----------------------------------------------------------------------------------------------------------


async def test_status_of_a_gateway_at_work(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Exactly these fields, as JSON has them, with a live stream, an upstream that failed, and one without a key."""
    config = make_config({"up": {}, "bad": {}, "off": {"api_key": {"env": "NOT_SET"}}})
    providers = {
        "up": Provider((Say(content("the answer")), Stall())),
        "bad": Provider(answers(b"{}", status=500)),
        "off": Provider(),
    }
    async with open_app(config, providers) as served:
        await served.client.chat(model="bad/m").wait()
        await served.client.chat(messages=[{"role": "user", "content": "the question"}]).wait_for(b"answer")
        await trio.sleep(7)
        status = await report.status(served.gateway)
        assert json.loads(json.dumps(status, allow_nan=False)) == status
        assert set(status) == {
            "status",
            "version",
            "uptime_s",
            "uptime",
            "config",
            "reload_error",
            "workers",
            "channels",
            "sessions",
            "outbox",
            "store",
            "upstreams",
            "streams",
            "totals",
        }
        up, bad, off = status["upstreams"]
        assert set(up) == set(bad) == set(off)
        assert (up["name"], up["kind"], up["in_flight"], up["models"]) == ("up", "openai", 1, 1)
        assert (up["last_error"], up["last_error_at"]) == (None, None)
        assert datetime.datetime.fromisoformat(bad["last_error_at"]).tzinfo is datetime.UTC
        assert off["state"] == "disabled"
        assert "NOT_SET" in off["reason"]
        streams = status["streams"]
        assert (streams["live"], streams["by_phase"], streams["by_upstream"]) == (1, {"streaming": 1}, {"up": 1})
        [stream] = streams["oldest"]
        assert (stream["model"], stream["upstream"], stream["phase"]) == ("up/m", "up/m", "streaming")
        assert stream["age_s"] == pytest.approx(7, abs=0.5)
        assert (status["totals"]["exchanges"], status["totals"]["failed"]) == (1, 1)
        assert "the question" not in json.dumps(status)
        assert "the answer" not in json.dumps(status)


async def test_status_while_draining(open_app: OpenApp) -> None:
    """It says so; before that it is ok."""
    async with open_app() as served:
        assert (await report.status(served.gateway))["status"] == "ok"
        served.gateway.drain.begin()
        assert (await report.status(served.gateway))["status"] == "draining"


@pytest.mark.parametrize("status", [401, 400, 500, 503])
async def test_no_secret_is_told(open_app: OpenApp, status: int) -> None:
    """Neither key nor header, even when the provider quotes them as it refuses them. Names of keys are told."""
    quoted = json.dumps({"error": {"message": f"refused: {PROVIDER_KEY} {HEADER}"}}).encode()
    async with open_app(WITH_SECRETS, Provider(answers(quoted, status=status))) as served:
        mine = {"authorization": f"Bearer {GATEWAY_KEY}"}
        body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.ask("POST", "/v1/chat/completions", body, headers=mine)
        assert call.status >= 400
        assert served.providers["up"].calls[0].headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        said = json.dumps(await report.status(served.gateway)) + "\n".join(report.startup_lines(served.gateway))
        for secret in (GATEWAY_KEY, PROVIDER_KEY, HEADER):
            assert secret not in said
        assert "alice" in said


# -- at the start -----------------------------------------------------------------------------------------------------


def _insecure(config: Config) -> Config:
    return attrs.evolve(config, server=attrs.evolve(config.server, insecure=True))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (make_config(), "no key: this machine only"),
        (make_config(keys={"alice": "a" * 20, "bob": "b" * 20}), "2 keys (alice, bob)"),
        (_insecure(make_config()), "NO KEY and --insecure: anybody who reaches it can use it"),
        (_insecure(make_config(keys={"alice": "a" * 20})), "1 keys (alice)"),
    ],
    ids=["no key", "keys", "insecure", "insecure with a key"],
)
async def test_who_may_come_in(open_app: OpenApp, config: Config, first: str) -> None:
    """The first line says it, with version and source; an open gateway shouts."""
    async with open_app(config) as served:
        assert report.startup_lines(served.gateway) == [
            f"Trigate {__version__}, configured by test; {first}; store in memory",
            "Upstreams: up: 1 models",
            "Models: 2 listed; default is up/m",
        ]


@pytest.mark.parametrize(
    ("upstreams", "scripts", "found", "default"),
    [
        ({}, {}, "none", "default cannot serve: No upstream can serve now (none is configured)"),
        (
            {"off": {"api_key": {"env": "NOT_SET"}}},
            {},
            "off: disabled (api_key: the environment variable NOT_SET is not set)",
            "default cannot serve: No upstream can serve now (off: api_key: the environment variable NOT_SET",
        ),
        ({"gone": {"models": "discover"}}, {"gone": (Refuse(),)}, "gone: down (", "default cannot serve: "),
        (
            {"gone": {"models": "discover"}, "up": {"models": ["a", "b"]}},
            {"gone": (Refuse(),)},
            "up: 2 models",
            "default is up/a",
        ),
        ({"parrot": {"kind": "echo"}}, {}, "parrot: 1 models", "default is parrot/echo"),
    ],
    ids=["none", "disabled", "down", "down and up", "echo"],
)
async def test_what_was_found(
    open_app: OpenApp,
    autojump_clock: MockClock,
    upstreams: dict[str, Any],
    scripts: dict[str, Any],
    found: str,
    default: str,
) -> None:
    """Each upstream with its models, or with the reason why not; and what ``default`` means now."""
    providers = {name: Provider(scripts[name]) if name in scripts else Provider() for name in upstreams}
    async with open_app(make_config(upstreams), providers) as served:
        _, second, third = report.startup_lines(served.gateway)
        assert second.startswith("Upstreams: ")
        assert found in second
        assert f"{len(served.gateway.generation.public_ids())} listed; {default}" in third
