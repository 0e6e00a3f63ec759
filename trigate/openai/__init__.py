"""OpenAI's wire format, as far as the gateway acts on it. Pure: no clock, no socket, no await.

A request is forwarded as it came: its body is split into its top-level fields, each kept as the bytes that the client
sent, and joined again with another ``model``. The package knows no server, no upstream and no configuration.

Read first `request` (a client's call), then `stream` (an answer in events) and `answer` (an answer in one piece).
`accumulator` puts a streamed answer together again for a session; `conversion` makes events of JSON, and JSON of
events; `continuation` lets a second upstream continue a stream. `provider_error` reads what a provider says is wrong.

Source: OpenAI API reference (chat/completions, completions, embeddings, responses, moderations, audio/speech,
images/generations); which events end a stream is from its "Streaming" pages.
"""

from __future__ import annotations

from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage, decode_answer
from trigate.openai.continuation import ContinuationHead, continuation_head
from trigate.openai.endpoints import ENDPOINTS, Endpoint
from trigate.openai.request import Call, decode_call
from trigate.openai.stream import StreamReader

__all__ = [
    "ENDPOINTS",
    "AnswerAccumulator",
    "Call",
    "ContinuationHead",
    "Endpoint",
    "StreamReader",
    "Usage",
    "continuation_head",
    "decode_answer",
    "decode_call",
]
