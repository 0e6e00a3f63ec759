"""Discovery: keys in the environment, servers on loopback, the local model and the echo."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import httpx2
import pytest
import trio
from trio.testing import MockClock

from trigate.config import structure as configuration
from trigate.config.secrets import Secret
from trigate.config.sections import ConfigError, UpstreamConfig, Url
from trigate.upstream import discovery
from trigate.upstream.discovery import (
    LOCAL_SERVERS,
    PROBE_TIMEOUT_S,
    PROVIDERS,
    discover,
    from_environment,
    probe,
)
from trigate.upstream.local_model import process
from trigate.upstream.model_list import decode_model_list

MODELS = json.dumps({"object": "list", "data": [{"id": "m1", "object": "model"}, {"id": "m2"}]}).encode()


def _response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(head).encode() + body


class Answers(httpx2.AsyncBaseTransport):
    """A transport that answers by port, in memory."""

    def __init__(self, by_port: Mapping[int, Callable[[], Awaitable[httpx2.Response]]]) -> None:
        self.by_port = by_port
        self.asked: list[str] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url}")
        await trio.lowlevel.checkpoint()
        answer = self.by_port.get(request.url.port or 80)
        if answer is None:
            raise httpx2.ConnectError("refused")
        return await answer()


async def _lists_models(after_s: float = 0.0) -> httpx2.Response:
    await trio.sleep(after_s)
    return httpx2.Response(200, content=MODELS)


async def _never() -> httpx2.Response:
    await trio.sleep_forever()
    raise AssertionError


class Silence(httpx2.AsyncByteStream):
    """A body that never comes."""

    closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        self.closed = True


@asynccontextmanager
async def _open_server(answer: bytes) -> AsyncIterator[int]:
    """A real server on loopback that reads the head of a request, sends ``answer`` and closes."""

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        async with stream:
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            assert head.startswith(b"GET /v1/models HTTP/1.1\r\n")
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


# -- the environment --------------------------------------------------------------------------------------------------


def test_keys_in_the_environment() -> None:
    """Each provider whose key is set and not empty is an upstream, in the table's order; its key stays a reference."""
    env = {"GROQ_API_KEY": "g", "OPENAI_API_KEY": "o", "DASHSCOPE_API_KEY": "q", "XAI_API_KEY": "", "PATH": "/bin"}
    found = from_environment(env)
    assert list(found) == ["openai", "qwen", "groq"]
    assert found["qwen"].base_url == "https://dashscope.aliyuncs.com/compatible-mode/v1"
    assert found["qwen"].api_key == Secret(env="DASHSCOPE_API_KEY")
    assert found["openai"].default_model
    assert from_environment({}) == {}


def test_the_table_of_providers() -> None:
    """Each provider's name and URL are valid in a configuration file; names and variables are unique."""
    tables = {each.name: {"base_url": each.base_url, "api_key": {"env": each.env}} for each in PROVIDERS}
    config = configuration.structure(
        {"upstreams": tables}, env={each.env: "key" for each in PROVIDERS}, source="the table"
    )
    assert [upstream.base_url for upstream in config.upstreams.values()] == [each.base_url for each in PROVIDERS]
    assert len(config.upstreams) == len({each.env for each in PROVIDERS}) == len(PROVIDERS)
    assert all(upstream.base_url and upstream.base_url.startswith("https://") for upstream in config.upstreams.values())
    assert not {*config.upstreams} & {*LOCAL_SERVERS, "local", "trigate", "default"}


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("OPENAI_API_KEY", "openai"),
        ("DASHSCOPE_API_KEY", "qwen"),
        ("OPENROUTER_API_KEY", "openrouter"),
        ("GROQ_API_KEY", "groq"),
        ("DEEPSEEK_API_KEY", "deepseek"),
        ("MISTRAL_API_KEY", "mistral"),
        ("MOONSHOT_API_KEY", "moonshot"),
        ("XAI_API_KEY", "xai"),
        ("TOGETHER_API_KEY", "together"),
        ("ZHIPU_API_KEY", "zhipu"),
        ("SILICONFLOW_API_KEY", "siliconflow"),
        ("GEMINI_API_KEY", "gemini"),
        ("GOOGLE_API_KEY", "gemini"),
    ],
)
def test_each_promised_variable(variable: str, name: str) -> None:
    """Each documented variable makes the documented upstream."""
    assert list(from_environment({variable: "key"})) == [name]


# -- local servers ----------------------------------------------------------------------------------------------------


