"""Aliases that are patterns, end to end, in memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, make_config
from tests.support.provider import Provider, answers, completion, says
from trigate.upstream import generation

FAILS = answers(b'{"error":{"message":"broke"}}', status=500)
CONFIG = make_config(
    {"a": {"models": ["claude-9", "m"]}, "b": {}, "off": {"api_key": {"env": "NOT_SET"}}},
    models={
        "claude-*": {
            "targets": ["a/{model}", "b/x-{*}"],
            "max_attempts": 2,
            "coalesce": True,
            "info": {"context_length": 7},
        },
        "gone-*": {"targets": ["off/{model}"]},
    },
)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call(open_app: OpenApp, stream: bool) -> None:
    """Each target gets the model that its template makes of the id, and the answer has the id that was asked for. The
    settings of the pattern apply."""
    good = says("yes") if stream else answers(completion("yes"))
    providers = {"a": Provider(FAILS), "b": Provider(good), "off": Provider()}
    async with open_app(CONFIG, providers) as served:
        call = await served.client.chat(model="claude-9", stream=stream).wait()
        assert call.status == 200
        assert b'"model":"claude-9"' in call.body
        assert [providers[name].calls[0].json["model"] for name in "ab"] == ["claude-9", "x-9"]
        assert served.settled[0].request.model.coalesce
        providers["b"].play(FAILS)
        failed = await served.client.chat(model="claude-9", stream=stream).wait()
        assert failed.header("x-trigate-attempts") == "2", "max_attempts is that of the pattern"
        served.assert_clean()


async def test_the_list_of_models_agrees(open_app: OpenApp) -> None:
    """A pattern is not listed. Each id that it matches is a model, with the fields of the pattern."""
    providers: Any = {"a": Provider(), "b": Provider(), "off": Provider()}
    async with open_app(CONFIG, providers) as served:
        rows = {row["id"]: row for row in (await served.client.ask("GET", "/v1/models")).json["data"]}
        assert not any("*" in model for model in rows)
        for model, status in (("claude-9", 200), ("claude-new", 200), ("claude-", 404), ("gone-x", 404)):
            found = await served.client.ask("GET", f"/v1/models/{model}")
            assert found.status == status
            if status == 200:
                assert (found.json["id"], found.json["context_length"]) == (model, 7)
                assert found.json["owned_by"] == "a"
        assert rows["claude-9"] == (await served.client.ask("GET", "/v1/models/claude-9")).json
        form = {"anthropic-version": "2023-06-01"}
        assert (await served.client.ask("GET", "/v1/models/claude-new", headers=form)).json["type"] == "model"


async def test_many_ids(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients choose the ids, so the number of routes that are kept is bounded."""
    monkeypatch.setattr(generation, "_MAX_ROUTES", 8)
    async with open_app(CONFIG, {"a": Provider(), "b": Provider(), "off": Provider()}) as served:
        current = served.gateway.generations.current
        for number in range(30):
            current.route(f"claude-{number}")
        assert len(current._routes) <= 8
        assert current.alias_of("claude-29") == current.alias_of("claude-1") == "claude-*"
        assert (await served.client.ask("POST", "/v1/chat/completions", chat(model="claude-1"))).status == 200
