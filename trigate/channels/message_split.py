"""Splits a long text into passages, each of which fits into one message of a platform. Pure."""

from __future__ import annotations

from collections.abc import Callable

_ENDS = ("\n\n", "\n", ". ", " ")


def split(text: str, *, limit: int, size: Callable[[str], int] = len) -> list[str]:
    """Splits a text at the best place: after a paragraph, else a line, a sentence, or a word. A word that is longer
    than a message is split anywhere.

    A passage depends on no text beyond the passage after it. Therefore all passages of a growing text stay as they are,
    except the last two.

    Args:
        text: White space at its ends, and at the ends of passages, is removed, as platforms do.
        limit: How much fits into one message.
        size: How much of the limit a character takes, as the platform counts it.

    >>> split("One two three. Four five.", limit=16)
    ['One two three.', 'Four five.']
    >>> split("a<b", limit=4, size=lambda character: 4 if character == "<" else 1)
    ['a', '<', 'b']
    >>> split(" ", limit=4)
    []
    """
    passages = []
    rest = text.strip()
    while rest:
        fitting = _fitting(rest, limit, size)
        end = fitting if fitting == len(rest) else _best_end(rest, fitting)
        passages.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return passages


def _fitting(text: str, limit: int, size: Callable[[str], int]) -> int:
    """How many characters fit into a message; at least one."""
    used = 0
    for index, character in enumerate(text):
        used += size(character)
        if used > limit:
            return max(index, 1)
    return len(text)


def _best_end(text: str, fitting: int) -> int:
    """The index at which a passage of at most ``fitting`` characters ends: the last good one in the second half."""
    for end in _ENDS:
        # The white space of the separator is stripped, so it may lie beyond the limit.
        found = text.rfind(end, fitting // 2, fitting + len(end.lstrip(".")))
        if found > 0:
            return found + len(end)
    return fitting
