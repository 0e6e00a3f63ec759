"""Scenarios of the official Python SDK with a gateway: one set for every version and flavour of it.

A scenario is an async function of a `Case`. The synchronous client runs the same ones: `ask` and `following` await only
awaitable values. `sdk_legacy` runs them with another version of the SDK in another interpreter, so this module uses
only `openai`, the standard library and `scripted_upstream`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import openai

from tests.support.scripted_upstream import (
    EMBEDDING,
    IMAGE,
    MODELS,
    SPEECH,
    TEXT,
    TOOL_ARGUMENTS,
    USAGE,
    seen,
    wait_closed,
)

CLOSES_WITHIN_S = 0.05
"""The upstream's connection is closed this soon after the client's in the best of `TRIES`: the machine may be busy."""
TRIES = 3

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ERRORS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}


@dataclasses.dataclass
class Case:
    """The arguments of a scenario.

    Attributes:
        client: `openai.OpenAI` or `openai.AsyncOpenAI`. Any: what it returns depends on which.
        upstream: The URL of the scripted upstream.
        tag: Separates this run from others at the upstream.
    """

    client: Any
    upstream: str
    tag: str

    def model(self, part: str) -> str:
        """The public id of a script of the upstream, in this case's own copy."""
        return f"mock/{part}.{self.tag}"

    def seen(self, part: str) -> dict[str, Any]:
        """The upstream's record of that copy."""
        return seen(self.upstream, f"{part}.{self.tag}")

    async def chat(self, part: str, **more: Any) -> Any:
        """Creates a chat completion."""
        return await ask(self.client.chat.completions.create(model=self.model(part), **{"messages": HELLO, **more}))


async def ask(value: Any) -> Any:
    """Awaits the result of an asynchronous client. That of a synchronous one is already there."""
    return await value if inspect.isawaitable(value) else value


async def following(stream: Any) -> Any:
    """The next piece of a stream of either kind; None at its end."""
    return await anext(stream, None) if hasattr(stream, "__anext__") else next(stream, None)


async def all_of(stream: Any) -> list[Any]:
    """Every piece of a stream of either kind."""
    pieces = []
    while (piece := await following(stream)) is not None:
        pieces.append(piece)
    return pieces


async def refused(call: Callable[[], Any], kind: type[openai.OpenAIError]) -> Any:
    """Expects a call to raise exactly this class of error, and returns the error."""
    came: Any
    try:
        came = await ask(call())
    except openai.OpenAIError as error:
        came = error
    assert type(came) is kind, f"{came!r} instead of {kind.__name__}"
    return came


# -- successful calls -------------------------------------------------------------------------------------------------


async def models_are_listed(case: Case) -> None:
    """The list has ``default`` and the upstream's models under its name, with the owner that it says."""
    page = await ask(case.client.models.list())
    owners = {model.id: model.owned_by for model in page.data}
    assert owners["default"] == "them"
    assert {id for id, owner in owners.items() if id.startswith("mock/") and owner == "them"} == {
        f"mock/{model}" for model in MODELS
    }
    assert {model.object for model in page.data} == {"model"}
    assert all(isinstance(model.created, int) for model in page.data)


async def model_is_retrieved(case: Case) -> None:
    """A model is retrieved by an id with slashes in it."""
    model = await ask(case.client.models.retrieve("mock/org/deep/model"))
    assert (model.id, model.owned_by) == ("mock/org/deep/model", "them")


async def unknown_model_is_not_retrieved(case: Case) -> None:
    """An unlisted id is a NotFoundError with the code of an unknown model."""
    error = await refused(lambda: case.client.models.retrieve("mock/org/deep/modell"), openai.NotFoundError)
    assert error.code == "model_not_found"
    assert "mock/org/deep/model" in error.message


async def chat_answers(case: Case) -> None:
    """An answer has the text, the usage, the public model id, and unknown fields."""
    answer = await case.chat("hello")
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == case.model("hello")
    assert answer.usage.to_dict() == USAGE
    assert answer.to_dict()["x_unknown"] == {"kept": [1.0, 100.0]}
    assert answer._request_id


