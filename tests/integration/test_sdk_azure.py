"""The client for Azure of OpenAI's Python SDK against a real gateway, over an upstream of OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.processes import configuration, run_gateway
from tests.support.scripted_upstream import EMBEDDING, TEXT, open_upstream

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
ASK: dict[str, Any] = {"model": "mock/hello", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a gateway with a key."""
    with open_upstream() as upstream:
        config = configuration(upstream, more=f'[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway.url


def open_client(url: str, **settings: Any) -> Any:
    """Opens a client that makes each call once."""
    settings = {"api_key": KEY, **settings}
    return openai.AzureOpenAI(azure_endpoint=url, api_version="2024-10-21", max_retries=0, **settings)


@pytest.fixture(params=[None, "mock/hello"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    """A client with a deployment of its own, or with one for each call."""
    with open_client(url, azure_deployment=request.param) as made:
        yield made


def test_calls(client: Any) -> None:
    """A plain answer, a stream, and embeddings."""
    answer = client.chat.completions.create(**ASK)
    assert (answer.choices[0].message.content, answer.model) == (TEXT, "mock/hello")
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    row = client.embeddings.create(model="mock/hello", input="a").data[0]
    assert row.embedding == list(EMBEDDING)


def test_what_is_no_deployment(url: str) -> None:
    """The models, and response calls, are below ``/openai``."""
    with open_client(url) as client:
        assert "mock/hello" in [model.id for model in client.models.list()]
        assert client.responses.create(model="mock/hello", input="Hello").output_text == TEXT


def test_errors(url: str) -> None:
    """Each status is the exception that the SDK has for it."""
    with open_client(url) as client:
        for model, kind in (("mock/status-429", openai.RateLimitError), ("nobody/x", openai.NotFoundError)):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(**{**ASK, "model": model})
            assert caught.value.code
    with open_client(url, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**ASK)
