"""Calls in Ollama's format end to end, in memory and in virtual time, and the paths around them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import (
    DONE,
    FINISH,
    Break,
    Head,
    Pause,
    Provider,
    Say,
    Script,
    answers,
    completion,
    content,
    event,
    role,
    says,
    usage,
)

HELLO = [{"role": "user", "content": "Hi"}]
COUNTED = (Say(role()), Say(content("Hel")), Say(content("lo")), Say(FINISH), Say(usage(5, 2)), Say(DONE))


def ask(served: Served, path: str = "/api/chat", **fields: Any) -> ClientCall:
    """Starts a call."""
    body = {"model": "up/m", **({"messages": HELLO} if path == "/api/chat" else {}), **fields}
    return served.client.start("POST", path, body)


def lines_of(call: ClientCall) -> list[Any]:
    """The lines of a stream."""
    assert call.body.endswith(b"\n")
    return [json.loads(line) for line in call.body.splitlines()]


# -- calls ------------------------------------------------------------------------------------------------------------


async def test_a_stream(open_app: OpenApp) -> None:
    """It is the default; the exchange is recorded like any other."""
    async with open_app(providers=Provider(COUNTED)) as served:
        call = await ask(served, keep_alive="5m", options={"num_ctx": 4096}).wait()
        assert call.status == 200
        assert call.header("content-type") == "application/x-ndjson"
        assert call.header("x-trigate-dropped") == "keep_alive,options.num_ctx"
        *texts, last = lines_of(call)
        assert "".join(line["message"]["content"] for line in texts) == "Hello"
        assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("stop", 5, 2)
        [sent] = served.providers["up"].calls
        assert (sent.path, sent.json["stream"]) == ("/v1/chat/completions", True)
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage[:2], exchange.bytes_sent) == ("complete", (5, 2), len(call.body))
        served.assert_clean()


async def test_a_plain_answer(open_app: OpenApp) -> None:
    """It is one object."""
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        call = await ask(served, "/api/generate", prompt="a", stream=False).wait()
        assert call.header("content-type") == "application/json"
        assert (call.json["response"], call.json["done"], call.json["model"]) == ("Hi", True, "up/m")


async def test_a_silence_stays_one(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its readers take every line for JSON, so nothing is put into it."""
    async with open_app(
        providers=Provider((Pause(40), Say(content("a")), Pause(40), Say(FINISH), Say(DONE)))
    ) as served:
        call = await ask(served).wait()
        assert [line["message"]["content"] for line in lines_of(call)] == ["a", ""]


@pytest.mark.parametrize("end", [Break(), Say(event({"error": {"message": "it burns", "type": "x"}}))])
async def test_a_stream_that_fails(open_app: OpenApp, end: Any) -> None:
    """Its last line is the error, and no line says that it is done."""
    async with open_app(providers=Provider((Say(content("a")), end))) as served:
        call = await ask(served).wait()
        first, last = lines_of(call)
        assert first["message"]["content"] == "a"
        assert last.keys() == {"error"}
        assert isinstance(last["error"], str)
        served.assert_clean()


async def test_errors_before_the_answer(open_app: OpenApp) -> None:
    """They are one sentence."""
    async with open_app() as served:
        served.providers["up"].play(answers(b'{"error":{"message":"no such thing","code":7}}', status=400))
        call = await ask(served).wait()
        assert (call.status, call.json) == (400, {"error": "no such thing"})
        call = await ask(served, model="nothing/here").wait()
        assert call.status == 404
        assert isinstance(call.json["error"], str)
        call = await ask(served, "/api/generate", prompt="a", suffix="b").wait()
        assert (call.status, "suffix" in call.json["error"]) == (400, True)
        call = await served.client.ask("POST", "/api/chat", b"{")
        assert (call.status, call.json.keys()) == (400, {"error"})
        call = await served.client.ask("GET", "/api/chat")
        assert (call.status, call.json.keys()) == (405, {"error"})


async def test_the_client_disconnects(open_app: OpenApp) -> None:
    """The upstream is closed at once."""
    async with open_app(providers=Provider((Say(content("a")), Pause(1000)))) as served:
        call = ask(served)
        await call.wait_for(b"content")
        call.disconnect()
        await wait_all_tasks_blocked()
        assert served.providers["up"].calls[0].ended == "closed"
        served.assert_clean()


