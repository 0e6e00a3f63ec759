"""The paths of the data plane, and what ends a stream of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from trigate.openai.raw_json import decode_any


@attrs.frozen(kw_only=True)
class Endpoint:
    """A path of the data plane.

    Attributes:
        path: Below ``/v1``.
        answer: What a call without ``stream`` gets: one JSON object, or bytes (audio).
        required: Top-level fields, besides ``model``, without which no upstream could serve the call.
        ends: Tells from an event's data whether it is the last one of a complete stream.
        marks: One of these stands in each event for which ``ends`` may be true.
        repeats: There may be several such events, one for each result; the stream is complete when it closes after one.
        finishes: Each choice says in a ``finish_reason`` how it ended: without it, a stream is not complete.
    """

    path: str
    answer: Literal["json", "bytes"] = "json"
    required: tuple[str, ...] = ()
    ends: Callable[[bytes], bool]
    marks: tuple[bytes, ...]
    repeats: bool = False
    finishes: bool = False


def _endpoint(path: str, *types: str, **more: Any) -> Endpoint:  # Any: the other fields of Endpoint
    """Makes an endpoint whose streams end with an event of one of these types, or, without any, with ``[DONE]``."""

    def ends_with_done(data: bytes) -> bool:
        return data.strip() == b"[DONE]"

    def ends_with_type(data: bytes) -> bool:
        if not any(mark in data for mark in marks):
            return False
        value = decode_any(data)
        return isinstance(value, dict) and value.get("type") in types

    marks = tuple(kind.encode() for kind in types) or (b"[DONE]",)
    return Endpoint(path=path, ends=ends_with_type if types else ends_with_done, marks=marks, **more)


ENDPOINTS: Mapping[str, Endpoint] = {
    f"/v1{endpoint.path}": endpoint
    for endpoint in (
        _endpoint("/chat/completions", required=("messages",), finishes=True),
        _endpoint("/completions", required=("prompt",), finishes=True),
        _endpoint("/embeddings", required=("input",)),
        _endpoint("/responses", "response.completed", "response.incomplete", "response.failed"),
        _endpoint("/moderations", required=("input",)),
        _endpoint("/audio/speech", "speech.audio.done", answer="bytes", required=("input",)),
        _endpoint("/images/generations", "image_generation.completed", required=("prompt",), repeats=True),
    )
}
