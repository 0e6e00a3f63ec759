"""Requests that are passed through: where they go, whose objects are shown, and what a failure does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import OpenApp, make_config
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Refuse,
    Say,
    SlowConnect,
    Stall,
    answers,
    chunk,
    completion,
    event,
    says,
)

TWO = {"a": {"models": ["m", "whisper"], "responses": "native"}, "b": {"models": ["n"], "responses": "native"}}
KEYED = make_config(TWO, keys={"one": "key-number-one", "two": "key-number-two"})
ONE = {"authorization": "Bearer key-number-one"}
OTHER = {"authorization": "Bearer key-number-two"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


def made(object_id: str, **fields: Any) -> Any:
    """An answer with an object."""
    return answers(msgspec.json.encode({"id": object_id, **fields}))


def form(*parts: tuple[str, str], file: bytes = b"RIFF", file_first: bool = False) -> bytes:
    """A form with a file."""
    texts = [
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v.encode()) for n, v in parts
    ]
    last = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n' % file
    return b"".join([last, *texts] if file_first else [*texts, last]) + b"--b--\r\n"


def providers() -> dict[str, Provider]:
    """The providers of `TWO`."""
    return {"a": Provider(), "b": Provider()}


def seen(provider: Provider) -> list[tuple[str, str]]:
    """The method and path of each request that reached a provider."""
    return [(call.method, call.path) for call in provider.calls]


# -- where requests go ------------------------------------------------------------------------------------------------


async def test_an_object_is_found_at_its_upstream(open_app: OpenApp) -> None:
    """What an upstream has made is looked for there, by whatever names it: a path, or a body."""
    there = providers()
    async with open_app(make_config(TWO), there) as served:
        ask = served.client.ask
        there["b"].play(made("file-1"))
        assert (await ask("POST", "/v1/files", form(), headers={**FORM, "x-trigate-upstream": "b"})).status == 200
        there["b"].play(made("batch_1", output_file_id="file-2"), made("file-1"), made("file-2"), answers(b"{}\n{}"))
        assert (await ask("POST", "/v1/batches", {"input_file_id": "file-1"})).status == 200
        assert (await ask("GET", "/v1/files/file-1")).json["id"] == "file-1"
        assert (await ask("GET", "/v1/files/file-2?x=1")).json["id"] == "file-2"
        assert (await ask("GET", "/v1/files/file-2/content")).body == b"{}\n{}"
        assert seen(there["b"])[1:] == [
            ("POST", "/v1/batches"),
            ("GET", "/v1/files/file-1"),
            ("GET", "/v1/files/file-2"),
            ("GET", "/v1/files/file-2/content"),
        ]
        assert there["a"].calls == []
        served.assert_clean()


async def test_a_request_without_an_object_goes_to_the_first_upstream(open_app: OpenApp) -> None:
    """In the order of the configuration; the header names another one. An unknown id goes there, too, without keys."""
    there = providers()
    async with open_app(make_config(TWO), there) as served:
        for upstream in there.values():
            upstream.play(made("vs_1"))
        assert (await served.client.ask("POST", "/v1/vector_stores", {})).header("x-trigate-upstream") == "a"
        path = "/v1/vector_stores/vs_9/files/x/content"
        got = await served.client.ask("GET", path, headers={"x-trigate-upstream": "b"})
        assert got.header("x-trigate-upstream") == "b"
        assert seen(there["b"]) == [("GET", path)]


async def test_a_model_chooses_the_upstream(open_app: OpenApp) -> None:
    """In JSON, in a form and in a query; the upstream gets its own id, the client its own back."""
    there = providers()
    models = {"hear": {"targets": ["a/whisper"]}, "rank": {"targets": ["b/n"]}}
    async with open_app(make_config(TWO, models=models), there) as served:
        there["a"].play(answers(b'{"text":"hi","usage":{"type":"tokens","input_tokens":9,"output_tokens":2}}'))
        there["b"].play(answers(b'{"model":"n","results":[]}'))
        got = await served.client.ask("POST", "/v1/audio/transcriptions", form(("model", "hear")), headers=FORM)
        assert (got.status, got.json["text"]) == (200, "hi")
        assert there["a"].calls[0].body == form(("model", "whisper"))
        assert there["a"].calls[0].headers["content-length"] == str(len(form(("model", "whisper"))))
        got = await served.client.ask("POST", "/v1/rerank", {"model": "rank", "query": "q", "documents": ["d"]})
        assert (got.json["model"], there["b"].calls[0].json["model"]) == ("rank", "n")
        await served.client.ask("GET", "/v1/chat/completions?model=rank&limit=2")
        assert there["b"].calls[1].path == "/v1/chat/completions"
        record = served.settled[0].record
        assert (record.endpoint, record.model, record.target) == ("/audio/transcriptions", "hear", "a/whisper")
        assert (record.prompt_tokens, record.completion_tokens, record.counted) == (9, 2, False)
        assert served.settled[1].record.prompt_tokens is None  # nothing is estimated


@pytest.mark.parametrize("split", [False, True])
async def test_a_model_behind_the_file(open_app: OpenApp, split: bool) -> None:
    """The form is kept until the model has come, and goes on whole; also byte by byte, in chunks."""
    there = providers()
    async with open_app(make_config(TWO), there) as served:
        there["a"].play(answers(b'{"text":"hi"}'))
        body = form(("model", "a/whisper"), ("stream", "false"), file_first=True)
        raw = [body[at : at + 1] for at in range(len(body))] if split else [body]
        got = await served.client.ask("POST", "/v1/audio/transcriptions", headers=FORM, raw=raw)
        assert got.json == {"text": "hi"}
        assert there["a"].calls[0].body == body.replace(b"a/whisper", b"whisper")
        served.assert_clean()
        assert served.client.app._bodies.held_bytes == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/v1/audio/transcriptions", form(), FORM, 400, "must provide a model"),
        ("POST", "/v1/audio/transcriptions", form(("model", "nope")), FORM, 404, "'nope' does not exist"),
        ("POST", "/v1/audio/transcriptions", b"x", {"content-type": "audio/wav"}, 415, "multipart/form-data"),
        ("POST", "/v1/audio/transcriptions", b"x" * 20_000, FORM, 400, "does not begin with the boundary"),
        ("POST", "/v1/files", form(), {"content-type": "multipart/form-data", "x-trigate-upstream": "c"}, 404, "'c'"),
        ("POST", "/v1/batches", b"[]", {"content-type": "application/json"}, 400, "not a JSON object"),
        ("POST", "/v1/rerank", {"model": ["m"]}, {}, 400, "model must be a string"),
        ("POST", "/v1/rerank", {"model": "b/n"}, {"x-trigate-upstream": "a"}, 404, "not one of the upstream a"),
        ("PATCH", "/v1/files/file-1", b"", {}, 405, "allowed: GET, DELETE"),
        ("GET", "/v1/files/../models", b"", {}, 404, "There is nothing"),
        ("GET", "/v1/organization/users", b"", {}, 404, "belongs to an account at a provider"),
        ("POST", "/v1/threads", {}, {}, 404, "belongs to an account at a provider"),
        ("POST", "/v1/evals/e/runs", {}, {}, 404, "belongs to an account at a provider"),
        ("GET", "/v1/fine_tuning/jobs", b"", {}, 404, "belongs to an account at a provider"),
    ],
)
async def test_refusals(
    open_app: OpenApp, method: str, path: str, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    """A request that cannot be passed through gets an error that says why, and no upstream sees it."""
    there = providers()
    async with open_app(make_config(TWO), there) as served:
        got = await served.client.ask(method, path, body, headers=headers)
        assert (got.status, message in got.error["message"]) == (status, True), got.body
        assert there["a"].calls == there["b"].calls == []
        served.assert_clean()


async def test_endpoints_of_an_upstream(open_app: OpenApp) -> None:
    """``endpoints`` narrows what an upstream serves, calls included; what no upstream has is a 404 that says so."""
    there = providers()
    two = {
        "a": {"models": ["m"], "endpoints": ["/chat/completions"]},
        "b": {"models": ["n"], "endpoints": ["files", "/v1/embeddings"]},
    }
    models = {"both": {"targets": ["a/m", "b/n"]}}
    async with open_app(make_config(two, models=models), there) as served:
        ask = served.client.ask
        there["b"].play(made("file-1"), answers(b'{"data":[{"embedding":[1]}]}'))
        assert (await ask("GET", "/v1/files/file-1")).header("x-trigate-upstream") == "b"
        for path, body in (("/v1/batches", {}), ("/v1/rerank", {"model": "b/n"}), ("/v1/moderations", {"input": "x"})):
            got = await ask("POST", path, body)
            assert (got.status, got.error["message"]) == (404, f"No upstream serves {path}.")
        got = await ask("POST", "/v1/files", form(), headers={**FORM, "x-trigate-upstream": "a"})
        assert got.error["message"] == "The upstream a does not serve /v1/files."
        for model in ("both", "default"):
            got = await ask("POST", "/v1/embeddings", {"model": model, "input": "x"})
            assert got.header("x-trigate-upstream") == "b"
        got = await ask("POST", "/v1/embeddings", {"model": "a/m", "input": "x"})
        assert got.error["message"] == "No upstream of the model 'a/m' serves /v1/embeddings."


@pytest.mark.parametrize("kind", ["echo", "anthropic"])
async def test_upstreams_without_these_paths(open_app: OpenApp, kind: str) -> None:
    """An upstream that has not OpenAI's API gets none of these requests."""
    own = {"kind": kind} | ({"base_url": "http://up.invalid/v1", "models": ["m"]} if kind == "anthropic" else {})
    async with open_app(make_config({"up": own})) as served:
        got = await served.client.ask("GET", "/v1/files")
        assert (got.status, got.error["message"]) == (404, "No upstream serves /v1/files.")