async def test_loading_needs_no_upstream(open_app: OpenApp) -> None:
    """But a model that somebody has."""
    async with open_app() as served:
        call = await ask(served, messages=[]).wait()
        assert (call.status, call.json["done_reason"], call.json["model"]) == (200, "load", "up/m")
        call = await ask(served, "/api/generate", model="m:latest", keep_alive=0).wait()
        assert (call.json["done_reason"], call.json["model"]) == ("unload", "m:latest")
        call = await ask(served, "/api/generate", model="nobody").wait()
        assert call.status == 404
        assert not served.providers["up"].calls


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("up/m", "m"),
        ("up/m:latest", "m"),
        ("m:latest", "m"),
        ("l", "l:latest"),
        ("up/l", "l:latest"),
        ("fast:latest", "m"),
        ("up/unlisted:latest", "unlisted"),
        ("up/unlisted:8b", "unlisted:8b"),
    ],
)
async def test_the_tag_of_a_name(open_app: OpenApp, asked: str, sent: str) -> None:
    """``latest`` may be added or left out, and the answer has the name that was asked for."""
    config = make_config({"up": {"models": ["m", "l:latest"]}}, models={"fast": {"targets": ["up/m"]}})
    async with open_app(config, Provider(says("x"))) as served:
        call = await ask(served, model=asked).wait()
        assert served.providers["up"].calls[0].json["model"] == sent
        assert lines_of(call)[0]["model"] == asked


async def test_embeddings(open_app: OpenApp) -> None:
    """Both paths reach OpenAI's ``/embeddings``."""
    answer = {"object": "list", "data": [{"index": 0, "embedding": [0.5]}], "usage": {"prompt_tokens": 2}}
    async with open_app(providers=Provider(answers(msgspec.json.encode(answer)))) as served:
        call = await ask(served, "/api/embed", input="a").wait()
        assert (call.json["embeddings"], call.json["prompt_eval_count"]) == ([[0.5]], 2)
        call = await ask(served, "/api/embeddings", prompt="a").wait()
        assert call.json == {"embedding": [0.5]}
        assert [each.path for each in served.providers["up"].calls] == ["/v1/embeddings"] * 2
        assert served.settled[0].usage[0] == 2
        call = await ask(served, "/api/embed", input={}).wait()
        assert (call.status, "input" in call.json["error"]) == (400, True)
        call = await ask(served, "/api/embed", input="a", stream=True).wait()
        assert (call.status, "stream" in call.json["error"]) == (400, True)


