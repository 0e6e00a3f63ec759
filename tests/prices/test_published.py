"""The price table that is made of published data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trigate.openai.answer import Usage
from trigate.prices.published import table_of
from trigate.prices.table import PriceTable, ProviderPrices

DAY = 1_790_000_000  # 2026-09-21


def provider(*models: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "p", "name": "P", "api_pattern": r"https://p\.invalid", "models": models, **fields}


def model(prices: Any, match: Any = None, **fields: Any) -> dict[str, Any]:
    return {"id": "m", "match": match or {"equals": "M"}, "prices": prices, "context_window": 1, **fields}


def read(*providers: Any) -> ProviderPrices:
    return PriceTable(table_of(json.dumps(providers).encode(), "here")).models_of("p")


def cost(prices: Any, usage: Usage, at: float = DAY, tier: str = "", **fields: Any) -> int | None:
    found = read(provider(model(prices, **fields))).find("m")
    assert found is not None
    price = found.in_tier(tier, at) if tier else found.at(at)
    return price.cost(usage) if price is not None else None


def test_rates() -> None:
    """They are US dollars per million tokens, and per thousand requests; what is not counted does not matter."""
    prices = {"input_mtok": 1.5, "output_mtok": 10, "requests_kcount": 14, "web_searches_kcount": 10, "x": None}
    assert cost(prices, Usage(1000, 10)) == 1500 + 100 + 14_000
    assert cost({"input_mtok": 0.1, "output_mtok": 0.083333333333}, Usage(0, 1_000_000)) == 83_333
    assert cost({"input_mchars": 15}, Usage(0, 0, characters=100)) == 1500
    assert cost({"audio_hours": 0.36, "input_audio_hours": 0.36}, Usage(0, 0, audio_ms=1000)) == 100
    assert cost({"audio_hours": 3}, Usage(0, 0, audio_ms=1000)) is None
    assert cost({"input_mtok": 1, "input_audio_hours": 3}, Usage(1, 1)) is None
    assert cost({"input_mtok": 1, "input_video_mtok": 2}, Usage(1, 1)) is None
    assert cost({"input_mtok": 1, "input_text_mtok": 1}, Usage(1, 1)) == 1


def test_longer_prompts() -> None:
    """A rate that has no tiers of its own stays in the tiers of the others."""
    tiers = {"base": 1, "tiers": [{"start": 100, "price": 2}, {"start": 1000, "price": 3}]}
    prices = {"input_mtok": tiers, "output_mtok": 10}
    assert [cost(prices, Usage(count, 1)) for count in (100, 101, 1001)] == [110, 212, 3013]


def test_prices_of_a_day() -> None:
    """Each is in force from a day on; or for a part of each day, in UTC."""
    dated = [{"prices": {"input_mtok": 1}}, {"constraint": {"start_date": "2026-09-22"}, "prices": {"input_mtok": 2}}]
    assert [cost(dated, Usage(10, 0), at=at) for at in (DAY, DAY + 86_400)] == [10, 20]
    night = {"start_time": "01:30:00+01:00", "end_time": "02:00:00Z"}
    dated = [{"prices": {"input_mtok": 1}}, {"constraint": night, "prices": {"input_mtok": 2}}]
    midnight = DAY - DAY % 86_400
    assert [cost(dated, Usage(10, 0), at=midnight + 60 * at) for at in (29, 30, 119, 120)] == [10, 20, 20, 10]


def test_service_tiers() -> None:
    """A variant replaces some rates, of those that are in force the first one. Before it is, the price is unknown."""
    variants = [
        {"when": {"processing": "batch"}, "prices": {"input_mtok": 3}, "constraint": {"start_date": "2026-09-25"}},
        {"when": {"processing": "batch"}, "prices": {"input_mtok": 2}, "constraint": {"start_date": "2026-09-22"}},
        {"when": {"service_tier": "Flex"}, "prices": {"output_mtok": 4}},
        {"when": {"service_tier": "default"}, "prices": {}},
        {"when": {"route": "eu"}, "prices": {"input_mtok": 9}},
    ]
    prices = {"input_mtok": 5, "output_mtok": 10}
    found = [
        cost(prices, Usage(100, 10), at=DAY + 86_400 * day, tier="batch", price_variants=variants) for day in (0, 1, 5)
    ]
    assert found == [None, 300, 400]
    assert cost(prices, Usage(100, 10), tier="flex", price_variants=variants) == 540
    assert cost(prices, Usage(100, 10), tier="eu", price_variants=variants) is None


def test_matches() -> None:
    """All kinds of clauses, nested ones too."""
    match = {"or": [{"starts_with": "A"}, {"and": [{"contains": "b"}, {"ends_with": "c"}]}, {"regex": "^x{3}$"}]}
    models = read(provider(model({"input_mtok": 1}, match)))
    assert [models.find(name) is not None for name in ("ab", "xbc", "xxx", "bx", "xxxx")] == [
        True,
        True,
        True,
        False,
        False,
    ]


PRICE = {"input_mtok": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"{}",
        b"[]",
        b'[{"id": "p"}]',
        [provider()],
        [provider(model([]))],
        [provider(model({"input_mtok": "much"}))],
        [provider(model({"input_mtok": -1}))],
        [provider(model({"input_mtok": 1e300}))],
        [provider(model([{"prices": PRICE, "constraint": {}}]))],
        [provider(model([{"prices": PRICE, "constraint": {"start_date": "soon"}}]))],
        [provider(model(PRICE, {"like": "a"}))],
        [provider(model(PRICE, {"regex": "("}))],
        [provider(model(PRICE, {"equals": "a", "regex": "b"}))],
        [provider(model(PRICE, {"or": ["a"]}))],
        [provider(model(PRICE), api_pattern="(")],
        [provider(model(PRICE), fallback_model_providers=["nobody"])],
    ],
)
def test_what_is_no_table(data: Any) -> None:
    """It is refused as a whole, so that no price can be wrong later."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(ValueError, match=r"."):
        table_of(body, "here")
    with pytest.raises(ValueError, match=r"."):
        table_of(b"\xff" + body, "here")
