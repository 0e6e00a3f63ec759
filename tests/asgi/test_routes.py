"""The control plane: models, health, readiness, status, and the errors of unknown paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx2
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import trigate
from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, make_config
from tests.support.provider import (
    DONE,
    FINISH,
    Head,
    Provider,
    Refuse,
    Say,
    Stall,
    answers,
    completion,
    content,
    event,
    says,
)
from trigate.asgi import control_plane

MODELS = make_config(
    {
        "openrouter": {"models": ["google/gemini-flash", "m"]},
        "qwen": {"models": ["qwen-turbo", "m"]},
        "off": {"models": ["x"], "api_key": {"env": "NOT_SET"}},
    },
    models={"default": {"targets": ["qwen/qwen-turbo"]}, "fast/one": {"targets": ["openrouter/m", "qwen/m"]}},
)
PROVIDERS = {"openrouter": Provider(), "qwen": Provider(), "off": Provider()}


async def test_health_is_exactly_this(open_app: OpenApp) -> None:
    """The body is part of the contract."""
    async with open_app() as served:
        call = await served.client.ask("GET", "/health")
        assert (call.status, call.json) == (200, {"status": "ok"})
        assert call.header("content-type") == "application/json"


async def test_the_models_of_all_upstreams(open_app: OpenApp) -> None:
    """Each model has its upstream's name as prefix, aliases are included, and the shape is OpenAI's. Disabled upstreams
    are left out."""
    async with open_app(MODELS, PROVIDERS) as served:
        call = await served.client.ask("GET", "/v1/models")
        assert call.status == 200
        assert call.json["object"] == "list"
        found = {row["id"]: row["owned_by"] for row in call.json["data"]}
        assert found == {
            "default": "qwen",
            "fast/one": "openrouter",
            "openrouter/google/gemini-flash": "openrouter",
            "openrouter/m": "openrouter",
            "qwen/qwen-turbo": "qwen",
            "qwen/m": "qwen",
            "google/gemini-flash": "openrouter",
            "qwen-turbo": "qwen",
        }
        for row in call.json["data"]:
            assert set(row) == {"id", "object", "created", "owned_by"}
            assert row["object"] == "model"
            assert type(row["created"]) is int


async def test_the_fields_of_models(open_app: OpenApp) -> None:
    """What the upstream lists about a model is passed on, for an alias that of its first target; the configuration has
    the last word."""
    config = make_config(
        {"up": {"model_info": {"m": {"context_length": 9, "pricing": {"prompt": "1"}}}}},
        models={"coder": {"targets": ["up/m"], "info": {"context_length": 7}}},
    )
    async with open_app(config) as served:
        upstream = served.gateway.generations.current.upstreams["up"]
        upstream.model_fields = {"m": {"created": 5, "owned_by": "vllm", "max_model_len": 8}, "x": {"created": "5"}}
        upstream.models = ("m", "x")
        rows = {row["id"]: row for row in (await served.client.ask("GET", "/v1/models")).json["data"]}
        one = (await served.client.ask("GET", "/v1/models/up/m")).json
    known = {"object": "model", "created": 5, "owned_by": "vllm", "max_model_len": 8, "pricing": {"prompt": "1"}}
    assert one == rows["up/m"] == {"id": "up/m", "context_length": 9, **known}
    assert rows["default"] == {"id": "default", "context_length": 9, **known}
    assert rows["coder"] == {"id": "coder", "context_length": 7, **known}
    assert type(rows["up/x"]["created"]) is int


async def test_default_is_listed_without_an_alias(open_app: OpenApp) -> None:
    """It stands for the models of the first upstream that can serve."""
    async with open_app() as served:
        rows = (await served.client.ask("GET", "/v1/models")).json["data"]
        assert [(row["id"], row["owned_by"]) for row in rows] == [("default", "up"), ("up/m", "up"), ("m", "up")]


async def test_bare_ids(open_app: OpenApp) -> None:
    """A call, the list and a single model agree about the id of a model without its upstream: one upstream has it."""
    async with open_app(MODELS, PROVIDERS) as served:
        listed = {row["id"]: row for row in (await served.client.ask("GET", "/v1/models")).json["data"]}
        for model, status in (("qwen-turbo", 200), ("google/gemini-flash", 200), ("m", 404), ("x", 503), ("none", 404)):
            call = await served.client.ask("GET", f"/v1/models/{model}")
            assert call.status == (200 if status == 200 else 404)
            assert (call.json if status == 200 else None) == listed.get(model)
            assert (await served.client.chat(model=model).wait()).status == status
        ambiguous = await served.client.ask("GET", "/v1/models/m")
        assert "openrouter/m, qwen/m" in ambiguous.error["message"]


@pytest.mark.parametrize(
    "model",
    ["default", "fast/one", "openrouter/google/gemini-flash", "qwen/qwen-turbo"],
    ids=lambda m: m.replace("/", "|"),
)
async def test_one_model_by_its_id(open_app: OpenApp, model: str) -> None:
    """The id may contain slashes. In ASGI's path a server has already decoded ``%2F``."""
    async with open_app(MODELS, PROVIDERS) as served:
        call = await served.client.ask("GET", f"/v1/models/{model}")
        assert (call.status, call.json["id"], call.json["object"]) == (200, model, "model")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["openrouter/google/gemini-flash", "openrouter%2Fgoogle%2Fgemini-flash"])
