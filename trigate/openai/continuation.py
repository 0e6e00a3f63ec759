"""What lets one upstream continue a stream that another one began."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import msgspec

from trigate.openai import sse
from trigate.openai.answer import _answer_fields
from trigate.openai.raw_json import decode_any


def _without_roles(choices: msgspec.Raw) -> msgspec.Raw:
    r"""The choices of an event that goes on with a stream in which it was said already who speaks. An SDK that adds up
    what has the same name would make ``assistantassistant`` of it (openai-python ``lib/streaming/_deltas.py``).

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


def seam_of(frames: Iterable[bytes]) -> dict[str, msgspec.Raw]:
    """What is the same in all events of a chat stream, and so has to be in those of another one that goes on with it.

    >>> sorted(seam_of([b'data: {"id":"a","created":1,"choices":[]}\\n\\n']))
    ['created', 'id']
    """
    for data in map(sse.data_of, sse.EventSplitter(max_event_bytes=sys.maxsize).feed(b"".join(frames))):
        try:
            fields = _answer_fields(data or b"")
        except (ValueError, RecursionError):
            continue
        return {name: msgspec.Raw(bytes(fields[name])) for name in ("id", "created") if name in fields}
    return {}
