"""``POST /hooks/NAME`` through the application: authentication, responses, and the run that a message makes."""

from __future__ import annotations

import base64
import gc
import hashlib
import hmac
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.processes import run_gateway
from tests.support.provider import DONE, Break, Pause, Provider, Say, Script, Stall, answers, chunk, content, usage
from trigate.errors import Unauthenticated, Unverified
from trigate.keys.key import ANYBODY, Key
from trigate.runs.service import Runs
from trigate.signatures import Verifier
from trigate.upstream.generation import Generations
from trigate.webhooks.calls import HookHead
from trigate.webhooks.endpoint import Hooks

SECRET = "a-secret-of-thirty-two-bytes-or-so"
WHSEC = "whsec_" + base64.b64encode(b"k" * 32).decode()
REPLY: Script = (
    Say(content("Hel")),
    Say(content("lo")),
    Say(chunk({}, finish_reason="stop")),
    Say(usage(7, 2)),
    Say(DONE),
)
HI = {"text": "Hi", "from": "ada"}


def hooks(keys: Mapping[str, str] | None = None, **tables: Mapping[str, Any]) -> Any:  # Any: a Config
    """A configuration with these hooks. A hook has the model ``up/m`` and no session, unless its table sets them."""
    own = {name: {"model": "up/m", "session": "none", **table} for name, table in tables.items()}
    return make_config(store={"path": ":memory:"}, hooks=own, keys=keys or {})


async def post(served: Served, body: object = HI, name: str = "h", **headers: str) -> ClientCall:
    """Sends a message and waits for the response; ``_`` in the names of headers stands for ``-``."""
    return await start(served, body, name, **headers).wait()


def start(served: Served, body: object = HI, name: str = "h", **headers: str) -> ClientCall:
    """Sends a message, and returns the call in progress."""
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    return served.client.start("POST", f"/hooks/{name}", body, headers=fields)


async def settled(served: Served, run_id: str) -> Any:  # Any: JSON
    """Waits until the run has ended, and returns it as ``GET`` shows it."""
    await served.gateway.runs.wait_ended(run_id)
    call = await served.client.ask("GET", f"/hooks/h/runs/{run_id}")
    assert call.status == 200, call.body
    return call.json


# -- success ---------------------------------------------------------------------------------------------------------


async def test_the_answer_has_the_documented_fields(open_app: OpenApp) -> None:
    """Exactly these, with the usage that the upstream reported; a header has the run's id too."""
    async with open_app(hooks(h={}), Provider(REPLY)) as served:
        call = await post(served)
        assert call.status == 200, call.body
        assert call.json == {
            "id": call.header("x-run-id"),
            "hook": "h",
            "session": None,
            "action": "chat",
            "reply": "Hello",
            "model": "up/m",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            "created": pytest.approx(time.time(), abs=60),
        }
        assert call.json["id"].startswith("run_")
        served.assert_clean()


