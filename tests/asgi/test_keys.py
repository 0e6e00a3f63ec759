"""Keys over HTTP: ``/v1/keys``, what a key may use, and what becomes of its calls when it is revoked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import DONE, Pause, Provider, Say, Stall, chunk, content

ADMIN = "the-key-of-the-admin"
CONFIG = make_config(
    {"up": {"models": ["m", "other"]}, "far": {"models": ["x"]}},
    admin={"key": ADMIN},
    keys={"ada": "a-key-of-ada"},
    models={"fast": {"targets": ["up/m"]}, "both": {"targets": ["up/m", "far/x"]}},
    hooks={"ci": {"model": "up/m", "session": "none"}, "deploy": {"model": "up/m", "session": "none"}},
)
ANSWER = (Say(content("Hello")), Say(chunk({}, finish_reason="stop")), Say(DONE))
HI = [{"role": "user", "content": "Hi"}]


def providers() -> dict[str, Provider]:
    """Two that answer."""
    return {"up": Provider(*[ANSWER] * 9), "far": Provider(*[ANSWER] * 9)}


async def ask(served: Served, method: str, path: str, body: object = None, *, key: str = ADMIN) -> ClientCall:
    """Makes a request, by default with the admin's key."""
    headers = {"authorization": f"Bearer {key}"}
    return await served.client.start(method, path, body, headers=headers).wait()


def call(served: Served, key: str, model: str = "up/m", **headers: str) -> ClientCall:
    """Starts a streamed call."""
    body = {"model": model, "messages": HI, "stream": True}
    return served.client.start(
        "POST", "/v1/chat/completions", body, headers={"authorization": f"Bearer {key}", **headers}
    )


async def make(served: Served, name: str = "eve", **settings: Any) -> str:
    """Makes a key; returns its secret."""
    made = await ask(served, "POST", "/v1/keys", {"name": name, **settings})
    assert made.status == 200, made.body
    return str(made.json["secret"])


async def test_a_key_from_its_making_to_its_end(open_app: OpenApp) -> None:
    """It is made, shown without its secret, changed, rotated and revoked; each step holds at once."""
    async with open_app(CONFIG, providers()) as served:
        made = await ask(served, "POST", "/v1/keys", {"name": "eve", "rpm": 5, "metadata": {"team": "x"}})
        secret = made.json["secret"]
        assert made.header("cache-control") == "no-store"
        shown = (await ask(served, "GET", "/v1/keys/eve")).json
        assert {**shown, "secret": secret} == made.json
        assert shown["settings"] == {"rpm": 5, "metadata": {"team": "x"}}
        assert secret.startswith(shown["secret_begins_with"])
        assert (await call(served, secret).wait()).status == 200
        changed = await ask(served, "PATCH", f"/v1/keys/{shown['id']}", {"rpm": None, "tags": ["a"]})
        assert changed.json["settings"] == {"metadata": {"team": "x"}, "tags": ["a"]}
        rotated = await ask(served, "POST", "/v1/keys/eve/rotate", {"overlap_s": 60})
        assert [(await call(served, each).wait()).status for each in (secret, rotated.json["secret"])] == [200, 200]
        revoked = await ask(served, "DELETE", "/v1/keys/eve")
        assert revoked.json["revoked_at"] is not None
        assert [(await call(served, each).wait()).status for each in (secret, rotated.json["secret"])] == [401, 401]
        listed = (await ask(served, "GET", "/v1/keys?limit=1")).json
        assert [row["name"] for row in listed["data"]] == ["eve"]
        assert listed["has_more"] is False
        assert "digest" not in str(listed)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/keys", {"name": 5}, 400),
        ("POST", "/v1/keys", [], 400),
        ("POST", "/v1/keys", {"name": "ada"}, 400),
        ("GET", "/v1/keys?limit=0", None, 400),
        ("GET", "/v1/keys/nobody", None, 404),
        ("PATCH", "/v1/keys/nobody", {}, 404),
        ("DELETE", "/v1/keys/nobody", None, 404),
        ("POST", "/v1/keys/nobody/rotate", {"overlap": 1}, 400),
        ("POST", "/v1/keys/nobody/rotate", {"overlap_s": True}, 400),
    ],
)
async def test_requests_that_are_refused(method: str, path: str, body: object, status: int, open_app: OpenApp) -> None:
    """A value that is invalid and a key that does not exist are told apart."""
    async with open_app(CONFIG, providers()) as served:
        assert (await ask(served, method, path, body)).status == status


