"""What token counts cost at a price."""

import attrs
import pytest

from trigate.openai.answer import Usage
from trigate.prices.price import FREE, Price

PRICE = Price(
    input=3_000_000,
    cache_read=300_000,
    cache_write=3_750_000,
    cache_write_1h=6_000_000,
    output=15_000_000,
    audio_input=10_000_000,
    audio_output=20_000_000,
    call=7,
)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (Usage(0, 0), 7),
        (Usage(1000, 100), 7 + 3000 + 1500),
        (Usage(1000, 100, cached_tokens=1000), 7 + 300 + 1500),
        (Usage(1000, 0, cache_write_tokens=1000), 7 + 3750),
        (Usage(1000, 0, cache_write_tokens=1000, cache_write_1h_tokens=400), 7 + 2250 + 2400),
        (Usage(1000, 100, reasoning_tokens=90), 7 + 3000 + 1500),
        (Usage(1000, 100, audio_tokens=450, audio_output_tokens=50), 7 + 600 * 3 + 400 * 10 + 50 * 15 + 50 * 20),
    ],
)
def test_every_token_is_paid_once(usage: Usage, cost: int) -> None:
    """Each kind has its own rate, and is no part of another kind."""
    assert PRICE.cost(usage) == cost
    assert PRICE.most(usage.prompt_tokens, usage.completion_tokens) >= cost


def test_the_sum_is_rounded_once() -> None:
    """Half a micro-dollar counts as one, whatever the parts are."""
    price = Price(input=250_000, cache_read=250_000, cache_write=250_000, output=250_000)
    assert [price.cost(Usage(prompt, 1)) for prompt in (0, 1, 2, 4)] == [0, 1, 1, 1]


UNITS = Price(input=0, cache_read=0, cache_write=0, output=0, characters=15_000_000, audio_hour=360_000)


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        (UNITS, Usage(0, 0, characters=1000), 15_000),
        (UNITS, Usage(0, 0, audio_ms=90_000), 9000),
        (UNITS, Usage(0, 0, audio_ms=1), 0),
        (UNITS, Usage(0, 0, images=1), None),
        (UNITS, Usage(5, 5), None),
        (UNITS, Usage(0, 0), 0),
        (PRICE, Usage(0, 0, characters=1000), None),
        (PRICE, Usage(0, 0, audio_ms=1000), None),
        (attrs.evolve(PRICE, image=40_000), Usage(0, 0, images=2), 80_007),
        (attrs.evolve(UNITS, characters=None, audio_hour=None, call=5), Usage(0, 0, audio_ms=1000), 5),
        (FREE, Usage(5, 5, images=1, characters=1), 0),
    ],
)
def test_what_has_another_price_than_its_tokens(price: Price, usage: Usage, cost: int | None) -> None:
    """Images, characters and hours have their own. What has none is unknown, and not 0."""
    assert price.cost(usage) == cost


def test_a_longer_prompt() -> None:
    """The length of the whole prompt chooses the rate of all tokens, those of the cache and of the answer included."""
    long = Price(input=6_000_000, cache_read=600_000, cache_write=6_000_000, output=20_000_000)
    price = Price(input=3_000_000, cache_read=300_000, cache_write=3_000_000, output=10_000_000, tiers=((1000, long),))
    assert price.cost(Usage(1000, 10, cached_tokens=900)) == 300 + 270 + 100
    assert price.cost(Usage(1001, 10, cached_tokens=1000)) == 6 + 600 + 200
    assert price.most(1001, 10) == 6006 + 200
