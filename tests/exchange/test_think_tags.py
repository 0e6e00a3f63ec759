"""Upstreams whose answers have their reasoning between tags in the text, end to end, in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.dialects.chat import message_of
from tests.support.gateway import OpenApp, make_config
from tests.support.provider import DONE, Provider, Say, answers, completion, content, role, says

TEXT = "<think>\nHm.</think>\n\nYes."
CONFIG = {"up": {"think_tags": True}}


def deltas(stream: bytes) -> list[dict[str, Any]]:
    """The deltas of a chat completion's stream."""
    data = [line[6:] for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
    return [choice["delta"] for each in data for choice in msgspec.json.decode(each)["choices"]]


@pytest.mark.parametrize("script", [answers(completion(TEXT)), says(*TEXT), says(TEXT)])
async def test_chat(open_app: OpenApp, script: Any) -> None:
    """The client gets the reasoning in its field, streamed or not, whatever the upstream sends."""
    async with open_app(make_config(CONFIG), Provider(script)) as served:
        call = await served.client.chat(stream=False).wait()
        message = call.json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
        call = await served.client.chat(stream=True).wait()
        assert call.body.endswith(b"data: [DONE]\n\n")
        found = deltas(call.body)
        assert "".join([delta.get("reasoning_content") or "" for delta in found]) == "Hm."
        assert "".join([delta.get("content") or "" for delta in found]) == "Yes."
        assert [exchange.outcome for exchange in served.settled] == ["complete", "complete"]
        served.assert_clean()


@pytest.mark.parametrize("script", [answers(completion(TEXT)), says(*TEXT), says(TEXT)])
@pytest.mark.parametrize("stream", [False, True])
async def test_messages(open_app: OpenApp, script: Any, stream: bool) -> None:
    """In Anthropic's format it is a thinking block."""
    thinks = {"model": "up/m", "max_tokens": 9, "thinking": {"type": "adaptive"}, "stream": stream}
    async with open_app(make_config(CONFIG), Provider(script)) as served:
        body = {**thinks, "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.ask("POST", "/v1/messages", body)
        message = message_of(call.body) if stream else call.json
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]
        assert (message["content"][0]["thinking"], message["content"][1]["text"]) == ("Hm.", "Yes.")


async def test_without_the_setting(open_app: OpenApp) -> None:
    """The text stays as it is, byte for byte."""
    async with open_app(make_config({"up": {}}), Provider(says(TEXT))) as served:
        call = await served.client.chat(stream=True).wait()
        assert "".join([delta.get("content") or "" for delta in deltas(call.body)]) == TEXT


async def test_another_target_while_a_tag_is_held_back(open_app: OpenApp) -> None:
    """What may be a tag is no content yet: the next target can answer."""
    config = make_config({"up": {"think_tags": True}, "b": {}}, models={"both": {"targets": ["up/m", "b/m"]}})
    providers = {"up": Provider((Say(role()), Say(content("<thi")))), "b": Provider(says("Hello"))}
    async with open_app(config, providers) as served:
        call = await served.client.chat(stream=True, model="both").wait()
        assert "".join([delta.get("content") or "" for delta in deltas(call.body)]) == "Hello"
        assert call.body.endswith(DONE[-len(b"data: [DONE]\n\n") :])
