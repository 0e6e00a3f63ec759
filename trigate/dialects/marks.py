"""Marks the reasoning that the gateway hands out, so that it knows it again.

Anthropic signs each thinking block, and refuses a conversation with a block that it has not signed. Other providers do
not sign. So where a client's format wants a signature of another provider's reasoning, the gateway puts a *mark* there:
a keyed hash (BLAKE2b) of the text, with a key that only this gateway has. A mark fits no other text, and nobody else
can make one.

The mark of a text that comes in pieces costs an update of the hash for each piece.
"""

from __future__ import annotations

import hashlib
import hmac

import attrs

PAYLOAD = "trigate"
"""The name of a mark among the payloads of reasoning."""
PREFIX = "trigate.r"
"""Begins every mark, also those of other versions and of other gateways. No signature of a provider begins like it."""
_VERSION = "2."
KEY_BYTES = 32


@attrs.frozen
class Marks:
    """The marks of one gateway.

    Args:
        key: `KEY_BYTES` random bytes. All workers of a gateway have the same.

    >>> marks, other = Marks(bytes(32)), Marks(b"k" * 32)
    >>> marker = marks.marker()
    >>> marker.feed("Let me ")
    >>> marker.feed("think.")
    >>> mark = marker.mark()
    >>> marks.fits(mark, "Let me think."), marks.fits(mark, "Let me"), other.fits(mark, "Let me think.")
    (True, False, False)
    """

    key: bytes = attrs.field(repr=False)

    def marker(self) -> Marker:
        """Makes the marker of a text that comes in pieces."""
        return Marker(self.key)

    def mark_of(self, text: str) -> str:
        """Returns the mark of a text."""
        marker = self.marker()
        marker.feed(text)
        return marker.mark()

    def fits(self, mark: str, text: str) -> bool:
        """Whether this gateway has marked the text with it."""
        return hmac.compare_digest(mark.encode(), self.mark_of(text).encode())


class Marker:
    """Makes the mark of one text."""

    __slots__ = ("_hash",)

    def __init__(self, key: bytes) -> None:
        self._hash = hashlib.blake2b(digest_size=16, key=key, person=b"trigate.mark")

    def feed(self, text: str) -> None:
        """Takes the next piece."""
        self._hash.update(text.encode(errors="surrogatepass"))

    def mark(self) -> str:
        """Returns the mark of all pieces."""
        return f"{PREFIX}{_VERSION}{self._hash.hexdigest()}"


def is_mark(signature: object) -> bool:
    """Whether a signature is a mark, of whichever gateway.

    >>> is_mark("trigate.r1.00"), is_mark("EqQBCgIYAhIM"), is_mark(None)
    (True, False, False)
    """
    return isinstance(signature, str) and signature.startswith(PREFIX)
