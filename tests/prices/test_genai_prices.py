"""The price table beside the package that its prices come from."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

import pytest

from tests.support.slow import FULL
from trigate.openai.answer import Usage
from trigate.prices.table import read_table

if TYPE_CHECKING:  # its import takes longer than a quick test may
    from genai_prices import types

TIMES = (
    datetime.datetime(2026, 12, 1, 12, tzinfo=datetime.UTC),
    datetime.datetime(2027, 1, 2, 20, tzinfo=datetime.UTC),
)
USAGES = (
    Usage(1000, 100),
    Usage(0, 0),
    Usage(1_234_567, 89, cached_tokens=1_000_000),
    Usage(99_999, 1234, cached_tokens=70_001, cache_write_tokens=9_998),
    Usage(272_001, 777, cached_tokens=20_000, cache_write_tokens=100_000, cache_write_1h_tokens=40_000),
    Usage(5000, 400, audio_tokens=3300, audio_output_tokens=300),
    Usage(5000, 400, image_tokens=3300, image_output_tokens=300),
    Usage(0, 0, characters=12_345),
    Usage(0, 0, audio_ms=12_345_678),
)
NOT_COUNTED = {"web_searches_kcount", "storage_searches_kcount", "cache_audio_read_mtok", "cache_image_read_mtok"}
COUNTED = {
    *("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok", "requests_kcount"),
    *("input_audio_mtok", "output_audio_mtok", "input_image_mtok", "output_image_mtok"),
    *("input_mchars", "input_audio_hours", "audio_hours"),
}
TOKENS = {"input_mtok", "output_mtok", "requests_kcount"}
UNITS = {"input_mchars", "input_audio_hours", "audio_hours"}
TIERS: tuple[dict[str, str], ...] = (
    {},
    {"service_tier": "flex"},
    {"service_tier": "priority"},
    {"processing": "batch"},
    {"speed": "fast"},
)


def counts_of(usage: Usage) -> types.Usage:
    """The counts of one call, as the package takes them."""
    from genai_prices import Usage as Counts

    return Counts(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        input_audio_tokens=usage.audio_tokens - usage.audio_output_tokens,
        output_audio_tokens=usage.audio_output_tokens,
        cache_audio_read_tokens=0,
        input_image_tokens=usage.image_tokens - usage.image_output_tokens,
        output_image_tokens=usage.image_output_tokens,
        cache_image_read_tokens=0,
        input_characters=usage.characters,
        input_audio_seconds=Decimal(usage.audio_ms) / 1000,
        audio_seconds=Decimal(usage.audio_ms) / 1000,
    )


def texts_of(match: object) -> Iterator[str]:
    """The texts in a clause by which a model is found."""
    for value in vars(match).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                yield part
            else:
                yield from texts_of(part)


def models_of(provider: types.Provider) -> Iterator[tuple[str, types.ModelInfo]]:
    """Ids of models with what the package finds for them: of each model its own id, or else one that its clause has."""
    for model in provider.models:
        for name in (model.id, *texts_of(model.match)):
            found = provider.find_model(name)
            if found is not None:
                yield name, found
                break


def expected(price: types.ModelPrice, usage: Usage) -> int | None:
    """What the package says that a call costs, in micro-dollars; None = no counts of tokens tell it, or it refuses."""
    rates = {name: value for name, value in vars(price).items() if value is not None and name not in NOT_COUNTED}
    told = {name for name, value in rates.items() if name in COUNTED or value != rates.get("input_mtok")}
    by_token, by_unit = told & TOKENS, told & UNITS
    if not told <= COUNTED or (by_token and by_unit) or not told:
        return None
    if "audio_hours" in told and rates.get("input_audio_hours") != rates["audio_hours"]:
        return None
    if (usage.prompt_tokens and by_unit) or (usage.characters and "input_mchars" not in told):
        return None
    if usage.audio_ms and "audio_hours" not in told:
        return None
    total = price.calc_price(counts_of(usage))["total_price"]
    return int((total * 1_000_000).quantize(Decimal(1), ROUND_HALF_UP))


@pytest.mark.slow
@pytest.mark.parametrize("at", TIMES if FULL else TIMES[-1:], ids=str)
@pytest.mark.parametrize("context", TIERS, ids=lambda context: "-".join(context.values()) or "normal")
def test_all_prices_are_those_of_the_package(context: dict[str, str], at: datetime.datetime) -> None:
    """Each model of each provider costs the same to the micro-dollar, in each service tier.

    The exceptions: fees for tools and the rates of sound and images from a cache are not counted, and a rate with more
    than six decimal places is rounded. What has no rate is unknown, and not 0; so is a model that has rates of tokens
    and of hours.
    """
    from genai_prices.data import providers

    table, seen, wrong = read_table(), 0, []
    assert table.source == f"genai-prices {importlib.metadata.version('genai-prices')}"
    [tier] = context.values() or ("",)
    for provider in providers:
        own = table.models_of(provider.id)
        for name, model in models_of(provider):
            price = model.get_prices(at, context)
            if tier and price == model.get_prices(at):
                continue
            seen += 1
            found = own.find(name)
            assert found is not None, name
            rates = found.in_tier(tier, at.timestamp()) if tier else found.at(at.timestamp())
            for usage in USAGES:
                theirs, ours = expected(price, usage), rates.cost(usage) if rates is not None else None
                if theirs != ours:
                    wrong.append((provider.id, name, usage, theirs, ours))
    assert not wrong[:10], f"{len(wrong)} wrong"
    assert seen >= (2000 if not tier else 4)
