"""OpenAI's Python SDK against a real gateway, over an upstream of Anthropic's that refuses what Anthropic refuses.

The SDK checks each answer and each chunk against its own types (``_strict_response_validation``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import attrs
import openai
import pydantic
import pytest

from tests.support.messages_rules import signature_of
from tests.support.processes import configuration, run_gateway
from tests.support.scripted_messages import ARGUMENTS, JSON, MODEL, THOUGHT, Messages, open_messages
from tests.support.scripted_messages import configuration as native
from tests.support.scripted_upstream import TEXT

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 9,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
WITH_USAGE = {"stream_options": {"include_usage": True}}


def tools(*names: str, **fields: Any) -> Any:
    """Functions of these names."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return [
        {"type": "function", "function": {"name": name, "parameters": {**schema, **fields}, "strict": bool(fields)}}
        for name in names
    ]


@attrs.frozen
class Endpoints:
    """The base URL of the gateway, and the upstream behind it."""

    base_url: str
    upstream: Messages


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A gateway with a key."""
    with open_messages() as upstream:
        config = configuration("http://127.0.0.1:9", more=f'{native(upstream)}\n[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield Endpoints(f"{gateway.url}/v1", upstream)
            assert gateway.process.poll() is None, gateway.log()
            errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert errors == [], gateway.log()


@pytest.fixture
def client(endpoints: Endpoints) -> Iterator[Any]:
    """A client that makes each call once."""
    with openai.OpenAI(
        base_url=endpoints.base_url, api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def chat(client: Any, part: str, *, stream: bool = False, model: str = MODEL, **fields: Any) -> Any:
    """Returns a whole completion, also of a stream, which the SDK puts together."""
    asked: dict[str, Any] = {"model": f"native/{model}.{part}", "messages": HELLO, **fields}
    if not stream:
        return client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, **WITH_USAGE) as events:
        return events.get_final_completion()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("part", ["hello", "swapped"])
def test_an_answer(client: Any, endpoints: Endpoints, part: str, stream: bool) -> None:
    """Text, reason and counts, and what the model got."""
    answer = chat(client, part, stream=stream)
    assert answer.choices[0].message.content == TEXT
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", f"native/{MODEL}.{part}")
    assert answer.usage.to_dict() == USAGE
    assert abs(answer.created - time.time()) < 60
    sent = endpoints.upstream.requests[-1]
    assert (sent["system"], sent["messages"]) == ("Be brief.", [{"role": "user", "content": "Hello"}])
    assert sent["max_tokens"] >= 64_000


def test_chunks(client: Any) -> None:
    """They are of one answer, come piece by piece, and have no counts that were not asked for."""
    chunks = list(client.chat.completions.create(model=f"native/{MODEL}.hello", messages=HELLO, stream=True))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 2
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [MODEL, "claude-sonnet-4-5"])
def test_reasoning_and_parallel_tools(client: Any, endpoints: Endpoints, model: str, stream: bool) -> None:
    """The SDK's own message goes back, and the upstream finds its signature and its ids in it."""
    fields = {"tools": tools("weather", "clock"), "reasoning_effort": "high", "model": model, "stream": stream}
    message = chat(client, "tools", **fields).choices[0].message
    assert message.reasoning_content == THOUGHT
    assert [(call.id, call.function.name) for call in message.tool_calls] == [
        ("toolu_0", "weather"),
        ("toolu_1", "clock"),
    ]
    assert message.tool_calls[1].function.arguments == "{}"
    results: Any = [
        {"role": "tool", "tool_call_id": call.id, "content": call.function.name}
        for call in reversed(message.tool_calls)
    ]
    turns = [*HELLO, message.model_dump(exclude_none=True), *results]
    answer = chat(client, "tools", messages=turns, **fields)
    assert answer.choices[0].message.content == "toolu_0 says weather; toolu_1 says clock"
    _, turn, _ = endpoints.upstream.requests[-1]["messages"]
    assert turn["content"][0] == {"type": "thinking", "thinking": THOUGHT, "signature": signature_of(THOUGHT)}
    assert turn["content"][1]["input"] == ARGUMENTS


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(client: Any, stream: bool) -> None:
    """The SDK's own schema is one that Anthropic takes, and its parser reads the answer."""

    class Weather(pydantic.BaseModel):
        city: str
        degrees: int = pydantic.Field(ge=-90, le=60)

    asked: dict[str, Any] = {"model": f"native/{MODEL}.json", "messages": HELLO, "response_format": Weather}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.parse(**asked)
    assert answer.choices[0].message.content == JSON
    assert answer.choices[0].message.parsed == Weather(city="Köln", degrees=21)


