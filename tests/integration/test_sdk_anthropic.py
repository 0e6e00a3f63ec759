"""Anthropic's Python SDK against a real gateway, over an upstream that speaks chat completions.

The SDK checks each answer and each event against its own types (``_strict_response_validation``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.processes import configuration, run_gateway
from tests.support.scripted_upstream import TEXT, open_upstream, seen, wait_closed

anthropic: Any = pytest.importorskip("anthropic", reason="the SDK of requirements-test.lock is not installed")

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
ASK: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


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


@pytest.fixture(params=["api_key", "auth_token"])
def client(request: pytest.FixtureRequest, urls: tuple[str, str]) -> Iterator[Any]:
    """A client that sends its key in either header, and makes each call once."""
    with anthropic.Anthropic(
        base_url=urls[0], max_retries=0, _strict_response_validation=True, **{request.param: KEY}
    ) as made:
        yield made


def test_an_answer(client: Any) -> None:
    """A plain answer has every field that the SDK requires."""
    message = client.messages.create(model="mock/hello", **ASK)
    assert [block.text for block in message.content] == [TEXT]
    assert (message.stop_reason, message.model) == ("end_turn", "mock/hello")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 4)
    assert message._request_id.startswith("req_")


def test_a_stream(client: Any) -> None:
    """The events make the same message."""
    with client.messages.stream(model="mock/hello", **ASK) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(texts) == message.content[0].text == TEXT
    assert len(texts) > 1
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 7, 4)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool(client: Any, is_stream: bool) -> None:
    """The model calls a tool, and gets its result under the same id."""

    def ask(messages: list[Any]) -> Any:
        asked = {"model": "mock/tools", "max_tokens": 100, "tools": [TOOL], "messages": messages}
        if not is_stream:
            return client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            return stream.get_final_message()

    message = ask(ASK["messages"])
    [call] = message.content
    assert (message.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Köln"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "warm"}
    turns = [*ASK["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(turns).content[0].text == f"{call.id} says warm"


def test_errors(client: Any) -> None:
    """Each status is the exception that the SDK has for it."""
    for model, kind in (
        ("mock/status-400", anthropic.BadRequestError),
        ("mock/status-429", anthropic.RateLimitError),
        ("mock/status-503", anthropic.InternalServerError),
        ("nobody/x", anthropic.NotFoundError),
    ):
        with pytest.raises(kind) as caught:
            client.messages.create(model=model, **ASK)
        assert caught.value.body["type"] == "error"
        assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.count_tokens(model="mock/hello", messages=ASK["messages"])
    assert caught.value.status_code == 501
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong", auth_token=None).messages.create(model="mock/hello", **ASK)


@pytest.mark.parametrize("how", ["cut", "reset", "short"])
def test_a_truncated_stream(client: Any, how: str) -> None:
    """It is an exception, not a short answer."""
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(model=f"mock/{how}", **ASK) as stream,
    ):
        stream.get_final_message()
    assert caught.value.body["error"]["type"] == "upstream_error"


def test_a_disconnect(client: Any, urls: tuple[str, str]) -> None:
    """A client that has read enough closes the upstream's stream."""
    model = f"endless.messages-{client.api_key is None}"
    with client.messages.stream(model=f"mock/{model}", **ASK) as stream:
        assert next(iter(stream.text_stream)) == "word "
    wait_closed(urls[1], model)
    assert seen(urls[1], model)["hits"] == 1


def test_models(client: Any) -> None:
    """The list of models comes by pages."""
    ids = [model.id for model in client.models.list(limit=2)]
    assert "mock/hello" in ids
    assert len(ids) == len(set(ids)) > 2
    assert client.models.retrieve("mock/org/deep/model").display_name == "mock/org/deep/model"
