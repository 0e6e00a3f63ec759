"""The gateway as the client of llmock, which mocks providers, fails as they do, and judges how its client took that.

Its verdict goes by the requests that it gets. So it cannot know that the gateway has told its own client of a stream
that broke off after its first content: such a stream cannot be sent again, and to llmock no second request means that
the client took half an answer (``truncated_stream_accepted``), skipped an event (``malformed_chunk_ignored``) or gave
up (``gave_up``). There, the tests look at what the gateway's client gets instead: an error, or the rest of the answer
from another target, whose request is another call to llmock.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio

from tests.support.gateway import OpenServer, make_config
from tests.support.processes import environment
from trigate.openai.raw_json import decode_any

LLMOCK = Path(os.environ.get("TRIGATE_LLMOCK") or Path(__file__).parents[2] / ".venv-llmock/bin/llmock")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not LLMOCK.exists(), reason="llmock is not installed")]

TARGETS = {"openai": "openai/gpt-4o", "anthropic": "anthropic/claude-opus-4-6", "gemini": "gemini/gemini-2.5-pro"}
PATHS = {"openai": "/v1", "anthropic": "/anthropic/v1", "gemini": "/gemini"}
CLIENTS = ("/v1/chat/completions", "/v1/messages")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMATS = dict(zip(CLIENTS, ("openai", "anthropic"), strict=True))
AFTER_COMMIT = {"truncated_stream_accepted", "malformed_chunk_ignored", "gave_up"}


@attrs.frozen
class Mock:
    """A running llmock."""

    url: str
    client: httpx2.AsyncClient

    async def behave(self, *behaviors: dict[str, Any]) -> None:
        """Forgets all requests, and behaves like this from now on, each once."""
        (await self.client.post(f"{self.url}/_llmock/reset")).raise_for_status()
        if behaviors:
            behaving = await self.client.post(f"{self.url}/_llmock/scenario", json={"behaviors": list(behaviors)})
            behaving.raise_for_status()

    async def findings(self) -> set[str]:
        """What it has found in the requests."""
        return {found["code"] for found in (await self.client.get(f"{self.url}/_llmock/verdict")).json()["findings"]}

    async def requests(self) -> int:
        """How many requests it got."""
        return len((await self.client.get(f"{self.url}/_llmock/requests")).json()["requests"])


@pytest.fixture(scope="module")
def mock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running llmock."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("llmock") / "log"
    command = [str(LLMOCK), "serve", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(LLMOCK_STREAM_CHUNK_DELAY_MS="20"))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
async def mock(mock_url: str) -> AsyncIterator[Mock]:
    """A running llmock."""
    async with httpx2.AsyncClient(timeout=10.0, trust_env=False, verify=False) as client:
        made = Mock(mock_url, client)
        with trio.fail_after(20):
            while True:
                try:
                    await made.behave()
                    break
                except httpx2.TransportError:
                    await trio.sleep(0.05)
        yield made


def configured(mock: Mock) -> Any:
    """A configuration that sends calls again after any failure."""
    upstreams = {
        kind: {"kind": kind, "base_url": mock.url + PATHS[kind], "api_key": "k", "models": [target.partition("/")[2]]}
        for kind, target in TARGETS.items()
    }
    upstreams["other"] = upstreams["openai"]
    return make_config(
        upstreams,
        models={"both": {"targets": [TARGETS["openai"], "other/gpt-4o"], "on_truncation": "continue"}},
        retries={"resend": "always", "budget": 1},
    )


async def ask(client: httpx2.AsyncClient, path: str, model: str, *, stream: bool, tools: bool = False) -> Any:
    """Makes a call."""
    body: dict[str, Any] = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "Weather?"}]}
    if path == "/v1/messages":
        body["max_tokens"] = 100
    if tools and path == "/v1/messages":
        body["tools"] = [{"name": "get_weather", "description": "w", "input_schema": SCHEMA}]
    elif tools:
        function = {"name": "get_weather", "description": "w", "parameters": SCHEMA}
        body["tools"] = [{"type": "function", "function": function}]
    return await client.post(path, json=body)


def is_whole(path: str, body: bytes, *, stream: bool) -> bool:
    """Whether a client takes this for a whole answer."""
    if b'"error"' in body:
        return False
    end = b"message_stop" if path == "/v1/messages" else b"data: [DONE]\n\n"
    return not stream or end in body[-100:]


def has_broken_event(body: bytes) -> bool:
    """Whether an event's data is no JSON, as clients would find."""
    found = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ") and line != b"data: [DONE]"]
    return any(decode_any(data) is None for data in found)


