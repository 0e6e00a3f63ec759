"""What becomes of each field of a request in Ollama's format that is translated.

The decoders act by these tables, and ``docs/reference/formats.md`` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.request_values import Fate

CHAT_FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "messages": "translated",
    "stream": "translated",
    "tools": "translated",
    "format": "translated",
    "think": "translated",
    "options": "translated",
    "keep_alive": "dropped",
    "truncate": "dropped",
    "shift": "dropped",
    "template": "refused",
    "logprobs": "refused",
    "top_logprobs": "refused",
}
"""The fields of ``/api/chat``. One that is not here is dropped: a client may be newer than the gateway."""

GENERATE_FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "prompt": "translated",
    "system": "translated",
    "images": "translated",
    "stream": "translated",
    "format": "translated",
    "think": "translated",
    "options": "translated",
    "keep_alive": "dropped",
    "truncate": "dropped",
    "shift": "dropped",
    "suffix": "refused",
    "template": "refused",
    "context": "refused",
    "raw": "refused",
    "logprobs": "refused",
    "top_logprobs": "refused",
    "width": "refused",
    "height": "refused",
    "steps": "refused",
}
"""The fields of ``/api/generate``. One that is not here is dropped."""

EMBED_FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "input": "translated",
    "prompt": "translated",
    "dimensions": "translated",
    "truncate": "dropped",
    "options": "dropped",
    "keep_alive": "dropped",
}
"""The fields of ``/api/embed``, and of ``/api/embeddings``, which has ``prompt`` in place of ``input``. One that is not
here is dropped."""

OPTIONS: Mapping[str, Fate] = {
    "num_predict": "translated",
    "temperature": "translated",
    "top_p": "translated",
    "top_k": "translated",
    "seed": "translated",
    "stop": "translated",
    "presence_penalty": "translated",
    "frequency_penalty": "translated",
}
"""The fields of ``options``. One that is not here is dropped, as ``options.NAME``: it is for the server that runs the
model."""

FIELD_OF: Mapping[str, str] = {
    "max_tokens": "options.num_predict",
    "temperature": "options.temperature",
    "top_p": "options.top_p",
    "top_k": "options.top_k",
    "seed": "options.seed",
    "stop": "options.stop",
    "presence_penalty": "options.presence_penalty",
    "frequency_penalty": "options.frequency_penalty",
    "effort": "think",
    "schema": "format",
    "is_json": "format",
}
"""The fields that an encoder of another format may drop, by their name in `vocabulary.Request`."""
