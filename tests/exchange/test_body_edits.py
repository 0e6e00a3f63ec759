"""What an upstream's configuration changes in requests, end to end, in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, answers, completion

EDITS = {
    "drop": ["top_p", "absent"],
    "rename": {"max_tokens": "max_new", "user": "safety_identifier"},
    "set": {"temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}},
}
GOOD = answers(completion("yes"))
SET = {"temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}}


async def sent(served: Served, body: dict[str, Any], path: str = "chat/completions") -> tuple[dict[str, Any], str]:
    """What the upstream gets, besides the messages, and what the client is told has been dropped."""
    call = await served.client.ask("POST", f"/v1/{path}", {"model": "up/m", **body})
    assert call.status == 200
    got = msgspec.json.decode(served.providers["up"].calls[-1].body)
    assert got.pop("messages")
    assert got.pop("model") == "m"
    return got, call.header("x-trigate-dropped")


HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_as_they_are(open_app: OpenApp) -> None:
    """Fields of a request that is passed through are left out, renamed and set; the client is told what is missing."""
    async with open_app(make_config({"up": EDITS}), Provider(GOOD)) as served:
        assert await sent(served, {**HI, "top_p": 0.1, "max_tokens": 9, "temperature": 1, "seed": 5}) == (
            {"max_new": 9, "seed": 5, **SET},
            "top_p",
        )
        assert await sent(served, {**HI, "user": "u", "safety_identifier": "s"}) == (
            {"safety_identifier": "s", **SET},
            "user",
        )
        assert await sent(served, HI) == (SET, "")


async def test_translated(open_app: OpenApp) -> None:
    """The same is done to the fields of a request that has been translated."""
    async with open_app(make_config({"up": EDITS}), Provider(GOOD)) as served:
        body = {**HI, "max_tokens": 9, "top_p": 0.1, "temperature": 1, "context_management": {}}
        got, dropped = await sent(served, body, "messages")
        assert got == {"max_new": 9, **SET}
        assert dropped == "context_management,top_p"


async def test_a_body_that_needs_no_edit(open_app: OpenApp) -> None:
    """It is sent as it came, byte for byte."""
    async with open_app(make_config({"up": {"drop": ["seed"]}}), Provider(GOOD)) as served:
        body = b'{ "messages" : [{"role":"user","content":"Hi"}], "model" : "up/m", "n" : 1.0 }'
        call = await served.client.ask(
            "POST", "/v1/chat/completions", body, headers={"content-type": "application/json"}
        )
        assert call.status == 200
        assert served.providers["up"].calls[0].body == body.replace(b"up/m", b"m")


async def test_other_requests_than_for_text(open_app: OpenApp) -> None:
    """They stay as they are: a parameter of texts may be an error there."""
    answer = answers(b'{"object":"list","model":"m","data":[1]}')
    async with open_app(make_config({"up": EDITS}), Provider(answer)) as served:
        body = {"model": "up/m", "input": "x", "user": "u", "top_p": 1}
        call = await served.client.ask("POST", "/v1/embeddings", body)
        assert (call.status, call.header("x-trigate-dropped")) == (200, "")
        assert served.providers["up"].calls[0].json == {**body, "model": "m"}


@pytest.mark.parametrize("where", ["configured", "listed", "top_provider"])
async def test_more_tokens_than_the_model_can_give(open_app: OpenApp, where: str) -> None:
    """A translated request asks for what the model can give; one that is passed through only if the upstream says so.
    What is configured counts more than what the upstream lists."""
    fields: dict[str, Any] = {"max_output_tokens": 4096}
    info = {"model_info": {"m": fields}} if where == "configured" else {}
    for clamps in (False, True):
        async with open_app(make_config({"up": {**info, "clamp_max_tokens": clamps}}), Provider(GOOD)) as served:
            upstream = served.gateway.generations.current.upstreams["up"]
            if where == "configured":
                upstream.model_fields = {"m": {"max_completion_tokens": 5}}
            elif where == "listed":
                upstream.model_fields = {"m": {"max_completion_tokens": 4096, "max_tokens": 5}}
            else:
                upstream.model_fields = {"m": {"top_provider": {"max_completion_tokens": 4096}}}
            for asked, given in ((128_000, 4096), (9, 9)):
                assert (await sent(served, {**HI, "max_tokens": asked}, "messages"))[0]["max_tokens"] == given
                expected = given if clamps else asked
                assert (await sent(served, {**HI, "max_tokens": asked}))[0] == {"max_tokens": expected}
            assert (await sent(served, HI))[0] == {}


async def test_a_limit_that_is_not_known(open_app: OpenApp) -> None:
    """Then the request is sent as it is."""
    async with open_app(make_config({"up": {"clamp_max_tokens": True}}), Provider(GOOD)) as served:
        for path in ("messages", "chat/completions"):
            assert (await sent(served, {**HI, "max_tokens": 128_000}, path))[0]["max_tokens"] == 128_000
        assert (await sent(served, {**HI, "max_tokens": "many"}))[0] == {"max_tokens": "many"}


async def test_every_attempt_is_edited_for_its_own_upstream(open_app: OpenApp) -> None:
    """A failover does not carry the edits of the first upstream to the next one."""
    config = make_config(
        {"a": {"drop": ["seed"], "set": {"top_p": 0.1}}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}
    )
    providers = {"a": Provider(answers(b"{}", status=500)), "b": Provider(GOOD)}
    async with open_app(config, providers) as served:
        call = await served.client.chat(model="both", stream=False, seed=5).wait()
        assert [("seed" in provider.calls[0].json) for provider in providers.values()] == [False, True]
        assert "top_p" not in providers["b"].calls[0].json
        assert call.header("x-trigate-dropped") == ""