async def test_one_model_by_its_id_over_a_socket(
    open_server: Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, object]]], model: str
) -> None:
    """The id may be encoded or not, as the SDKs send it (npm's encodes, Python's does not)."""
    async with open_server(MODELS) as (client, _):
        response = await client.get(f"/v1/models/{model}")
        assert (response.status_code, response.json()["id"]) == (200, "openrouter/google/gemini-flash")


async def test_a_model_that_is_not_listed_is_a_404(open_app: OpenApp) -> None:
    """The error suggests the closest models with their full ids."""
    async with open_app(MODELS, PROVIDERS) as served:
        call = await served.client.ask("GET", "/v1/models/qwen/qwen-turb")
        assert (call.status, call.error["code"]) == (404, "model_not_found")
        assert "qwen/qwen-turbo" in call.error["message"]


@pytest.mark.parametrize("path", ["/v1", "/v2/models", "/v1/chat", "/v2/chat/completions/", "/%00", "/é"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_path_is_a_404(open_app: OpenApp, path: str, method: str) -> None:
    """The error has OpenAI's shape."""
    async with open_app() as served:
        call = await served.client.ask(method, path, headers={"accept": "text/html"})
        assert (call.status, call.error["code"]) == (404, "not_found")
        assert set(call.error) == {"message", "type", "param", "code"}
        assert call.header("content-type") == "application/json"


TYPED = ["/v1//chat/completions", "//v1/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions"]


@pytest.mark.parametrize("path", [*TYPED, "/chat/completions", "///v1/v1//chat//completions//"])
async def test_a_path_that_people_type(open_app: OpenApp, path: str) -> None:
    """The call that is meant is served. For another method, the error is that of the endpoint."""
    async with open_app() as served:
        assert (await served.client.ask("POST", path, chat())).status == 200
        assert (await served.client.ask("PUT", path)).status == 405
        assert served.settled[0].request.call.endpoint.path == "/chat/completions"


DEPLOYED = ("/openai/deployments/up/m", "/openai//deployments/up/m/", "/deployments/up/m")


@pytest.mark.parametrize("path", DEPLOYED)
@pytest.mark.parametrize("model", [None, "m", "another/one"])
async def test_a_path_as_azure_has_it(open_app: OpenApp, path: str, model: str | None) -> None:
    """The model of the path counts, whatever the body says, and goes to the upstream in the body."""
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        fields = {"messages": [{"role": "user", "content": "Hi"}], "new": 1.0}
        body = fields if model is None else {**fields, "model": model}
        call = await served.client.ask("POST", f"{path}/chat/completions?api-version=2024-10-21", body)
        assert (call.status, call.json["model"]) == (200, "up/m")
        assert served.providers["up"].calls[0].json == {**fields, "model": "m"}
        assert served.providers["up"].calls[0].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("tail", "field"),
    [
        ("completions", "prompt"),
        ("embeddings", "input"),
        ("responses", "input"),
        ("images/generations", "prompt"),
        ("audio/speech", "input"),
    ],
)
async def test_the_paths_of_azure(open_app: OpenApp, tail: str, field: str) -> None:
    """Each goes where it goes by its ordinary path; errors are those that Azure's clients read."""
    config = make_config({"up": {"responses": "native"}})
    async with open_app(config, Provider(answers(b'{"error":{"message":"no","code":"c"}}', status=400))) as served:
        call = await served.client.ask("POST", f"/openai/deployments/up/m/{tail}?api-version=1", {field: "a"})
        assert (call.status, call.error["message"], call.error["code"]) == (400, "no", "c")
        [sent] = served.providers["up"].calls
        assert (sent.path, sent.json) == (f"/v1/{tail}", {field: "a", "model": "m"})
        call = await served.client.ask("POST", f"/openai/deployments/nobody/{tail}", {field: "a"})
        assert (call.status, call.error["code"]) == (404, "model_not_found")
        call = await served.client.ask("GET", f"/openai/deployments/up/m/{tail}")
        assert call.status == 405


@pytest.mark.parametrize(
    "path", ["/openai/v1/chat/completions", "/openai/chat/completions/", "//openai/v1//chat/completions"]
)
async def test_the_paths_of_azures_newer_api(open_app: OpenApp, path: str) -> None:
    """They are OpenAI's, below another one; the model is in the body, and the key may be in ``api-key``."""
    async with open_app(make_config(keys={"one": "key-number-one"})) as served:
        headers = {"api-key": "key-number-one"}
        assert (await served.client.ask("POST", path, chat(), headers=headers)).status == 200
        assert (await served.client.ask("GET", "/openai/v1/models", headers=headers)).json["data"]
        assert (await served.client.ask("POST", path, chat(), headers={"api-key": "wrong"})).status == 401
        deployed = "/openai/deployments/up/m/chat/completions"
        assert (await served.client.ask("POST", deployed, chat(), headers=headers)).status == 200
        assert (await served.client.ask("POST", deployed, chat())).status == 401


@pytest.mark.parametrize("path", TYPED[:3])
async def test_a_typed_path_needs_the_key(open_app: OpenApp, path: str) -> None:
    """Access control does not depend on how a path is written."""
    async with open_app(make_config(keys={"one": "key-number-one"})) as served:
        for asked in (path, path.replace("/chat/completions", "/models"), "//status", "//hooks/x/runs/run_1"):
            assert (await served.client.ask("GET" if asked != path else "POST", asked, chat())).status == 401


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "//v1/models", "/models", "/v1/v1/models", "/models/"])
async def test_the_models_by_a_path_that_people_type(open_app: OpenApp, path: str) -> None:
    """The list is returned, and each model below such a path."""
    async with open_app() as served:
        assert (await served.client.ask("GET", path)).json["data"]
        call = await served.client.ask("GET", f"{path}/up/m/")
        assert (call.status, call.json["id"]) == (200, "up/m")