async def test_the_upstream_request(open_app: OpenApp) -> None:
    """It has the system message, the text as the user's message and the parameters; always as a stream with usage."""
    config = hooks(h={"system": "Be brief.", "parameters": {"temperature": 0.5, "max_tokens": 9}})
    async with open_app(config, Provider(REPLY)) as served:
        await post(served)
        [sent] = served.providers["up"].calls
        assert sent.json == {
            "temperature": 0.5,
            "max_tokens": 9,
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def test_the_reply_streams_as_chunks(open_app: OpenApp) -> None:
    """A client that accepts an event stream gets the upstream's events with the public model id; a header has the run's
    id."""
    async with open_app(hooks(h={}), Provider(REPLY)) as served:
        call = await post(served, accept="text/event-stream")
        assert call.status == 200
        assert call.header("content-type").startswith("text/event-stream")
        assert call.body == b"".join(step.data for step in REPLY if isinstance(step, Say)).replace(b'"m"', b'"up/m"')
        run = await settled(served, call.header("x-run-id"))
        assert (run["state"], run["result"]["reply"]) == ("completed", "Hello")


async def test_a_run_is_a_live_exchange(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The gateway counts it as in flight, under the id of the run."""
    async with open_app(hooks(h={}), Provider((Say(content("a")), Pause(5), Say(DONE)))) as served:
        call = start(served)
        await trio.sleep(1)
        [live] = served.gateway.live
        assert live.id.startswith("run_")
        await call.wait()
        assert call.header("x-run-id") == live.id
        served.assert_clean()


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (answers(b'{"error":{"message":"no"}}', status=400), 400, None),
        (answers(b'{"error":{"message":"slow down"}}', status=429), 429, None),
        (answers(b'{"error":{"message":"down"}}', status=500), 502, "upstream_unavailable"),
        ((Break(),), 502, "upstream_unavailable"),
    ],
)
async def test_a_failed_model_call_is_an_error(
    open_app: OpenApp, script: Script, status: int, code: str | None, accept: str
) -> None:
    """The response has an error status, and the run stores status and body."""
    async with open_app(hooks(h={}), Provider(script)) as served:
        call = await post(served, accept=accept)
        assert call.status == status
        assert call.error.get("code") == code
        run = await settled(served, call.header("x-run-id"))
        assert (run["state"], run["status"]) == ("failed", status)
        assert run["result"] == call.json
        served.assert_clean()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("on_disconnect", ["cancel", "finish"])
async def test_a_failure_says_when_to_try_again(open_app: OpenApp, accept: str, on_disconnect: str) -> None:
    """The ``Retry-After`` of the provider is passed on, since it is the provider's limit."""
    script = answers(b'{"error":{"message":"slow down"}}', status=429, headers={"retry-after": "17"})
    async with open_app(hooks(h={"on_disconnect": on_disconnect}), Provider(script)) as served:
        call = await post(served, accept=accept)
        assert (call.status, call.header("retry-after"), call.header("x-should-retry")) == (429, "17", "false")
        assert call.header("x-run-id")


async def test_the_overhead_is_without_the_answer_s_duration(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The time that the provider needs for its answer is not the gateway's, where the answer is sent whole, too."""
    script = (Pause(2), Say(content("Hel")), Pause(5), *REPLY[1:])
    async with open_app(hooks(h={}), Provider(script)) as served:
        call = await post(served)
        assert (call.status, call.header("x-trigate-attempts")) == (200, "1")
        assert float(call.header("x-trigate-overhead-ms")) == pytest.approx(0, abs=1)


async def test_a_truncated_answer_is_an_error(open_app: OpenApp) -> None:
    """A partial answer is not returned as the reply."""
    async with open_app(hooks(h={}), Provider((Say(content("a")), Break()))) as served:
        call = await post(served)
        assert (call.status, call.error["code"]) == (502, "upstream_truncated")


async def test_a_truncated_stream_ends_with_an_error(open_app: OpenApp) -> None:
    """Its last event is an error, as in every stream of this gateway."""
    async with open_app(hooks(h={}), Provider((Say(content("a")), Break()))) as served:
        call = await post(served, accept="text/event-stream")
        assert (call.status, call.error["code"]) == (200, "upstream_truncated")
        run = await settled(served, call.header("x-run-id"))
        assert (run["state"], run["status"]) == ("failed", 502)


async def test_an_unknown_model_is_a_404(open_app: OpenApp) -> None:
    """The model of the hook is not known to any upstream."""
    async with open_app(hooks(h={"model": "gone"})) as served:
        call = await post(served)
        assert (call.status, call.error["code"]) == (404, "model_not_found")


# -- refused requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\xff", 400, None),
        (b"[" * 100_000, 400, None),
        ([], 400, None),
        ("text", 400, None),
        ({}, 400, "text"),
        ({"text": ""}, 400, "text"),
        ({"text": 1}, 400, "text"),
        ({"text": "x", "from": ["a"]}, 400, "from"),
        ({"text": "x", "from": True}, 400, "from"),
        ({"text": "x", "from": "a" * 300}, 400, "from"),
        ({"text": "x", "action": "explode"}, 400, "action"),
        ({"text": "x", "action": 1}, 400, "action"),
        ({"text": "x", "callback_url": "http://evil.example/"}, 400, "callback_url"),
        ({"text": "x", "callback_url": 1}, 400, "callback_url"),
        ({"action": "note", "text": "x"}, 400, "action"),
        ({"action": "reset"}, 400, "action"),
    ],
)
async def test_an_invalid_body(open_app: OpenApp, body: object, status: int, param: str) -> None:
    """The error names the invalid field, and the upstream gets no request."""
    async with open_app(hooks(h={})) as served:
        call = await post(served, body, content_type="application/json")
        assert (call.status, call.error["param"]) == (status, param), call.body
        assert call.error["code"] == "invalid_request"
        assert not served.providers["up"].calls


async def test_a_message_without_a_sender(open_app: OpenApp) -> None:
    """It is refused where each sender has its own session, which is the default."""
    async with open_app(hooks(h={"session": "sender"})) as served:
        call = await post(served, {"text": "x"})
        assert (call.status, call.error["param"]) == (400, "from")


async def test_an_action_that_is_not_allowed(open_app: OpenApp) -> None:
    """An action that the hook's ``actions`` leave out is a 403."""
    async with open_app(hooks(h={"actions": ["chat"], "session": "hook"})) as served:
        call = await post(served, {"action": "reset"})
        assert (call.status, call.error["code"]) == (403, "forbidden")


@pytest.mark.parametrize("name", ["other", "off", "a b", "x" * 100])
async def test_an_unknown_hook(open_app: OpenApp, name: str) -> None:
    """An unknown hook and a disabled one are the same 404."""
    async with open_app(hooks(h={}, off={"enabled": False})) as served:
        call = await post(served, name=name)
        assert (call.status, call.error["code"]) == (404, "not_found")


async def test_without_hooks_any_name_accepts_the_documented_body(open_app: OpenApp) -> None:
    """On loopback and without a key. An invalid name is a 404."""
    async with open_app(make_config(models={"default": {"targets": ["up/m"]}}), Provider(REPLY)) as served:
        call = await post(served, {"text": "Hi", "from": "ada", "action": "history"}, "whatever")
        assert call.status == 200, call.body
        assert (call.json["session"], call.json["messages"]) == ("hook:whatever:ada", [])
        assert (await post(served, name="not a name")).status == 404
        served.client.client = ("192.0.2.1", 5)
        assert (await post(served)).status == 403


async def test_a_token_in_the_url_is_refused(open_app: OpenApp) -> None:
    """Even a valid one, because URLs are logged."""
    async with open_app(hooks(h={"verification": "bearer", "secrets": [SECRET]})) as served:
        call = await served.client.ask("POST", f"/hooks/h?token={SECRET}", HI)
        assert (call.status, call.error["param"]) == (400, "token")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_other_methods(open_app: OpenApp, method: str) -> None:
    """They are a 405 with ``Allow``."""
    async with open_app(hooks(h={})) as served:
        call = await served.client.ask(method, "/hooks/h")
        assert (call.status, call.header("allow")) == (405, "POST")


async def test_a_form_is_refused_under_a_key(open_app: OpenApp) -> None:
    """A page of another site can send such a content type without a CORS preflight."""
    async with open_app(hooks(h={})) as served:
        call = await post(served, b'{"text":"x"}', content_type="text/plain")
        assert (call.status, call.error["code"]) == (415, "unsupported_media_type")


URLENCODED = "application/x-www-form-urlencoded"
OPENED = json.dumps({"action": "opened", "issue": {"title": "It hangs 🦊 & more"}}).encode()
GITHUB_HOOK = {
    "verification": "github",
    "secrets": [SECRET],
    "filter": "action == 'opened'",
    "expressions": {"title": "issue.title"},
    "template": "{title}",
}


def github_signature(body: bytes) -> str:
    """The value of ``X-Hub-Signature-256`` for a body."""
    return f"sha256={hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()}"


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (OPENED, "application/json", 200),
        (urlencode({"payload": OPENED}).encode(), URLENCODED, 200),
        (urlencode({"payload": OPENED}).encode(), f"{URLENCODED}; charset=utf-8", 200),
        (OPENED, URLENCODED, 200),  # as `curl -d` sends it
        (OPENED, "text/plain", 200),
        (OPENED, "application/cloudevents+json", 200),
        (urlencode({"payload": b'{"action": "closed"}'}).encode(), URLENCODED, 204),
        (b"payload=%7Bnot", URLENCODED, 400),
        (b"payload=%7B%22a%22:%ff%7D", URLENCODED, 400),
        (b"&" + b"a=1&" * 1001, URLENCODED, 400),
        (b"--B\r\ncontent-disposition: form-data\r\n\r\n{}\r\n--B--\r\n", "multipart/form-data; boundary=B", 415),
        (b"<a/>", "application/xml", 415),
        (b"<a/>", "application/json", 400),
    ],
)
async def test_content_types(open_app: OpenApp, body: bytes, content_type: str, status: int) -> None:
    """A form is unwrapped after its bytes were verified, and means the same as JSON. What cannot be read is a 400; if
    its type is to blame, a 415 that names the type."""
    async with open_app(hooks(h=GITHUB_HOOK), Provider(REPLY)) as served:
        headers = {"content_type": content_type, "x_hub_signature_256": github_signature(body)}
        call = await post(served, body, **headers)
        assert call.status == status, call.body
        if status == 200:
            assert served.providers["up"].calls[0].json["messages"][1]["content"] == '"It hangs 🦊 & more"'
        if status == 415:
            assert content_type.partition(";")[0] in call.error["message"]
        headers["x_hub_signature_256"] = github_signature(body + b" ")
        assert (await post(served, body, **headers)).status == 401


