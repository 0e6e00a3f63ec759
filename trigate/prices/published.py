"""Makes the price table (`prices.table`) of the data that genai-prices publishes: a JSON array of providers.

What cannot be told from counts of tokens, calls, characters and hours of transcribed sound has no price in the table:
pages, videos, hours of conversation.
Fees for tools of a provider (web search) are left out, and so is that sound or images from a cache have a rate of their
own: they cost what text from a cache does.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import msgspec

_RATES = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "audio_input",
    "output_audio_mtok": "audio_output",
    "input_image_mtok": "image_input",
    "output_image_mtok": "image_output",
    "input_mchars": "characters",
    "input_audio_hours": "audio_hour",
    "requests_kcount": "call",
}
_NOT_COUNTED = {"web_searches_kcount", "storage_searches_kcount", "cache_audio_read_mtok", "cache_image_read_mtok"}
_NEEDED = {"input_mtok", "output_mtok", "requests_kcount", "input_mchars", "input_audio_hours"}
_SIGNS = {"equals": "=", "starts_with": "^", "ends_with": "$", "contains": "*", "regex": "/"}
_MOST_USD = 10**6
"""More than this, a rate is none."""


class _Tier(msgspec.Struct):
    start: int
    price: Decimal


class _Tiers(msgspec.Struct):
    base: Decimal
    tiers: list[_Tier]

    def at(self, start: int) -> Decimal:
        return next((tier.price for tier in reversed(self.tiers) if start >= tier.start), self.base)


_Rates = dict[str, Decimal | _Tiers | None]


class _Constraint(msgspec.Struct):
    """From a day on, or a part of each day."""

    start_date: datetime.date | None = None
    start_time: datetime.time | None = None
    end_time: datetime.time | None = None


class _Conditional(msgspec.Struct):
    prices: _Rates
    constraint: _Constraint | None = None


class _Variant(msgspec.Struct):
    when: dict[str, str]
    prices: _Rates
    constraint: _Constraint | None = None


class _Model(msgspec.Struct):
    match: dict[str, Any]  # Any: a clause, which nests
    prices: _Rates | list[_Conditional]
    price_variants: list[_Variant] | None = None


class _Provider(msgspec.Struct):
    id: str
    api_pattern: str
    models: list[_Model]
    fallback_model_providers: list[str] | None = None


_decoder = msgspec.json.Decoder(list[_Provider])


def table_of(data: bytes, source: str) -> bytes:
    """Makes the table of published data. Takes about 0.2 s.

    Args:
        data: The JSON array.
        source: Where it comes from.

    Raises:
        ValueError: The data is something else, or has a price that is none.
    """
    try:
        providers = _decoder.decode(data)
        if not any(provider.models for provider in providers):
            raise ValueError("it has no models")
        head = [[each.id, each.api_pattern, each.fallback_model_providers or []] for each in providers]
        models = {each.id: [_row(model) for model in each.models] for each in providers}
        for _, pattern, others in head:
            re.compile(str(pattern))
            if unknown := set(others) - set(models):
                raise ValueError(f"there is no provider {min(unknown)}")
    except (re.error, RecursionError) as error:
        raise ValueError(str(error)) from None
    rows = [
        f"{json.dumps(name)}:[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in of_provider) + "\n]"
        for name, of_provider in models.items()
    ]
    text = (
        f'{{"source":{json.dumps(source)},\n"providers":{json.dumps(head, separators=(",", ":"))},\n"models":{{\n'
        + ",\n".join(rows)
        + "\n}}\n"
    )
    return text.encode()


def _row(model: _Model) -> list[Any]:  # Any: JSON
    variants = model.price_variants or []
    dated = model.prices if isinstance(model.prices, list) else [_Conditional(model.prices)]
    if not dated:
        raise ValueError("a model has no prices")
    row: list[Any] = [_clause(model.match), [[_when(each.constraint), _tiers(each.prices)] for each in dated]]
    tiers = {name: _in_tier(dated, own) for name, own in _by_tier(variants)}
    return [*row, tiers] if tiers else row


def _clause(match: Mapping[str, Any]) -> Any:  # Any: JSON
    [(kind, value)] = match.items() if len(match) == 1 else [("", None)]
    if kind in ("or", "and") and isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return ["|" if kind == "or" else "&", *map(_clause, value)]
    if kind not in _SIGNS or not isinstance(value, str):
        raise ValueError(f"a model has the unknown match {str(match)[:100]}")
    if kind == "regex":
        re.compile(value)
        return "/" + value
    return _SIGNS[kind] + value.lower()


def _by_tier(variants: list[_Variant]) -> Iterator[tuple[str, list[_Variant]]]:
    """Yields the variants of each service tier, batches and the fast mode included. The normal tier needs none."""
    found: dict[str, list[_Variant]] = {}
    for variant in variants:
        if len(variant.when) == 1 and {"service_tier", "processing", "speed"} & set(variant.when) and variant.prices:
            [name] = variant.when.values()
            found.setdefault(name.lower(), []).append(variant)
    yield from found.items()


def _in_tier(dated: list[_Conditional], variants: list[_Variant]) -> list[Any]:  # Any: JSON
    """Returns the prices in a service tier. A variant has some rates, which replace those of the day; the first one
    that is in force has the first word. Before any is, the price is unknown."""
    constraints = [*[each.constraint for each in dated], *[each.constraint for each in variants]]
    if any(each is not None and each.start_date is None for each in constraints):
        return [[None, None]]  # prices by the time of day have no tiers in the data
    days = sorted({_day(each) for each in constraints})
    rows: list[Any] = []
    for day in days:
        in_force = [each for each in variants if _day(each.constraint) <= day]
        standard = next((each for each in reversed(dated) if _day(each.constraint) <= day), dated[0])
        rates: _Rates = dict(standard.prices)
        for variant in reversed(in_force):
            rates |= {name: value for name, value in variant.prices.items() if value is not None}
        when = None if day == datetime.date.min else _posix(day)
        rows.append([when, _tiers(rates) if in_force else None])
    return rows


def _day(constraint: _Constraint | None) -> datetime.date:
    day = constraint.start_date if constraint is not None else None
    return day or datetime.date.min


def _tiers(prices: _Rates) -> list[Any] | None:  # Any: JSON
    """Returns the rates by the length of the prompt; None = counts of tokens do not tell the cost."""
    values = {name: value for name, value in prices.items() if value is not None}
    base = values.get("input_mtok")
    if values.get("audio_hours") == values.get("input_audio_hours"):
        values.pop("audio_hours", None)
    values = {
        name: value for name, value in values.items() if name in _RATES or (name not in _NOT_COUNTED and value != base)
    }
    if not set(values) <= set(_RATES) or not _NEEDED & set(values):
        return None
    if "input_audio_hours" in values and {"input_mtok", "output_mtok"} & set(values):
        return None  # a chat with sound costs both, and no count of tokens tells the hours
    starts = {0} | {tier.start for value in values.values() if isinstance(value, _Tiers) for tier in value.tiers}
    return [
        [start, {_RATES[name]: _rate(value, start, name) for name, value in values.items()}] for start in sorted(starts)
    ]


def _rate(value: Decimal | _Tiers, start: int, name: str) -> int:
    usd = value.at(start) if isinstance(value, _Tiers) else value
    if not 0 <= usd <= _MOST_USD:
        raise ValueError(f"{name} is {usd}")
    scaled = usd * 1_000_000 / (1000 if name == "requests_kcount" else 1)
    return int(scaled.to_integral_value())  # a few have more digits than a micro-dollar for a million tokens


def _when(constraint: _Constraint | None) -> Any:  # Any: JSON
    if constraint is None:
        return None
    if constraint.start_date is not None:
        return _posix(constraint.start_date)
    if constraint.start_time is None or constraint.end_time is None:
        raise ValueError("a price has a constraint without a day or a time")
    return [_seconds(constraint.start_time), _seconds(constraint.end_time)]


def _posix(day: datetime.date) -> int:
    return int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())


def _seconds(time: datetime.time) -> int:
    if time.tzinfo is not None:
        time = datetime.datetime.combine(datetime.date(1970, 1, 2), time).astimezone(datetime.UTC).time()
    return time.hour * 3600 + time.minute * 60 + time.second
