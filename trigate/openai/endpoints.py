"""The paths of OpenAI's format, and how a stream of each path ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from trigate.openai.raw_json import decode_any

DONE = b"[DONE]"

Format = Literal["openai", "anthropic", "gemini", "ollama", "bedrock"]
"""A family of endpoints whose errors have one shape."""


@attrs.frozen(kw_only=True)
class Endpoint:
    """A path of the data plane, in any format.

    Attributes:
        path: The path below ``/v1``.
        answer: What a call without ``stream`` gets: one JSON object, or bytes (audio).
        results: The field of a JSON answer, a list, without which it is no answer.
        required: The top-level fields, besides ``model``, without which no upstream could serve the call.
        nullable: Those of them that may be null.
        model_optional: A call may leave the model to its provider.
        is_last_event: Whether an event with this data is the last one of a complete stream.
        end_markers: Every event for which ``is_last_event`` holds contains one of these byte strings.
        repeats_last_event: A stream may have several last events, one for each result; it is complete when it closes
            after one of them.
        needs_finish_reason: The results are choices, each of which ends with a ``finish_reason``; without it, a stream
            is not complete. With it, a stream that ends in order is complete without its last event.
        format: The format of its requests, answers and errors.
        counts_tokens: The tokens of an answer are estimated if the upstream does not report them.
        makes_images: Its answers are images: they are counted, and nothing is estimated.
        streams_by_default: A call without ``stream`` asks for a stream.
        stream_type: The content type of a stream.
        keep_alive: What a client is sent in a silence of its stream: a comment; an event of the format's own, once the
            stream has begun; a blank line, for clients that cannot read a comment; or nothing.
        around_error: What stands before and behind an error in a stream.
    """

    path: str
    answer: Literal["json", "bytes"] = "json"
    results: str = "data"
    required: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    model_optional: bool = False
    is_last_event: Callable[[bytes], bool]
    end_markers: tuple[bytes, ...]
    repeats_last_event: bool = False
    needs_finish_reason: bool = False
    format: Format = "openai"
    counts_tokens: bool = True
    makes_images: bool = False
    streams_by_default: bool = False
    stream_type: str = "text/event-stream; charset=utf-8"
    keep_alive: Literal["comment", "ping", "blank", "none"] = "comment"
    around_error: tuple[bytes, bytes] = (b"", b"")


def make_endpoint(path: str, *types: str, **fields: Any) -> Endpoint:  # Any: the other fields of Endpoint
    """Makes an endpoint whose streams end with an event of one of these types; without types, with ``[DONE]``."""

    def is_done(data: bytes) -> bool:
        return data.strip() == DONE

    def has_last_type(data: bytes) -> bool:
        if not any(marker in data for marker in markers):
            return False
        value = decode_any(data)
        return isinstance(value, dict) and value.get("type") in types

    markers = tuple(name.encode() for name in types) or (DONE,)
    return Endpoint(path=path, is_last_event=has_last_type if types else is_done, end_markers=markers, **fields)


ENDPOINTS: Mapping[str, Endpoint] = {
    f"/v1{endpoint.path}": endpoint
    for endpoint in (
        make_endpoint("/chat/completions", required=("messages",), results="choices", needs_finish_reason=True),
        make_endpoint(
            "/completions", required=("prompt",), nullable=("prompt",), results="choices", needs_finish_reason=True
        ),
        make_endpoint("/embeddings", required=("input",)),
        make_endpoint(
            "/responses",
            *("response.completed", "response.incomplete", "response.failed"),
            results="output",
            model_optional=True,
        ),
        make_endpoint("/moderations", required=("input",), results="results", model_optional=True),
        make_endpoint("/audio/speech", "speech.audio.done", answer="bytes", required=("input",)),
        make_endpoint(
            "/images/generations",
            "image_generation.completed",
            required=("prompt",),
            model_optional=True,
            repeats_last_event=True,
            makes_images=True,
        ),
    )
}
"""OpenAI's endpoints by their paths. Source: OpenAI's API reference, which says what a call needs."""