async def test_a_slash_command(open_app: OpenApp) -> None:
    """Its fields are values like those of JSON. A copy of the signed request, under whatever idempotency key, is the
    same message."""
    table = {
        "verification": "slack",
        "secrets": [SECRET],
        "session": "sender",
        "expressions": {"text": "text", "from": "user_id"},
    }
    body = b"command=%2Fask&text=Is+it+up%3F&user_id=U2C&response_url=https%3A%2F%2Fhooks.slack.com%2F"
    now = f"{time.time():.0f}"
    mac = hmac.new(SECRET.encode(), f"v0:{now}:".encode() + body, hashlib.sha256).hexdigest()
    signed = {"content_type": URLENCODED, "x_slack_request_timestamp": now, "x_slack_signature": f"v0={mac}"}
    async with open_app(hooks(h=table), Provider(REPLY)) as served:
        first = await post(served, body, **signed)
        assert (first.status, first.json["session"]) == (200, "hook:h:U2C")
        assert served.providers["up"].calls[0].json["messages"] == [{"role": "user", "content": "Is it up?"}]
        again = await post(served, body, **signed, idempotency_key="other")
        assert again.header("idempotency-replayed") == "true"
        assert again.json == first.json


async def test_a_body_over_the_limit(open_app: OpenApp) -> None:
    """It is a 413, with and without ``Content-Length``."""
    async with open_app(hooks(h={"body_bytes": 100})) as served:
        assert (await post(served, {"text": "x" * 200})).status == 413
        call = served.client.start(
            "POST", "/hooks/h", headers={"content-type": "application/json"}, raw=[b"x" * 60, b"x" * 60]
        )
        assert (await call.wait()).status == 413


