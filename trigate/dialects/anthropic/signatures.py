"""Removes the thinking blocks that a gateway made itself from requests to an upstream that signs its own.

Anthropic refuses a conversation with a block that it has not signed. Its own signatures are not looked at.
"""

from __future__ import annotations

import msgspec

from trigate.dialects.marks import PREFIX, is_mark
from trigate.openai.raw_json import join_fields, split_fields

_PREFIX = PREFIX.encode()
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


class _Block(msgspec.Struct):
    type: str
    signature: str | None = None


_block = msgspec.json.Decoder(_Block)


def may_have_own_reasoning(body: bytes) -> bool:
    """Whether a request may have such a block."""
    return _PREFIX in body


def without_own_reasoning(body: bytes) -> bytes:
    """Returns a request without the thinking blocks that have a mark, whether it is this gateway's or not.

    Every byte of everything else stays as it is.

    >>> without_own_reasoning(b'{"model": "m", "messages": [{"role":"user","content":"a"}]}')
    b'{"model": "m", "messages": [{"role":"user","content":"a"}]}'
    """
    if not may_have_own_reasoning(body):
        return body
    fields = split_fields(body)
    try:
        given = [bytes(raw) for raw in _raw_list.decode(fields["messages"])]
        messages = [_without_own(message) for message in given]
    except (ValueError, RecursionError):
        return body  # the upstream says what is wrong with it
    if messages == given:
        return body
    kept = b",".join([message for message in messages if message])
    return join_fields({**fields, "messages": msgspec.Raw(b"[" + kept + b"]")})


def _without_own(message: bytes) -> bytes:
    """Returns a message without such blocks; empty if it had nothing else, since an empty message is refused."""
    if _PREFIX not in message:
        return message
    fields = split_fields(message)
    content = bytes(fields.get("content", b""))
    if not content.startswith(b"["):
        return message
    blocks = [bytes(raw) for raw in _raw_list.decode(content)]
    kept = [block for block in blocks if not _is_own(block)]
    if len(kept) == len(blocks):
        return message
    return join_fields({**fields, "content": msgspec.Raw(b"[" + b",".join(kept) + b"]")}) if kept else b""


def _is_own(block: bytes) -> bool:
    if _PREFIX not in block:
        return False
    try:
        found = _block.decode(block)
    except ValueError:
        return False
    return found.type == "thinking" and is_mark(found.signature)