async def test_curl_sends_no_json_type(open_app: OpenApp) -> None:
    """Ollama documents ``curl -d``. A page, which could send that type without a preflight, may not."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    body = msgspec.json.encode({"model": "up/m", "messages": HELLO})
    async with open_app(providers=Provider(says("x"))) as served:
        call = await served.client.ask("POST", "/api/chat", body, headers=form)
        assert call.status == 200
        origin = {**form, "origin": "http://127.0.0.1:3000"}
        call = await served.client.ask("POST", "/api/chat", body, headers=origin)
        assert call.status == 415
        call = await served.client.ask("POST", "/v1/chat/completions", body, headers=form)
        assert call.status == 415


# -- around them ------------------------------------------------------------------------------------------------------


async def test_is_it_running(open_app: OpenApp) -> None:
    """Clients ask ``/``, with or without a key; a browser does not get that answer."""
    config = make_config(keys={"k": "a key of the gateway"})
    async with open_app(config) as served:
        call = await served.client.ask("GET", "/")
        assert (call.status, call.body) == (200, b"Ollama is running")
        assert (await served.client.ask("HEAD", "/")).status == 200
        call = await served.client.ask("GET", "/", headers={"accept": "text/html,*/*"})
        assert (call.status, call.header("content-type")) == (200, "text/html; charset=utf-8")


async def test_the_version(open_app: OpenApp) -> None:
    """It is one that clients accept, which compare three numbers."""
    async with open_app() as served:
        call = await served.client.ask("GET", "/api/version")
        assert tuple(map(int, call.json["version"].split("."))) >= (0, 6, 4)


async def test_tags_and_show(open_app: OpenApp) -> None:
    """Every model is listed under a name with a tag, and can be shown and asked by it."""
    config = make_config(
        {"up": {"models": ["m"], "model_info": {"m": {"context_length": 8192}}}}, models={"fast": {"targets": ["up/m"]}}
    )
    async with open_app(config, Provider(says("x"))) as served:
        listed = (await served.client.ask("GET", "/api/tags")).json["models"]
        names = [entry["name"] for entry in listed]
        assert names == ["default:latest", "fast:latest", "up/m:latest", "m:latest"]
        assert [entry["model"] for entry in listed] == names
        for name in [*names, "up/m", "fast"]:
            shown = (await served.client.ask("POST", "/api/show", {"model": name})).json
            assert shown["capabilities"] == ["completion", "tools"]
            context = [value for key, value in shown["model_info"].items() if key.endswith(".context_length")]
            assert context == [8192]
            assert (await ask(served, model=name).wait()).status == 200
        assert (await served.client.ask("POST", "/api/show", {"name": "up/m"})).status == 200
        assert (await served.client.ask("POST", "/api/show", {"model": "up/other"})).status == 200
        bodies: tuple[object, ...] = ({"model": "nobody"}, {"model": 1}, [], b"{")
        for body in bodies:
            call = await served.client.ask("POST", "/api/show", body)
            assert call.status in (400, 404)
            assert isinstance(call.json["error"], str)


async def test_models_in_memory(open_app: OpenApp) -> None:
    """Nothing is known of them."""
    async with open_app() as served:
        assert (await served.client.ask("GET", "/api/ps")).json == {"models": []}


@pytest.mark.parametrize(
    ("method", "what"), [("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"), ("DELETE", "delete")]
)
async def test_models_are_not_managed(open_app: OpenApp, method: str, what: str) -> None:
    """The refusal says so."""
    async with open_app() as served:
        call = await served.client.ask(method, f"/api/{what}", {"model": "m"})
        assert (call.status, what in call.json["error"]) == (404, True)


async def test_other_paths(open_app: OpenApp) -> None:
    """They are errors in Ollama's shape, except those of a base URL that is wrong for OpenAI's clients."""
    async with open_app() as served:
        call = await served.client.ask("POST", "/api/blobs", {})
        assert (call.status, isinstance(call.json["error"], str)) == (404, True)
        call = await served.client.ask("POST", "/api/v1/chat/completions", {})
        assert (call.status, call.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/api/tags", "//api/tags", "/api/tags/", "/api//tags"])
async def test_paths_that_people_type(open_app: OpenApp, path: str) -> None:
    """A base URL for OpenAI's clients, or a slash too many, does no harm."""
    async with open_app(providers=Provider(says("x"))) as served:
        assert (await served.client.ask("GET", path)).json["models"]
        assert (await ask(served, path.replace("tags", "chat"), messages=HELLO).wait()).status == 200


async def test_keys(open_app: OpenApp) -> None:
    """They are those of every other path."""
    async with open_app(make_config(keys={"k": "a key of the gateway"}), Provider(says("x"))) as served:
        for method, path in (("GET", "/api/tags"), ("GET", "/api/version"), ("POST", "/api/chat")):
            call = await served.client.ask(method, path)
            assert (call.status, isinstance(call.json["error"], str)) == (401, True)
        headers = {"authorization": "Bearer a key of the gateway"}
        assert (await served.client.ask("GET", "/api/tags", headers=headers)).status == 200