def test_strict_tools(client: Any) -> None:
    """The SDK parses the arguments of a strict tool."""
    with client.chat.completions.stream(
        model=f"native/{MODEL}.tools", messages=HELLO, tools=tools("weather", additionalProperties=False)
    ) as events:
        [call] = events.get_final_completion().choices[0].message.tool_calls
    assert call.function.parsed_arguments == ARGUMENTS


@pytest.mark.parametrize(("part", "reason"), [("long", "length"), ("refuses", "content_filter")])
@pytest.mark.parametrize("stream", [False, True])
def test_reasons(client: Any, part: str, reason: str, stream: bool) -> None:
    asked: dict[str, Any] = {"model": f"native/{MODEL}.{part}", "messages": HELLO}
    if stream:
        *_, last = client.chat.completions.create(**asked, stream=True)
    else:
        last = client.chat.completions.create(**asked)
    assert last.choices[0].finish_reason == reason


@pytest.mark.parametrize(
    ("part", "kind", "status", "code"),
    [
        ("status-400", openai.BadRequestError, 400, "upstream_rejected"),
        ("status-401", openai.AuthenticationError, 401, "upstream_rejected"),
        ("status-403", openai.PermissionDeniedError, 403, "upstream_rejected"),
        ("status-404", openai.NotFoundError, 404, "upstream_rejected"),
        ("status-429", openai.RateLimitError, 429, "upstream_throttled"),
        ("status-500", openai.InternalServerError, 502, "upstream_unavailable"),
        ("status-529", openai.InternalServerError, 503, "upstream_unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    client: Any, part: str, kind: type[openai.APIStatusError], status: int, code: str, stream: bool
) -> None:
    """Each status is the exception that the SDK has for it."""
    with pytest.raises(kind) as caught:
        chat(client, f"{part}.{stream}", stream=stream)
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert "said Anthropic" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize("part", ["cut", "short", "overloaded"])
def test_a_truncated_stream(client: Any, part: str) -> None:
    """It is an exception, not a short answer."""
    words: list[str] = []
    stream = client.chat.completions.create(model=f"native/{MODEL}.{part}", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        words.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert caught.value.type == ("overloaded_error" if part == "overloaded" else "upstream_error")
    assert TEXT.startswith("".join(words))
    assert "".join(words)


def test_a_disconnect(client: Any, endpoints: Endpoints) -> None:
    """A client that has read enough closes the upstream's stream."""
    before = len(endpoints.upstream.closed_at)
    stream = client.chat.completions.create(model=f"native/{MODEL}.endless", messages=HELLO, stream=True)
    assert next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    give_up_at = time.monotonic() + 5
    while len(endpoints.upstream.closed_at) == before:
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


@pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")  # the SDK's own
async def test_under_trio(endpoints: Endpoints) -> None:
    """The asynchronous client reads the same."""
    async with openai.AsyncOpenAI(base_url=endpoints.base_url, api_key=KEY, _strict_response_validation=True) as client:
        stream = await client.chat.completions.create(model=f"native/{MODEL}.hello", messages=HELLO, stream=True)
        words = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(words) == TEXT
