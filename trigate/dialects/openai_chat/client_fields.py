"""What becomes of each field of a request for a chat completion that is translated.

`decode_request` acts by these tables, and ``docs/reference/formats.md`` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.request_values import Fate

FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "messages": "translated",
    "stream": "translated",
    "stream_options": "translated",
    "max_completion_tokens": "translated",
    "max_tokens": "translated",
    "temperature": "translated",
    "top_p": "translated",
    "top_k": "translated",
    "stop": "translated",
    "tools": "translated",
    "tool_choice": "translated",
    "parallel_tool_calls": "translated",
    "functions": "translated",
    "function_call": "translated",
    "reasoning_effort": "translated",
    "response_format": "translated",
    "seed": "translated",
    "presence_penalty": "translated",
    "frequency_penalty": "translated",
    "user": "translated",
    "safety_identifier": "translated",
    "prompt_cache_key": "translated",
    "n": "translated",
    "modalities": "translated",
    "metadata": "dropped",
    "moderation": "dropped",
    "prediction": "dropped",
    "prompt_cache_options": "dropped",
    "prompt_cache_retention": "dropped",
    "service_tier": "dropped",
    "store": "dropped",
    "verbosity": "dropped",
    "audio": "refused",
    "logit_bias": "refused",
    "logprobs": "refused",
    "top_logprobs": "refused",
    "web_search_options": "refused",
}
"""The fields of a request. One that is not here is dropped: a client may be newer than the gateway."""

PARTS: Mapping[str, Fate] = {
    "text": "translated",
    "refusal": "translated",
    "image_url": "translated",
    "input_audio": "translated",
    "file": "translated",
}
"""The parts of messages. One that is not here is refused: without it, the conversation would be another one."""

FIELD_OF: Mapping[str, str] = {
    "cache": "prompt_cache_key",
    "effort": "reasoning_effort",
    "is_json": "response_format",
    "schema": "response_format",
    "strict": "tools.function.strict",
}
"""The fields that an encoder of another format may drop or refuse, by their name in `vocabulary.Request`."""
