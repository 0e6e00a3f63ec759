"""Google's Python SDK against a real gateway, over an upstream of Google's and over one that speaks chat completions.

The SDK reads each answer and each chunk into its own types, which take no unknown field
(``_common.BaseModel``, ``extra="forbid"``).
"""

from __future__ import annotations

import itertools
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec
import pytest

from tests.support.processes import configuration, run_gateway
from tests.support.scripted_gemini import ARGUMENTS, JSON, MODEL, OVERFLOW, THOUGHT, Gemini, open_gemini
from tests.support.scripted_gemini import configuration as native
from tests.support.scripted_upstream import TEXT, open_upstream, seen, wait_closed

genai: Any = pytest.importorskip("google.genai", reason="the SDK of requirements-test.lock is not installed")
errors: Any = pytest.importorskip("google.genai.errors")
types: Any = pytest.importorskip("google.genai.types")

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
GOOGLE, CHAT = f"google/{MODEL}.", "mock/"


@attrs.frozen
class Endpoints:
    """The URLs of the gateway and of the upstream with chat completions, Google's upstream, and the gateway's log."""

    url: str
    chat: str
    google: Gemini


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A gateway with a key."""
    with open_upstream() as chat, open_gemini() as google:
        config = configuration(chat, more=f'{native(google)}\n[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield Endpoints(gateway.url, chat, google)
            assert gateway.process.poll() is None, gateway.log()
            lines = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert lines == [], gateway.log()
            assert KEY not in gateway.log()
            assert google.refused == []


@pytest.fixture
def client(endpoints: Endpoints) -> Any:
    """A client of the SDK."""
    return genai.Client(api_key=KEY, http_options={"base_url": endpoints.url})


def weather(city: str) -> str:
    """Returns the weather of a city."""
    return f"warm in {city}"


@pytest.mark.parametrize("upstream", [GOOGLE, CHAT])
def test_an_answer(client: Any, upstream: str) -> None:
    """A plain answer, over either upstream."""
    answer = client.models.generate_content(model=f"{upstream}hello", contents="Hello")
    assert answer.text == TEXT
    assert answer.candidates[0].finish_reason == "STOP"
    assert answer.usage_metadata.prompt_token_count == 7
    assert answer.response_id


@pytest.mark.parametrize("upstream", [GOOGLE, CHAT])
def test_a_stream(client: Any, upstream: str) -> None:
    """The chunks make the same text."""
    chunks = list(client.models.generate_content_stream(model=f"{upstream}hello", contents="Hello"))
    assert "".join([chunk.text or "" for chunk in chunks]) == TEXT
    assert len(chunks) > 2
    assert chunks[-1].candidates[0].finish_reason == "STOP"
    assert chunks[-1].usage_metadata.prompt_token_count == 7


@pytest.mark.parametrize("upstream", [GOOGLE, CHAT])
@pytest.mark.parametrize("is_stream", [False, True])
def test_functions(client: Any, upstream: str, is_stream: bool) -> None:
    """The SDK runs the function that the model calls, and sends its result, with the signature that came with the
    call."""
    config = types.GenerateContentConfig(tools=[weather], system_instruction="Be brief.", max_output_tokens=100)
    chat = client.chats.create(model=f"{upstream}tools", config=config)
    if is_stream:
        text = "".join([chunk.text or "" for chunk in chat.send_message_stream("How is it in Köln?")])
    else:
        text = chat.send_message("How is it in Köln?").text
    assert "says" in text
    assert "warm in K" in text
    roles = [content.role for content in chat.get_history()]  # the SDK keeps each chunk of a stream as a turn
    assert [role for role, _ in itertools.groupby(roles)] == ["user", "model", "user", "model"]


def test_signatures(client: Any, endpoints: Endpoints) -> None:
    """A call comes back with its signature, over the same format byte for byte."""
    declaration = {"name": "weather", "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}}
    config = {"tools": [{"function_declarations": [declaration, {"name": "time"}]}]}
    ask = types.Content(role="user", parts=[types.Part(text="How is it?")])
    answer = client.models.generate_content(model=f"{GOOGLE}tools.signed", contents=[ask], config=config)
    first, second = answer.function_calls
    assert (first.name, first.args, second.name) == ("weather", ARGUMENTS, "time")
    results = types.Content(
        role="user",
        parts=[
            types.Part.from_function_response(name=call.name, response={"output": "good"})
            for call in answer.function_calls
        ],
    )
    contents = [ask, answer.candidates[0].content, results]
    final = client.models.generate_content(model=f"{GOOGLE}tools.signed", contents=contents, config=config)
    assert final.text == 'weather says {"output": "good"}; time says {"output": "good"}'


@pytest.mark.parametrize("upstream", [GOOGLE, CHAT])
def test_structured_output(client: Any, endpoints: Endpoints, upstream: str) -> None:
    """The schema reaches the model, and the SDK reads the answer by it."""
    schema = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}, "degrees": {"type": "INTEGER"}}}
    config = {"response_mime_type": "application/json", "response_schema": schema}
    answer = client.models.generate_content(model=f"{upstream}json", contents="Hello", config=config)
    if upstream == GOOGLE:
        assert answer.text == JSON
        assert answer.parsed == msgspec.json.decode(JSON)
        return
    sent = msgspec.json.decode(seen(endpoints.chat, "json")["bodies"][-1])
    assert sent["response_format"]["json_schema"]["schema"]["properties"]["degrees"] == {"type": "integer"}


def test_thoughts(client: Any) -> None:
    """They are parts of their own."""
    config = {"thinking_config": {"include_thoughts": True, "thinking_level": "LOW"}}
    answer = client.models.generate_content(model=f"{GOOGLE}hello", contents="Hello", config=config)
    thought, text = answer.candidates[0].content.parts
    assert (thought.thought, thought.text, text.text) == (True, THOUGHT, TEXT)


def test_tokens_and_embeddings(client: Any) -> None:
    """The upstream counts and embeds, if it is Google's."""
    assert client.models.count_tokens(model=f"{GOOGLE}hello", contents="Hello").total_tokens == 14
    found = client.models.embed_content(model=f"{GOOGLE}hello", contents="a")
    assert [each.values for each in found.embeddings] == [[0.25, -1.5]]
    for call in (client.models.count_tokens, client.models.embed_content):
        with pytest.raises(errors.ServerError) as caught:
            call(model=f"{CHAT}hello", contents="Hello")
        assert (caught.value.code, caught.value.status) == (501, "UNIMPLEMENTED")


