"""Ollama's format: of calls (``/api/chat``, ``/api/generate``, ``/api/embed``), of lists of models, and of errors.

Answers are streamed unless the client asks for a plain one, and a stream is newline-delimited JSON: one object a line,
the last of which has ``done: true``. An error in a stream is a line ``{"error": "…"}``.

Source: Ollama's API reference (``docs/api.md``), its ``api/types.go`` and ``server/routes.go``, and what its SDK for
Python and Open WebUI read.
"""

from __future__ import annotations

from trigate.dialects.ollama.client import CLIENTS, OllamaClient, answer_without_upstream
from trigate.dialects.ollama.embed import EMBEDDINGS, EmbedCall, EmbeddingsCall
from trigate.dialects.ollama.errors import error_line, error_response
from trigate.dialects.ollama.models import VERSION, encode_show, encode_tag, names_of
from trigate.dialects.ollama.upstream import OllamaRelay, OllamaUpstream

__all__ = [
    "CLIENTS",
    "EMBEDDINGS",
    "VERSION",
    "EmbedCall",
    "EmbeddingsCall",
    "OllamaClient",
    "OllamaRelay",
    "OllamaUpstream",
    "answer_without_upstream",
    "encode_show",
    "encode_tag",
    "error_line",
    "error_response",
    "names_of",
]
