"""The Codex command line against a real gateway, over an upstream that speaks only chat completions.

Codex answers a failed request with up to 29 more. The tests count the requests that reach the upstream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_lines import MODULES, NODE, Ended, run
from tests.support.processes import Gateway, configuration, run_gateway
from tests.support.scripted_upstream import open_upstream, seen
from tests.support.slow import FULL

KEY = "a key of the gateway"
CODEX = MODULES / "@openai/codex/bin/codex.js"
ATTEMPTS = 5
"""How often Codex sends a request that is refused with 5xx: once, and ``request_max_retries`` times."""
STREAMS = 6
"""How often it sends a request whose stream fails: once, and ``stream_max_retries`` times."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="there is no Node here"),
    pytest.mark.skipif(
        not CODEX.exists(),
        reason="there is no tests/node-cli/node_modules: ./scripts/test (or `npm ci` in tests/node-cli) makes it",
    ),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str]]:
    """A gateway with a key, and the URL of the upstream behind it."""
    with open_upstream() as upstream:
        config = configuration(upstream, more=f'[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway, upstream
            assert gateway.process.poll() is None, gateway.log()
            assert "[error" not in gateway.log(), gateway.log()


def codex(served: tuple[Gateway, str], home: Path, model: str) -> tuple[Ended, list[dict[str, Any]], list[Any]]:
    """Runs one prompt; returns how it ended, its events, and the requests that reached the upstream."""
    gateway, upstream = served
    settings = home / "codex"
    settings.mkdir()
    (settings / "config.toml").write_text(
        f"""
        model = "mock/{model}"
        model_provider = "trigate"
        [model_providers.trigate]
        name = "Trigate"
        base_url = "{gateway.url}/v1"
        env_key = "TRIGATE_KEY"
        wire_api = "responses"
        """,
        encoding="utf-8",
    )
    ended = run(
        CODEX,
        ["exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Run the command."],
        home=home,
        timeout_s=100,
        CODEX_HOME=str(settings),
        TRIGATE_KEY=KEY,
    )
    events = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    return ended, events, [json.loads(body) for body in seen(upstream, model)["bodies"]]


def test_one_prompt_with_one_tool_call(served: tuple[Gateway, str], tmp_path: Path) -> None:
    """Codex runs the command that the model asks for, and shows its answer: two requests."""
    ended, events, sent = codex(served, tmp_path, "shell.codex")
    assert ended.code == 0, ended.output
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    [command] = [item for item in items if item["type"] == "command_execution"]
    assert (command["aggregated_output"], command["exit_code"]) == ("from-the-tool\n", 0)
    [answer] = [item["text"] for item in items if item["type"] == "agent_message"]
    assert answer.startswith("call-1 says ")
    assert "from-the-tool" in answer
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["input_tokens"] == 14
    assert len(sent) == 2
    assert [message["role"] for message in sent[1]["messages"][-2:]] == ["assistant", "tool"]
    assert any(tool["function"]["name"].count("__") for tool in sent[0]["tools"]), "a namespace"


@pytest.mark.parametrize(
    ("model", "requests", "words"),
    [
        ("overflow", 1, "ran out of room in the model's context window"),
        ("status-400", 1, "said the upstream"),
        ("status-503", ATTEMPTS, "at capacity"),
        pytest.param(
            *("status-500", ATTEMPTS * STREAMS, "said the upstream"),
            marks=pytest.mark.skipif(not FULL, reason="takes half a minute: TRIGATE_TEST_FULL=1 runs it"),
        ),
        ("cut", STREAMS, "truncated"),
    ],
)
def test_failures(served: tuple[Gateway, str], tmp_path: Path, model: str, requests: int, words: str) -> None:
    """The upstream gets no more requests than Codex insists on. (A breaker, which is off here, ends that sooner.)"""
    ended, events, sent = codex(served, tmp_path, f"{model}.codex")
    assert ended.code == 1, ended.output
    assert events[-1]["type"] == "turn.failed"
    assert words in events[-1]["error"]["message"]
    assert len(sent) == requests
