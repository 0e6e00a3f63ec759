"""The token counts of a stream, which the gateway asks for although the client did not: it has to know them. Pure.

**Source:** OpenAI's ``stream_options.include_usage``: one more chunk comes before ``[DONE]``, without choices. Mistral
refuses the field and always counts; Azure knows it since the API of September 2024.
"""

from __future__ import annotations

import functools
from urllib.parse import urlsplit

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.openai.raw_json import decode_any, join_fields
from trigate.openai.request import Call

_REFUSING = ("api.mistral.ai",)
_FIRST_OF_AZURE = "2024-09-01"
_ADDED = b'"stream_options":{"include_usage":true}}'


def takes_include_usage(config: UpstreamConfig) -> bool:
    """Whether an upstream is asked for the token counts of streams.

    >>> takes_include_usage(UpstreamConfig(api_version="2024-02-01")), takes_include_usage(UpstreamConfig())
    (False, True)
    """
    if config.include_usage is not None:
        return config.include_usage
    return _is_known_to_take(config.base_url, config.api_version)


@functools.lru_cache(maxsize=256)
def _is_known_to_take(base_url: str | None, api_version: str | None) -> bool:
    if api_version is not None and api_version[:1] == "2" and api_version < _FIRST_OF_AZURE:
        return False
    return (urlsplit(base_url).hostname if base_url else None) not in _REFUSING


def is_counted_for_gateway(call: Call) -> bool:
    """Whether a call is one whose token counts only the gateway wants: a stream of choices whose client did not ask."""
    if not call.stream or not call.endpoint.needs_finish_reason:
        return False
    if "stream_options" not in call.fields:
        return True
    options = decode_any(bytes(call.fields["stream_options"]))
    return not (isinstance(options, dict) and options.get("include_usage") is True)


def with_include_usage(body: bytes, call: Call, model: bytes) -> bytes:
    """Returns the body of such a call, with the question added.

    Args:
        body: The call's body, with the upstream's model id.
        model: That id, as JSON.
    """
    if "stream_options" not in call.fields:
        at = body.rfind(b"}")
        return b"".join((memoryview(body)[:at], b"," if call.fields else b"", _ADDED))
    options = decode_any(bytes(call.fields["stream_options"]))
    asked = msgspec.json.encode({**(options if isinstance(options, dict) else {}), "include_usage": True})
    fields = {**call.fields, "stream_options": msgspec.Raw(asked)}
    return join_fields(fields, model) if call.names_model else join_fields(fields)
