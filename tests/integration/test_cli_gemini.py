"""Gemini CLI against a real gateway, over an upstream of Google's and over one that speaks chat completions.

By default, the CLI answers a failed request with up to nine more, and a stream that fails in the middle with three
more; here, with one. The tests count the requests that reach the upstream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.support.command_lines import MODULES, NODE, Ended, run
from tests.support.gemini_rules import SIGNATURE
from tests.support.processes import configuration, run_gateway
from tests.support.scripted_gemini import MODEL, Gemini, open_gemini
from tests.support.scripted_gemini import configuration as native
from tests.support.scripted_upstream import open_upstream, seen

KEY = "a key of the gateway"
CLI = MODULES / "@google/gemini-cli/bundle/gemini.js"
ATTEMPTS = 2
"""How often the CLI may send a request, by its settings."""
SETTINGS = {
    # with GOOGLE_GEMINI_BASE_URL alone, this version chooses a way to log in that it then refuses
    "security": {"auth": {"selectedType": "gemini-api-key"}},
    "general": {"maxAttempts": ATTEMPTS, "disableAutoUpdate": True},  # 10 take minutes
    "privacy": {"usageStatisticsEnabled": False},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="there is no Node here"),
    pytest.mark.skipif(
        not CLI.exists(),
        reason="there is no tests/node-cli/node_modules: ./scripts/test (or `npm ci` in tests/node-cli) makes it",
    ),
]


@attrs.frozen
class Endpoints:
    """The URLs of the gateway and of the upstream with chat completions, and Google's upstream."""

    url: str
    chat: str
    google: Gemini

    def requests(self, model: str) -> int:
        """How many requests have reached a model."""
        upstream, _, own = model.partition("/")
        if upstream == "mock":
            return int(seen(self.chat, own)["hits"])
        return len([name for name, _ in self.google.requests if name == own])


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A gateway with a key."""
    with open_upstream() as chat, open_gemini() as google:
        config = configuration(chat, more=f'{native(google)}\n[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield Endpoints(gateway.url, chat, google)
            assert gateway.process.poll() is None, gateway.log()
            assert "[error" not in gateway.log(), gateway.log()
            assert google.refused == []


def gemini(endpoints: Endpoints, home: Path, model: str) -> Ended:
    """Runs one prompt."""
    settings = home / ".gemini/settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    return run(
        CLI,
        ["--skip-trust", "--yolo", "--model", model, "--prompt", "Run the command."],
        home=home,
        timeout_s=100,
        GOOGLE_GEMINI_BASE_URL=endpoints.url,
        GEMINI_API_KEY=KEY,
        GEMINI_CLI_NO_RELAUNCH="true",
    )


@pytest.mark.parametrize("model", [f"google/{MODEL}.shell.cli", "mock/shell.gemini"])
def test_one_prompt_with_one_tool_call(endpoints: Endpoints, tmp_path: Path, model: str) -> None:
    """The CLI runs the command that the model asks for, and shows its answer: two requests."""
    ended = gemini(endpoints, tmp_path, model)
    assert ended.code == 0, ended.output
    assert "says" in ended.output
    assert "from-the-tool" in ended.output
    assert endpoints.requests(model) == 2
    if model.startswith("google"):
        contents = endpoints.google.requests[-1][1]["contents"]
        [call] = [part for part in contents[-2]["parts"] if "functionCall" in part]
        assert call["thoughtSignature"] == SIGNATURE
    else:
        sent = json.loads(seen(endpoints.chat, "shell.gemini")["bodies"][-1])
        assert [message["role"] for message in sent["messages"][-2:]] == ["assistant", "tool"]


@pytest.mark.parametrize(
    ("model", "requests", "words"),
    [
        (f"google/{MODEL}.status-503.cli", ATTEMPTS, "said Google"),
        (f"google/{MODEL}.breaks.cli", ATTEMPTS, "said Google"),
        ("mock/cut.gemini", ATTEMPTS, "truncated"),
        ("mock/overflow.gemini", 1, "exceeds the maximum number of tokens allowed"),
    ],
)
def test_failures(endpoints: Endpoints, tmp_path: Path, model: str, requests: int, words: str) -> None:
    """The upstream gets no more requests than the CLI insists on."""
    ended = gemini(endpoints, tmp_path, model)
    assert ended.code == 1, ended.output
    assert words in ended.output
    assert endpoints.requests(model) == requests