async def test_an_id_with_two_slashes(open_app: OpenApp) -> None:
    """Some servers have a path as an id; its slashes are its own."""
    async with open_app(make_config({"up": {"models": ["/models/a.gguf"]}})) as served:
        call = await served.client.ask("GET", "/v1/models/up//models/a.gguf")
        assert (call.status, call.json["id"]) == (200, "up//models/a.gguf")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/api/v1/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/Chat/Completions", "Did you mean /v1/chat/completions?"),
        ("/v1/chat/completion", "Did you mean /v1/chat/completions?"),
        ("//api/v1/models", "Did you mean /v1/models?"),
        ("/v1/status", "Did you mean /status?"),
        ("/status/", "Did you mean /status?"),
        ("/v1/health", "Did you mean /health?"),
        ("/sessions", "Did you mean /v1/sessions?"),
        ("/v1/v1/usage/", "Did you mean /v1/usage?"),
        ("/filez", "The paths of the API begin with /v1."),
        ("/v1", "The paths of the API begin with /v1."),
    ],
)
async def test_a_404_names_what_was_meant(open_app: OpenApp, path: str, hint: str) -> None:
    """It also repeats the path that was asked for, as it was."""
    async with open_app() as served:
        call = await served.client.ask("PATCH", path)
        assert (call.status, call.error["code"]) == (404, "not_found")
        assert call.error["message"] == f"There is nothing at PATCH {path}. {hint}"


