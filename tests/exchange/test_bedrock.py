"""Upstreams of kind ``bedrock`` end to end, in memory: signatures, framing, and errors before and within a stream."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from tests.dialects.event_stream import delta, end, frame, start, stop
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, make_config
from tests.support.gateway import Served as Open
from tests.support.provider import Break, Head, Provider, Say, Script, Served, answers
from trigate.dialects.bedrock.framing import EVENT_STREAM

MODEL = "arn:aws:bedrock:eu-central-1:1:inference-profile/eu.amazon.nova-pro-v1:0"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
HEAD = Head(content_type=EVENT_STREAM)
STREAM = (HEAD, Say(start()), Say(delta(0, text="Hel")), Say(delta(0, text="lo")), Say(stop(0) + end()))


def bedrock(**settings: Any) -> Any:  # Any: a Config
    """The upstream ``up`` at Bedrock, with one model."""
    table = {"kind": "bedrock", "region": "eu-central-1", "models": [MODEL], **settings}
    return make_config({"up": table})


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts keys into the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def ask(served: Open, *, stream: bool = True, **fields: Any) -> ClientCall:
    """Starts a call in Anthropic's format."""
    body = {"model": MODEL, "max_tokens": 9, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
    return served.client.start("POST", "/v1/messages", {**body, **fields}, headers={"anthropic-beta": "x"})


async def answered(open_app: OpenApp, config: Any, script: Script, **fields: Any) -> tuple[ClientCall, list[Served]]:
    """Makes a call; returns it, and what the provider got."""
    async with open_app(config, Provider(script)) as served:
        call = await ask(served, **fields).wait()
        served.assert_clean()
        return call, served.providers["up"].calls


def assert_signed(sent: Served, *, region: str, secret: str) -> None:
    """Verifies the signature of a request as AWS describes it: from what has arrived, and the secret key."""
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8})/([\w-]+)/bedrock/aws4_request, "
        r"SignedHeaders=([\w;-]+), Signature=([0-9a-f]{64})",
        sent.headers["authorization"],
    )
    assert found is not None
    key, day, found_region, names, signature = found.groups()
    assert (key, found_region) == ("AKIDEXAMPLE", region)
    assert {"host", "x-amz-date"} <= set(names.split(";"))
    assert sent.headers["x-amz-date"].startswith(day)
    where, _, query = sent.target.partition("?")
    assert not query
    fields = "".join(f"{name}:{sent.headers[name]}\n" for name in names.split(";"))
    body_hash = hashlib.sha256(sent.body).hexdigest()
    canonical = f"{sent.method}\n{quote(where, safe='/-_.~')}\n\n{fields}\n{names}\n{body_hash}"
    scope = f"{day}/{region}/bedrock/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{sent.headers['x-amz-date']}\n{scope}\n{hashed}"
    signing = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        signing = hmac.new(signing, part.encode(), hashlib.sha256).digest()
    assert hmac.new(signing, text.encode(), hashlib.sha256).hexdigest() == signature


async def test_a_signed_stream(open_app: OpenApp) -> None:
    """The request is signed as it arrives, its model is one segment of the path, and its events reach the client."""
    call, [sent] = await answered(open_app, bedrock(), STREAM)
    assert sent.target == f"/model/{quote(MODEL, safe='')}/converse-stream"
    assert sent.headers["host"] == "bedrock-runtime.eu-central-1.amazonaws.com"
    assert_signed(sent, region="eu-central-1", secret=SECRET)
    assert "anthropic-beta" not in sent.headers
    assert call.status == 200
    assert re.findall(rb'"text":"([^"]+)"', call.body) == [b"Hel", b"lo"]
    assert call.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert SECRET.encode() not in sent.body
    assert all(SECRET not in value for value in sent.headers.values())


@pytest.mark.parametrize("model", [".", ".."])
async def test_a_model_that_is_no_name(open_app: OpenApp, model: str) -> None:
    """No model id leads to another path than that of a model."""
    call, sent = await answered(open_app, bedrock(), STREAM, model=f"up/{model}")
    assert (call.status, call.json["error"]["type"]) == (404, "not_found_error")
    assert sent == []


async def test_temporary_keys(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their token is sent, and signed."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token+of/session==")
    script = answers(_plain("Hello"))
    call, [sent] = await answered(open_app, bedrock(region="cn-north-1"), script, stream=False)
    assert sent.target.endswith("/converse")
    assert sent.headers["host"] == "bedrock-runtime.cn-north-1.amazonaws.com.cn"
    assert sent.headers["x-amz-security-token"] == "token+of/session=="
    assert "x-amz-security-token" in sent.headers["authorization"]
    assert_signed(sent, region="cn-north-1", secret=SECRET)
    assert call.json["content"] == [{"type": "text", "text": "Hello"}]
    assert call.json["usage"]["input_tokens"] == 30


def _plain(text: str) -> bytes:
    message = {"role": "assistant", "content": [{"text": text}]}
    usage = {"inputTokens": 30, "outputTokens": 20, "totalTokens": 50}
    return json.dumps({"output": {"message": message}, "stopReason": "end_turn", "usage": usage}).encode()


async def test_a_large_body(open_app: OpenApp) -> None:
    """It is hashed in a thread, and signed all the same."""
    text = "x" * (2 * 1024 * 1024)
    call, [sent] = await answered(open_app, bedrock(), STREAM, messages=[{"role": "user", "content": text}])
    assert call.status == 200
    assert_signed(sent, region="eu-central-1", secret=SECRET)