# -- whose objects are shown ------------------------------------------------------------------------------------------


async def test_an_object_of_another_key_does_not_exist(open_app: OpenApp) -> None:
    """Not by its path, not in a body, however it is written there, and not in a list."""
    there = providers()
    async with open_app(KEYED, there) as served:
        ask = served.client.ask
        for headers, object_id in ((ONE, "file-1"), (OTHER, "file-2")):
            there["a"].play(made(object_id))
            assert (await ask("POST", "/v1/files", form(), headers={**FORM, **headers})).status == 200
        calls = there["a"].opened
        missing = "There is no object 'file-1' here."
        for method, path in (
            ("GET", "/v1/files/file-1"),
            ("GET", "/v1/files/file-1/content"),
            ("DELETE", "/v1/files/file-1"),
        ):
            got = await ask(method, path, headers={**OTHER, "x-trigate-upstream": "a"})
            assert (got.status, got.error["message"]) == (404, missing)
        for body in (b'{"input_file_id":"file\\u002d1"}', b'{"a":[{"file-2":["file-2","file-1"]}]}'):
            got = await ask("POST", "/v1/batches", body, headers={**OTHER, "content-type": "application/json"})
            assert (got.status, got.error["message"]) == (404, missing)
        got = await ask("GET", "/v1/files/file-unknown", headers=ONE)
        assert (got.status, got.error["message"]) == (404, "There is no object 'file-unknown' here.")
        assert there["a"].opened == calls
        rows = b'{"object":"list","data":[{"id":"file-1","n":1.50},{"id":"file-2"},{"id":"file-3"}],"has_more":true}'
        there["a"].play(answers(rows))
        got = await ask("GET", "/v1/files", headers=ONE)
        assert got.body == b'{"object":"list","data":[{"id":"file-1","n":1.50}],"has_more":true}'
        for script in (answers(b'{"object":"list"}'), says("no list"), answers(b'[{"id":"file-2"}]')):
            there["a"].play(script)
            assert (await ask("GET", "/v1/files", headers=ONE)).json["error"]["code"] == "upstream_garbled"
        assert there["b"].calls == []


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("path", "object_id", "asked"),
    [
        ("/v1/responses", "resp_1", {"input": "x"}),
        ("/v1/chat/completions", "chatcmpl-1", {"messages": [{"role": "user", "content": "x"}], "store": True}),
    ],
)
async def test_an_answer_that_its_upstream_keeps(
    open_app: OpenApp, path: str, object_id: str, asked: dict[str, Any], is_stream: bool
) -> None:
    """It belongs to the key of the call, which can ask for it, and go on from it at the same upstream only."""
    there = providers()
    both = {"m": {"targets": ["a/m", "b/n"]}}
    if path == "/v1/responses":
        answer = {"id": object_id, "output": [{}]}
        events = event({"type": "response.created", "response": {"id": object_id}}) + event(
            {"type": "response.completed", "response": answer}
        )
    else:
        answer = msgspec.json.decode(completion("hi")) | {"id": object_id}
        events = chunk({"content": "hi"}) + DONE
    keyed = make_config(TWO, models=both, keys={"one": "key-number-one", "two": "key-number-two"})
    async with open_app(keyed, there) as served:
        ask = served.client.ask
        there["b"].play((Head(), Say(events)) if is_stream else answers(msgspec.json.encode(answer)))
        got = await ask("POST", path, {**asked, "model": "b/n", "stream": is_stream}, headers=ONE)
        assert got.status == 200, got.body
        there["b"].play(answers(msgspec.json.encode(answer)))
        assert (await ask("GET", f"{path}/{object_id}", headers=ONE)).json["id"] == object_id
        assert (await ask("GET", f"{path}/{object_id}", headers=OTHER)).status == 404
        if path == "/v1/responses":
            following = {"input": "y", "model": "m", "previous_response_id": object_id}
            got = await ask("POST", path, following, headers=ONE)
            assert got.header("x-trigate-upstream") == "b"
            got = await ask("POST", path, following, headers=OTHER)
            assert (got.status, got.error["message"]) == (404, "There is no object 'resp_1' here.")
            got = await ask("POST", path, {**following, "model": "a/m"}, headers=ONE)
            assert (got.status, got.error["param"]) == (400, "model")
        served.assert_clean()