async def test_open_webui(open_app: OpenApp) -> None:
    """Its Ollama connection checks the version, looks for each name, with a tag, in the list, and merges what is in
    memory into it; then it sends its own fields.

    **Source:** open-webui ``backend/open_webui/routers/ollama.py`` and ``utils/payload.py``.
    """
    headers = {"content-type": "application/json", "x-openwebui-user-id": "u", "x-openwebui-chat-id": "c"}
    async with open_app(providers=Provider(COUNTED)) as served:
        version = (await served.client.ask("GET", "/api/version", headers=headers)).json["version"]
        assert [int(part) for part in version.split(".")]
        tags = (await served.client.ask("GET", "/api/tags", headers=headers)).json["models"]
        models = {entry["model"]: entry for entry in tags}
        loaded = (await served.client.ask("GET", "/api/ps", headers=headers)).json["models"]
        assert [entry for entry in loaded if "expires_at" in entry] == []
        model = "up/m:latest"  # it appends the tag to a name without one
        assert model in models
        body = {
            "model": model,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "images": []}],
            "options": {"temperature": 0.8, "num_ctx": 2048, "num_predict": 128, "stop": ["</s>"], "mirostat": 0},
            "stream": True,
            "keep_alive": "5m",
            "think": False,
        }
        call = await served.client.ask("POST", "/api/chat", body, headers=headers)
        *texts, last = lines_of(call)
        assert "".join(line["message"]["content"] for line in texts) == "Hello"
        assert last["eval_duration"] > 0  # it divides by them
        assert last["prompt_eval_duration"] > 0
        sent = served.providers["up"].calls[0].json
        assert (sent["max_tokens"], sent["stop"], sent["temperature"]) == (128, ["</s>"], 0.8)
        title = {"model": model, "prompt": "A title", "stream": False, "options": {"num_predict": 50}, "format": "json"}
        served.providers["up"].play(answers(completion("{}")))
        call = await served.client.ask("POST", "/api/generate", title, headers=headers)
        assert call.json["response"] == "{}"
        unload = {"model": model, "keep_alive": 0, "prompt": ""}
        call = await served.client.ask("POST", "/api/generate", unload, headers=headers)
        assert call.json["done"]
        refused = await served.client.ask("POST", "/api/pull", {"model": "x", "insecure": True}, headers=headers)
        assert "pull" in refused.json["error"]


# -- upstreams --------------------------------------------------------------------------------------------------------

OLLAMA = {"kind": "ollama", "base_url": "http://ollama.invalid", "models": ["qwen3:latest"]}
NDJSON = Head(200, "application/x-ndjson")


def line(message: dict[str, Any], *, done: bool = False, **fields: Any) -> bytes:
    """A line of an Ollama server."""
    head = {"model": "qwen3:latest", "created_at": "2026-01-01T00:00:00Z"}
    return msgspec.json.encode({**head, "message": {"role": "assistant", **message}, "done": done, **fields}) + b"\n"


LAST = line({"content": ""}, done=True, done_reason="stop", prompt_eval_count=5, eval_count=2)
LINES = (line({"content": "", "thinking": "Hm."}), line({"content": 'the "done":true'}), LAST)


async def test_the_same_format_is_relayed(open_app: OpenApp) -> None:
    """Only the model id changes, in both directions; what is newer than the gateway goes through."""
    config = make_config({"up": OLLAMA})
    script = (NDJSON, Say(LINES[0][:9]), Say(LINES[0][9:] + LINES[1]), Say(LAST))
    async with open_app(config, Provider(script)) as served:
        body = b'{"model": "up/qwen3", "messages":[{"role":"user","content":"Hi"}], "new": {"x": 1.0}, "raw": true}'
        call = await served.client.ask("POST", "/api/chat", body, headers={"content-type": "application/json"})
        assert call.body == b"".join(LINES).replace(b'"qwen3:latest"', b'"up/qwen3"')
        [sent] = served.providers["up"].calls
        assert (sent.path, sent.body) == ("/api/chat", body.replace(b"up/qwen3", b"qwen3:latest"))
        assert served.settled[0].usage[:2] == (5, 2)
        served.providers["up"].play(answers(LAST))
        call = await ask(served, model="up/qwen3:latest", stream=False).wait()
        assert call.json == {**json.loads(LAST), "model": "up/qwen3:latest"}
        served.assert_clean()


async def test_half_a_character_is_relayed(open_app: OpenApp) -> None:
    """A server that cuts text within an emoji sends it; an answer without its message is none."""
    half = rb'{"done":true,"model":"qwen3","message":{"role":"assistant","content":"\ud83d"},"done_reason":"stop"}'
    async with open_app(make_config({"up": OLLAMA}), Provider((NDJSON, Say(half + b"\n")))) as served:
        expected = {**json.loads(half), "model": "up/qwen3"}
        assert json.loads((await ask(served, model="up/qwen3").wait()).body) == expected
        served.providers["up"].play(answers(half))
        assert json.loads((await ask(served, model="up/qwen3", stream=False).wait()).body) == expected
        served.providers["up"].play(answers(b'{"model":"qwen3","message":null,"done":true}'))
        assert (await ask(served, model="up/qwen3", stream=False).wait()).status == 502
        served.assert_clean()


