"""``/api/chat`` and ``/api/generate`` as formats of clients."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.formats import Asked
from trigate.dialects.ollama.answer import Kind, LineEncoder, encode_answer, encode_loaded
from trigate.dialects.ollama.fields import FIELD_OF
from trigate.dialects.ollama.request import decode_chat, decode_generate
from trigate.dialects.ollama.values import asked_model
from trigate.dialects.vocabulary import Answer, Request
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

_INPUTS: Mapping[str, tuple[str, ...]] = {
    "/api/chat": ("messages",),
    "/api/generate": ("prompt", "images"),
    "/api/embed": ("input",),
    "/api/embeddings": ("prompt",),
}
_NO_EMBEDDING: Mapping[str, bytes] = {"/api/embed": b'{"embeddings":[]}', "/api/embeddings": b'{"embedding":[]}'}
_KINDS: Mapping[str, Kind] = {"/api/chat": "chat", "/api/generate": "generate"}


class OllamaClient:
    """A `formats.ClientFormat`.

    Args:
        path: The endpoint's.
    """

    field_of: Mapping[str, str] = FIELD_OF

    def __init__(self, path: str) -> None:
        self._kind = _KINDS[path]
        self._decode = decode_chat if self._kind == "chat" else decode_generate

    def decode_request(self, call: Call) -> tuple[Request, tuple[str, ...]]:
        """As `ClientFormat.decode_request`."""
        return self._decode(call.fields, stream=call.stream)

    def event_encoder(self, asked: Asked) -> LineEncoder:
        """As `ClientFormat.event_encoder`."""
        return LineEncoder(asked, self._kind)

    def encode_answer(self, answer: Answer, asked: Asked) -> bytes:
        """As `ClientFormat.encode_answer`."""
        return encode_answer(answer, asked, self._kind)


CLIENTS: Mapping[str, OllamaClient] = {path: OllamaClient(path) for path in _KINDS}
"""By the path of the endpoint."""


def answer_without_upstream(call: Call, now_ns: int) -> bytes | None:
    """Answers a call that has no message, prompt or input, and only asks to load a model, or (``keep_alive: 0``) to
    unload it. None = it is another one.

    Args:
        now_ns: The time, in nanoseconds since the epoch.
    """
    path = call.endpoint.path
    if not all(_is_empty(call, name) for name in _INPUTS[path]):
        return None
    if path not in _KINDS:
        return _NO_EMBEDDING[path]
    kind = _KINDS[path]
    keep_alive = decode_any(bytes(call.fields.get("keep_alive", b"null")))
    unloads = keep_alive in (0, "0", "0s", "0m") and not isinstance(keep_alive, bool)
    return encode_loaded(asked_model(call), now_ns, kind, "unload" if unloads else "load")


def _is_empty(call: Call, name: str) -> bool:
    raw = call.fields.get(name, b"null")
    return len(bytes(memoryview(raw)[:64])) < 64 and decode_any(bytes(raw)) in (None, "", [])
