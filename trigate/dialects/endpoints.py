"""The paths of the data plane in all formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import attrs

from trigate.dialects.gemini.paths import asks_for_events, model_and_method
from trigate.openai import endpoints
from trigate.openai.endpoints import Endpoint, make_endpoint
from trigate.openai.request import NOTHING, InPath

CHAT = endpoints.ENDPOINTS["/v1/chat/completions"]
RESPONSES = endpoints.ENDPOINTS["/v1/responses"]
MESSAGES = make_endpoint(
    "/messages",
    "message_stop",
    required=("max_tokens", "messages"),
    results="content",
    format="anthropic",
    keep_alive="ping",
)
COUNT_TOKENS = make_endpoint(
    "/messages/count_tokens", "message_stop", required=("messages",), results="input_tokens", format="anthropic"
)


def _gemini(method: str, *required: str, results: str) -> Endpoint:
    return Endpoint(
        path=f"/models/{{model}}:{method}",
        is_last_event=lambda _: False,  # the end of its body ends a stream
        end_markers=(),
        required=required,
        results=results,
        format="gemini",
        keep_alive="blank",
    )


GENERATE = _gemini("generateContent", "contents", results="candidates")
STREAM_GENERATE = _gemini("streamGenerateContent", "contents", results="candidates")
STREAM_GENERATE_ARRAY = attrs.evolve(
    STREAM_GENERATE,
    path=f"{STREAM_GENERATE.path}?alt=json",
    stream_type="application/json",
    keep_alive="none",
    around_error=(b",\r\n", b"]"),
)
_GEMINI: Mapping[str, Endpoint] = {
    "generateContent": GENERATE,
    "countTokens": _gemini("countTokens", results="totalTokens"),
    "embedContent": _gemini("embedContent", "content", results="embedding"),
    "batchEmbedContents": _gemini("batchEmbedContents", "requests", results="embeddings"),
}
"""By their methods; which endpoint streams depends on the query."""

_OLLAMA = {"format": "ollama", "stream_type": "application/x-ndjson", "keep_alive": "none"}
OLLAMA_CHAT = make_endpoint("/api/chat", results="message", streams_by_default=True, **_OLLAMA)
OLLAMA_GENERATE = make_endpoint("/api/generate", results="response", streams_by_default=True, **_OLLAMA)
OLLAMA_EMBED = make_endpoint("/api/embed", results="embeddings", **_OLLAMA)
OLLAMA_EMBEDDINGS = make_endpoint("/api/embeddings", results="embedding", **_OLLAMA)

ENDPOINTS: Mapping[str, Endpoint] = {
    **endpoints.ENDPOINTS,
    **{f"/v1{endpoint.path}": endpoint for endpoint in (MESSAGES, COUNT_TOKENS)},
    **{endpoint.path: endpoint for endpoint in (OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED, OLLAMA_EMBEDDINGS)},
}
"""The endpoints of the data plane by their paths."""


@attrs.frozen
class Found:
    """The endpoint of a path, and what the path says of the call."""

    endpoint: Endpoint
    in_path: InPath = NOTHING


def find_endpoint(path: str, query: bytes) -> Found | None:
    """Finds the endpoint of a path that is not one of `ENDPOINTS`, since it has the model in it; None = there is none.

    Args:
        path: Decoded from its percent encoding.
        query: The query, as it was received.
    """
    for find in _FINDERS:
        if (found := find(path, query)) is not None:
            return found
    return None


def _find_gemini(path: str, query: bytes) -> Found | None:
    found = model_and_method(path)
    if found is None:
        return None
    model, method = found
    if method == "streamGenerateContent":
        return Found(STREAM_GENERATE if asks_for_events(query) else STREAM_GENERATE_ARRAY, InPath(model, stream=True))
    endpoint = _GEMINI.get(method)
    return Found(endpoint, InPath(model, stream=False)) if endpoint is not None else None


_DEPLOYMENT = re.compile(
    r"/+(?:openai/+)?(?:v1/+)*deployments/+(?P<model>.+?)/+(?P<path>chat/+completions|completions|embeddings|responses"
    r"|images/+generations|audio/+speech)/*",
    re.DOTALL,
)


def _find_deployment(path: str, query: bytes) -> Found | None:
    """Finds the endpoint of a path as Azure has it. The model of the path counts, as Azure's deployment does."""
    found = _DEPLOYMENT.fullmatch(path)
    if found is None:
        return None
    tail = "/".join(filter(None, found["path"].split("/")))
    return Found(ENDPOINTS[f"/v1/{tail}"], InPath(found["model"], in_body=True))


_FINDERS: tuple[Callable[[str, bytes], Found | None], ...] = (_find_gemini, _find_deployment)
"""Each finds the endpoints of one format."""
