"""How many tokens a text may have, where no upstream has counted them. Pure.

Four bytes count as a token, rounded up. That is about right for English prose, and too many for an image in a data URL.
"""

from __future__ import annotations

_BYTES_PER_TOKEN = 4


def tokens_of_size(size_bytes: int) -> int:
    """Estimates the tokens of a text of this size.

    >>> tokens_of_size(0), tokens_of_size(4), tokens_of_size(5)
    (0, 1, 2)
    """
    return -(-size_bytes // _BYTES_PER_TOKEN)


def estimated_tokens(body: bytes) -> int:
    """Estimates the tokens of a message or a request body."""
    return tokens_of_size(len(body))
