"""Sealed reasoning: what the gateway puts into ``encrypted_content``, so that a client can carry it.

A client that stores nothing at the gateway (``store: false``, as Codex does) sends each reasoning item back with the
next call. The text in ``encrypted_content`` then has everything that the provider needs to take its reasoning back. It
is authenticated: the gateway takes back only what it has made. It is not secret: the client gets the same reasoning as
text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Protocol

import attrs
import msgspec

from trigate.dialects.vocabulary import Reasoning

PREFIX = "trigate.e1."
"""Begins every sealed reasoning."""

_TAG_BYTES = 16
_decoder = msgspec.json.Decoder(tuple[str, dict[str, str]])


class Seal(Protocol):
    """Seals reasoning, and opens what it has sealed."""

    def seal(self, reasoning: Reasoning) -> str:
        """Returns the reasoning as an opaque text."""

    def open(self, text: str) -> Reasoning | None:
        """Returns the reasoning in a text; None = another program has made or changed it."""


@attrs.frozen
class HmacSeal:
    """A `Seal` by HMAC-SHA-256, with 128 bits.

    >>> seal = HmacSeal(b"key")
    >>> seal.open(seal.seal(Reasoning("Let me think.", {"anthropic": "s"})))
    Reasoning(text='Let me think.', payloads={'anthropic': 's'})
    >>> seal.open(HmacSeal(b"other").seal(Reasoning("a"))), seal.open("gAAAAABo"), seal.open(PREFIX + "!")
    (None, None, None)
    """

    key: bytes = attrs.field(repr=False)

    def seal(self, reasoning: Reasoning) -> str:
        """As `Seal.seal`."""
        data = msgspec.json.encode((reasoning.text, reasoning.payloads))
        return PREFIX + base64.urlsafe_b64encode(self._tag(data) + data).decode()

    def open(self, text: str) -> Reasoning | None:
        """As `Seal.open`."""
        if not text.startswith(PREFIX):
            return None
        try:
            sealed = base64.urlsafe_b64decode(text[len(PREFIX) :].encode())
        except (binascii.Error, ValueError):
            return None
        tag, data = sealed[:_TAG_BYTES], sealed[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(data)):
            return None
        return Reasoning(*_decoder.decode(data))

    def _tag(self, data: bytes) -> bytes:
        return hmac.digest(self.key, data, hashlib.sha256)[:_TAG_BYTES]