async def test_an_answer_that_the_gateway_makes(open_app: OpenApp) -> None:
    """A response that was translated is not kept by its upstream, so nothing says that it is there."""
    config = make_config({"up": {"models": ["m"], "responses": "translate"}}, keys={"one": "key-number-one"})
    async with open_app(config, Provider(answers(completion("hi")))) as served:
        got = await served.client.ask("POST", "/v1/responses", {"model": "up/m", "input": "x"}, headers=ONE)
        assert got.status == 200
        assert await served.gateway.store.objects.find([got.json["id"]]) == []


@pytest.mark.parametrize("name", ["file_id", "file\\u005fid"])
async def test_a_call_with_a_file_of_another_key(open_app: OpenApp, name: str) -> None:
    """It does not exist for a call either."""
    there = providers()
    async with open_app(KEYED, there) as served:
        there["a"].play(made("file-1"))
        await served.client.ask("POST", "/v1/files", form(), headers={**FORM, **ONE})
        part = f'{{"type":"file","file":{{"{name}":"file-1"}}}}'
        body = f'{{"model":"a/m","messages":[{{"role":"user","content":[{part}]}}]}}'.encode()
        there["a"].play(answers(completion("hi")))
        for headers, status in ((ONE, 200), (OTHER, 404)):
            headers = {**headers, "content-type": "application/json"}
            assert (await served.client.ask("POST", "/v1/chat/completions", body, headers=headers)).status == status


