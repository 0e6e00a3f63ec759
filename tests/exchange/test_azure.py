"""Upstreams of kind ``azure`` end to end, in memory: where calls go, with which credentials, and what comes back."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.gateway import OpenApp, make_config
from tests.support.provider import DONE, Head, Provider, Say, Served, answers, completion, content, event, says
from trigate.upstream.auth import CredentialsError, entra

RESOURCE = "https://name.openai.azure.com"
KEY = "key-of-the-resource"
FILTER_RESULTS = {"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}


def azure(**settings: Any) -> Any:  # Any: a Config
    """The upstream ``up`` at Azure, with one deployment."""
    table = {"kind": "azure", "base_url": RESOURCE, "api_key": KEY, "models": ["my gpt"], **settings}
    return make_config({"up": {name: value for name, value in table.items() if value is not None}})


async def sent_by(
    open_app: OpenApp, config: Any, path: str, **fields: Any
) -> tuple[Served, Any]:  # Any: a Config; a ClientCall
    """Makes a call; returns what the provider got, and the call."""
    body = {"model": "up/my gpt", "messages": [{"role": "user", "content": "Hi"}], **fields}
    script = says("Hello") if fields.get("stream") else answers(completion("Hello"))
    async with open_app(config, Provider(script)) as served:
        call = await served.client.start("POST", path, body).wait()
        served.assert_clean()
        [sent] = served.providers["up"].calls
        return sent, call


@pytest.mark.parametrize("stream", [False, True])
async def test_version_1(open_app: OpenApp, stream: bool) -> None:
    """The API of version 1 has the deployment in the body, and the key in a header of its own. Only the model id of the
    body changes."""
    sent, call = await sent_by(open_app, azure(), "/v1/chat/completions", stream=stream, new_field=[1.0])
    assert (sent.path, call.status) == ("/openai/v1/chat/completions", 200)
    assert sent.headers["api-key"] == KEY
    assert "authorization" not in sent.headers
    assert json.loads(sent.body) == {
        "model": "my gpt",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": stream,
        "new_field": [1.0],
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }


async def test_the_older_api(open_app: OpenApp) -> None:
    """It has the deployment in the path, percent-encoded, and its version in the query."""
    config = azure(api_version="2024-10-21", base_url=f"{RESOURCE}/openai/")
    sent, call = await sent_by(open_app, config, "/v1/chat/completions")
    assert sent.target == "/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21"
    assert call.status == 200


@pytest.mark.parametrize("model", [".", ".."])
async def test_a_deployment_that_is_no_name(open_app: OpenApp, model: str) -> None:
    """No model id leads to another path than that of a deployment."""
    async with open_app(azure(api_version="2024-10-21"), Provider(says("a"))) as served:
        body = {"model": f"up/{model}", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.start("POST", "/v1/chat/completions", body).wait()
        assert not served.providers["up"].calls
        served.assert_clean()
    assert (call.status, call.json["error"]["code"]) == (404, "model_not_found")


async def test_a_translated_call(open_app: OpenApp) -> None:
    """A call in another format goes to the same place."""
    sent, call = await sent_by(open_app, azure(api_version="2024-10-21"), "/v1/messages", max_tokens=9, stream=True)
    assert sent.target == "/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21"
    assert json.loads(sent.body)["max_completion_tokens"] == 9
    assert b'"text":"Hello"' in call.body


async def test_events_of_the_content_filter(open_app: OpenApp) -> None:
    """The results for the prompt come first, in an event without choices, and those for the answer among it."""
    first = event({"choices": [], "prompt_filter_results": [FILTER_RESULTS], "model": "", "id": "", "created": 0})
    empty = {"index": 0, "finish_reason": None, "content_filter_offsets": {"start_offset": 0}, "delta": {}}
    script = (Say(first), Say(content("Hel")), Say(event({"choices": [empty]})), Say(content("lo")), Say(DONE))
    for path, fields in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 9})):
        async with open_app(azure(), Provider(script)) as served:
            body = {"model": "my gpt", "stream": True, "messages": [{"role": "user", "content": "Hi"}], **fields}
            call = await served.client.start("POST", path, body).wait()
            served.assert_clean()
        assert call.status == 200
        assert call.body.index(b'"Hel"') < call.body.index(b'"lo"')
        assert b"error" not in call.body
        if path == "/v1/chat/completions":
            assert b"prompt_filter_results" in call.body


async def test_a_prompt_that_the_filter_refuses(open_app: OpenApp) -> None:
    """Its error reaches the client as it is: with its code, and what the filter found."""
    error = {
        "message": "The response was filtered due to the prompt triggering the content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}},
    }
    script = answers(json.dumps({"error": error}).encode(), status=400)
    async with open_app(azure(), Provider(script)) as served:
        body = {"model": "my gpt", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.start("POST", "/v1/chat/completions", body).wait()
    assert (call.status, call.json) == (400, {"error": error})


async def test_other_errors(open_app: OpenApp) -> None:
    """A refused key has a shape of its own; a throttled call says when to try again."""
    unauthorized = {"statusCode": 401, "message": f"Unauthorized. Access token is missing, {KEY} is invalid."}
    throttled = {"error": {"code": "429", "message": "Requests have exceeded the token rate limit."}}
    body = {"model": "my gpt", "messages": [{"role": "user", "content": "Hi"}]}
    script = answers(json.dumps(unauthorized).encode(), status=401)
    async with open_app(azure(), Provider(script)) as served:
        call = await served.client.start("POST", "/v1/chat/completions", body).wait()
    assert (call.status, call.json["error"]["message"]) == (
        401,
        "Unauthorized. Access token is missing, [redacted] is invalid.",
    )
    script = (Head(429, "application/json", {"retry-after": "7"}), Say(json.dumps(throttled).encode()))
    async with open_app(azure(), Provider(script)) as served:
        call = await served.client.start("POST", "/v1/chat/completions", body).wait()
    assert (call.status, call.header("retry-after")) == (429, "7")


# -- Entra ID ---------------------------------------------------------------------------------------------------------


class Credential:
    """`azure.identity.DefaultAzureCredential`, as far as it is used."""

    scopes: list[str] = []  # noqa: RUF012  # of the class, as each fetch makes an object

    def __enter__(self) -> Credential:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_token(self, scope: str) -> SimpleNamespace:
        self.scopes.append(scope)
        return SimpleNamespace(token=f"token-{len(self.scopes)}", expires_on=4102444800)


@pytest.fixture
def azure_identity(monkeypatch: pytest.MonkeyPatch) -> type[Credential]:
    """Puts the credential in the place of the library."""
    module = ModuleType("azure.identity")
    module.DefaultAzureCredential = Credential  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "azure", ModuleType("azure"))
    monkeypatch.setitem(sys.modules, "azure.identity", module)
    Credential.scopes = []
    return Credential


async def test_a_token_of_entra_id(open_app: OpenApp, azure_identity: type[Credential]) -> None:
    """Without a key, calls have a token for the cloud of the resource, which is fetched once."""
    config = azure(api_key=None, base_url="https://name.openai.azure.us")
    async with open_app(config, Provider(says("a"))) as served:
        for _ in range(2):
            body = {"model": "my gpt", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
            call = await served.client.start("POST", "/v1/chat/completions", body).wait()
            assert call.status == 200
        tokens = [sent.headers["authorization"] for sent in served.providers["up"].calls]
    assert tokens == ["Bearer token-1"] * 2
    assert azure_identity.scopes == ["https://cognitiveservices.azure.us/.default"]


async def test_without_the_library(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, and nothing is sent."""
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(CredentialsError, match=r"install trigate\[azure\]"):
        entra.fetch_token("scope")
    async with open_app(azure(api_key=None), Provider(says("a"))) as served:
        body = {"model": "my gpt", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.start("POST", "/v1/chat/completions", body).wait()
        assert not served.providers["up"].calls
    assert call.status == 503
    assert "install trigate[azure]" in call.json["error"]["message"]


async def test_a_header_in_place_of_a_key(open_app: OpenApp) -> None:
    """A token that is configured as a header is sent, and no other one is fetched."""
    sent, _ = await sent_by(
        open_app, azure(api_key=None, headers={"Authorization": "Bearer abc"}), "/v1/chat/completions"
    )
    assert sent.headers["authorization"] == "Bearer abc"
