"""A long text in passages that fit."""

from __future__ import annotations

import random

from trigate.channels.message_split import split


def test_nothing_but_white_space_is_lost() -> None:
    """Every passage fits, none is empty, and together they are the text."""
    dice = random.Random(7)
    for _ in range(200):
        text = "".join(dice.choice("ab. \n") for _ in range(dice.randrange(200)))
        limit = dice.randrange(1, 40)
        passages = split(text, limit=limit)
        assert all(0 < len(passage) <= limit and passage == passage.strip() for passage in passages)
        assert "".join("".join(passages).split()) == "".join(text.split())


def test_the_size_is_as_the_platform_counts() -> None:
    """Characters that are sent as several count as several."""
    assert split("&&&&", limit=10, size=lambda character: 5) == ["&&", "&&"]
    assert split("😀😀", limit=4, size=lambda character: len(character.encode())) == ["😀", "😀"]


def test_the_best_place_is_taken() -> None:
    """A paragraph goes before a line, a line before a sentence, a sentence before a word."""
    assert split("aaaa aaaa\n\nbbb. bbb\nccc", limit=18) == ["aaaa aaaa", "bbb. bbb\nccc"]
    assert split("aaaa aaaa\nbbb. bbb ccc", limit=18) == ["aaaa aaaa", "bbb. bbb ccc"]
    assert split("aaaa aaaa. bbb ccc ddd", limit=18) == ["aaaa aaaa.", "bbb ccc ddd"]
    assert split("aaaa aaaa bbb ccc", limit=13) == ["aaaa aaaa bbb", "ccc"]
    assert split("abcdefgh", limit=3) == ["abc", "def", "gh"]


def test_of_a_text_that_grows_only_the_last_passages_change() -> None:
    """What was written in earlier messages has not to be edited again."""
    text = "word " * 100
    before: list[str] = []
    for end in range(len(text)):
        now = split(text[:end], limit=30)
        assert now[: len(before) - 1] == before[:-1]
        before = now
