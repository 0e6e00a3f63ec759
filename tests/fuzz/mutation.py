"""Mutates bytes at random."""

from __future__ import annotations

import random
from collections.abc import Sequence


def mutated(data: bytes, chance: random.Random, *, parts: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """Returns the data with one to three mutations.

    Args:
        parts: What is inserted: pieces that mean something to the parser.
        others: Data whose ends are put in the place of the end.
    """
    out = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(6):
            case 0:
                out[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del out[at : at + chance.randrange(1, 9)]
            case 2:
                out[at:at] = chance.choice(parts)
            case 3:
                out[at:at] = out[at : at + chance.randrange(1, 40)]
            case 4:
                other = chance.choice(others)
                out[at:] = other[chance.randrange(len(other) + 1) :]
            case _:
                out[at : at + 2] = out[at : at + 2][::-1]
    return bytes(out)


def in_pieces(data: bytes, chance: random.Random) -> list[bytes]:
    """Splits data at up to four random places."""
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 5)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
