"""Sealed reasoning: what the gateway puts into ``encrypted_content``, so that a client can carry it.

A client that stores nothing at the gateway (``store: false``, as Codex does) sends each reasoning item back with the
next call. The text in ``encrypted_content`` then has everything that the provider needs to take its reasoning back. It
has the gateway's mark (`trigate.dialects.marks`): the gateway takes back only what it has made. It is not secret: the
client gets the same reasoning as text.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from trigate.dialects.marks import PAYLOAD
from trigate.dialects.vocabulary import Reasoning

PREFIX = "trigate.e1."
"""Begins every sealed reasoning."""

_decoder = msgspec.json.Decoder(tuple[str, dict[str, str]])


def seal(reasoning: Reasoning) -> str:
    """Returns reasoning as an opaque text. Its mark is among its payloads."""
    data = msgspec.json.encode((reasoning.text, reasoning.payloads))
    return PREFIX + base64.urlsafe_b64encode(data).decode()


def unseal(text: str) -> Reasoning | None:
    """Returns the reasoning in a text, with its mark, which is still to be checked; None = another program has made it.

    >>> unseal(seal(Reasoning("Let me think.", {"trigate": "mark"})))
    Reasoning(text='Let me think.', payloads={'trigate': 'mark'})
    >>> unseal(seal(Reasoning("without a mark"))), unseal("gAAAAABo"), unseal(PREFIX + "!")
    (None, None, None)
    """
    if not text.startswith(PREFIX):
        return None
    try:
        reasoning = Reasoning(*_decoder.decode(base64.urlsafe_b64decode(text[len(PREFIX) :].encode())))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return reasoning if PAYLOAD in reasoning.payloads else None
