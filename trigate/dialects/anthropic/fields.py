"""What becomes of each field of a request in Anthropic's format that is translated.

`decode_request` acts by these tables, and ``docs/reference/formats.md`` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.request_values import Fate

FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "messages": "translated",
    "system": "translated",
    "max_tokens": "translated",
    "stream": "translated",
    "temperature": "translated",
    "top_p": "translated",
    "top_k": "translated",
    "stop_sequences": "translated",
    "tools": "translated",
    "tool_choice": "translated",
    "thinking": "translated",
    "output_config": "translated",
    "metadata": "translated",
    "cache_control": "dropped",
    "context_management": "dropped",
    "service_tier": "dropped",
    "inference_geo": "dropped",
    "speed": "dropped",
    "betas": "dropped",
    "tags": "dropped",
    "container": "refused",
    "mcp_servers": "refused",
    "safeguards": "refused",
}
"""The fields of a request. One that is not here is dropped: a client may be newer than the gateway."""

BLOCKS: Mapping[str, Fate] = {
    "text": "translated",
    "image": "translated",
    "document": "translated",
    "search_result": "translated",
    "tool_use": "translated",
    "tool_result": "translated",
    "thinking": "translated",
    "redacted_thinking": "translated",
    "mid_conv_system": "translated",
}
"""The blocks of messages. One that is not here is refused: without it, the conversation would be another one."""

FIELD_OF: Mapping[str, str] = {
    "effort": "output_config.effort",
    "reasoning": "thinking",
    "schema": "output_config.format",
    "stop": "stop_sequences",
    "user": "metadata.user_id",
}
"""The fields that an encoder of another format may drop or refuse, by their name in `vocabulary.Request`."""
