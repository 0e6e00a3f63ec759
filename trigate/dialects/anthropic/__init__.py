"""Anthropic's Messages, as a client's and as an upstream's format. The modules ``upstream_…`` and `traits` are for
upstreams: they encode requests, and decode answers and events. The others are for clients.

Source: Anthropic API reference ("Messages", "Streaming messages", "Errors"), and what the SDKs of Anthropic require of
an answer (anthropic-sdk-python ``lib/streaming/_messages.py``): ``message_start`` comes before everything else, and
only events whose name is that of their type are read.
"""

from __future__ import annotations

from trigate.dialects.anthropic.betas import with_betas
from trigate.dialects.anthropic.client import MessagesClient
from trigate.dialects.anthropic.errors import error_frame, error_response
from trigate.dialects.anthropic.events import PING
from trigate.dialects.anthropic.models import encode_model, encode_model_list
from trigate.dialects.anthropic.signatures import may_have_own_reasoning, without_own_reasoning
from trigate.dialects.anthropic.upstream import MessagesUpstream

__all__ = [
    "PING",
    "MessagesClient",
    "MessagesUpstream",
    "encode_model",
    "encode_model_list",
    "error_frame",
    "error_response",
    "may_have_own_reasoning",
    "with_betas",
    "without_own_reasoning",
]