async def test_only_the_admin_administers(open_app: OpenApp) -> None:
    """Any other key gets 403, as does everybody at a gateway without an admin's key."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served)
        for key in ("a-key-of-ada", secret):
            for method, path in (("GET", "/v1/keys"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/eve")):
                refused = await ask(served, method, path, {"name": "x"} if method == "POST" else None, key=key)
                assert (refused.status, refused.error["code"]) == (403, "admin_required")
    async with open_app() as served:
        refused = await ask(served, "GET", "/v1/keys")
        assert (refused.status, refused.error["code"]) == (403, "admin_required")


async def test_models_of_a_key(open_app: OpenApp) -> None:
    """A key calls the models on its list only, by whichever id, and sees no others."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served, models=["up/m"])
        for model, status in {"up/m": 200, "m": 200, "fast": 200, "both": 403, "up/other": 403, "far/x": 403}.items():
            answer = await call(served, secret, model).wait()
            assert answer.status == status, (model, answer.body)
            if status == 403:
                assert (answer.error["code"], answer.error["type"]) == ("model_not_allowed", "permission_error")
        listed = [row["id"] for row in (await ask(served, "GET", "/v1/models", key=secret)).json["data"]]
        assert {"up/m", "fast"} <= set(listed) <= {"up/m", "m", "fast", "default"}
        tags = (await ask(served, "GET", "/api/tags", key=secret)).json["models"]
        assert {row["name"].removesuffix(":latest") for row in tags} == set(listed)
        for path in ("/v1/models/far/x", "/v1/models/both"):
            assert (await ask(served, "GET", path, key=secret)).status == 404
        assert (await ask(served, "POST", "/api/show", {"model": "far/x"}, key=secret)).status == 404
        assert len((await ask(served, "GET", "/v1/models")).json["data"]) > len(listed)
        files = await ask(served, "GET", "/v1/files", key=secret)  # a batch could have any model
        assert files.status in (400, 403)


async def test_hooks_of_a_key(open_app: OpenApp) -> None:
    """A key calls the webhooks on its list only, and reads their runs only."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served, hooks=["ci"])
        assert (await ask(served, "POST", "/hooks/ci", {"text": "Hi"}, key=secret)).status == 200
        refused = await ask(served, "POST", "/hooks/deploy", {"text": "Hi"}, key=secret)
        assert (refused.status, refused.error["code"]) == (403, "hook_not_allowed")
        assert (await ask(served, "GET", "/hooks/deploy/runs/run_1", key=secret)).status == 403


async def test_a_stream_of_a_revoked_key(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It ends with an error event that says so, and no other stream does. A call that waits gets a status."""
    slow = (Say(content("Hel")), Stall())
    served_by = {"up": Provider(slow, slow, (Stall(),)), "far": Provider()}
    async with open_app(CONFIG, served_by) as served:
        secret = await make(served)
        stream, other = call(served, secret), call(served, "a-key-of-ada")
        await stream.wait_for(b"Hel")
        await other.wait_for(b"Hel")
        waiting = call(served, secret)
        await ask(served, "DELETE", "/v1/keys/eve")
        await stream.wait()
        assert (stream.status, stream.error["code"]) == (200, "key_revoked")
        assert b"[DONE]" not in stream.body
        await waiting.wait()
        assert (waiting.status, waiting.error["code"]) == (401, "key_revoked")
        assert not other.ended
        other.disconnect()
        await other.wait()