@pytest.mark.parametrize(
    "end", [(Break(),), (Say(b'{"error":"it burns"}\n'),), (), (Say(b"no json\n"),), (Say(LAST[:-9]),)]
)
async def test_a_relayed_stream_that_fails(open_app: OpenApp, end: tuple[Any, ...]) -> None:
    """It ends with an error; before the first content, with a status."""
    async with open_app(make_config({"up": OLLAMA}), Provider((NDJSON, Say(LINES[1]), *end))) as served:
        call = await ask(served, model="up/qwen3").wait()
        first, last = lines_of(call)
        assert first["message"]["content"]
        assert last.keys() == {"error"}
        served.providers["up"].play((NDJSON, *end))
        call = await ask(served, model="up/qwen3").wait()
        assert call.status in (400, 502)
        assert isinstance(call.json["error"], str)


async def test_an_error_of_the_same_format(open_app: OpenApp) -> None:
    """It goes to the client word for word."""
    told = b'{"error":"model \\"x\\" not found, try pulling it first"}'
    async with open_app(make_config({"up": OLLAMA}), Provider(answers(told, status=404))) as served:
        call = await ask(served, model="up/x").wait()
        assert (call.status, call.body) == (404, told)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_other_clients_over_ollama(open_app: OpenApp, is_stream: bool) -> None:
    """A chat completion gets its own format."""
    script: Script = (NDJSON, *map(Say, LINES)) if is_stream else answers(LAST.replace(b'""', b'"Hello"'))
    async with open_app(make_config({"up": OLLAMA}), Provider(script)) as served:
        call = await served.client.chat(model="up/qwen3:latest", stream=is_stream).wait()
        assert call.status == 200
        assert (b"[DONE]" in call.body) is is_stream
        assert served.providers["up"].calls[0].json["stream"] is is_stream
        assert served.settled[0].usage[:2] == (5, 2)


async def test_openai_embeddings_over_ollama(open_app: OpenApp) -> None:
    """Vectors are numbers, or in base64, as OpenAI's SDKs ask for them."""
    answer = answers(b'{"model":"e","embeddings":[[0.5,1.0]],"prompt_eval_count":3}')
    async with open_app(make_config({"up": OLLAMA}), Provider(answer)) as served:
        body = {"model": "up/e", "input": "a", "user": "u"}
        call = await served.client.ask("POST", "/v1/embeddings", body)
        assert call.json["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
        assert call.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert call.header("x-trigate-dropped") == "user"
        [sent] = served.providers["up"].calls
        assert (sent.path, sent.json) == ("/api/embed", {"model": "e", "input": "a"})
        call = await served.client.ask("POST", "/v1/embeddings", {**body, "encoding_format": "base64"})
        assert call.json["data"][0]["embedding"] == "AAAAPwAAgD8="
        call = await served.client.ask("POST", "/v1/embeddings", {**body, "input": [1, 2]})
        assert (call.status, call.error["param"]) == (400, "input")


async def test_the_models_of_an_ollama_server(open_app: OpenApp) -> None:
    """They are those of ``/api/tags``; a name without its tag is found from Ollama's clients."""
    tags = {"models": [{"name": "qwen3:latest", "model": "qwen3:latest", "size": 9, "capabilities": ["thinking"]}]}
    config = make_config({"up": {**OLLAMA, "models": "discover"}})
    async with open_app(config, Provider(answers(msgspec.json.encode(tags)), (NDJSON, *map(Say, LINES)))) as served:
        assert served.providers["up"].calls[0].path == "/api/tags"
        listed = [row["id"] for row in (await served.client.ask("GET", "/v1/models")).json["data"]]
        assert listed == ["default", "up/qwen3:latest", "qwen3:latest"]
        shown = (await served.client.ask("POST", "/api/show", {"model": "qwen3"})).json
        assert shown["capabilities"] == ["completion", "thinking"]
        assert (await ask(served, model="qwen3").wait()).status == 200