BEFORE: dict[str, tuple[dict[str, Any], int, int]] = {
    "nothing": ({}, 200, 1),
    "429": ({"type": "fail", "status": 429, "retry_after": 0.2}, 200, 2),
    "503": ({"type": "fail", "status": 503, "retry_after": 0.1}, 200, 2),
    "500": ({"type": "fail", "status": 500}, 200, 2),
    "400": ({"type": "fail", "status": 400}, 400, 1),
    "401": ({"type": "fail", "status": 401}, 401, 1),
    "a slow first token": ({"type": "slow_first_token", "seconds": 0.2}, 200, 1),
}
"""What happens before any content; the status that the client gets, and the number of requests."""


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", CLIENTS)
async def test_before_any_content(open_server: OpenServer, mock: Mock, path: str, kind: str) -> None:
    """The gateway waits as long as it is told, sends again, and does not where that is of no use."""
    async with open_server(configured(mock)) as (client, _):
        for fault, (behavior, status, requests) in BEFORE.items():
            for stream in (False, True):
                await mock.behave(*([behavior] if behavior else []))
                answer = await ask(client, path, TARGETS[kind], stream=stream)
                case = (fault, stream, answer.content)
                assert (answer.status_code, await mock.requests()) == (status, requests), case
                assert is_whole(path, answer.content, stream=stream) == (status == 200), case
                assert await mock.findings() == set(), case


@pytest.mark.parametrize("fault", ["disconnect", "truncate"])
@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("path", CLIENTS)
async def test_a_stream_ends_before_its_content(
    open_server: OpenServer, mock: Mock, path: str, kind: str, fault: str
) -> None:
    """After the role or the beginning of the message alone, the call is sent again. Gemini's first event has
    content."""
    async with open_server(configured(mock)) as (client, _):
        await mock.behave({"type": "stream_fault", "kind": fault, "after_chunks": 1})
        answer = await ask(client, path, TARGETS[kind], stream=True)
        assert is_whole(path, answer.content, stream=True), answer.content
        assert (await mock.requests(), await mock.findings()) == (2, set())


@pytest.mark.parametrize("fault", ["disconnect", "truncate", "malformed"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", CLIENTS)
async def test_within_a_stream(open_server: OpenServer, mock: Mock, path: str, kind: str, fault: str) -> None:
    """The client gets an error, and never an answer that looks whole. What is no JSON is an error where the stream is
    translated; else the client gets it as it came."""
    async with open_server(configured(mock)) as (client, _):
        await mock.behave({"type": "stream_fault", "kind": fault, "after_chunks": 4})
        answer = await ask(client, path, TARGETS[kind], stream=True)
        assert answer.status_code == 200, answer.content
        if fault == "malformed" and kind == FORMATS[path]:
            assert has_broken_event(answer.content), answer.content
        else:
            assert b'"error"' in answer.content, answer.content
            assert not is_whole(path, answer.content, stream=True)
        assert await mock.findings() <= AFTER_COMMIT


@pytest.mark.parametrize("fault", ["disconnect", "truncate"])
async def test_continued(open_server: OpenServer, mock: Mock, fault: str) -> None:
    """Another target continues a chat completion, so that the client notices nothing."""
    async with open_server(configured(mock)) as (client, _):
        await mock.behave({"type": "stream_fault", "kind": fault, "after_chunks": 3})
        answer = await ask(client, CLIENTS[0], "both", stream=True)
        assert is_whole(CLIENTS[0], answer.content, stream=True), answer.content
        assert await mock.requests() == 2
        assert await mock.findings() <= AFTER_COMMIT


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", CLIENTS)
async def test_tools(open_server: OpenServer, mock: Mock, path: str, kind: str) -> None:
    """Arguments that are no JSON are an error where the answer is translated, and never an empty call; a tool that the
    client does not have is the client's to refuse. Gemini's format cannot express such arguments, and Anthropic's only
    in a stream."""
    async with open_server(configured(mock)) as (client, _):
        for fault in ("malformed_arguments", "unknown_tool"):
            for stream in (False, True):
                await mock.behave({"type": "tool_fault", "kind": fault})
                answer = await ask(client, path, TARGETS[kind], stream=stream, tools=True)
                may_be_broken = kind == "openai" or (kind == "anthropic" and stream)
                is_error = fault == "malformed_arguments" and may_be_broken and kind != FORMATS[path]
                case = (fault, stream, answer.content)
                assert is_whole(path, answer.content, stream=stream) != is_error, case
                assert (await mock.requests(), await mock.findings()) == (1, set()), case
