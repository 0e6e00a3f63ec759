"""OpenAI's chat completions, as a client's and as an upstream's format. The modules ``client_…`` are for clients: they
decode requests, and encode answers and events. The others are for upstreams.

It also has OpenAI's errors, which clients get.

Servers that are said to be compatible differ in details. `traits` has what they are known to take; the decoders take
every spelling that is known, and refuse only what makes no sense.

Source: OpenAI API reference ("Chat completions", "The chat completion chunk object"); for reasoning, the documentation
of DeepSeek (``reasoning_content``), Groq and OpenRouter (``reasoning``, ``reasoning_details``) and vLLM
(``stop_reason``).
"""

from __future__ import annotations

from trigate.dialects.openai_chat.client import ChatClient
from trigate.dialects.openai_chat.errors import error_frame, error_response
from trigate.dialects.openai_chat.system_role import with_system_role
from trigate.dialects.openai_chat.think_tags import TagSplitter, with_reasoning_field
from trigate.dialects.openai_chat.traits import takes_developer
from trigate.dialects.openai_chat.upstream import ChatUpstream

__all__ = [
    "ChatClient",
    "ChatUpstream",
    "TagSplitter",
    "error_frame",
    "error_response",
    "takes_developer",
    "with_reasoning_field",
    "with_system_role",
]