async def test_a_server_on_loopback_is_found() -> None:
    """A real server that lists a model becomes an upstream under its name; a closed port does not."""
    async with _open_server(_response(MODELS)) as port, _open_server(_response(MODELS)) as other:
        transport = httpx2.AsyncHTTPTransport()
        found = await probe(transport, {"vllm": port, "ollama": other, "lmstudio": 1})
        await transport.aclose()
    assert list(found.items()) == [
        ("vllm", UpstreamConfig(base_url=Url(f"http://127.0.0.1:{port}/v1"))),
        ("ollama", UpstreamConfig(base_url=Url(f"http://127.0.0.1:{other}/v1"))),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        _response(MODELS, "404 Not Found"),
        _response(MODELS, "401 Unauthorized"),
        _response(b"", "302 Found", "location: /login"),
        _response(b"<html>hello</html>"),
        _response(b"[]"),
        _response(b'{"data": [1]}'),
        _response(b'{"data": []}'),
        _response(b'{"models": [{"name": "m"}]}'),
        _response(b'{"data": [], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        _response(b"not gzip", "200 OK", "content-encoding: gzip"),
        _response(MODELS)[:-5],
    ],
    ids=[
        "nothing",
        "another protocol",
        "no body",
        "404",
        "401",
        "redirect",
        "html",
        "array",
        "no ids",
        "empty list",
        "another list",
        "deep",
        "bad encoding",
        "cut",
    ],
)
async def test_whatever_else_listens_is_left_alone(answer: bytes) -> None:
    """Any other answer than a model list with at least one model is ignored."""
    async with _open_server(answer) as port:
        transport = httpx2.AsyncHTTPTransport()
        try:
            assert await probe(transport, {"llamacpp": port}) == {}
        finally:
            await transport.aclose()


async def test_all_are_asked_at_once_and_none_delays_the_start(autojump_clock: MockClock) -> None:
    """A server that hangs delays the start by the timeout only, and the answers of the others count."""
    silence = Silence()

    async def silent_body() -> httpx2.Response:
        await trio.lowlevel.checkpoint()
        return httpx2.Response(200, stream=silence)

    transport = Answers(
        {1: _never, 2: partial(_lists_models, 0.25), 3: silent_body, 4: partial(_lists_models, 0.31), 5: _lists_models}
    )
    started = trio.current_time()
    found = await probe(transport, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6})
    assert trio.current_time() - started == pytest.approx(PROBE_TIMEOUT_S)
    assert list(found) == ["b", "e"]
    assert silence.closed
    assert len(transport.asked) == 6


async def test_quick_answers_end_the_probe(autojump_clock: MockClock) -> None:
    """The probe ends with the last answer, and the result has the order of the table."""
    started = trio.current_time()
    found = await probe(Answers({1: partial(_lists_models, 0.1), 2: _lists_models}), {"a": 1, "b": 2, "c": 3})
    assert list(found) == ["a", "b"]
    assert trio.current_time() - started == pytest.approx(0.1)


