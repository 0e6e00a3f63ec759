"""OpenAI's Python SDK and its Responses API against a real gateway, over an upstream that has only chat completions.

The SDK checks each answer and each event against its own types (``_strict_response_validation``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.support.processes import configuration, run_gateway
from tests.support.scripted_upstream import REFUSAL, TEXT, open_upstream, seen, wait_closed

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URLs of a gateway with two keys, and of the scripted upstream behind it."""
    with open_upstream() as upstream:
        config = configuration(upstream, more=f'[keys]\ntests = "{KEY}"\nother = "another key"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway.url, upstream
            assert gateway.process.poll() is None, gateway.log()
            errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert errors == [], gateway.log()


@pytest.fixture
def client(urls: tuple[str, str]) -> Iterator[openai.OpenAI]:
    """A client that makes each call once."""
    url = f"{urls[0]}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, _strict_response_validation=True) as made:
        yield made


def test_an_answer(client: openai.OpenAI) -> None:
    """A plain answer has every field that the SDK requires."""
    response = client.responses.create(model="mock/hello", input="Hello")
    assert (response.output_text, response.status, response.model) == (TEXT, "completed", "mock/hello")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 4, 11)


def test_a_stream(client: openai.OpenAI) -> None:
    """The SDK puts the same response together from the events."""
    with client.responses.stream(model="mock/hello", input="Hello") as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert response.output_text == TEXT
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool(client: openai.OpenAI, is_stream: bool) -> None:
    """The model calls a tool, and gets its result, which continues the response."""

    def ask(**fields: Any) -> Any:
        asked = {"model": "mock/tools", "tools": [WEATHER], **fields}
        if not is_stream:
            return client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            return stream.get_final_response()

    first = ask(input="Hello")
    [call] = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Köln"}')
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}
    assert ask(input=[result], previous_response_id=first.id).output_text == f"{call.call_id} says warm"
    assert ask(input=[{"role": "user", "content": "Hello"}, call, result]).output_text.endswith("warm")


def test_structured_output(client: openai.OpenAI, urls: tuple[str, str]) -> None:
    """The upstream gets the schema that the SDK makes of a class."""

    class City(pydantic.BaseModel):
        name: str

    model = "hello.responses-parse"
    with pytest.raises(pydantic.ValidationError):  # the scripted answer is no JSON
        client.responses.parse(model=f"mock/{model}", input="Hello", text_format=City)
    [body] = seen(urls[1], model)["bodies"]
    assert '"json_schema"' in body
    assert '"City"' in body


def test_what_is_kept(client: openai.OpenAI) -> None:
    """It can be read, listed, continued and deleted, and only with its own key."""
    made = client.responses.create(model="mock/hello", input="Hello")
    assert client.responses.retrieve(made.id) == made
    again = client.responses.create(model="mock/hello", input="And?", previous_response_id=made.id)
    items = list(client.responses.input_items.list(again.id, limit=1))
    texts = [getattr(item.content[0], "text", "") for item in items if item.type == "message"]
    assert texts == ["And?", TEXT, "Hello"]
    with pytest.raises(openai.NotFoundError):
        client.with_options(api_key="another key").responses.retrieve(made.id)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="mock/hello", input="And?", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found"


def test_in_the_background(client: openai.OpenAI) -> None:
    """A response is polled, and its stream resumed."""
    made = client.responses.create(model="mock/hello", input="Hello", background=True)
    assert made.status == "queued"
    give_up_at = time.monotonic() + 10
    while made.status in ("queued", "in_progress"):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
        made = client.responses.retrieve(made.id)
    assert (made.status, made.output_text, made.background) == ("completed", TEXT, True)
    begun = []
    with client.responses.create(model="mock/hello", input="Hello", background=True, stream=True) as stream:
        for event in stream:
            begun.append(event)
            if event.type == "response.output_text.delta":
                break
    assert begun[0].type == "response.created"
    last = begun[-1].sequence_number
    rest = list(client.responses.retrieve(begun[0].response.id, stream=True, starting_after=last))
    assert [event.sequence_number for event in rest][:1] == [last + 1]
    assert rest[-1].type == "response.completed"


def test_a_background_response_is_cancelled(client: openai.OpenAI, urls: tuple[str, str]) -> None:
    """Its upstream stream is closed."""
    model = "endless.responses-background"
    stream = client.responses.create(model=f"mock/{model}", input="Hello", background=True, stream=True)
    first = next(iter(stream))
    assert first.type == "response.created"
    assert client.responses.cancel(first.response.id).status == "cancelled"
    wait_closed(urls[1], model)
    assert client.responses.retrieve(first.response.id).status == "cancelled"
    stream.close()


def test_tokens_are_counted(client: openai.OpenAI) -> None:
    """As an estimate."""
    counted = client.responses.input_tokens.count(model="mock/hello", input="word " * 100)
    assert 100 <= counted.input_tokens <= 200


@pytest.mark.parametrize("how", ["cut", "reset", "short"])
def test_a_truncated_stream(client: openai.OpenAI, how: str) -> None:
    """It is an exception, not a short answer."""
    with (
        pytest.raises(openai.APIError) as caught,
        client.responses.stream(model=f"mock/{how}", input="Hello") as stream,
    ):
        stream.get_final_response()
    assert caught.value.code == "upstream_truncated"


def test_errors(client: openai.OpenAI) -> None:
    """Each status is the exception that the SDK has for it."""
    with pytest.raises(openai.BadRequestError, match=REFUSAL["error"]["message"]):
        client.responses.create(model="mock/status-400", input="Hello")
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="mock/status-429", input="Hello")
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="mock/status-503", input="Hello")
    assert caught.value.code == "server_is_overloaded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="mock/overflow", input="Hello")
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="file_search"):
        client.responses.create(
            model="mock/hello", input="Hello", tools=[{"type": "file_search", "vector_store_ids": ["vs_1"]}]
        )


def test_a_disconnect(client: openai.OpenAI, urls: tuple[str, str]) -> None:
    """A client that has read enough closes the upstream's stream."""
    model = "endless.responses"
    with client.responses.create(model=f"mock/{model}", input="Hello", stream=True) as stream:
        assert next(iter(stream)).type == "response.created"
    wait_closed(urls[1], model)
    assert seen(urls[1], model)["hits"] == 1
