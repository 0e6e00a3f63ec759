"""How far the estimates of `token_estimate` are off for one model, as calls whose tokens are reported teach it. Pure.

Four bytes a token is right for English prose. Code, Chinese and other tokenizers differ by a factor of two or three, so
each model has a factor of its own: what was reported over what was estimated, each as a moving average. So a call
counts by its size. An average of the calls' own factors would be that of short calls, with more JSON than text in them.
"""

from __future__ import annotations

_WEIGHT = 0.1
"""Of the newest call in the moving averages."""
_LEAST, _MOST = 1 / 16, 16.0
"""A call beyond these bounds says nothing of the model: a provider that counts a hidden prompt, or nothing."""
_ENOUGH = 32
"""After so many calls, only one in `_EVERY` is looked at."""
_EVERY = 8


class Ratio:
    """The factor of one kind of estimate.

    Attributes:
        factor: What an estimate is multiplied by.
        error: The mean relative error of the estimates so far, each made with the factor before it; None = unknown.

    >>> ratio = Ratio()
    >>> for _ in range(100):
    ...     ratio.note(estimated=100, reported=250)
    >>> ratio.corrected(40), round(ratio.error, 2)
    (100, 0.0)
    """

    __slots__ = ("_estimated", "_reported", "calls", "error", "factor")

    def __init__(self) -> None:
        self._estimated = self._reported = 0.0
        self.calls = 0
        self.factor = 1.0
        self.error: float | None = None

    def __repr__(self) -> str:
        return f"<Ratio {self.factor:.2f} of {self.calls} calls>"

    def wants(self, *, every: int = _EVERY) -> bool:
        """Counts a call, and returns whether it should be noted: the first ones, then one in ``every``."""
        self.calls += 1
        return self.calls <= _ENOUGH or self.calls % every == 0

    def note(self, *, estimated: int, reported: int) -> None:
        """Notes the estimate of a call, without the factor, and what was reported."""
        if estimated <= 0 or reported <= 0 or not _LEAST <= reported / estimated <= _MOST:
            return
        error = abs(self.factor * estimated - reported) / reported
        if self.error is None:
            self._estimated, self._reported, self.error = estimated, reported, error
        else:
            self._estimated += _WEIGHT * (estimated - self._estimated)
            self._reported += _WEIGHT * (reported - self._reported)
            self.error += _WEIGHT * (error - self.error)
        self.factor = self._reported / self._estimated

    def corrected(self, estimated: int) -> int:
        """Returns an estimate with the factor."""
        return round(estimated * self.factor)


class TokenRatios:
    """The factors of one model.

    Attributes:
        prompt: Of prompts.
        events: Of answers that are streamed: tokens of one event.
        text: Of other answers.
    """

    __slots__ = ("events", "prompt", "text")

    def __init__(self) -> None:
        self.prompt = Ratio()
        self.events = Ratio()
        self.text = Ratio()
