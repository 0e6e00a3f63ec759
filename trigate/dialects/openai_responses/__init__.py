"""OpenAI's Responses, as a client's format: decodes requests, encodes answers and events.

Source: OpenAI API reference ("Responses", "Streaming events"), and what Codex reads of a stream: the content of an
answer is that of its ``response.output_item.done``, and a stream without its last event is a failed one.
"""

from __future__ import annotations

from trigate.dialects.openai_responses.client import ResponsesClient
from trigate.dialects.openai_responses.errors import failed_response, overloaded_response, response_failed
from trigate.dialects.openai_responses.history import without_own_reasoning
from trigate.dialects.openai_responses.response import response_head

__all__ = [
    "ResponsesClient",
    "failed_response",
    "overloaded_response",
    "response_failed",
    "response_head",
    "without_own_reasoning",
]
