"""One upstream continues a stream that another one began.

The *continuation head* holds the fields that are the same in all events of a stream (``id``, ``created``), taken from
the events that the client already has. The events of the continuing upstream get them instead of their own, so that the
client sees one stream.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping

import msgspec

from trigate.openai import sse
from trigate.openai.raw_json import decode_any, join_fields, split_provider_fields

ContinuationHead = Mapping[str, msgspec.Raw]
_FIELDS = ("id", "created")


def continuation_head(frames: Iterable[bytes]) -> ContinuationHead:
    r"""Reads the continuation head from the first JSON event of a chat stream.

    Args:
        frames: The beginning of the stream, in whole events.

    >>> sorted(continuation_head([b'data: {"id":"a","created":1,"choices":[]}\n\n']))
    ['created', 'id']
    """
    for data in map(sse.data_of, sse.EventSplitter(max_event_bytes=sys.maxsize).feed(b"".join(frames))):
        try:
            fields = split_provider_fields(data or b"")
        except (ValueError, RecursionError):
            continue
        return {name: msgspec.Raw(bytes(fields[name])) for name in _FIELDS if name in fields}
    return {}


def continued(event: bytes, head: ContinuationHead) -> bytes:
    """Returns an event of the continuing upstream as an event of the stream that it continues."""
    data = sse.data_of(event) or b""
    try:
        fields = split_provider_fields(data)
    except (ValueError, RecursionError):
        return event  # [DONE]
    changed = {name: value for name, value in head.items() if name in fields}
    if b'"role"' in bytes(fields.get("choices", b"")):
        changed["choices"] = _without_roles(fields["choices"])
    return sse.with_data(event, join_fields({**fields, **changed}))


def _without_roles(choices: msgspec.Raw) -> msgspec.Raw:
    r"""The choices of an event without ``role``, which the client has already received.

    An SDK that concatenates fields of the same name would make ``assistantassistant`` of it (openai-python
    ``lib/streaming/_deltas.py``).

    >>> bytes(_without_roles(msgspec.Raw(b'[{"index":0,"delta":{"role":"assistant","content":"a"}}]')))
    b'[{"index": 0, "delta": {"content": "a"}}]'
    """
    value = decode_any(bytes(choices))
    if value is None:
        return choices
    for choice in value if isinstance(value, list) else ():
        if isinstance(choice, dict) and isinstance(choice.get("delta"), dict):
            choice["delta"].pop("role", None)
    return msgspec.Raw(json.dumps(value).encode())