async def test_a_404_without_a_guess(open_app: OpenApp) -> None:
    """Where nothing is similar, the message guesses nothing, and the work for a long path is bounded."""
    async with open_app() as served:
        call = await served.client.ask("GET", "/v1/fine-tuning")
        assert call.error["message"] == "There is nothing at GET /v1/fine-tuning."
        assert (await served.client.ask("GET", "/v1" + "/chat" * 1000)).status == 404


async def test_a_run_by_a_doubled_slash(open_app: OpenApp) -> None:
    """The path that is checked is the path that is served."""
    async with open_app() as served:
        call = await served.client.ask("GET", "//hooks/x/runs/run_1")
        assert (call.status, call.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/up/m", "/health", "/ready", "/status"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_a_wrong_method_is_a_405_with_allow(open_app: OpenApp, path: str, method: str) -> None:
    """The ``Allow`` header lists the allowed methods."""
    async with open_app() as served:
        call = await served.client.ask(method, path)
        assert (call.status, call.error["code"]) == (405, "method_not_allowed")
        assert "GET" in [each.strip() for each in call.header("allow").split(",")]


async def test_head_is_answered_as_get_is(open_app: OpenApp) -> None:
    """Probes send HEAD. The server leaves out the body."""
    async with open_app() as served:
        assert (await served.client.ask("HEAD", "/health")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "problem"),
    [
        ("GET", "/status?verbose=1", "/status has no query parameter 'verbose'. It has none."),
        ("GET", "/v1/exchanges?since=2026-01-01", "no query parameter 'since'. It has id, key, model, outcome"),
        ("GET", "/v1/exchanges?limit=5&Outcome=lost", "no query parameter 'Outcome'"),
        ("GET", "/v1/exchanges?outcome=", "'outcome' is empty"),
        ("GET", "/status/streams?limit=1&limit=2", "'limit' is given more than once"),
        ("GET", "/status/streams/x?limit=1", "no query parameter 'limit'"),
        ("DELETE", "/status/streams/x?force=true", "no query parameter 'force'"),
        ("GET", "/v1/sessions?order=desc", "no query parameter 'order'. It has limit, after, owner."),
        ("GET", "/v1/sessions/k?x", "no query parameter 'x'"),
        ("GET", "/v1/sessions/k/messages?before=1", "no query parameter 'before'"),
        ("POST", "/v1/sessions/k/reset?hard=1", "no query parameter 'hard'"),
        ("DELETE", "/v1/sessions/k?archived=true", "no query parameter 'archived'"),
        ("GET", "/hooks/h/runs/r?wait=1", "no query parameter 'wait'"),
    ],
)
async def test_a_query_parameter_that_is_not_known(open_app: OpenApp, method: str, path: str, problem: str) -> None:
    """It is refused, not ignored: the answer would look as if it had been applied."""
    async with open_app() as served:
        call = await served.client.ask(method, path)
        assert (call.status, call.error["code"]) == (400, "invalid_request")
        assert problem in call.error["message"]
        assert call.error["param"] in path


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/up/m", "/health", "/ready"])
async def test_query_parameters_that_clients_append(open_app: OpenApp, path: str) -> None:
    """The models and the probes are answered whatever a client appends to every URL."""
    async with open_app() as served:
        assert (await served.client.ask("GET", f"{path}?api-version=2026-01-01&x")).status == 200