async def test_a_deleted_object_is_forgotten(open_app: OpenApp) -> None:
    """Once its upstream has deleted it."""
    there = providers()
    async with open_app(KEYED, there) as served:
        there["a"].play(made("vs_1"), answers(b'{"error":{"message":"no"}}', status=409), made("vs_1", deleted=True))
        assert (await served.client.ask("POST", "/v1/vector_stores", {}, headers=ONE)).status == 200
        assert (await served.client.ask("DELETE", "/v1/vector_stores/vs_1", headers=ONE)).status == 409
        assert (await served.client.ask("DELETE", "/v1/vector_stores/vs_1", headers=ONE)).json["deleted"] is True
        assert (await served.client.ask("DELETE", "/v1/vector_stores/vs_1", headers=ONE)).status == 404
        assert there["a"].opened == 3


async def test_a_key_in_the_query_stays_here(open_app: OpenApp) -> None:
    """Where Google's clients put it, it is the gateway's, and no upstream's."""
    there = providers()
    async with open_app(KEYED, there) as served:
        there["a"].play(answers(b'{"object":"list","data":[]}'))
        for name in ("key", "%6bey"):
            got = await served.client.ask("GET", f"/v1/files?limit=2&{name}=key-number-one", headers=ONE)
            assert got.status == 200
        assert [call.target for call in there["a"].calls] == ["/v1/files?limit=2", "/v1/files?limit=2"]


async def test_without_a_key_nothing_is_told(open_app: OpenApp) -> None:
    """Whether a path or an object exists is not said to a client without a key."""
    async with open_app(KEYED, providers()) as served:
        for path in ("/v1/files", "/v1/files/file-1", "/v1/organization/users"):
            assert (await served.client.ask("GET", path)).status == 401


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_a_request_that_was_not_sent_goes_to_the_next_upstream(open_app: OpenApp) -> None:
    """If no connection could be made. Once sent, nothing is repeated, and a list is of the first upstream alone."""
    there = providers()
    there["a"].play(answers(b"{}", status=500), (Break(),), (Refuse(),))
    there["b"].play(made("vs_1"))
    async with open_app(make_config(TWO), there) as served:
        for _ in range(2):
            got = await served.client.ask("POST", "/v1/vector_stores", {})
            assert (got.status, got.header("x-trigate-attempts")) == (502, "1")
        got = await served.client.ask("POST", "/v1/vector_stores", {})
        assert (got.status, got.header("x-trigate-attempts")) == (200, "2")
        assert (await served.client.ask("POST", "/v1/vector_stores", {})).header("x-trigate-attempts") == "1"
        assert (await served.client.ask("GET", "/v1/vector_stores")).status == 502
        served.assert_clean()


