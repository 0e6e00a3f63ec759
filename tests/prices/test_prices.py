"""The prices of the models of a configuration."""

from typing import Any

import pytest

from trigate.config.structure import structure
from trigate.openai.answer import Usage
from trigate.prices.prices import Prices
from trigate.prices.table import DatedPrices, PriceTable

UPSTREAMS: dict[str, Any] = {
    "openai": {"base_url": "https://api.openai.com/v1"},
    "claude": {"kind": "anthropic", "base_url": "https://api.anthropic.com"},
    "mine": {"base_url": "http://10.0.0.1:8000/v1"},
    "echo": {"kind": "echo"},
}
NOON = 1_790_000_000.0


def prices_of(**tables: Any) -> Prices:
    return Prices(structure({"upstreams": UPSTREAMS, "prices": tables}, env={}, source="test"))


def test_the_public_price() -> None:
    """A model of a known provider has it; that of a model of another server is unknown, and is listed as such."""
    prices = prices_of()
    known = prices.price("openai", "gpt-4o-mini", NOON)
    assert known is not None
    assert known.cost(Usage(1_000_000, 1_000_000)) == 750_000
    assert prices.price("claude", "claude-sonnet-4-5-20250929", NOON) is not None
    assert prices.price("mine", "gpt-4o-mini", NOON) is None
    assert prices.price("openai", "nobody-knows", NOON) is None
    assert list(prices.unknown) == ["mine/gpt-4o-mini", "openai/nobody-knows"]


def test_what_the_gateway_runs_itself_is_free() -> None:
    """Its price is 0, which is not the same as unknown."""
    price = prices_of().price("echo", "echo", NOON)
    assert price is not None
    assert price.cost(Usage(1000, 1000)) == 0


def test_the_configuration_has_the_last_word() -> None:
    """The price of a model at one upstream precedes that of all models of it, and that of the model anywhere."""
    prices = prices_of(
        **{
            "gpt-4o-mini": {"input_usd": 1},
            "mine/gpt-4o-mini": {"input_usd": "2.5", "output_usd": 0.1},
            "mine/*": {"input_usd": 3, "long_prompt_tokens": 100, "long_prompt": {"input_usd": 4}},
        }
    )
    found = [prices.price(*target, NOON) for target in (("openai", "gpt-4o-mini"), ("mine", "gpt-4o-mini"))]
    assert [(each.input, each.cache_read, each.output) for each in found if each is not None] == [
        (1_000_000, 1_000_000, 0),
        (2_500_000, 2_500_000, 100_000),
    ]
    other = prices.price("mine", "x", NOON)
    assert other is not None
    assert [other.cost(Usage(count, 0)) for count in (100, 101)] == [300, 404]


def test_a_price_that_changes() -> None:
    """The last price in force applies: from a day on, or for a part of each day."""
    table = PriceTable(
        b'{"source":"s","providers":[["p","https://p",[]]],"models":{"p":['
        b'["^a",[[null,[[0,{"input":1}]]],[1000,[[0,{"input":2}]]]]],'
        b'["=b",[[null,[[0,{"input":1}]]],[[82800,3600],[[0,{"input":2}]]]]],'
        b'["*c",[[null,null]]]]}}'
    )
    models = table.models_of("p")

    def at(model: str, time_s: float) -> int | None:
        found: DatedPrices | None = models.find(model)
        assert found is not None
        price = found.at(time_s)
        return price.input if price is not None else None

    assert [at("A-1", time_s) for time_s in (0, 999, 1000)] == [1, 1, 2]
    assert [at("b", time_s) for time_s in (82799, 82800, 86400, 86400 + 3600)] == [1, 2, 2, 1]
    assert at("abc", 0) == 1
    assert at("xcx", 0) is None
    assert models.find("d") is None


def test_every_row_of_the_table() -> None:
    """All of it can be read: each provider's patterns, and each model's prices."""
    from trigate.prices import table as module

    table = module.read_table()
    for provider in table._models:
        for match, *prices in table.models_of(provider)._rows:
            assert isinstance(module._matches(match, "gpt-4o"), bool)
            found = module._dated(*prices)
            for dated in (found, *found.tiers.values()):
                dated.at(NOON)


def test_the_service_tiers_of_the_table() -> None:
    """A tier has the public price, where there is one; the names of the normal tier have the normal one."""
    prices = prices_of()

    def rate(upstream: str, model: str, tier: str) -> int | None:
        price = prices.price(upstream, model, 1_796_000_000.0, tier)
        return price.output if price is not None else None

    assert [rate("openai", "o3", tier) for tier in ("", "default", "flex", "priority")] == [
        *(8_000_000, 8_000_000, 4_000_000, 14_000_000)
    ]
    assert [rate("claude", "claude-opus-5", tier) for tier in ("standard", "batch", "fast")] == [
        *(25_000_000, 12_500_000, 50_000_000)
    ]
    assert list(prices.unknown) == []
    assert rate("openai", "gpt-4o-mini", "scale") is None
    assert rate("echo", "echo", "scale") == 0
    assert list(prices.unknown) == ["openai/gpt-4o-mini (scale)"]


def test_the_factors_of_service_tiers() -> None:
    """They multiply the price of the same table, its longer prompts included. Alone, they multiply the public one, of
    which other tiers stay; where there is none, they give none."""
    long = {"input_usd": 4, "image_usd": "0.02"}
    prices = prices_of(
        **{
            "mine/*": {
                "input_usd": 3,
                "long_prompt_tokens": 100,
                "long_prompt": long,
                "service_tiers": {"Slow": "0.5"},
            },
            "openai/*": {"service_tiers": {"flex": 2, "contract": 0.9}},
            "claude/x": {"service_tiers": {"batch": 0.5}},
        }
    )
    slow = prices.price("mine", "m", NOON, "slow")
    assert slow is not None
    assert [slow.cost(Usage(count, 0, images=1)) for count in (100, 1000)] == [150, 2000 + 10_000]
    tiers = ("", "flex", "contract", "priority")
    found = [prices.price("openai", "o3", 1_796_000_000.0, tier) for tier in tiers]
    assert [each.output if each else None for each in found] == [8_000_000, 16_000_000, 7_200_000, 14_000_000]
    assert prices.price("claude", "x", NOON, "batch") is None
    assert list(prices.unknown) == ["claude/x"]


@pytest.mark.parametrize(
    "value",
    [
        *({"input_usd": "x"}, {"input_usd": -1}, {"in": 1}, {"long_prompt": {"input": 1}}),
        *({"service_tiers": {"flex": -1}}, {"service_tiers": {"flex": "half"}}, {"service_tiers": 0.5}),
    ],
)
def test_a_wrong_price_is_refused(value: dict[str, Any]) -> None:
    """The error names its path."""
    with pytest.raises(Exception, match=r"prices\.m"):
        prices_of(m=value)
