"""Upstreams in the clouds over real sockets: what arrives there, byte by byte, and the streams that come back."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dialects.event_stream import delta, end, start, stop
from tests.exchange.test_bedrock import SECRET, assert_signed
from tests.exchange.test_bedrock_invoke import MODEL as CLAUDE
from tests.exchange.test_bedrock_invoke import STREAM as CLAUDE_STREAM
from tests.support.gateway import OpenServer, make_config
from tests.support.provider import Head, Say, Script, Served, open_socket_provider, says
from trigate.dialects.bedrock.framing import EVENT_STREAM

NOVA = "arn:aws:bedrock:us-east-1:1:inference-profile/us.amazon.nova-pro-v1:0"
PIECES = start() + delta(0, text="Hel") + delta(0, text="lo") + stop(0) + end()
STREAM: Script = (
    Head(content_type=EVENT_STREAM),
    *[Say(PIECES[at : at + 50]) for at in range(0, len(PIECES), 50)],
)


async def _stream(
    open_server: OpenServer, script: Script, path: str, model: str, **settings: Any
) -> tuple[Served, bytes]:
    """Makes a streamed call; returns what has arrived at the provider, and the answer."""
    async with open_socket_provider(script) as (provider, url):
        table = {"base_url": url.removesuffix("/v1"), "models": [model], **settings}
        async with open_server(make_config({"up": table})) as (client, _):
            body = {"model": model, "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
            response = await client.post(path, json=body)
            assert response.status_code == 200
        [sent] = provider.calls
        sent.target = sent.path
        return sent, response.content


@pytest.mark.parametrize(("model", "script"), [(NOVA, STREAM), (CLAUDE, CLAUDE_STREAM)])
async def test_a_signed_stream(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch, model: str, script: Script
) -> None:
    """The signature fits the bytes that arrive, and the relay moves the stream."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    sent, answer = await _stream(open_server, script, "/v1/messages", model, kind="bedrock", region="us-east-1")
    assert_signed(sent, region="us-east-1", secret=SECRET)
    assert answer.endswith(b"}\n\n")
    assert b"message_stop" in answer


async def test_a_stream_of_azure(open_server: OpenServer) -> None:
    """The path has the deployment and the version, and the header the key."""
    settings = {"kind": "azure", "api_version": "2024-10-21", "api_key": "k"}
    sent, answer = await _stream(open_server, says("Hello"), "/v1/chat/completions", "my gpt", **settings)
    assert sent.path == "/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21"
    assert sent.headers["api-key"] == "k"
    assert answer.endswith(b"data: [DONE]\n\n")