def test_models(client: Any) -> None:
    """The list comes by pages, with the limits that Google lists."""
    names = [model.name for model in client.models.list(config={"page_size": 2})]
    assert f"models/google/{MODEL}.tools" in names
    assert len(names) == len(set(names)) > 2
    model = client.models.get(model=f"{GOOGLE}hello")
    assert (model.input_token_limit, model.output_token_limit) == (1_048_576, 65_536)
    assert client.models.get(model="mock/org/deep/model").name == "models/mock/org/deep/model"


@pytest.mark.parametrize("upstream", [GOOGLE, CHAT])
def test_errors(client: Any, endpoints: Endpoints, upstream: str) -> None:
    """Each status is the exception that the SDK has for it, before a stream as well."""
    for part, kind, name in (
        ("status-400", errors.ClientError, "INVALID_ARGUMENT"),
        ("status-429", errors.ClientError, "RESOURCE_EXHAUSTED"),
        ("status-503", errors.ServerError, "UNAVAILABLE"),
    ):
        with pytest.raises(kind) as caught:
            client.models.generate_content(model=f"{upstream}{part}", contents="Hello")
        assert caught.value.status == name
        assert "said" in caught.value.message
    with pytest.raises(errors.ClientError) as caught:
        list(client.models.generate_content_stream(model="nobody/x", contents="Hello"))
    assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")
    wrong = genai.Client(api_key="wrong", http_options={"base_url": endpoints.url})
    with pytest.raises(errors.ClientError) as caught:
        wrong.models.generate_content(model=f"{upstream}hello", contents="Hello")
    assert (caught.value.code, caught.value.status) == (401, "UNAUTHENTICATED")


def test_what_google_says(client: Any) -> None:
    """A prompt that is too long, one that is blocked, and an answer that is too long, in its own words."""
    with pytest.raises(errors.ClientError) as caught:
        client.models.generate_content(model=f"{GOOGLE}overflow", contents="Hello")
    assert caught.value.message == OVERFLOW
    blocked = list(client.models.generate_content_stream(model=f"{GOOGLE}blocked", contents="Hello"))
    assert blocked[-1].prompt_feedback.block_reason == "PROHIBITED_CONTENT"
    answer = client.models.generate_content(model=f"{GOOGLE}long", contents="Hello")
    assert answer.candidates[0].finish_reason == "MAX_TOKENS"
    answer = client.models.generate_content(model=f"{GOOGLE}malformed", contents="Hello")
    assert answer.candidates[0].finish_reason == "MALFORMED_FUNCTION_CALL"


@pytest.mark.parametrize(
    "model", [f"{GOOGLE}cut", f"{GOOGLE}short", f"{GOOGLE}breaks", f"{CHAT}cut", f"{CHAT}short", f"{CHAT}reset"]
)
def test_a_stream_that_fails(client: Any, model: str) -> None:
    """It is an exception, not a short answer."""
    texts = []

    def read() -> None:
        for chunk in client.models.generate_content_stream(model=model, contents="Hello"):
            texts.append(chunk.text)

    with pytest.raises(errors.ServerError) as caught:
        read()
    assert len(texts) == 2
    assert caught.value.status == "UNAVAILABLE"


def test_a_disconnect(client: Any, endpoints: Endpoints) -> None:
    """A client that has read enough closes the upstream's stream."""
    stream = client.models.generate_content_stream(model=f"{CHAT}endless.gemini", contents="Hello")
    assert next(stream).text == "word "
    stream.close()
    wait_closed(endpoints.chat, "endless.gemini")
    before = len(endpoints.google.closed_at)
    stream = client.models.generate_content_stream(model=f"{GOOGLE}endless", contents="Hello")
    next(stream)
    stream.close()
    give_up_at = time.monotonic() + 5.0
    while len(endpoints.google.closed_at) == before:
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def test_other_ways_to_call(client: Any, endpoints: Endpoints) -> None:
    """The key in the query, a model whose slash is encoded, an array in place of events; and the SDK for Vertex AI."""
    body = msgspec.json.encode({"contents": [{"parts": [{"text": "Hello"}]}]})
    path = f"{endpoints.url}/v1beta/models/{CHAT.replace('/', '%2F')}hello:streamGenerateContent?key="
    key = KEY.replace(" ", "%20")
    request = urllib.request.Request(path + key, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        chunks = msgspec.json.decode(response.read())
    texts = [part["text"] for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
    assert "".join(texts) == TEXT
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(path + "wrong", body, {"content-type": "application/json"}))
    with caught.value as refusal:
        assert refusal.code == 401
    vertex = genai.Client(vertexai=True, api_key=KEY, http_options={"base_url": endpoints.url})
    answer = vertex.models.generate_content(model=f"publishers/google/models/{GOOGLE}hello", contents="Hello")
    assert answer.text == TEXT
