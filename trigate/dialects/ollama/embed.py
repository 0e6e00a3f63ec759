"""Embeddings: ``/api/embed`` and ``/api/embeddings`` over OpenAI's ``/embeddings``, and the other way round.

They have no place in the vocabulary, which is for conversations, so each direction is translated by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.ollama.fields import EMBED_FIELDS
from trigate.dialects.ollama.values import Json, asked_model, whole_at
from trigate.dialects.request_values import decode_fields, shown
from trigate.errors import BadRequest, ProtocolViolation, Untranslatable
from trigate.openai import answer as openai_answer
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS, Format
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

_OPENAI = ENDPOINTS["/v1/embeddings"]


class _Embedding:
    """A call that is never streamed. A `trigate.exchange.translation.Translation`.

    Attributes:
        dropped: The names of the advisory fields that were dropped.
    """

    stream_types: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.dropped: tuple[str, ...] = ()

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """All of them."""
        return headers

    def stream_reader(self, call: Call, **settings: Any) -> NoReturn:  # Any: what only streams need
        """There is no stream."""
        raise _no_stream()

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """There is no stream."""
        raise _no_stream()

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        """There is no stream."""
        raise ProtocolViolation(f"The upstream {upstream} answered with a stream that was not asked for.")


def _no_stream() -> BadRequest:
    return BadRequest("Embeddings cannot be streamed.", param="stream")


class EmbedCall(_Embedding):
    """A call in Ollama's format, over OpenAI's ``/embeddings``.

    Raises:
        BadRequest: A field is malformed.
    """

    def __init__(self, call: Call, clock: Callable[[], int]) -> None:
        super().__init__()
        self._clock, self._began_ns = clock, clock()
        dropped: set[str] = set()
        values = decode_fields(call.fields, EMBED_FIELDS, dropped)
        self._is_old = call.endpoint.path == "/api/embeddings"
        self._fields: Json = {"input": _texts(values, "prompt" if self._is_old else "input")}
        if (dimensions := whole_at(values, "dimensions", "dimensions")) is not None:
            self._fields["dimensions"] = dimensions
        self._count = len(self._fields["input"]) if isinstance(self._fields["input"], list) else 1
        self.dropped = tuple(sorted(dropped))

    def path(self, call: Call, model: str) -> str:
        """Where the call goes."""
        return _OPENAI.path

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body."""
        return msgspec.json.encode({"model": model, **self._fields, "encoding_format": "float"})

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Translates the answer; the vectors are in the order of the texts. Raises ProtocolViolation."""
        body, usage = openai_answer.decode_answer(body, _OPENAI, model=None, upstream=upstream)
        vectors: list[Any] = [None] * self._count
        for at, row in enumerate((decode_any(body) or {}).get("data") or ()):
            index = row.get("index", at) if isinstance(row, dict) else None
            if type(index) is not int or not 0 <= index < self._count or not isinstance(row.get("embedding"), list):
                raise ProtocolViolation(f"The upstream {upstream} answered with something that is no embedding.")
            vectors[index] = row["embedding"]
        if None in vectors:
            raise ProtocolViolation(f"The upstream {upstream} did not answer with one embedding for each text.")
        if self._is_old:
            return msgspec.json.encode({"embedding": vectors[0]}), usage
        answer = {
            "model": asked_model(call),
            "embeddings": vectors,
            "total_duration": max(self._clock() - self._began_ns, 1),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens if usage is not None else call_tokens(call),
        }
        return msgspec.json.encode(answer), usage


def call_tokens(call: Call) -> int:
    """Estimates the tokens of a call whose provider has not counted."""
    return len(call.body) // 4


def _texts(values: Json, name: str) -> str | list[str]:
    found = values.get(name, "")
    is_list = isinstance(found, list) and all(isinstance(each, str) for each in found)
    if isinstance(found, str) or (is_list and name == "input"):
        return cast("str | list[str]", found)
    what = "a string" if name == "prompt" else "a string or a list of strings"
    raise BadRequest(f"{name} must be {what}.", param=name)


class EmbeddingsCall(_Embedding):
    """A call to OpenAI's ``/embeddings``, over Ollama's ``/api/embed``.

    Raises:
        BadRequest: The input is malformed.
        Untranslatable: It has tokens in place of texts.
    """

    def __init__(self, call: Call, clock: Callable[[], int]) -> None:
        super().__init__()
        values = {name: decode_any(bytes(raw)) for name, raw in call.fields.items() if name != "model"}
        given = values.get("input")
        if not isinstance(given, str) and not (
            isinstance(given, list) and all(isinstance(each, str) for each in given)
        ):
            raise Untranslatable(
                "input must be a string or a list of strings: the upstream takes texts.", param="input"
            )
        self._is_base64 = values.get("encoding_format") == "base64"
        self._fields: Json = {"input": given}
        if (dimensions := whole_at(values, "dimensions", "dimensions")) is not None:
            self._fields["dimensions"] = dimensions
        known = ("input", "encoding_format", "dimensions")
        self.dropped = tuple(sorted({shown(name) for name, value in values.items() if value and name not in known}))

    def path(self, call: Call, model: str) -> str:
        """Where the call goes."""
        return "/api/embed"

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        """The request body."""
        return msgspec.json.encode({"model": model, **self._fields})

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        """Translates the answer. Raises ProtocolViolation."""
        value = decode_any(body)
        vectors = value.get("embeddings") if isinstance(value, dict) else None
        if not isinstance(vectors, list) or not all(isinstance(vector, list) for vector in vectors):
            raise ProtocolViolation(f"The upstream {upstream} answered with something that is no embedding.")
        rows = [
            {"object": "embedding", "index": at, "embedding": _base64(vector) if self._is_base64 else vector}
            for at, vector in enumerate(vectors)
        ]
        counted = value.get("prompt_eval_count")
        tokens = counted if type(counted) is int and counted >= 0 else call_tokens(call)
        usage = Usage(tokens, 0) if type(counted) is int else None
        answer = {
            "object": "list",
            "data": rows,
            "model": call.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return msgspec.json.encode(answer), usage


EMBEDDINGS: Mapping[tuple[str, Format], Callable[[Call, Callable[[], int]], EmbedCall | EmbeddingsCall]] = {
    ("/api/embed", "openai"): EmbedCall,
    ("/api/embeddings", "openai"): EmbedCall,
    ("/embeddings", "ollama"): EmbeddingsCall,
}
"""The translations of embeddings, by the path of the endpoint and the upstream's format."""


def _base64(vector: list[Any]) -> bytes:  # Any: JSON of any shape
    """Returns a vector as OpenAI's SDKs ask for it: 32-bit numbers, which msgspec encodes as base64."""
    try:
        return struct.pack(f"<{len(vector)}f", *vector)
    except struct.error:
        raise ProtocolViolation("The upstream answered with an embedding that is not made of numbers.") from None
