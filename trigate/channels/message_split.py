"""A long text in passages, each of which fits into one message of a platform. Pure."""

from __future__ import annotations

from collections.abc import Callable

_ENDS = ("\n\n", "\n", ". ", " ")


def split(text: str, *, limit: int, size: Callable[[str], int] = len) -> list[str]:
    """Splits a text where it reads best: after a paragraph, else a line, a sentence, a word; and a word that is longer
    than a message anywhere.

    A passage depends on nothing behind the one that follows it. So of a text that grows, all passages but the last two
    stay as they are.

    Args:
        text: White space at its ends, and at the ends of the passages, is left out: platforms do the same.
        limit: How much fits into one message.
        size: How much of that a character takes, as the platform counts it.

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
        fits = _fitting(rest, limit, size)
        cut = fits if fits == len(rest) else _cut(rest, fits)
        passages.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return passages


def _fitting(text: str, limit: int, size: Callable[[str], int]) -> int:
    """How many characters fit; at least one."""
    used = 0
    for index, character in enumerate(text):
        used += size(character)
        if used > limit:
            return max(index, 1)
    return len(text)


def _cut(text: str, fits: int) -> int:
    """Where to end a passage of at most so many characters: as late as may be, but rather half empty than in a line."""
    for end in _ENDS:
        # what is cut off at the end is white space, so it may stand where nothing fits any more
        found = text.rfind(end, fits // 2, fits + len(end.lstrip(".")))
        if found > 0:
            return found + len(end)
    return fits