async def default_answers(case: Case) -> None:
    """The model ``default`` answers under that name."""
    answer = await ask(case.client.chat.completions.create(model="default", messages=HELLO))
    assert (answer.model, answer.choices[0].message.content) == ("default", TEXT)


async def chat_streams(case: Case) -> None:
    """The deltas of a stream join to the text. It ends cleanly, without a usage that was not requested."""
    chunks = await all_of(await case.chat("hello", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {case.model("hello")}
    assert [chunk.usage for chunk in chunks if chunk.usage] == []


async def stream_reports_usage(case: Case) -> None:
    """With ``include_usage`` the last chunk has the usage and no choices."""
    chunks = await all_of(await case.chat("hello", stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage.to_dict() for chunk in chunks if chunk.usage] == [USAGE]
    assert chunks[-1].choices == []
    assert chunks[-1].usage


async def tools_make_a_round_trip(case: Case) -> None:
    """The model asks for a tool, gets its result, and answers with it."""
    asked = (await case.chat("tools", tools=TOOLS)).choices[0]
    assert asked.finish_reason == "tool_calls"
    [tool] = asked.message.tool_calls
    assert (tool.function.name, tool.function.arguments) == ("temperature", TOOL_ARGUMENTS)
    result = {"role": "tool", "tool_call_id": tool.id, "content": "21 °C"}
    messages = [*HELLO, asked.message.to_dict(), result]
    answer = await case.chat("tools", tools=TOOLS, messages=messages)
    assert answer.choices[0].message.content == "call-1 says 21 °C"


async def tools_are_streamed(case: Case) -> None:
    """The arguments of a streamed tool call join to the model's text, and so does the answer to its result."""
    chunks = await all_of(await case.chat("tools", tools=TOOLS, stream=True))
    fragments = [tool for chunk in chunks for tool in chunk.choices[0].delta.tool_calls or []]
    assert [fragment.id for fragment in fragments if fragment.id] == ["call-1"]
    assert len(fragments) > 2
    assert "".join(fragment.function.arguments for fragment in fragments) == TOOL_ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    function = {"name": "temperature", "arguments": TOOL_ARGUMENTS}
    asked = {"role": "assistant", "tool_calls": [{"id": "call-1", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "call-1", "content": "21 °C"}
    chunks = await all_of(await case.chat("tools", tools=TOOLS, stream=True, messages=[*HELLO, asked, result]))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "call-1 says 21 °C"


async def unknown_fields_pass_through(case: Case) -> None:
    """The upstream gets what the client sent byte for byte, except for the model's id."""
    odd = {
        "x_big": 123456789012345678901234567890,
        "x_float": [0.1, 1e300, -0.0, 2.0],
        "x_text": 'ü\u2028\x7f \\ " </script> \U0001f30d',
        "x_deep": {"a": [{"b": {}}, [], None, True]},
        "model ": "mock/decoy",
    }
    raw = await ask(
        case.client.chat.completions.with_raw_response.create(
            model=case.model("hello"), messages=HELLO, temperature=0.30000000000000004, extra_body=odd
        )
    )
    sent = raw.http_request.content
    public, own = (json.dumps(model).encode() for model in (case.model("hello"), f"hello.{case.tag}"))
    assert sent.count(public) == 1
    [body] = case.seen("hello")["bodies"]
    assert body.encode() == sent.replace(public, own)


async def request_id_comes_back(case: Case) -> None:
    """The client's request id is in the answer. Without one the gateway makes one."""
    create = case.client.chat.completions.with_raw_response.create
    call = {"model": case.model("hello"), "messages": HELLO}
    raw = await ask(create(**call, extra_headers={"x-request-id": "mine-1.a"}))
    assert raw.headers["x-request-id"] == "mine-1.a"
    ids = {(await ask(create(**call))).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(ids)


async def stream_has_its_headers(case: Case) -> None:
    """A stream's head has its content type and tells proxies not to buffer it."""
    raw = await ask(
        case.client.chat.completions.with_raw_response.create(model=case.model("hello"), messages=HELLO, stream=True)
    )
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert raw.headers["cache-control"] == "no-cache"
    assert raw.headers["x-accel-buffering"] == "no"
    assert raw.headers["x-request-id"]
    await all_of(raw.parse())


async def embeddings_answer(case: Case) -> None:
    """Embeddings have the encoding that the SDK requests: base64, which it decodes, or numbers."""
    for more in ({}, {"encoding_format": "float"}):
        answer = await ask(case.client.embeddings.create(model=case.model("hello"), input=["a"], **more))
        assert answer.data[0].embedding == list(EMBEDDING)
        assert answer.model == case.model("hello")
        assert answer.usage.prompt_tokens == USAGE["prompt_tokens"]


async def completions_answer(case: Case) -> None:
    """Legacy completions answer and stream."""
    create = case.client.completions.create
    answer = await ask(create(model=case.model("hello"), prompt="a"))
    assert (answer.choices[0].text, answer.model) == (TEXT, case.model("hello"))
    chunks = await all_of(await ask(create(model=case.model("hello"), prompt="a", stream=True)))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT


async def responses_answer(case: Case) -> None:
    """The responses API answers and streams with its own event types and the public model id."""
    create = case.client.responses.create
    answer = await ask(create(model=case.model("hello"), input="a"))
    assert (answer.output_text, answer.model) == (TEXT, case.model("hello"))
    events = await all_of(await ask(create(model=case.model("hello"), input="a", stream=True)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert {event.response.model for event in (events[0], events[-1])} == {case.model("hello")}
    assert events[-1].response.usage.total_tokens == USAGE["total_tokens"]


async def moderations_answer(case: Case) -> None:
    """Moderations pass through."""
    answer = await ask(case.client.moderations.create(model=case.model("hello"), input="a"))
    assert (answer.results[0].flagged, answer.model) == (True, case.model("hello"))


async def speech_answers(case: Case) -> None:
    """Speech consists of the upstream's bytes with their content type."""
    answer = await ask(case.client.audio.speech.create(model=case.model("hello"), voice="alloy", input="a"))
    assert answer.content == SPEECH
    assert answer.response.headers["content-type"] == "audio/mpeg"


async def images_answer(case: Case) -> None:
    """Image generation passes through."""
    answer = await ask(case.client.images.generate(model=case.model("hello"), prompt="a"))
    assert answer.data[0].b64_json == IMAGE


# -- errors -----------------------------------------------------------------------------------------------------------


async def wrong_key_is_refused(case: Case) -> None:
    """An unknown key is an AuthenticationError, and nothing reaches the upstream."""
    stranger = Case(case.client.with_options(api_key="wrong"), case.upstream, case.tag)
    error = await refused(lambda: stranger.chat("hello"), openai.AuthenticationError)
    assert error.code == "invalid_api_key"
    await refused(lambda: stranger.client.models.list(), openai.AuthenticationError)
    assert case.seen("hello")["hits"] == 0


async def bad_call_is_refused(case: Case) -> None:
    """An invalid call is a BadRequestError that names the field, and nothing reaches the upstream."""
    error = await refused(lambda: case.chat("hello", messages=[]), openai.BadRequestError)
    assert (error.code, error.param, error.type) == ("invalid_request", "messages", "invalid_request_error")
    assert case.seen("hello")["hits"] == 0


async def unknown_model_is_refused(case: Case) -> None:
    """An unknown bare id is a NotFoundError that suggests the closest ids."""
    create = case.client.chat.completions.create
    error = await refused(lambda: create(model="helo", messages=HELLO), openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert "mock/hello" in error.message


async def upstream_refusals_keep_their_class(case: Case) -> None:
    """An upstream's refusal raises the SDK's class for its status. A 4xx keeps its body, and nothing is retried.

    The client has its default settings: without the gateway's header it would retry 409, 429 and 5xx twice.
    """
    for status, kind in ERRORS.items():
        for stream in (False, True):
            part = f"status-{status}"
            error = await refused(partial(case.chat, part, stream=stream), kind)
            if status < 500:
                assert (error.status_code, error.code, error.param) == (status, "some_code", "p")
            else:
                assert error.status_code == (503 if status == 503 else 502)
                assert error.code == "upstream_unavailable"
            assert "said the upstream" in error.message
            assert error.response.headers["x-should-retry"] == "false"
            assert error.response.headers.get("retry-after") == ("7" if status == 429 else None)
            # A target with a retry time is not called before that time: the second answer repeats the first one's
            # message.
            assert case.seen(part)["hits"] == (1 if status == 429 else 1 + stream)


async def _take_words(stream: Any, words: list[str]) -> None:
    while (chunk := await following(stream)) is not None:
        words.append(chunk.choices[0].delta.content or "")


async def truncated_stream_is_an_error(case: Case) -> None:
    """A stream that ends by FIN, RST or without ``[DONE]`` gives its text and then an APIError, not a clean end."""
    for part in ("cut", "reset", "short"):
        stream = await case.chat(part, stream=True)
        words: list[str] = []
        error = await refused(partial(_take_words, stream, words), openai.APIError)
        assert error.code == "upstream_truncated"
        assert TEXT.startswith("".join(words))
        assert "".join(words)
        assert case.seen(part)["hits"] == 1


async def timeout_closes_upstream(case: Case) -> None:
    """A client that times out gets an APITimeoutError, and the upstream's connection is closed."""
    for stream in (False, True):
        late = []
        for attempt in range(TRIES):
            # the gateway does not get the timeout: otherwise it would answer before
            untold = {"x-stainless-read-timeout": "600"}
            client = case.client.with_options(timeout=0.15, max_retries=0)
            hurried = Case(client, case.upstream, f"{case.tag}-{stream}-{attempt}")
            await refused(partial(hurried.chat, "silent", stream=stream, extra_headers=untold), openai.APITimeoutError)
            left_at = time.time()
            late.append(wait_closed(case.upstream, f"silent.{hurried.tag}") - left_at)
        assert min(late) < CLOSES_WITHIN_S, f"closed {late} s after the client disconnected"
        assert max(late) < 1


async def abort_closes_upstream(case: Case) -> None:
    """When a client closes a stream in the middle, the upstream's connection is closed too."""
    late = []
    for attempt in range(TRIES):
        copy = Case(case.client, case.upstream, f"{case.tag}-{attempt}")
        stream = await copy.chat("endless", stream=True)
        for _ in range(3):
            assert await following(stream)
        left_at = time.time()
        await ask(stream.close())
        late.append(wait_closed(case.upstream, f"endless.{copy.tag}") - left_at)
    assert min(late) < CLOSES_WITHIN_S, f"closed {late} s after the client disconnected"
    assert max(late) < 1


SCENARIOS: dict[str, Callable[[Case], Awaitable[None]]] = {
    scenario.__name__: scenario
    for scenario in (
        models_are_listed,
        model_is_retrieved,
        unknown_model_is_not_retrieved,
        chat_answers,
        default_answers,
        chat_streams,
        stream_reports_usage,
        tools_make_a_round_trip,
        tools_are_streamed,
        unknown_fields_pass_through,
        request_id_comes_back,
        stream_has_its_headers,
        embeddings_answer,
        completions_answer,
        responses_answer,
        moderations_answer,
        speech_answers,
        images_answer,
        wrong_key_is_refused,
        bad_call_is_refused,
        unknown_model_is_refused,
        upstream_refusals_keep_their_class,
        truncated_stream_is_an_error,
        timeout_closes_upstream,
        abort_closes_upstream,
    )
}