async def test_the_rate_is_limited_before_anything_else(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Per client address. A retry after the ``Retry-After`` of the 429 is accepted."""
    config = hooks(h={"rate_per_s": 0.5, "burst": 2, "verification": "github", "secrets": [SECRET]})
    async with open_app(config) as served:
        assert [(await post(served)).status for _ in range(3)] == [401, 401, 429]
        call = await post(served)
        assert (call.status, call.error["code"], call.header("retry-after")) == (429, "rate_limited", "2")
        served.client.client = ("192.0.2.7", 1)
        assert (await post(served)).status == 401
        served.client.client = ("127.0.0.1", 1)
        await trio.sleep(2)
        assert (await post(served)).status == 401


async def test_no_rate_limit(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """``rate_per_s = 0`` switches it off."""
    async with open_app(hooks(h={"rate_per_s": 0, "burst": 1})) as served:
        assert {(await post(served, {})).status for _ in range(5)} == {400}


async def test_a_gateway_that_drains(open_app: OpenApp) -> None:
    """It refuses new messages."""
    async with open_app(hooks(h={})) as served:
        served.gateway.drain.begin()
        call = await post(served)
        assert (call.status, call.error["code"]) == (503, "draining")


# -- authentication ---------------------------------------------------------------------------------------------------


async def test_a_key_of_the_gateway(open_app: OpenApp) -> None:
    """With verification ``key``, a request needs a gateway key."""
    async with open_app(hooks({"ada": "key-of-ada"}, h={}), Provider(REPLY)) as served:
        assert (await post(served)).status == 401
        assert (await post(served, authorization="Bearer key-of-ada")).status == 200


async def test_a_bearer_secret(open_app: OpenApp) -> None:
    """It opens this hook and nothing else; a gateway key does not open the hook."""
    config = hooks({"ada": "key-of-ada"}, h={"verification": "bearer", "secrets": [SECRET]})
    async with open_app(config, Provider(REPLY)) as served:
        assert (await post(served, authorization=f"Bearer {SECRET}")).status == 200
        call = await post(served, authorization="Bearer key-of-ada")
        assert (call.status, call.error["code"]) == (401, "invalid_signature")
        served.client.client = ("192.0.2.1", 1)
        assert (await post(served, authorization=f"Bearer {SECRET}")).status == 200
        call = await served.client.ask("GET", "/v1/models", headers={"authorization": f"Bearer {SECRET}"})
        assert call.status == 401


def signed(scheme: str, body: bytes, *, at: float, event: str = "evt-1") -> dict[str, str]:
    """The headers of a signed request."""

    def mac(key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, "sha256")

    second = int(at)
    match scheme:
        case "github":
            return {
                "x-hub-signature-256": "sha256=" + mac(SECRET.encode(), body).hex(),
                "x-github-delivery": event,
            }
        case "standard-webhooks":
            signature = base64.b64encode(mac(b"k" * 32, f"{event}.{second}.".encode() + body)).decode()
            return {"webhook-id": event, "webhook-timestamp": str(second), "webhook-signature": f"v1,{signature}"}
        case "slack":
            signature = mac(SECRET.encode(), f"v0:{second}:".encode() + body).hex()
            return {"x-slack-request-timestamp": str(second), "x-slack-signature": f"v0={signature}"}
        case _:
            signature = mac(SECRET.encode(), f"{second}.".encode() + body).hex()
            return {"stripe-signature": f"t={second},v1={signature}"}


@pytest.mark.parametrize("scheme", ["github", "standard-webhooks", "slack", "stripe"])
async def test_a_signed_request(open_app: OpenApp, scheme: str) -> None:
    """A valid signature is accepted from any address and with any content type. A repetition gets the result of the
    same run. Another body, or an old time, is a 401."""
    secret = WHSEC if scheme == "standard-webhooks" else SECRET
    async with open_app(hooks(h={"verification": scheme, "secrets": [secret]}), Provider(REPLY)) as served:
        served.client.client = ("192.0.2.1", 1)
        body = json.dumps({**HI, "event_id": "evt-1", "id": "evt-1"}).encode()
        headers = {"content-type": "text/plain", **signed(scheme, body, at=time.time())}
        calls = [await served.client.ask("POST", "/hooks/h", body, headers=headers) for _ in range(2)]
        assert [call.status for call in calls] == [200, 200]
        assert calls[0].json == calls[1].json
        assert [call.header("idempotency-replayed") for call in calls] == ["", "true"]
        # The signed id takes precedence over a header that an attacker can set.
        again = await served.client.ask("POST", "/hooks/h", body, headers={**headers, "idempotency-key": "another"})
        assert again.json == calls[0].json
        assert len(served.providers["up"].calls) == 1
        call = await served.client.ask("POST", "/hooks/h", body + b" ", headers=headers)
        assert (call.status, call.error["code"]) == (401, "invalid_signature")
        if scheme != "github":
            old = signed(scheme, body, at=time.time() - 400)
            assert (await served.client.ask("POST", "/hooks/h", body, headers=old)).status == 401


@pytest.mark.parametrize("scheme", ["github", "standard-webhooks", "slack", "stripe"])
async def test_a_doubled_signature(open_app: OpenApp, scheme: str) -> None:
    """A header that the scheme reads and that occurs twice is a 401, whichever value is the right one, and if both are:
    another program on the way may have read the other."""
    secret = WHSEC if scheme == "standard-webhooks" else SECRET
    async with open_app(hooks(h={"verification": scheme, "secrets": [secret]}), Provider(REPLY)) as served:
        body = json.dumps(HI).encode()
        right = list(signed(scheme, body, at=time.time()).items())
        for name, value in right:
            for extra in (value, "wrong"):
                for headers in ([(name, extra), *right], [*right, (name.title(), extra)]):
                    call = await served.client.ask("POST", "/hooks/h", body, headers=headers)
                    assert (call.status, call.error["code"]) == (401, "invalid_signature"), headers
                    assert "twice" in call.error["message"]
        assert (await served.client.ask("POST", "/hooks/h", body, headers=right)).status == 200


async def test_slack_verifies_the_url(open_app: OpenApp) -> None:
    """A signed ``url_verification`` is answered with its challenge; an unsigned one is refused."""
    async with open_app(hooks(h={"verification": "slack", "secrets": [SECRET]})) as served:
        body = b'{"type":"url_verification","challenge":"abc123"}'
        call = await served.client.ask("POST", "/hooks/h", body, headers=signed("slack", body, at=time.time()))
        assert (call.status, call.body) == (200, b"abc123")
        assert (await served.client.ask("POST", "/hooks/h", body)).status == 401


async def test_a_hub_verifies_the_url(open_app: OpenApp) -> None:
    """``GET ?hub.challenge`` with the ``verify_token`` is answered; without it, it is refused."""
    token = "a-token-of-more-than-24-bytes"
    more = {"verification": "github", "secrets": [SECRET]}
    async with open_app(hooks(h={**more, "verify_token": token}, other=more)) as served:
        asks = "?hub.mode=subscribe&hub.challenge=42&hub.verify_token="
        path = f"/hooks/h{asks}"
        call = await served.client.ask("GET", path + token)
        assert (call.status, call.body) == (200, b"42")
        assert (await served.client.ask("GET", path + "x")).status == 401
        assert (await served.client.ask("GET", path + SECRET)).status == 401
        assert (await served.client.ask("GET", f"/hooks/other{asks}{SECRET}")).status == 401
        assert (await served.client.ask("GET", "/hooks/h?hub.mode=unsubscribe")).status == 405


# -- payloads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'\xef\xbb\xbf{"text":"Hi","from":"ada"}', "Hi"),
        (rb'{"text":"a\ud83d","from":"\ude00"}', "a\ufffd"),
        (rb'{"text":"a\u0000b","from":"\u0000"}', "a\0b"),
        (b'payload={"text":"a\\ud83d","from":"ada"}', "a\ufffd"),
    ],
    ids=["byte order mark", "half a character", "NUL", "half a character in a form"],
)
async def test_text_that_json_allows(open_app: OpenApp, body: bytes, text: str) -> None:
    """It reaches the model, is stored with the run and in the session of its sender, and can be read and sent again."""
    kind = "application/json" if body[:1] != b"p" else "application/x-www-form-urlencoded"
    config = hooks(h={"session": "sender", "verification": "bearer", "secrets": [SECRET]})
    headers = {"content-type": kind, "authorization": f"Bearer {SECRET}"}
    async with open_app(config, Provider(REPLY, REPLY)) as served:
        for turn in (1, 2):
            call = await served.client.ask("POST", "/hooks/h", body, headers=headers)
            assert call.status == 200, call.body
            sent = json.loads(served.providers["up"].calls[-1].body)["messages"]
            assert [message["content"] for message in sent if message["role"] == "user"] == [text] * turn


ISSUE = {"action": "opened", "issue": {"title": 'Say "{from}"', "number": 7}, "sender": {"id": 5, "login": "ada"}}


async def test_expressions_and_a_template(open_app: OpenApp) -> None:
    """Picked values appear in the prompt as JSON, with their braces and quotes; the system message marks them as
    data."""
    config = hooks(
        h={
            "system": "Triage.",
            "expressions": {"from": "sender.id", "title": "issue.title", "number": "issue.number"},
            "filter": "action == 'opened'",
            "template": "Issue {number} by {from}: {title}. {{ok}}",
        }
    )
    async with open_app(config, Provider(REPLY)) as served:
        call = await post(served, ISSUE)
        assert call.status == 200, call.body
        [sent] = served.providers["up"].calls
        system, user = sent.json["messages"]
        assert user["content"] == 'Issue 7 by 5: "Say \\"{from}\\"". {ok}'
        assert system["content"].startswith("Triage.\n\nValues in double quotes")


async def test_a_filter_that_is_false(open_app: OpenApp) -> None:
    """The answer is 204 and no run is made, also where the filter cannot be applied."""
    async with open_app(hooks(h={"filter": "contains(action, 'opened')", "expressions": {"text": "@"}})) as served:
        payloads: list[object] = [{"action": "closed"}, {}, [], 5]
        for payload in payloads:
            call = await post(served, payload)
            assert (call.status, call.body) == (204, b"")
        assert not served.providers["up"].calls


async def test_an_expression_that_cannot_be_applied(open_app: OpenApp) -> None:
    """It is a 400 that names the expression."""
    async with open_app(hooks(h={"expressions": {"text": "join(', ', names)"}})) as served:
        call = await post(served, {"names": 5})
        assert (call.status, call.error["param"]) == (400, "text")


async def test_a_picked_object_becomes_json(open_app: OpenApp) -> None:
    """An expression may pick the whole payload as the text."""
    async with open_app(hooks(h={"expressions": {"text": "@"}}), Provider(REPLY)) as served:
        await post(served, {"a": [1, None]})
        assert served.providers["up"].calls[0].json["messages"][-1]["content"] == '{"a":[1,null]}'


# -- asynchronous -----------------------------------------------------------------------------------------------------


async def test_prefer_respond_async(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The answer is 202 once the run is stored, before there is an answer; the run can be fetched at once and later."""
    async with open_app(hooks(h={}), Provider((Pause(5), *REPLY))) as served:
        begun = trio.current_time()
        call = await post(served, prefer="respond-async")
        assert trio.current_time() == begun
        assert call.status == 202
        assert call.header("preference-applied") == "respond-async"
        run_id = call.json["id"]
        assert call.header("location") == f"/hooks/h/runs/{run_id}"
        assert call.json == {
            "id": run_id,
            "hook": "h",
            "session": None,
            "action": "chat",
            "state": "queued",
            "created": call.json["created"],
        }
        await trio.sleep(1)
        now = (await served.client.ask("GET", call.header("location"))).json
        assert (now["state"], now["result"], now["finished"]) == ("running", None, None)
        run = await settled(served, run_id)
        assert run["state"] == "completed"
        assert run["status"] == 200
        assert run["result"]["reply"] == "Hello"
        assert run["deliveries"] == []
        served.assert_clean()


async def test_a_run_of_another_owner_is_not_found(open_app: OpenApp) -> None:
    """It is a 404 for another key and another hook, as an unknown run is; a bearer secret sees the runs that its hook
    let in."""
    config = hooks({"ada": "key-of-ada", "bob": "key-of-bob"}, h={}, b={"verification": "bearer", "secrets": [SECRET]})
    async with open_app(config, Provider(REPLY)) as served:

        async def seen(name: str, run_id: str, key: str) -> int:
            path = f"/hooks/{name}/runs/{run_id}"
            return (await served.client.ask("GET", path, headers={"authorization": f"Bearer {key}"})).status

        mine = (await post(served, authorization="Bearer key-of-ada")).json["id"]
        assert [await seen("h", mine, key) for key in ("key-of-ada", "key-of-bob", SECRET)] == [200, 404, 401]
        assert [await seen(name, mine, "key-of-ada") for name in ("b", "nothing")] == [404, 404]
        assert await seen("h", "run_x", "key-of-ada") == 404
        its = (await post(served, name="b", authorization=f"Bearer {SECRET}")).json["id"]
        assert [await seen("b", its, key) for key in (SECRET, "key-of-bob", "wrong")] == [200, 200, 401]
        assert await seen("b", mine, SECRET) == 404


def hooks_of(*configs: Any) -> tuple[Hooks, Callable[[], None]]:  # Any: each a Config
    """The hooks of the first configuration, without runs or channels; and a reload, which switches to the next one."""
    generations = SimpleNamespace(config=configs[0])
    rest = iter(configs[1:])
    made = Hooks(runs=cast("Runs", None), generations=cast("Generations", generations), channel_adapter=lambda _: None)

    def reload() -> None:
        generations.config = next(rest)
        made.apply()

    return made, reload


def test_runs_of_a_removed_hook_are_readable() -> None:
    """A client with a key still reads its runs, and those that the hook let in, after the hook is gone."""
    config = hooks({"ada": "key-of-ada"}, other={})
    readers = hooks_of(config)[0].readers("h", {}, lambda: Key(name="ada"))
    assert readers == {"ada", "hook:h", "channel:h"}


def test_who_reads_runs_of_a_channel() -> None:
    """Any key of the gateway opens them, also after the channel has been removed; the channel's own secret, which the
    platform has, does not."""
    config = make_config(channels={"bot": {"type": "telegram", "token": "123:ABC"}})

    def refuse() -> Key:
        raise Unauthenticated("No key.")

    for each in (config, make_config()):
        readers = hooks_of(each)[0].readers("bot", {}, lambda: Key(name="ada"))
        assert readers is not None
        assert "channel:bot" in readers
    with pytest.raises(Unauthenticated):
        hooks_of(config)[0].readers("bot", {}, refuse)


@pytest.mark.slow
def test_secrets_live_as_long_as_their_configuration() -> None:
    """One verifier is made for a hook of a configuration. A reload drops it: the new secret is accepted, the old one is
    refused, and no verifier with the old secret is left."""

    def head(secret: str) -> HookHead:
        headers = {b"authorization": b"Bearer " + secret.encode()}
        return HookHead(
            name="h",
            method="POST",
            headers=headers,
            repeated=frozenset(),
            query=b"",
            client=None,
            authorize=lambda: ANYBODY,
        )

    def verifiers() -> list[Verifier]:
        gc.collect()
        return [each for each in gc.get_objects() if isinstance(each, Verifier)]

    def bearer(secret: str) -> Any:  # Any: a Config
        return hooks(h={"verification": "bearer", "secrets": [secret], "rate_per_s": 0})

    others = verifiers()
    old, new = f"old-{SECRET}", f"new-{SECRET}"
    served, reload = hooks_of(bearer(old), bearer(new))
    for _ in range(2):
        served.check_head(head(old))
        assert served.readers("h", head(old).headers, lambda: ANYBODY) == {"hook:h"}
    assert len(verifiers()) == len(others) + 1
    reload()
    assert len(verifiers()) == len(others)
    served.check_head(head(new))
    with pytest.raises(Unverified):
        served.check_head(head(old))


async def test_a_full_hook(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """With all slots and queue slots taken, the next message is refused before it is stored."""
    config = hooks(h={"concurrency": 1, "queue": 1, "actions": ["chat"]})
    async with open_app(config, Provider((Pause(5), *REPLY))) as served:
        first = [await post(served, prefer="respond-async") for _ in range(3)]
        assert [call.status for call in first] == [202, 202, 503]
        assert (first[2].error["code"], first[2].header("retry-after")) == ("overloaded", "1")
        await trio.sleep(1)
        assert len(served.gateway.live) == 1
        for call in first[:2]:
            await settled(served, call.json["id"])
        assert (await post(served)).status == 200


# -- clients that disconnect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_a_disconnect_cancels_the_run(open_app: OpenApp, autojump_clock: MockClock, accept: str) -> None:
    """It cancels the upstream call too; the partial answer is stored."""
    async with open_app(hooks(h={}), Provider((Say(content("Hel")), Stall()))) as served:
        call = start(served, accept=accept)
        await trio.sleep(1)
        [live] = served.gateway.live
        call.disconnect()
        await call.wait()
        run = await settled(served, live.id)
        assert (run["state"], run["result"]["reply"], run["result"]["finish_reason"]) == ("cancelled", "Hel", None)
        served.assert_clean()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_a_run_that_outlives_its_client(open_app: OpenApp, autojump_clock: MockClock, accept: str) -> None:
    """With ``on_disconnect = "finish"`` the run is acknowledged, continues, and can be fetched."""
    script = (Say(content("Hel")), Pause(5), Say(content("lo")), Say(DONE))
    async with open_app(hooks(h={"on_disconnect": "finish"}), Provider(script)) as served:
        call = start(served, accept=accept)
        await trio.sleep(1)
        [live] = served.gateway.live
        call.disconnect()
        await call.wait()
        assert call.returned_at == trio.current_time()
        kept = await served.gateway.store.runs.get(live.id)
        assert kept is not None
        assert kept.acknowledged
        run = await settled(served, live.id)
        assert (run["state"], run["result"]["reply"]) == ("completed", "Hello")
        served.assert_clean()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_finish_answers_a_client_that_stays(open_app: OpenApp, accept: str) -> None:
    """A client that waits gets the answer or the error, as without ``finish``."""
    good, bad = REPLY, answers(b'{"error":{"message":"down"}}', status=500)
    async with open_app(hooks(h={"on_disconnect": "finish"}), Provider(good, bad)) as served:
        call = await post(served, accept=accept)
        assert call.status == 200
        assert b"lo" in call.body
        call = await post(served, accept=accept)
        assert (call.status, call.error["code"]) == (502, "upstream_unavailable")


# -- idempotency ------------------------------------------------------------------------------------------------------


async def test_a_used_key_returns_the_stored_result(open_app: OpenApp) -> None:
    """As JSON and as a stream; another body under the key is a 409."""
    async with open_app(hooks(h={}), Provider(REPLY)) as served:
        first = await post(served, idempotency_key="k")
        again = await post(served, idempotency_key="k")
        assert again.json == first.json
        assert (first.header("idempotency-replayed"), again.header("idempotency-replayed")) == ("", "true")
        streamed = await post(served, idempotency_key="k", accept="text/event-stream")
        assert streamed.header("x-run-id") == first.json["id"]
        assert b'"content":"Hello"' in streamed.body
        assert b'"total_tokens":9' in streamed.body
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        later = await post(served, idempotency_key="k", prefer="respond-async")
        assert (later.status, later.json["id"]) == (202, first.json["id"])
        other = await post(served, {**HI, "text": "else"}, idempotency_key="k")
        assert (other.status, other.error["code"]) == (409, "idempotency_conflict")
        assert len(served.providers["up"].calls) == 1


async def test_keys_belong_to_their_owner(open_app: OpenApp) -> None:
    """A client cannot get another owner's result by guessing a key."""
    async with open_app(hooks({"ada": "key-of-ada", "bob": "key-of-bob"}, h={}), Provider(REPLY)) as served:
        ids = {
            (await post(served, idempotency_key="k", authorization=f"Bearer {key}")).json["id"]
            for key in ("key-of-ada", "key-of-bob")
        }
        assert len(ids) == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 300])