async def test_an_answer_that_breaks_off(open_app: OpenApp) -> None:
    """Bytes that are not complete do not look complete: the connection ends without its end."""
    there = providers()
    there["a"].play((Head(200, "application/octet-stream"), Say(b"half"), Break("rst")))
    async with open_app(make_config(TWO), there) as served:
        got = await served.client.ask("GET", "/v1/files/file-1/content")
        assert (got.status, got.body, got.ended) == (200, b"half", False)
        assert served.settled[0].outcome == "upstream_truncated"
        served.assert_clean()


async def test_transcriptions_as_events(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A stream is relayed in whole events, with keep-alive comments, and needs its last event to be complete."""
    there = providers()
    delta = event({"type": "transcript.text.delta", "delta": "hi"})
    done = event({"type": "transcript.text.done", "text": "hi"})
    there["a"].play((Head(), Say(delta), Pause(20.0), Say(done)), (Head(), Say(delta)))
    body = form(("model", "a/whisper"), ("stream", "true"))
    async with open_app(make_config(TWO), there) as served:
        got = await served.client.ask("POST", "/v1/audio/transcriptions", body, headers=FORM)
        assert got.header("content-type").startswith("text/event-stream")
        assert got.body == delta + b": keep-alive\n\n" + done
        got = await served.client.ask("POST", "/v1/audio/transcriptions", body, headers=FORM)
        assert got.error["code"] == "upstream_truncated"
        served.assert_clean()


async def test_a_response_as_events(open_app: OpenApp) -> None:
    """``stream=true`` in the query is a stream on the one path that has one."""
    there = providers()
    events = event({"type": "response.created", "response": {"id": "resp_1"}}) + event(
        {"type": "response.completed", "response": {"id": "resp_1", "output": []}}
    )
    there["a"].play((Head(), Say(events)), (Head(), Say(events[:50]), Break()), made("file-1"))
    async with open_app(make_config(TWO), there) as served:
        got = await served.client.ask("GET", "/v1/responses/resp_1?stream=true")
        assert got.body == events
        got = await served.client.ask("GET", "/v1/responses/resp_1?stream=true")
        assert got.status == 502
        assert (await served.client.ask("GET", "/v1/files/file-1?stream=true")).json == {"id": "file-1"}
        assert [exchange.call.stream for exchange in served.settled] == [True, True, False]


async def test_a_client_that_leaves_in_mid_upload(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The upload ends, the slot is free, and the record says that it was cancelled."""
    async with open_app(make_config(TWO), providers()) as served:
        call = served.client.start("POST", "/v1/files", headers=FORM, raw=[form()[:60], Stall()])
        await trio.sleep(1)
        assert served.gateway.generations.current.upstreams["a"].in_flight == 1
        call.disconnect()
        await call.wait()
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()


async def test_a_client_that_stops_sending(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It has as long as for any body; then it gets a 408, and the upstream is not blamed."""
    async with open_app(make_config(TWO), providers()) as served:
        for path in ("/v1/files", "/v1/audio/transcriptions"):
            got = await served.client.ask("POST", path, headers=FORM, raw=[form()[:60], Stall()])
            assert (got.status, got.error["code"]) == (408, "body_timeout")
        served.assert_clean()


async def test_one_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """``x-request-timeout`` covers the upload, the wait and the answer."""
    there = providers()
    there["a"].play((SlowConnect(2.0), Pause(100.0)))
    async with open_app(make_config(TWO), there) as served:
        began_at = trio.current_time()
        got = await served.client.ask("POST", "/v1/vector_stores", {}, headers={"x-request-timeout": "5"})
        assert (got.status, got.error["code"], trio.current_time() - began_at) == (504, "upstream_timeout", 5.0)
        served.assert_clean()


async def test_limits_hold(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The rate of a key, and the queue for an admission slot, are those of calls."""
    there = providers()
    there["a"].play((Stall(),))
    limits = {"key_rate_per_s": 1, "key_burst": 2, "max_exchanges": 1, "max_queued": 0}
    async with open_app(make_config(TWO, limits=limits), there) as served:
        served.client.start("GET", "/v1/files")
        await trio.sleep(0.1)
        assert (await served.client.ask("GET", "/v1/files")).status == 503
        assert (await served.client.ask("GET", "/v1/files")).status == 429