def test_model_lists() -> None:
    """The ids are in their order, each once. Odd rows are skipped; any other body is a ValueError."""
    assert tuple(decode_model_list(MODELS)) == ("m1", "m2")
    assert tuple(decode_model_list(b'{"data": [{"id": "b"}, {"id": "a"}, {"id": "b"}]}')) == ("b", "a")
    for body in (
        b'[{"id": "a", "type": "chat"}, {"id": "b"}]',
        b'{"data": [{"id": "a"}, "c", {"id": "b"}]}',
        b'{"data": [null, {"id": "a"}, {"id": 5}, {}, {"id": ""}, {"id": "x\\n"}, 7, {"id": "models/b"}]}',
    ):
        assert tuple(decode_model_list(body)) == ("a", "b"), body
    for body in (b"[]", b'{"data": null}', b'{"data": [{"id": 5}]}', b'{"data": [{}]}'):
        assert decode_model_list(body) == {}
    for body in (b"", b"{}", b"null", b'{"data": {"a": 1}}', b"\xff", b"<html>", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            decode_model_list(body)


def test_the_fields_of_models() -> None:
    """What clients look for is kept, and nothing else: a row may have paths and other details of the server."""
    row = {"id": "m", "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 8, "root": "/srv/m"}
    body = json.dumps({"data": [row | {"meta": {"n_ctx": 4}, "context_length": None}]}).encode()
    assert decode_model_list(body) == {
        "m": {"created": 1, "owned_by": "vllm", "max_model_len": 8, "meta": {"n_ctx": 4}}
    }


# -- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_local_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery finds no local model."""
    monkeypatch.setattr(process, "why_unavailable", lambda gguf: "not installed")


async def test_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is keys, local servers, the local model, the echo: `default` is the first that can serve."""
    monkeypatch.setattr(process, "why_unavailable", lambda gguf: None)
    transport = Answers({LOCAL_SERVERS["vllm"]: _lists_models, LOCAL_SERVERS["ollama"]: _lists_models})
    env = {"GROQ_API_KEY": "g", "OPENAI_API_KEY": "o"}
    config = await discover(env, transport=transport)
    assert config.source == "discovery"
    assert list(config.upstreams) == ["openai", "groq", "ollama", "vllm", "local", "trigate"]
    assert [config.upstreams[name].kind for name in ("openai", "local", "trigate")] == ["openai", "local", "echo"]
    assert config.secrets["groq"] == {"authorization": "Bearer g"}
    assert config.disabled == {}
    assert set(transport.asked) == {f"GET http://127.0.0.1:{port}/v1/models" for port in (11434, 1234, 8080, 8000)}


@pytest.mark.usefixtures("no_local_model")
async def test_nothing_found_still_answers() -> None:
    """If nothing is found, the echo is the only upstream, with its one model."""
    config = await discover({}, transport=Answers({}))
    assert list(config.upstreams) == ["trigate"]
    assert config.upstreams["trigate"].models == ("echo",)
    assert config.keys == {}


@pytest.mark.usefixtures("no_local_model")
async def test_the_gateway_s_key_holds_without_a_file() -> None:
    """``TRIGATE_API_KEY`` is a gateway key with discovery, too; an empty one is an error, not an open gateway."""
    keys = (await discover({"TRIGATE_API_KEY": "k"}, transport=Answers({}))).keys
    assert {name: key.secret.literal for name, key in keys.items()} == {"TRIGATE_API_KEY": "k"}
    with pytest.raises(ConfigError, match="TRIGATE_API_KEY"):
        await discover({"TRIGATE_API_KEY": ""}, transport=Answers({}))


@pytest.mark.usefixtures("no_local_model")
async def test_a_key_that_no_header_can_carry_disables_its_provider() -> None:
    """A key that no header can carry disables its provider, with the reason, and the others stay."""
    config = await discover({"OPENAI_API_KEY": "two\nlines", "GROQ_API_KEY": "g"}, transport=Answers({}))
    assert list(config.disabled) == ["openai"]
    assert list(config.upstreams) == ["openai", "groq", "trigate"]


@pytest.mark.usefixtures("no_local_model")
async def test_azure() -> None:
    """Key and endpoint together make an upstream; an endpoint that is no URL is an error that names its variable."""
    env = {"AZURE_OPENAI_API_KEY": "a", "AZURE_OPENAI_ENDPOINT": "https://name.openai.azure.com/"}
    config = await discover(env, transport=Answers({}))
    assert list(config.upstreams) == ["azure", "trigate"]
    found = config.upstreams["azure"]
    assert (found.kind, found.base_url, found.api_version) == ("azure", "https://name.openai.azure.com", None)
    assert config.secrets["azure"] == {"api-key": "a"}
    more = {"OPENAI_API_VERSION": "2024-10-21", "AZURE_OPENAI_DEPLOYMENT_NAME": "mine"}
    found = (await discover({**env, **more}, transport=Answers({}))).upstreams["azure"]
    assert (found.api_version, found.models) == ("2024-10-21", ("mine",))
    assert list((await discover({"AZURE_OPENAI_API_KEY": "a"}, transport=Answers({}))).upstreams) == ["trigate"]
    with pytest.raises(ConfigError, match="AZURE_OPENAI_ENDPOINT"):
        await discover({**env, "AZURE_OPENAI_ENDPOINT": "name"}, transport=Answers({}))


@pytest.mark.usefixtures("no_local_model")
async def test_bedrock() -> None:
    """A key of Bedrock's makes an upstream in the region that the environment names, or in the first one."""
    env = {"AWS_BEARER_TOKEN_BEDROCK": "b"}
    config = await discover({**env, "AWS_DEFAULT_REGION": "eu-west-1"}, transport=Answers({}))
    assert list(config.upstreams) == ["bedrock", "trigate"]
    found = config.upstreams["bedrock"]
    assert (found.kind, found.base_url) == ("bedrock", "https://bedrock-runtime.eu-west-1.amazonaws.com")
    assert config.secrets["bedrock"] == {"authorization": "Bearer b"}
    assert (await discover(env, transport=Answers({}))).upstreams["bedrock"].region == "us-east-1"
    with pytest.raises(ConfigError, match="AWS_REGION"):
        await discover({**env, "AWS_REGION": "a/b"}, transport=Answers({}))


def test_the_probe_s_bound() -> None:
    """The probe takes at most 300 ms."""
    assert discovery.PROBE_TIMEOUT_S <= 0.3