async def test_a_turn_that_waits_while_its_key_is_revoked(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It does not begin: the key is looked at again."""
    slow = (Say(content("Hel")), Pause(5), Say(chunk({}, finish_reason="stop")), Say(DONE))
    async with open_app(CONFIG, {"up": Provider(slow, slow), "far": Provider()}) as served:
        secret = await make(served)
        first = call(served, secret, **{"x-session-key": "s"})
        await first.wait_for(b"Hel")
        second = call(served, secret, **{"x-session-key": "s"})
        await ask(served, "DELETE", "/v1/keys/eve")
        await first.wait()
        await second.wait()
        assert (second.status, second.error["code"]) == (401, "key_revoked")


async def test_a_run_of_a_revoked_key(open_app: OpenApp) -> None:
    """A run that is in the queue when its key is revoked does not call a model."""
    async with open_app(CONFIG, {"up": Provider((Stall(),)), "far": Provider()}) as served:
        secret = await make(served)
        headers = {"authorization": f"Bearer {secret}", "prefer": "respond-async"}
        accepted = await served.client.start("POST", "/hooks/ci", {"text": "Hi"}, headers=headers).wait()
        assert accepted.status == 202
        await ask(served, "DELETE", "/v1/keys/eve")
        run = accepted.json["id"]
        await served.gateway.runs.wait_ended(run)
        shown = await ask(served, "GET", f"/hooks/ci/runs/{run}")  # the admin sees it
        assert (shown.json["state"], shown.json["status"]) == ("failed", 401)
        assert "revoked" in str(shown.json["result"])


async def test_what_belongs_to_another_key(open_app: OpenApp) -> None:
    """Sessions, streams and records of one key are a 404 for another, and the admin sees them."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served)
        assert (await call(served, secret, **{"x-session-key": "s"}).wait()).status == 200
        for key, path, status in (
            (secret, "/v1/sessions/s", 200),
            ("a-key-of-ada", "/v1/sessions/s", 404),
            (ADMIN, "/v1/sessions/s?owner=eve", 200),
            ("a-key-of-ada", "/v1/sessions/s?owner=eve", 403),
            (secret, "/v1/sessions/s?owner=eve", 200),
        ):
            assert (await ask(served, "GET", path, key=key)).status == status, (key, path)
        await served.gateway.ledger.list(limit=1)
        for key, count in ((secret, 1), ("a-key-of-ada", 0), (ADMIN, 1)):
            records = await ask(served, "GET", "/v1/exchanges", key=key)
            assert len(records.json["data"]) == count


async def test_carriers(open_app: OpenApp) -> None:
    """A virtual key comes in any of the headers with the same answer; two different keys are a 400."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served)
        for name, value in {
            "authorization": f"bEaReR {secret}",
            "x-api-key": secret,
            "api-key": secret,
            "x-goog-api-key": secret,
        }.items():
            for given, status in ((value, 200), (value[:-1], 401)):
                answer = await served.client.start("GET", "/v1/exchanges", None, headers={name: given}).wait()
                assert answer.status == status, name
        both = {"x-api-key": secret, "authorization": "Bearer a-key-of-ada"}
        assert (await served.client.start("GET", "/v1/exchanges", None, headers=both).wait()).status == 400


async def test_priority(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """In the queue of the gateway, the calls of a key with a higher priority go first."""
    config = make_config(
        limits={"max_exchanges": 1, "max_queued": 9},
        keys={
            "low": {"secret": "a-key-of-low"},
            "high": {"secret": "a-key-of-high", "priority": 5},
        },
    )
    script = (Say(content("Hi")), Pause(1), Say(chunk({}, finish_reason="stop")), Say(DONE))
    async with open_app(config, Provider(*[script] * 5)) as served:
        first = call(served, "a-key-of-low")
        await first.wait_for(b"Hi")
        low = [call(served, "a-key-of-low") for _ in range(2)]
        high = [call(served, "a-key-of-high") for _ in range(2)]
        for each in (*low, *high):
            await each.wait()
        assert max(each.ended_at for each in high) < min(each.ended_at for each in low)


async def test_responses_belong_to_their_key(open_app: OpenApp) -> None:
    """A stored response of one key is a 404 for another; the admin sees it and may delete it."""
    config = make_config(
        {"up": {"models": ["m"], "responses": "translate"}}, admin={"key": ADMIN}, keys={"ada": "a-key-of-ada"}
    )
    async with open_app(config, Provider(ANSWER)) as served:
        secret = await make(served)
        made = await ask(served, "POST", "/v1/responses", {"model": "up/m", "input": "Hi", "stream": True}, key=secret)
        found = re.search(rb'"id":"(resp_[^"]+)"', made.body)
        assert found is not None
        path = f"/v1/responses/{found[1].decode()}"
        for key, method, status in (
            (secret, "GET", 200),
            ("a-key-of-ada", "GET", 404),
            ("a-key-of-ada", "DELETE", 404),
            (ADMIN, "GET", 200),
            (ADMIN, "DELETE", 200),
            (secret, "GET", 404),
        ):
            assert (await ask(served, method, path, key=key)).status == status, (key, method)


async def test_formats_of_refusals(open_app: OpenApp) -> None:
    """Each format has its own shape of a refusal."""
    async with open_app(CONFIG, providers()) as served:
        secret = await make(served, models=["fast"])
        body = {"model": "up/other", "messages": HI, "max_tokens": 5}
        refused = await served.client.start("POST", "/v1/messages", body, headers={"x-api-key": secret}).wait()
        assert (refused.status, refused.json["type"], refused.json["error"]["type"]) == (
            403,
            "error",
            "permission_error",
        )
        gemini = {"contents": [{"parts": [{"text": "Hi"}]}]}
        path = "/v1beta/models/up/other:generateContent"
        refused = await served.client.start("POST", path, gemini, headers={"x-goog-api-key": secret}).wait()
        assert (refused.status, refused.json["error"]["status"]) == (403, "PERMISSION_DENIED")