def test_the_table_of_query_parameters() -> None:
    """Each view in it exists."""
    app = control_plane.create_control_plane()
    assert control_plane.PARAMETERS.keys() <= app.view_functions.keys()


# -- readiness --------------------------------------------------------------------------------------------------------


async def test_ready_while_one_upstream_can_serve(open_app: OpenApp) -> None:
    """One upstream that is down does not make the gateway unready. When all are down it is unready, and each states
    why."""
    config = make_config({"a": {}, "b": {}})
    async with open_app(config, {"a": Provider((Refuse(),)), "b": Provider((Refuse(),), says("x"))}) as served:
        assert (await served.client.ask("GET", "/ready")).json == {"status": "ready", "reasons": []}
        await served.client.chat(model="a/m").wait()
        assert (await served.client.ask("GET", "/ready")).status == 200
        await served.client.chat(model="b/m").wait()
        call = await served.client.ask("GET", "/ready")
        assert (call.status, len(call.json["reasons"])) == (503, 2)
        assert "The upstream a cannot be reached" in call.json["reasons"][0]
        assert (await served.client.chat(model="b/m").wait()).status == 200
        assert (await served.client.ask("GET", "/ready")).status == 200


async def test_readiness_recovers_after_a_failure(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After one failure of the only upstream, whose models are configured, ``default`` and readiness recover although
    no call names the upstream."""
    async with open_app(providers=Provider((Refuse(),), says("x"))) as served:
        assert (await served.client.chat(model="default").wait()).status == 502
        await trio.sleep(300)
        assert (await served.client.chat(model="default").wait()).status == 200
        assert (await served.client.ask("GET", "/ready")).status == 200


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"{}", b"", b"\xff", b'{"data":[5]}', b'{"data":null}', b"<html>"],
    ids=lambda b: repr(b)[:20],
)
async def test_a_bad_model_list_is_harmless(open_app: OpenApp, autojump_clock: MockClock, body: bytes) -> None:
    """Whatever an upstream answers to ``GET /models``, the gateway serves and reports what is wrong with that
    upstream."""
    config = make_config({"bad": {"models": "discover"}, "good": {}})
    async with open_app(config, {"bad": Provider(answers(body)), "good": Provider(says("x"))}) as served:
        await trio.sleep(200)
        assert (await served.client.chat(model="default").wait()).status == 200
        rows = (await served.client.ask("GET", "/v1/models")).json["data"]
        assert [row["id"] for row in rows] == ["default", "good/m", "m"]
        assert (await served.client.ask("GET", "/status")).json["upstreams"][0]["state"] in ("unknown", "up")


async def test_not_ready_without_any_upstream(open_app: OpenApp) -> None:
    """When nothing is configured or everything is disabled, the answer says which."""
    async with open_app(make_config({}), {}) as served:
        call = await served.client.ask("GET", "/ready")
        assert (call.status, call.json["reasons"]) == (503, ["no upstream is configured"])
    async with open_app(make_config({"off": {"api_key": {"env": "NOT_SET"}}}), {"off": Provider()}) as served:
        call = await served.client.ask("GET", "/ready")
        assert call.status == 503
        assert "NOT_SET" in call.json["reasons"][0]
        refused = await served.client.chat(model="off/m").wait()
        assert refused.status == 503
        assert "NOT_SET" in refused.error["message"]
        refused = await served.client.ask("GET", "/v1/models/off/m")
        assert (refused.status, refused.error["code"]) == (404, "model_not_found")
        assert "NOT_SET" in refused.error["message"]


# -- model discovery --------------------------------------------------------------------------------------------------

DISCOVER = make_config({"up": {"models": "discover"}})


def model_list(*models: str) -> tuple[Head | Say, ...]:
    """The answer of an upstream to ``GET /models``."""
    data = [{"id": model, "object": "model"} for model in models]
    return (Head(200, "application/json"), Say(event({"object": "list", "data": data}).removeprefix(b"data: ").strip()))


async def test_an_upstream_is_asked_for_its_models(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The gateway asks at the start and every minute. The new list replaces the old one."""
    async with open_app(DISCOVER, Provider(model_list("one"), model_list("one", "two"))) as served:
        ids = [row["id"] for row in (await served.client.ask("GET", "/v1/models")).json["data"]]
        assert ids == ["default", "up/one", "one"]
        assert served.providers["up"].calls[0].path == "/v1/models"
        await trio.sleep(61)
        ids = [row["id"] for row in (await served.client.ask("GET", "/v1/models")).json["data"]]
        assert ids == ["default", "up/one", "up/two", "one", "two"]


async def test_an_upstream_that_is_down_keeps_its_list(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """``GET /v1/models`` calls no upstream. The last known list stays until there is a new one."""
    async with open_app(DISCOVER, Provider(model_list("one"), (Stall(),))) as served:
        await trio.sleep(75)
        begun = trio.current_time()
        rows = (await served.client.ask("GET", "/v1/models")).json["data"]
        assert trio.current_time() == begun
        assert [row["id"] for row in rows] == ["default", "up/one", "one"]
        [upstream] = (await served.client.ask("GET", "/status")).json["upstreams"]
        assert upstream["state"] == "down"
        assert "10 s" in upstream["reason"]


async def test_the_start_does_not_wait_for_a_slow_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The start waits a moment at most for upstreams that do not answer."""
    begun = trio.current_time()
    async with open_app(DISCOVER, Provider((Stall(),))) as served:
        assert trio.current_time() - begun < 1
        assert (await served.client.ask("GET", "/v1/models")).status == 200


# -- status -----------------------------------------------------------------------------------------------------------


async def test_status_of_an_idle_gateway(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The contract: version, uptime twice, workers, channels, sessions, the store, upstreams, streams and totals."""
    async with open_app() as served:
        await trio.sleep(3_661)
        status = (await served.client.ask("GET", "/status")).json
        assert status["status"] == "ok"
        assert status["version"] == trigate.__version__
        assert status["uptime_s"] == pytest.approx(3_661, abs=1)
        assert re.fullmatch(r"1:01:0[12]", status["uptime"])
        assert status["channels"] == []
        assert status["sessions"] == {"active": 0, "total": 0, "busy": 0}
        assert status["outbox"] == {"depth": 0}
        assert status["store"] == {"kind": "memory", "path": ":memory:", "state": "open", "error": None}
        [worker] = status["workers"]
        assert (worker["pid"], worker["status"], worker["live"]) == (os.getpid(), "ok", 0)
        assert status["streams"] == {"live": 0, "by_phase": {}, "by_upstream": {}, "oldest": []}
        assert status["config"] == "test"
        assert status["reload_error"] is None
        assert [upstream["name"] for upstream in status["upstreams"]] == ["up"]
        assert set(status["upstreams"][0]) >= {"state", "reason", "in_flight", "queued", "last_error", "last_error_at"}


async def test_status_shows_what_is_in_flight(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each live exchange has its phase, age, events and bytes, and none of its content."""
    config = make_config({"up": {"max_connections": 2}})
    scripts = ((Say(content("SECRET")), Say(content("b")), Stall()), (Stall(),))
    async with open_app(config, Provider(*scripts)) as served:
        first = served.client.start("POST", "/v1/chat/completions", chat(), headers={"x-request-id": "id-1"})
        await first.wait_for(b'"b"')
        await trio.sleep(5)
        served.client.chat(stream=False)
        await wait_all_tasks_blocked()
        served.client.chat()
        await wait_all_tasks_blocked()
        call = await served.client.ask("GET", "/status")
        streams = call.json["streams"]["oldest"]
        assert call.json["streams"]["by_phase"] == {"streaming": 1, "connecting": 1, "queued": 1}
        assert [stream["phase"] for stream in streams] == ["streaming", "connecting", "queued"]
        assert streams[0] == {
            "id": "id-1",
            "model": "up/m",
            "upstream": "up/m",
            "stream": True,
            "phase": "streaming",
            "age_s": pytest.approx(5, abs=0.1),
            "events": 2,
            "bytes": len(first.body),
            "worker": served.gateway.workers.id,
        }
        [upstream] = call.json["upstreams"]
        assert (upstream["in_flight"], upstream["queued"], upstream["max_connections"]) == (2, 1, 2)
        assert b"SECRET" not in call.body


async def test_status_counts_and_remembers_the_last_error(open_app: OpenApp) -> None:
    """Totals by outcome, tokens, and the last error of each upstream."""
    scripts = (says("x"), answers(b'{"error":{"message":"boom"}}', status=500), (Stall(),))
    async with open_app(providers=Provider(*scripts)) as served:
        await served.client.chat().wait()
        await served.client.chat().wait()
        cancel_queue = served.client.chat()
        await wait_all_tasks_blocked()
        cancel_queue.disconnect()
        await cancel_queue.wait()
        status = (await served.client.ask("GET", "/status")).json
        totals = status["totals"]
        assert (totals["exchanges"], totals["complete"], totals["failed"], totals["cancelled"]) == (3, 1, 1, 1)
        [upstream] = status["upstreams"]
        assert "boom" in upstream["last_error"]
        assert re.match(r"\d{4}-\d\d-\d\dT", upstream["last_error_at"])


async def test_status_shows_the_cost(open_app: OpenApp) -> None:
    """What all calls have cost, how many have no known cost, and for which targets there is no price."""
    config = make_config({"up": {"models": ["m", "n"]}}, prices={"m": {"input_usd": 1}})
    async with open_app(config, Provider(answers(completion("Hi")), answers(completion("Hi")))) as served:
        for model in ("up/m", "up/n"):
            await served.client.chat(stream=False, model=model).wait()
        status = (await served.client.ask("GET", "/status")).json
        assert (status["totals"]["cost_microusd"], status["totals"]["unpriced"]) == (3, 1)
        assert status["prices"]["source"].startswith("genai-prices ")
        assert status["prices"]["unknown"] == ["up/n"]


async def test_status_shows_what_the_cache_saves(open_app: OpenApp) -> None:
    """The tokens of the prompts of each target, and how many came from its cache: of a stream, of an answer, and of one
    that another target had to give."""
    counts = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}
    answer = msgspec.json.encode({**msgspec.json.decode(completion("x")), "usage": counts})
    stream = (Say(content("x")), Say(FINISH), Say(event({"choices": [], "usage": {**counts, "prompt_tokens": 28}})))
    config = make_config({"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}})
    providers = {"a": Provider((*stream, Say(DONE)), answers(b"{}", status=500)), "b": Provider(answers(answer))}
    async with open_app(config, providers) as served:
        await served.client.chat(model="both").wait()
        await served.client.chat(model="both", stream=False).wait()
        targets = (await served.client.ask("GET", "/status")).json["targets"]
        counted = [(each["target"], each["prompt_tokens"], each["cached_tokens"]) for each in targets]
        assert counted == [("a/m", 28, 28), ("b/m", 100, 64)]
