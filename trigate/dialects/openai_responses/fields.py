"""What becomes of each field, input item and tool of a response call that is translated.

`decode_request` acts by these tables, and ``docs/reference/formats.md`` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.request_values import Fate

FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "input": "translated",
    "instructions": "translated",
    "tools": "translated",
    "tool_choice": "translated",
    "parallel_tool_calls": "translated",
    "reasoning": "translated",
    "text": "translated",
    "max_output_tokens": "translated",
    "temperature": "translated",
    "top_p": "translated",
    "stream": "translated",
    "include": "translated",
    "user": "translated",
    "safety_identifier": "translated",
    "store": "translated",
    "previous_response_id": "translated",
    "background": "translated",
    "metadata": "translated",
    "truncation": "translated",
    "stream_options": "translated",
    "service_tier": "translated",
    "top_logprobs": "translated",
    "prompt_cache_key": "translated",
    "prompt_cache_retention": "dropped",
    "client_metadata": "dropped",
    "max_tool_calls": "dropped",
    "context_management": "dropped",
    "conversation": "refused",
    "prompt": "refused",
}
"""The fields of a request. One that is not here is dropped: a client may be newer than the gateway."""

ITEMS: Mapping[str, Fate] = {
    "message": "translated",
    "function_call": "translated",
    "function_call_output": "translated",
    "custom_tool_call": "translated",
    "custom_tool_call_output": "translated",
    "reasoning": "translated",
    "item_reference": "translated",
    "web_search_call": "dropped",
    "compaction_trigger": "dropped",
}
"""The items of the input. One that is not here is refused: without it, the conversation would be another one."""

CONTENT: Mapping[str, Fate] = {
    "input_text": "translated",
    "output_text": "translated",
    "refusal": "translated",
    "input_image": "translated",
    "input_file": "translated",
    "input_audio": "translated",
}
"""The parts of a message and of a tool's output. One that is not here is refused."""

TOOLS: Mapping[str, Fate] = {
    "function": "translated",
    "custom": "translated",
    "namespace": "translated",
}
"""The tools. One that is not here runs at OpenAI, and is refused: without it, the answer would be another one."""

FIELD_OF: Mapping[str, str] = {
    "cache": "prompt_cache_key",
    "effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "reasoning": "reasoning.encrypted_content",
    "schema": "text.format",
    "user": "safety_identifier",
}
"""The fields that an encoder of another format may drop, by their name in `vocabulary.Request`."""
