"""The price of a model, and what token counts cost at it.

Money is whole micro-dollars. The rates are micro-dollars per million tokens, so that a sum of tokens times rates is
exact, and is rounded once, at the end: half a micro-dollar and more count as one.
"""

from __future__ import annotations

from typing import Any

import attrs

from trigate.config.key_sections import MicroUsd
from trigate.openai.answer import Usage

_PER = 1_000_000
_HOUR_MS = 3_600_000


@attrs.frozen(kw_only=True)
class Price:
    """What a model costs, in micro-dollars per million tokens of each kind, and per call.

    Attributes:
        input: Tokens of the prompt that no cache had.
        cache_read: Tokens of the prompt that the provider read from its cache.
        cache_write: Tokens of the prompt that it wrote into its cache.
        output: Tokens of the answer, those of its reasoning included.
        call: Micro-dollars for each call.
        cache_write_1h: Those that it keeps there for an hour; None = as all that it writes.
        audio_input, audio_output: Tokens of sound; None = as those of text.
        image_input, image_output: Tokens of images; None = as those of text.
        characters: Micro-dollars for each million characters of a text that is read out; None = not known.
        audio_hour: Micro-dollars for each hour of sound that is transcribed; None = not known.
        image: Micro-dollars for each image that an endpoint of images makes; None = not known, or the tokens tell it.
        tiers: The prices of longer prompts: ``(more than so many tokens, price)``, the shortest first. The length of
            the whole prompt decides, for all tokens of the call.
    """

    input: int
    cache_read: int
    cache_write: int
    output: int
    call: int = 0
    cache_write_1h: int | None = None
    audio_input: int | None = None
    audio_output: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    image: int | None = None
    characters: int | None = None
    audio_hour: int | None = None
    tiers: tuple[tuple[int, Price], ...] = ()

    def of_prompt(self, prompt_tokens: int) -> Price:
        """Returns the price for a prompt of this length."""
        found = self
        for above, price in self.tiers:
            if prompt_tokens > above:
                found = price
        return found

    def cost(self, usage: Usage) -> MicroUsd | None:
        """Returns what token counts, images, characters and hours cost; None = what is counted has no known price.

        >>> Price(input=3_000_000, cache_read=300_000, cache_write=3_750_000, output=15_000_000).cost(
        ...     Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=800, cache_write_tokens=100)
        ... )
        2415
        >>> Price(input=0, cache_read=0, cache_write=0, output=0, image=40_000).cost(Usage(0, 0, images=2))
        80000
        """
        price = self.of_prompt(usage.prompt_tokens) if self.tiers else self
        written, hour = usage.cache_write_tokens, 0
        plain = usage.prompt_tokens - usage.cached_tokens - written
        total = usage.cached_tokens * price.cache_read + usage.completion_tokens * price.output
        if price.cache_write_1h is not None and usage.cache_write_1h_tokens:
            hour = min(usage.cache_write_1h_tokens, written)
            total += hour * (price.cache_write_1h - price.cache_write)
        if usage.audio_tokens or usage.image_tokens:
            for tokens, answered, asked_rate, answered_rate in (
                (usage.audio_tokens, usage.audio_output_tokens, price.audio_input, price.audio_output),
                (usage.image_tokens, usage.image_output_tokens, price.image_input, price.image_output),
            ):
                if tokens and asked_rate is not None:
                    total += min(tokens - answered, plain) * (asked_rate - price.input)
                if tokens and answered_rate is not None:
                    total += min(answered, usage.completion_tokens) * (answered_rate - price.output)
        total += plain * price.input + written * price.cache_write
        each = price.call
        if usage.images or usage.characters or usage.audio_ms:
            if not (usage.prompt_tokens or usage.completion_tokens) and not price.tells(usage):
                return None
            each += usage.images * (price.image or 0)
            total += usage.characters * (price.characters or 0)
            total += (usage.audio_ms * (price.audio_hour or 0) * _PER + _HOUR_MS // 2) // _HOUR_MS
        elif not (total or each) and usage.prompt_tokens + usage.completion_tokens and price.has_units:
            return None  # tokens, of a model whose price is another
        return MicroUsd(each + (total + _PER // 2) // _PER)

    @property
    def has_units(self) -> bool:
        """Whether something else than tokens and calls has a price."""
        return self.image is not None or self.characters is not None or self.audio_hour is not None

    def tells(self, usage: Usage) -> bool:
        """Whether the cost of images, characters and hours without token counts is known: each has a price, or there
        are no rates of anything, as where a call has one price."""
        rates = ((usage.images, self.image), (usage.characters, self.characters), (usage.audio_ms, self.audio_hour))
        if all(rate is not None for count, rate in rates if count):
            return True
        return not any((self.input, self.output, *[rate for _, rate in rates]))

    def most(self, prompt_tokens: int, completion_tokens: int, images: int = 0, characters: int = 0) -> MicroUsd:
        """Returns the most that a call with these counts can cost, however much of its prompt is in a cache."""
        price = self.of_prompt(prompt_tokens)
        dearest = max(
            *(price.input, price.cache_read, price.cache_write, price.cache_write_1h or 0),
            *(price.audio_input or 0, price.image_input or 0),
        )
        written = max(price.output, price.audio_output or 0, price.image_output or 0)
        total = prompt_tokens * dearest + completion_tokens * written + characters * (price.characters or 0)
        return MicroUsd(price.call + images * (price.image or 0) - -total // _PER)

    def times(self, factor: int) -> Price:
        """Returns the price times a factor in millionths. Each rate is rounded, half up.

        >>> Price(input=3, cache_read=0, cache_write=3, output=15_000_000).times(500_000).output
        7500000
        """

        def scaled(rate: int | None) -> Any:  # Any: None stays None
            return None if rate is None else (rate * factor + _PER // 2) // _PER

        rates = {name: scaled(getattr(self, name)) for name in _RATES}
        return Price(**rates, tiers=tuple([(above, price.times(factor)) for above, price in self.tiers]))


_RATES = [field.name for field in attrs.fields(Price) if field.name != "tiers"]
FREE = Price(input=0, cache_read=0, cache_write=0, output=0)
"""What a model costs that the gateway runs itself."""


def usd(cost: MicroUsd) -> str:
    """Writes an amount in US dollars.

    >>> usd(MicroUsd(2415)), usd(MicroUsd(1_000_000))
    ('0.002415', '1.000000')
    """
    return f"{cost // 1_000_000}.{cost % 1_000_000:06d}"
