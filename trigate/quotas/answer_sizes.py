"""How long the answers of each model have been: what a call without an answer yet is expected to use at most. Pure.

Agents ask for up to 128 000 tokens and use a few hundred. To hold what they ask for would make a budget look spent that
is not. So a call holds the `SHARE` quantile of the model's last answers, if that is less. A longer answer exceeds what
its call has held: this is the bound by which a budget, and a limit of tokens, can be exceeded by each call in flight.
"""

from __future__ import annotations

import itertools
from collections import deque

SHARE = 0.95
LAST = 128
"""How many answers of a model are remembered."""
ENOUGH = 16
"""From how many answers on their quantile counts."""
_EVERY = 16
"""To sort the sizes takes as long as a tenth of a call: after how many answers of all models it is done again."""
UNKNOWN_TOKENS = 4096
"""What an answer is expected to have at most, of a model with fewer answers."""
_MAX_MODELS = 1000


class AnswerSizes:
    """The sizes of the last answers, by model, in tokens."""

    def __init__(self) -> None:
        self._last: dict[str, deque[int]] = {}
        self._expected: dict[str, int] = {}
        self._noted = itertools.count(1)

    def __repr__(self) -> str:
        return f"<AnswerSizes of {len(self._last)} models>"

    def note(self, model: str, tokens: int) -> None:
        """Notes the size of an answer."""
        last = self._last.get(model)
        if last is None:
            if len(self._last) >= _MAX_MODELS:
                self._last.clear()
                self._expected.clear()
            last = self._last[model] = deque(maxlen=LAST)
        last.append(tokens)
        if len(last) == ENOUGH or (len(last) > ENOUGH and next(self._noted) % _EVERY == 0):
            self._expected[model] = sorted(last)[min(len(last) - 1, int(SHARE * len(last)))]

    def expected(self, model: str, asked: int | None) -> int:
        """Returns how many tokens the answer of a call is expected to have at most.

        Args:
            asked: The most that the call allows; None = it does not say.

        >>> sizes = AnswerSizes()
        >>> sizes.expected("m", None), sizes.expected("m", 100), sizes.expected("m", 128_000)
        (4096, 100, 4096)
        """
        expected = self._expected.get(model, UNKNOWN_TOKENS)
        return expected if asked is None else min(asked, expected)
