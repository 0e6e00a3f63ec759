"""How far estimates are off."""

from __future__ import annotations

from trigate.openai.token_ratios import Ratio


def test_long_calls_count_more() -> None:
    """Short calls, which have more JSON than text, do not make the estimates of the long ones between them wrong."""
    ratio = Ratio()
    for _ in range(50):
        ratio.note(estimated=30, reported=9)
        ratio.note(estimated=20_000, reported=22_000)
    assert 21_500 < ratio.corrected(20_000) < 22_500
    assert ratio.error is not None
    assert ratio.error > 0.5


def test_what_says_nothing() -> None:
    """A count that no tokenizer can give changes nothing."""
    ratio = Ratio()
    for estimated, reported in ((0, 5), (5, 0), (10, 161), (160, 9)):
        ratio.note(estimated=estimated, reported=reported)
    assert (ratio.factor, ratio.error) == (1.0, None)


def test_which_calls_are_noted() -> None:
    """The first ones, then one in eight or as many as are asked for."""
    often, seldom = Ratio(), Ratio()
    assert sum(often.wants() for _ in range(320)) == 32 + 288 / 8
    assert sum(seldom.wants(every=64) for _ in range(320)) == 32 + 5