async def test_an_invalid_key(open_app: OpenApp, key: str) -> None:
    """It is a 400."""
    async with open_app(hooks(h={})) as served:
        call = await post(served, idempotency_key=key)
        assert (call.status, call.error["param"]) == (400, "Idempotency-Key")


async def test_an_event_id_by_expression(open_app: OpenApp) -> None:
    """It recognises a repetition where the verification scheme has no id."""
    async with open_app(hooks(h={"expressions": {"text": "t", "event_id": "id"}}), Provider(REPLY)) as served:
        calls = [await post(served, {"t": "x", "id": 5}) for _ in range(2)]
        assert calls[0].json == calls[1].json


async def test_a_hundred_at_once_make_one_run(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each request gets the result of this run."""
    async with open_app(hooks(h={}), Provider((Pause(5), *REPLY))) as served:
        calls = [start(served, idempotency_key="k") for _ in range(100)]
        for call in calls:
            await call.wait()
        assert {call.status for call in calls} == {200}
        assert len({call.json["id"] for call in calls}) == 1
        assert [call.header("idempotency-replayed") for call in calls].count("") == 1
        assert len(served.providers["up"].calls) == 1
        served.assert_clean()


async def test_a_duplicate_takes_over_after_a_disconnect(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """When the first client disconnects, one of the duplicates makes a new run, and the others wait for it."""
    async with open_app(hooks(h={}), Provider((Pause(5), *REPLY))) as served:
        first = start(served, idempotency_key="k")
        await trio.sleep(1)
        others = [start(served, idempotency_key="k") for _ in range(3)]
        await trio.sleep(1)
        first.disconnect()
        for call in others:
            await call.wait()
        assert [call.status for call in others] == [200] * 3
        assert len({call.json["id"] for call in others}) == 1
        assert sum(not call.header("idempotency-replayed") for call in others) == 1
        assert len(served.providers["up"].calls) == 2
        served.assert_clean()


async def test_a_failed_run_may_be_retried(open_app: OpenApp) -> None:
    """A retry under the same key makes a new run where the provider was unavailable, not where it rejected the
    message."""
    down, refused = answers(b'{"error":{"message":"x"}}', status=500), answers(b'{"error":{"message":"x"}}', status=400)
    async with open_app(hooks(h={}), Provider(down, REPLY, refused)) as served:
        assert [(await post(served, idempotency_key="k")).status for _ in range(3)] == [502, 200, 200]
        assert [(await post(served, idempotency_key="j")).status for _ in range(2)] == [400, 400]
        assert len(served.providers["up"].calls) == 3


async def test_async_duplicates_name_the_same_run(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """During the run and afterwards. A duplicate of a run that is not acknowledged gets its 202 once that run has
    ended."""
    async with open_app(hooks(h={}), Provider((Pause(5), *REPLY))) as served:
        first = await post(served, idempotency_key="k", prefer="respond-async")
        again = await post(served, idempotency_key="k", prefer="respond-async")
        assert (again.status, again.json["id"]) == (202, first.json["id"])
        sync = await post(served, idempotency_key="k")
        assert (sync.status, sync.json["id"]) == (200, first.json["id"])
        waiting = start(served, idempotency_key="j")
        await trio.sleep(1)
        begun = trio.current_time()
        later = await post(served, idempotency_key="j", prefer="respond-async")
        assert trio.current_time() - begun == pytest.approx(4)
        assert (later.status, later.json["id"]) == (202, (await waiting.wait()).json["id"])


# -- callbacks --------------------------------------------------------------------------------------------------------

CALLBACK = {"callback_secret": WHSEC, "callback_hosts": ["127.0.0.1"]}  # refused without ``callback_private``


async def test_a_hook_with_callbacks(open_app: OpenApp) -> None:
    """The answer is 202. The run shows the delivery without the query of its URL, which may hold a secret."""
    async with open_app(hooks(h={"reply": "callback", **CALLBACK}), Provider(REPLY)) as served:
        call = await post(served, {**HI, "callback_url": "http://127.0.0.1:9/done?secret=x"})
        assert (call.status, call.header("preference-applied")) == (202, "")
        run = await settled(served, call.json["id"])
        [delivery] = run["deliveries"]
        assert delivery["url"] == "http://127.0.0.1:9/done"
        assert set(delivery) == {"id", "url", "state", "attempts", "last_status", "last_error"}
        assert "secret" not in json.dumps(run)


async def test_a_callback_needs_a_valid_url(open_app: OpenApp) -> None:
    """The configuration or the request has it; that of a request must be on one of the hook's hosts."""
    async with open_app(hooks(h={"reply": "callback", **CALLBACK}), Provider(REPLY)) as served:
        for url in (
            None,
            "http://evil.example/",
            "file:///etc/passwd",
            "http://u@127.0.0.1/",
            "http://127.0.0.1/ x",
            "x",
        ):
            call = await post(served, {**HI, "callback_url": url})
            assert (call.status, call.error["param"]) == (400, "callback_url"), url
        assert not served.providers["up"].calls


async def test_a_client_that_waits_gets_no_callback(open_app: OpenApp) -> None:
    """It already has the answer. With ``Prefer: respond-async`` there is a callback."""
    async with open_app(hooks(h={**CALLBACK, "callback_url": "http://127.0.0.1:9/own"}), Provider(REPLY)) as served:
        now = await post(served)
        assert (await settled(served, now.header("x-run-id")))["deliveries"] == []
        later = await post(served, prefer="respond-async")
        [delivery] = (await settled(served, later.json["id"]))["deliveries"]
        assert delivery["url"] == "http://127.0.0.1:9/own"


# -- several workers --------------------------------------------------------------------------------------------------


async def test_a_duplicate_in_another_worker_waits_for_the_same_run(open_app: OpenApp, tmp_path: Path) -> None:
    """It is notified when the run ends."""
    shared = make_config(store={"path": str(tmp_path / "t.db")}, hooks={"h": {"model": "up/m", "session": "none"}})
    async with (
        open_app(shared, Provider((Say(content("Hel")), Pause(0.1), Say(content("lo")), Say(DONE)))) as one,
        open_app(shared, Provider(REPLY)) as other,
    ):
        call = start(one, idempotency_key="k")
        with trio.fail_after(30):
            while not one.gateway.live:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.001)
        again = await post(other, idempotency_key="k")
        await call.wait()
        assert again.json == call.json
        assert again.header("idempotency-replayed") == "true"
        assert not other.providers["up"].calls
        seen = await other.client.ask("GET", f"/hooks/h/runs/{call.json['id']}")
        assert seen.json["state"] == "completed"


