"""The echo upstream: deterministic, and as strict about requests as a provider."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from trigate.openai import sse
from trigate.upstream.echo import EchoTransport, answer

URL = "http://echo.invalid/v1/chat/completions"


def _call(content: object = "one two  three", **more: object) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **more}


async def _ask(payload: dict[str, Any], *, url: str = URL, echo: EchoTransport | None = None) -> httpx2.Response:
    request = httpx2.Request("POST", url, content=json.dumps(payload).encode())
    response = await (echo or EchoTransport()).handle_async_request(request)
    await response.aread()
    return response


def _chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    events = sse.EventSplitter(max_event_bytes=100_000).feed(response.content)
    datas = [sse.data_of(event) or b"" for event in events]
    assert datas[-1] == b"[DONE]"
    return [json.loads(data) for data in datas[:-1]]


def _texts(chunks: list[dict[str, Any]], n: int = 1) -> list[str]:
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    return texts


async def test_the_last_user_message_comes_back() -> None:
    """The answer has the API's shape, and the text of the last user message."""
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": "second word"},
        {"role": "assistant", "content": "no"},
    ]
    response = await _ask({"model": "echo", "messages": messages})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["object"] == "chat.completion"
    assert document["model"] == "echo"
    [choice] = document["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "second word"
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a "}, {"type": "image_url"}, {"type": "text", "text": "b"}],
                }
            ],
            "a b",
        ),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "user"}], ""),
        ([{"role": "user", "content": 5}], ""),
        ([{"role": "user", "content": ["a", None]}], ""),
        ([{"role": "system", "content": "a"}], ""),
        ([{"role": "user", "content": " \n"}], " \n"),
    ],
    ids=repr,
)
def test_content_of_any_shape(messages: list[dict[str, Any]], text: str) -> None:
    """The text parts of a content are joined; a content without text is empty."""
    assert answer({"messages": messages}).text == text


@pytest.mark.parametrize(
    ("more", "text", "finish_reason"),
    [
        ({}, "one two  three", "stop"),
        ({"stop": "two"}, "one ", "stop"),
        ({"stop": ["three", "two"]}, "one ", "stop"),
        ({"stop": ["four"]}, "one two  three", "stop"),
        ({"stop": None}, "one two  three", "stop"),
        ({"stop": ""}, "one two  three", "stop"),
        ({"stop": [None, "two"]}, "one ", "stop"),
        ({"max_tokens": 2}, "one two", "length"),
        ({"max_tokens": 3}, "one two  three", "stop"),
        ({"max_tokens": 0}, "", "length"),
        ({"max_tokens": None}, "one two  three", "stop"),
        ({"max_completion_tokens": 1}, "one", "length"),
        ({"max_completion_tokens": 1, "max_tokens": 2}, "one", "length"),
        ({"max_completion_tokens": None, "max_tokens": 2}, "one two", "length"),
        ({"stop": "three", "max_tokens": 1}, "one", "length"),
        ({"stop": "two", "max_tokens": 1}, "one ", "stop"),
    ],
    ids=repr,
)
def test_stop_and_max_tokens(more: dict[str, Any], text: str, finish_reason: str) -> None:
    """A stop sequence is not part of the text; the limit counts words, and a limited answer ends with ``length``."""
    said = answer(_call(**more))
    assert (said.text, said.finish_reason) == (text, finish_reason)


@pytest.mark.parametrize(
    "more",
    [{"stop": 5}, {"stop": {"a": 1}}, {"stop": [5]}, {"max_tokens": "2"}, {"stream": True, "stream_options": []}],
    ids=repr,
)
async def test_odd_parameters_do_not_crash_it(more: dict[str, Any]) -> None:
    """A parameter of the wrong type is refused or ignored, and never raises an exception."""
    response = await _ask(_call(**more))
    assert response.status_code in (200, 400)


@pytest.mark.parametrize("number", ["1e400", 100_000 * "[" + 100_000 * "]"], ids=["1e400", "deep"])
async def test_a_body_that_it_cannot_read_is_refused(number: str) -> None:
    """A body that the decoder cannot read is refused: the gateway forwards fields that it does not decode."""
    body = json.dumps(_call()).removesuffix("}") + f', "temperature": {number}}}'
    response = await EchoTransport().handle_async_request(httpx2.Request("POST", URL, content=body.encode()))
    await response.aread()
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@settings(deadline=None, max_examples=40)
@given(
    st.text(st.sampled_from(" \n\tab\u2028é"), max_size=20),
    st.integers(0, 6) | st.none(),
    st.sampled_from([None, "a", " ", "ab"]),
    st.integers(1, 3),
)
async def test_streamed_and_whole_say_the_same(content: str, max_tokens: int | None, stop: str | None, n: int) -> None:
    """The streamed pieces join to the text of the same call without ``stream``, for each choice; usage is the same."""
    payload = _call(content, max_tokens=max_tokens, stop=stop, n=n)
    whole = (await _ask(payload)).json()
    chunks = _chunks(await _ask({**payload, "stream": True, "stream_options": {"include_usage": True}}))
    assert _texts(chunks, n) == [choice["message"]["content"] for choice in whole["choices"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    if max_tokens is None and stop is None:
        assert whole["choices"][0]["message"]["content"] == content


async def test_a_stream_has_the_shape_of_a_stream() -> None:
    """A stream has the role, one chunk for each word and the finish reason, under one id; usage only if requested."""
    response = await _ask(_call(stream=True, n=2))
    assert response.headers["content-type"] == "text/event-stream"
    chunks = _chunks(response)
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {(chunks[0]["id"], "chat.completion.chunk")}
    assert not any("usage" in chunk for chunk in chunks)
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert [choice["delta"]["content"] for choice in choices[1:-1]] == ["one", " two", "  three"]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]


async def test_usage_counts_words_and_says_so() -> None:
    """Usage counts the words of all messages and all choices, and ``system_fingerprint`` says so."""
    document = (await _ask(_call(n=2))).json()
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert "usage counts words" in document["system_fingerprint"]


async def test_it_is_deterministic() -> None:
    """Two echoes answer alike; the answers of one echo differ only in their id."""
    echo = EchoTransport()
    first, second = (await _ask(_call(), echo=echo)).json(), (await _ask(_call(), echo=echo)).json()
    assert first == (await _ask(_call())).json()
    assert first["id"] != second["id"]
    assert {**first, "id": ""} == {**second, "id": ""}


@pytest.mark.parametrize("n", [-1, 129, 1.5, "2", True], ids=repr)
async def test_n_is_checked(n: object) -> None:
    """``n`` is an integer from 1 to 128; anything else is a 400 that names it."""
    response = await _ask(_call(n=n))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


async def test_it_serves_chat_only() -> None:
    """Other endpoints are a 404 in OpenAI's shape."""
    response = await _ask({"model": "echo", "input": "x"}, url="http://echo.invalid/v1/embeddings")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_get_without_a_body_is_not_found() -> None:
    """A request without a body is answered: ``GET /models`` is 404."""
    response = await EchoTransport().handle_async_request(httpx2.Request("GET", "http://echo.invalid/v1/models"))
    assert response.status_code == 404


async def test_the_pace(autojump_clock: MockClock) -> None:
    """With ``words_per_s``, a stream pauses before each event; without it, it does not."""
    for words_per_s, pause_s in ((2.0, 0.5), (0.0, 0.0)):
        started = trio.current_time()
        chunks = _chunks(await _ask(_call(stream=True), echo=EchoTransport(words_per_s=words_per_s)))
        assert trio.current_time() - started == pytest.approx(pause_s * (len(chunks) + 1))
