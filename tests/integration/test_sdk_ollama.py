"""Ollama's Python SDK against a real gateway, over an upstream that speaks chat completions.

The SDK checks each answer and each line against its own types (pydantic).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.processes import configuration, run_gateway
from tests.support.scripted_upstream import EMBEDDING, TEXT, open_upstream, seen, wait_closed

ollama: Any = pytest.importorskip("ollama", reason="the SDK of requirements-test.lock is not installed")

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URLs of a gateway with a key, and of the scripted upstream behind it."""
    with open_upstream() as upstream:
        config = configuration(upstream, more=f'[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway.url, upstream
            assert gateway.process.poll() is None, gateway.log()
            errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert errors == [], gateway.log()


@pytest.fixture
def client(urls: tuple[str, str]) -> Iterator[Any]:
    """A client with a key."""
    with ollama.Client(host=urls[0], headers={"Authorization": f"Bearer {KEY}"}, trust_env=False) as made:
        yield made


def test_chat(client: Any) -> None:
    """A plain answer."""
    answer = client.chat(model="mock/hello", messages=HELLO)
    assert answer.message.content == TEXT
    assert (answer.done, answer.done_reason, answer.prompt_eval_count, answer.eval_count) == (True, "stop", 7, 4)
    assert answer.total_duration > 0


def test_a_stream(client: Any) -> None:
    """The lines make the same answer, whatever characters are in them."""
    parts = list(client.chat(model="mock/hello:latest", messages=HELLO, stream=True))
    assert "".join(part.message.content for part in parts) == TEXT
    assert [part.done for part in parts] == [*[False] * (len(parts) - 1), True]
    assert {part.model for part in parts} == {"mock/hello:latest"}
    assert (parts[-1].prompt_eval_count, parts[-1].eval_count) == (7, 4)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool(client: Any, is_stream: bool) -> None:
    """The model calls a tool; its result goes back by the name of the tool, as the SDK's examples have it."""

    def ask(messages: list[Any]) -> Any:
        answer = client.chat(model="mock/tools", messages=messages, tools=[TOOL], stream=is_stream)
        parts = list(answer) if is_stream else [answer]
        return next((part.message for part in parts if part.message.tool_calls), parts[0].message)

    message = ask(HELLO)
    [call] = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Köln"})
    result = {"role": "tool", "tool_name": "weather", "content": "warm"}
    assert ask([*HELLO, message, result]).content.endswith("says warm")


def test_generate(client: Any) -> None:
    """With a prompt, and without one."""
    options = {"temperature": 0, "num_predict": 50}
    answer = client.generate(model="mock/hello", prompt="Hello", system="Be brief.", options=options)
    assert (answer.response, answer.done_reason) == (TEXT, "stop")
    parts = list(client.generate(model="mock/hello", prompt="Hello", stream=True))
    assert "".join(part.response for part in parts) == TEXT
    assert client.generate(model="mock/hello").done_reason == "load"


def test_embed(client: Any) -> None:
    """Both methods."""
    assert client.embed(model="mock/hello", input="a").embeddings == [list(EMBEDDING)]
    assert client.embed(model="mock/hello", input=["a"]).embeddings == [list(EMBEDDING)]
    assert client.embeddings(model="mock/hello", prompt="a").embedding == list(EMBEDDING)


def test_models(client: Any) -> None:
    """The list, one of them, and those in memory."""
    names = [model.model for model in client.list().models]
    assert "mock/hello:latest" in names
    shown = client.show("mock/hello")
    assert "completion" in shown.capabilities
    assert shown.modelinfo["general.architecture"]
    assert client.ps().models == []


def test_errors(client: Any, urls: tuple[str, str]) -> None:
    """Each has its status and one sentence."""
    for model, status in (("mock/status-400", 400), ("mock/status-429", 429), ("nobody/x", 404)):
        for is_stream in (False, True):
            with pytest.raises(ollama.ResponseError) as caught:
                list(client.chat(model=model, messages=HELLO, stream=is_stream))
            assert caught.value.status_code == status
            assert caught.value.error
            assert not caught.value.error.startswith("{")
    with pytest.raises(ollama.ResponseError) as caught:
        client.pull("mock/hello")
    assert "pull" in caught.value.error
    with ollama.Client(host=urls[0], headers={"Authorization": "Bearer wrong"}, trust_env=False) as stranger:
        with pytest.raises(ollama.ResponseError) as caught:
            stranger.list()
        assert caught.value.status_code == 401


@pytest.mark.parametrize("how", ["cut", "reset", "short"])
def test_a_truncated_stream(client: Any, how: str) -> None:
    """It is an exception, not a short answer."""
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model=f"mock/{how}", messages=HELLO, stream=True))
    assert caught.value.error


def test_a_disconnect(client: Any, urls: tuple[str, str]) -> None:
    """A client that has read enough closes the upstream's stream."""
    model = "endless.ollama"
    stream = client.chat(model=f"mock/{model}", messages=HELLO, stream=True)
    assert next(stream).message.content == "word "
    stream.close()
    wait_closed(urls[1], model)
    assert seen(urls[1], model)["hits"] == 1
