"""The requests by which upstreams count the tokens of a prompt without answering it, in each format. Pure.

Such a request is made of the one that asks for the answer, as that is sent: its path and its body.

**Source:** Anthropic, "Count tokens in a Message"; Google, ``models.countTokens`` and Vertex AI's ``countTokens``;
OpenAI, "Get input token counts" (``/responses/input_tokens``); vLLM ``entrypoints/serve/tokenize/protocol.py``;
llama.cpp ``tools/server/README.md``. vLLM and llama.cpp both have ``/tokenize``, beside ``/v1`` and not below it, with
different fields.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.openai.answer import MAX_TOKENS
from trigate.openai.raw_json import decode_any, join_fields, split_fields

_DEFINED = ("anthropic", "gemini", "vertex")
"""The kinds whose format has an endpoint that counts."""
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "anthropic": (
        *("model", "messages", "system", "tools", "tool_choice", "thinking", "cache_control"),
        *("output_config", "output_format", "mcp_servers", "context_management"),
    ),
    "vertex": ("contents", "systemInstruction", "system_instruction", "tools", "generationConfig", "generation_config"),
    "responses": (
        *("model", "input", "instructions", "conversation", "previous_response_id", "tools", "tool_choice"),
        *("parallel_tool_calls", "reasoning", "text", "truncation"),
    ),
    "vllm": (
        *("model", "messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt"),
        *("continue_final_message", "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs"),
    ),
}
"""The fields that count: most of these endpoints refuse others, such as ``max_tokens``."""
_COUNTS = ("input_tokens", "totalTokens", "count")


@attrs.frozen
class CountRequest:
    """A request that counts.

    Attributes:
        path: Below the base URL of the upstream.
        at_root: The path is beside the version in that URL (``/v1``) instead of below it.
    """

    path: str
    body: bytes = attrs.field(repr=False)
    at_root: bool = False


def counts_tokens(config: UpstreamConfig) -> bool:
    """Whether an upstream is asked to count.

    Where the format has an endpoint for it, that is there to be used and costs nothing. OpenAI's chat completions have
    none, and what servers of that format have instead cannot be known.

    >>> counts_tokens(UpstreamConfig(kind="anthropic")), counts_tokens(UpstreamConfig(kind="openai"))
    (True, False)
    """
    return config.kind in _DEFINED if config.count_tokens is None else config.count_tokens


def count_requests(kind: str, path: str, body: bytes, model: str) -> tuple[CountRequest, ...]:
    """Returns the requests of which one may count the prompt of another request, in the order in which to try them.

    Args:
        kind: Of the upstream.
        path: Of the other request, below the base URL.
        body: Its body, a JSON object.
        model: The upstream's own model id.

    Raises:
        msgspec.DecodeError: The body is no JSON object.

    >>> count_requests("anthropic", "/messages", b'{"model":"m","max_tokens":9,"messages":[]}', "m")[0].body
    b'{"model":"m","messages":[]}'
    >>> count_requests("gemini", "/models/m:streamGenerateContent?alt=sse", b'{"contents":[]}', "m")[0].path
    '/models/m:countTokens'
    >>> count_requests("openai", "/embeddings", b'{"input":"a"}', "m")
    ()
    """
    fields = split_fields(body)
    if kind == "anthropic":
        return (CountRequest(f"{path}/count_tokens", _of(fields, "anthropic")),) if path == "/messages" else ()
    if kind in ("gemini", "vertex"):
        name, _, method = path.partition("?")[0].rpartition(":")
        if method not in ("generateContent", "streamGenerateContent"):
            return ()
        counted = _of(fields, "vertex") if kind == "vertex" else _generate_content_request(fields, model)
        return (CountRequest(f"{name}:countTokens", counted),)
    match path:
        case "/responses":
            return (CountRequest("/responses/input_tokens", _of(fields, "responses")),)
        case "/chat/completions":
            others = {name: value for name, value in fields.items() if name not in ("stream", "stream_options")}
            return (
                CountRequest("/tokenize", _of(fields, "vllm"), at_root=True),
                CountRequest("/chat/completions/input_tokens", join_fields(others)),
            )
        case "/completions" if bytes(memoryview(fields.get("prompt", msgspec.Raw()))[:1]) == b'"':
            prompt = fields["prompt"]
            own = {"model": msgspec.Raw(msgspec.json.encode(model)), "prompt": prompt}
            return (
                CountRequest("/tokenize", join_fields(own), at_root=True),
                CountRequest("/tokenize", b'{"content":%b,"add_special":true}' % bytes(prompt), at_root=True),
            )
    return ()


def decode_count(body: bytes) -> int | None:
    """Reads the count in the answer to such a request; None = there is none.

    >>> decode_count(b'{"input_tokens":9}'), decode_count(b'{"tokens":[5,6]}'), decode_count(b'{"tokens":[]}')
    (9, 2, None)
    """
    try:
        fields = split_fields(body)
    except (ValueError, RecursionError):
        return None
    name = next((name for name in (*_COUNTS, "tokens") if name in fields), None)
    found = decode_any(bytes(fields[name])) if name is not None else None
    if isinstance(found, list):
        found = len(found)
    return found if type(found) is int and 0 < found <= MAX_TOKENS else None


def _of(fields: Mapping[str, msgspec.Raw], format_: str) -> bytes:
    return join_fields({name: fields[name] for name in _FIELDS[format_] if name in fields})


def _generate_content_request(fields: Mapping[str, msgspec.Raw], model: str) -> bytes:
    """Google's API for developers counts more than the contents only in this field, which names the model again."""
    name = model if model.startswith("tunedModels/") else f"models/{model}"
    named = {**fields, "model": msgspec.Raw(msgspec.json.encode(name))}
    return b'{"generateContentRequest":%b}' % join_fields(named)
