"""Marks the reasoning that the gateway hands out in Anthropic's format.

Anthropic signs each thinking block, and refuses a conversation with a block that it has not signed. Other providers do
not sign. So a block that the gateway makes of another provider's reasoning has a *mark* in place of a signature, by
which the gateway knows the block again when the client sends it back. The mark depends on the text, so that it does not
fit another one; it is no secret.
"""

from __future__ import annotations

import hashlib

import msgspec

from trigate.openai.raw_json import decode_strictly, join_fields, split_fields

OWN = "trigate.r1."
"""Begins every mark."""

_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


class Marker:
    """Makes the mark of a text that comes in pieces.

    >>> marker = Marker()
    >>> marker.feed("Let me ")
    >>> marker.feed("think.")
    >>> marker.mark() == mark_of("Let me think."), is_own(marker.mark()), is_own("EqQBCgIYAhIM")
    (True, True, False)
    """

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def feed(self, text: str) -> None:
        """Takes the next piece."""
        self._hash.update(text.encode())

    def mark(self) -> str:
        """Returns the mark of all pieces."""
        return OWN + self._hash.hexdigest()


def mark_of(text: str) -> str:
    """Returns the mark of a text."""
    marker = Marker()
    marker.feed(text)
    return marker.mark()


def is_own(signature: object) -> bool:
    """Whether a signature is a mark."""
    return isinstance(signature, str) and signature.startswith(OWN)


def without_own_reasoning(body: bytes) -> bytes:
    """Returns a request without the thinking blocks that the gateway made itself, for an upstream that signs its own.

    Every byte of a request without such blocks stays as it is; of one with them, every byte but those of the messages
    that have one.

    >>> without_own_reasoning(b'{"model": "m", "messages": [{"role":"user","content":"a"}]}')
    b'{"model": "m", "messages": [{"role":"user","content":"a"}]}'
    """
    if OWN.encode() not in body:
        return body
    fields = split_fields(body)
    messages = []
    for raw in _raw_list.decode(fields["messages"]):
        if OWN.encode() not in bytes(raw):
            messages.append(bytes(raw))
            continue
        try:
            message = decode_strictly(raw)
        except (ValueError, RecursionError):
            return body  # the upstream says what is wrong with it
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message["content"] = [block for block in content if not _is_own_block(block)]
            if not message["content"]:
                continue  # it had nothing else, and an empty message is refused
        messages.append(msgspec.json.encode(message))
    return join_fields({**fields, "messages": msgspec.Raw(b"[" + b",".join(messages) + b"]")})


def _is_own_block(block: object) -> bool:
    return isinstance(block, dict) and block.get("type") == "thinking" and is_own(block.get("signature"))