async def test_a_key_of_bedrock(open_app: OpenApp) -> None:
    """It is a bearer token, and nothing is signed."""
    _, [sent] = await answered(open_app, bedrock(api_key="bedrock-api-key"), STREAM)
    assert sent.headers["authorization"] == "Bearer bedrock-api-key"
    assert "x-amz-date" not in sent.headers


async def test_keys_of_the_library(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a profile, the library finds the keys; they are fetched once."""
    profiles = []

    class Session:
        """`botocore.session.Session`, as far as it is used."""

        def __init__(self, profile: str | None) -> None:
            profiles.append(profile)

        def get_credentials(self) -> Any:
            keys = SimpleNamespace(access_key="AKIDEXAMPLE", secret_key="of the profile", token=None)
            return SimpleNamespace(get_frozen_credentials=lambda: keys)

    module = ModuleType("botocore.session")
    module.Session = Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "botocore", ModuleType("botocore"))
    monkeypatch.setitem(sys.modules, "botocore.session", module)
    async with open_app(bedrock(profile="work"), Provider(STREAM)) as served:
        for _ in range(2):
            assert (await ask(served).wait()).status == 200
        for sent in served.providers["up"].calls:
            assert_signed(sent, region="eu-central-1", secret="of the profile")
    assert profiles == ["work"]


async def test_without_keys(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do, and nothing is sent."""
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    call, sent = await answered(open_app, bedrock(), STREAM)
    assert call.status == 529
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in call.json["error"]["message"]
    assert "trigate[bedrock]" in call.json["error"]["message"]
    assert sent == []


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "message", "expected"),
    [
        ("ThrottlingException", 429, "Too many tokens, please wait before trying again.", (429, "rate_limit_error")),
        ("ValidationException", 400, "Input is too long for requested model.", (400, "invalid_request_error")),
        ("AccessDeniedException", 403, "You don't have access to the model.", (403, "permission_error")),
        ("ModelTimeoutException", 408, "Model processing time exceeded.", (500, "api_error")),
        ("ModelErrorException", 424, "The model returned an error.", (500, "api_error")),
        ("ServiceUnavailableException", 503, "Bedrock is unable to process your request.", (529, "overloaded_error")),
    ],
)
async def test_an_error_before_the_answer(
    open_app: OpenApp, name: str, status: int, message: str, expected: tuple[int, str]
) -> None:
    """It has Bedrock's message, and the status that clients of the format know; the last two are the model's fault."""
    script = answers(json.dumps({"message": message}).encode(), status=status, headers={"x-amzn-errortype": name})
    call, _ = await answered(open_app, bedrock(), script)
    error = call.json["error"]
    assert error["type"] == expected[1]
    if status == 400:
        assert error["message"].startswith("prompt is too long")
    else:
        assert message in error["message"]
    assert call.status == expected[0] or (expected[0] == 500 and call.status >= 500)


async def test_a_failed_model_leads_to_the_next_target(open_app: OpenApp) -> None:
    """What Bedrock says of a model that failed or took too long is no error of the call."""
    table = {"kind": "bedrock", "region": "eu-central-1", "models": [MODEL]}
    models = {"both": {"targets": [f"up/{MODEL}", f"other/{MODEL}"]}}
    config = make_config({"up": table, "other": table}, models=models)
    failing = Provider(answers(b'{"message":"The model returned an error."}', status=424))
    async with open_app(config, {"up": failing, "other": Provider(STREAM)}) as served:
        call = await ask(served, model="both").wait()
    assert call.status == 200
    assert b"Hel" in call.body


async def test_an_exception_within_the_stream(open_app: OpenApp) -> None:
    """After the first content, it is an error event; before it, a status."""
    exception = frame("modelStreamErrorException", {"message": "The stream broke."}, kind="exception")
    call, _ = await answered(open_app, bedrock(), (HEAD, Say(start() + delta(0, text="a")), Say(exception)))
    assert call.status == 200
    assert b"The stream broke." in call.body
    assert b"event: error" in call.body
    assert b"message_stop" not in call.body
    throttled = frame("throttlingException", {"message": "Slow down."}, kind="exception")
    call, _ = await answered(open_app, bedrock(), (HEAD, Say(start()), Say(throttled)))
    assert (call.status, call.json["error"]["message"]) == (429, "Slow down.")


@pytest.mark.parametrize("damage", [0, 9, 20, -3])
async def test_a_damaged_stream(open_app: OpenApp, damage: int) -> None:
    """A wrong checksum ends the stream with an error."""
    broken = bytearray(delta(0, text="lo"))
    broken[damage] ^= 1
    script = (HEAD, Say(start() + delta(0, text="Hel")), Say(bytes(broken)), Say(stop(0) + end()))
    call, _ = await answered(open_app, bedrock(), script)
    assert b"Hel" in call.body
    assert b"sent a broken stream" in call.body
    assert b"message_stop" not in call.body


async def test_a_cut_stream(open_app: OpenApp) -> None:
    """A connection that breaks off is no end."""
    script = (HEAD, Say(start() + delta(0, text="Hel") + delta(0, text="lo")[:20]), Break())
    call, _ = await answered(open_app, bedrock(), script)
    assert b"event: error" in call.body
    assert b"message_stop" not in call.body
