"""A long text is split into passages that fit."""

from __future__ import annotations

import random

from trigate.channels.message_split import split


def test_only_white_space_is_removed() -> None:
    """Every passage fits, none is empty, and joined they are the text without the white space between them."""
    dice = random.Random(7)
    for _ in range(200):
        text = "".join(dice.choice("ab. \n") for _ in range(dice.randrange(200)))
        limit = dice.randrange(1, 40)
        passages = split(text, limit=limit)
        assert all(0 < len(passage) <= limit and passage == passage.strip() for passage in passages)
        assert "".join("".join(passages).split()) == "".join(text.split())


def test_size_of_characters() -> None:
    """A character counts as much as ``size`` says."""
    assert split("&&&&", limit=10, size=lambda character: 5) == ["&&", "&&"]
    assert split("😀😀", limit=4, size=lambda character: len(character.encode())) == ["😀", "😀"]


def test_best_end() -> None:
    """The end of a paragraph is preferred to that of a line, then a sentence, then a word."""
    assert split("aaaa aaaa\n\nbbb. bbb\nccc", limit=18) == ["aaaa aaaa", "bbb. bbb\nccc"]
    assert split("aaaa aaaa\nbbb. bbb ccc", limit=18) == ["aaaa aaaa", "bbb. bbb ccc"]
    assert split("aaaa aaaa. bbb ccc ddd", limit=18) == ["aaaa aaaa.", "bbb ccc ddd"]
    assert split("aaaa aaaa bbb ccc", limit=13) == ["aaaa aaaa bbb", "ccc"]
    assert split("abcdefgh", limit=3) == ["abc", "def", "gh"]


def test_growing_text_changes_only_the_last_passages() -> None:
    """Earlier messages of a growing text need no further edit."""
    text = "word " * 100
    before: list[str] = []
    for end in range(len(text)):
        now = split(text[:end], limit=30)
        assert now[: len(before) - 1] == before[:-1]
        before = now
