"""The price of a model, and what token counts cost at it.

Money is whole micro-dollars. The prices are micro-dollars per million tokens, so that a sum of tokens times prices is
exact, and is rounded once, at the end: half a micro-dollar and more count as one.
"""

from __future__ import annotations

import attrs

from trigate.config.key_sections import MicroUsd
from trigate.openai.answer import Usage

_PER = 1_000_000


@attrs.frozen(kw_only=True)
class Price:
    """What a model costs, in micro-dollars per million tokens of each kind, and per call.

    Attributes:
        input: Tokens of the prompt that no cache had.
        cache_read: Tokens of the prompt that the provider read from its cache.
        cache_write: Tokens of the prompt that it wrote into its cache.
        output: Tokens of the answer, those of its reasoning included.
        call: Micro-dollars for each call.
    """

    input: int
    cache_read: int
    cache_write: int
    output: int
    call: int = 0

    def cost(self, usage: Usage) -> MicroUsd:
        """Returns what token counts cost.

        >>> Price(input=3_000_000, cache_read=300_000, cache_write=3_750_000, output=15_000_000).cost(
        ...     Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=800, cache_write_tokens=100)
        ... )
        2415
        """
        plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
        total = (
            plain * self.input
            + usage.cached_tokens * self.cache_read
            + usage.cache_write_tokens * self.cache_write
            + usage.completion_tokens * self.output
        )
        return MicroUsd(self.call + (total + _PER // 2) // _PER)

    def most(self, prompt_tokens: int, completion_tokens: int) -> MicroUsd:
        """Returns the most that a call with these counts can cost, however much of its prompt is in a cache."""
        dearest = max(self.input, self.cache_read, self.cache_write)
        total = prompt_tokens * dearest + completion_tokens * self.output
        return MicroUsd(self.call - -total // _PER)