# -- arbitrary payloads -----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "from", "action", "callback_url", "a"]) | st.text(max_size=5), inner, max_size=5
        )
    ),
    max_leaves=12,
)
KINDS: dict[str, dict[str, Any]] = {
    "documented": {},
    "expressions": {
        "expressions": {"text": "a", "from": "b.c", "action": "action", "event_id": "max_by(@, &a)"},
        "filter": "length(@) > `0`",
    },
    "template": {"expressions": {"x": "*.a"}, "template": "{x} {text} {from} {action}"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_no_payload_makes_a_server_error(open_app: OpenApp, kind: str) -> None:
    """No JSON value makes a 5xx."""
    found: list[object] = []

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(JSON)
    def collect(payload: object) -> None:
        found.append(payload)

    collect()
    async with open_app(hooks(h={**KINDS[kind], "rate_per_s": 0}), Provider(REPLY)) as served:
        for payload in found:
            call = await post(served, json.dumps(payload).encode(), content_type="application/json")
            assert call.status < 500, (payload, call.body)
        served.assert_clean()


# -- the how-to page --------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs/how-to/webhooks.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)^```$(?:\n\n```json\n(.*?)^```$)?", PAGE, re.M | re.S)
SETTINGS = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)
SECRETS = {
    name: f"whsec_{hashlib.sha256(name.encode()).hexdigest()[:48]}" for name in re.findall(r'env = "(\w+)"', PAGE)
}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="needs curl and openssl")
def test_every_command_of_the_page(tmp_path: Path) -> None:
    """Each command runs as written, against a real process; a response has the fields that the page shows."""
    config = f'[upstreams.trigate]\nkind = "echo"\n{"".join(SETTINGS)}'
    with run_gateway(config, tmp_path, env={**SECRETS, "TRIGATE_STORE": str(tmp_path / "t.db")}) as gateway:
        for command, shown in COMMANDS:
            command = command.replace("http://127.0.0.1:18888", gateway.url).replace(
                "curl ", "curl -sS --fail-with-body "
            )
            done = subprocess.run(
                ["sh", "-e", "-c", command], env={**os.environ, **SECRETS}, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            if shown:
                assert list(json.loads(done.stdout)) == list(json.loads(shown)), command
            if "event-stream" in command:
                assert done.stdout.rstrip().endswith("data: [DONE]")
            if "--fail-with-body -i" in command:
                assert done.stdout.startswith("HTTP/1.1 202")
            if "for attempt" in command:
                assert len(set(re.findall(r'"id":"run_\w+"', done.stdout))) == 1
        assert "[error" not in gateway.log()
