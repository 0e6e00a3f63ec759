"""The public prices of providers, which come with the gateway.

They are those of genai-prices (MIT, see ``table.LICENSE``), which ``scripts/prices`` brings into a form that costs
little: that package takes 1.4 s to import and 96 MiB, for each worker. ``table.json`` is an object:

* ``source``: the package and its version.
* ``providers``: ``[id, pattern of base URLs, [ids of providers whose models it also offers]]``.
* ``models``: for each provider, rows of ``[match, prices, {service tier: prices}]``, the last part of which may be
  missing. The first row that matches a model id is its own.

A match is a sign and a text (``=`` equal to it, ``^`` begins with it, ``$`` ends with it, ``*`` contains it, ``/``
regular expression), or a list: ``|`` (one of the rest) or ``&`` (all of the rest).

Prices are ``[[when, tiers], …]``, of which the last one applies that is in force. When: null = always; a number = from
then on (POSIX seconds); two numbers = between them, in seconds of the day (UTC). Tiers: null = the cost cannot be told
from counts of tokens; else ``[[more than so many tokens of the prompt, {rate: micro-dollars}], …]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import attrs
import msgspec

from trigate.prices.price import Price

_DAY_S = 86400


class _Table(msgspec.Struct):
    source: str
    providers: list[tuple[str, str, list[str]]]
    models: dict[str, msgspec.Raw]


@attrs.frozen
class DatedPrices:
    """The prices of a model, each from a time on, or for a part of the day.

    Attributes:
        tiers: The prices in the provider's service tiers, by their names in lower case.
    """

    rows: tuple[tuple[int | tuple[int, int] | None, Price | None], ...]
    tiers: Mapping[str, DatedPrices] = attrs.field(factory=dict)

    def at(self, time_s: float) -> Price | None:
        """Returns the price at a time (POSIX seconds); None = unknown."""
        for when, price in reversed(self.rows):
            if when is None or (isinstance(when, int) and when <= time_s):
                return price
            if isinstance(when, tuple):
                start, end = when
                now = time_s % _DAY_S
                if start <= now < end if start <= end else now >= start or now < end:
                    return price
        return self.rows[0][1]

    def in_tier(self, tier: str, time_s: float) -> Price | None:
        """Returns the price in a service tier at a time; None = unknown."""
        found = self.tiers.get(tier)
        return found.at(time_s) if found is not None else None

    def times(self, factor: int) -> DatedPrices:
        """Returns the prices times a factor in millionths."""
        return DatedPrices(tuple([(when, price and price.times(factor)) for when, price in self.rows]))


class PriceTable:
    """The table. It is read once for each configuration, and forgotten when the upstreams have what they need.

    Attributes:
        source: Where it comes from.
    """

    def __init__(self, data: bytes) -> None:
        table = msgspec.json.decode(data, type=_Table)
        self.source = table.source
        self._providers = {name: (re.compile(pattern), others) for name, pattern, others in table.providers}
        self._models = table.models

    def provider_of(self, base_url: str) -> str | None:
        """Returns the provider at a base URL; None = it is none of the table."""
        for name, (pattern, _) in self._providers.items():
            if pattern.match(base_url):
                return name
        return None

    def models_of(self, provider: str) -> ProviderPrices:
        """Returns the prices of a provider's models."""
        _, others = self._providers[provider]
        rows: list[Any] = []  # Any: JSON, whose shape the module describes
        for name in (provider, *others):
            rows += msgspec.json.decode(self._models[name])
        return ProviderPrices(rows)


class ProviderPrices:
    """The prices of one provider's models, by model id."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def find(self, model: str) -> DatedPrices | None:
        """Returns the prices of a model; None = it is none of the table."""
        model = model.lower()
        for wanted in (model, re.sub(r"-(\d{4})(\d\d)(\d\d)\b", r"-\1-\2-\3", model)):
            for match, prices, *tiers in self._rows:
                if _matches(match, wanted):
                    return _dated(prices, *tiers)
        return None


def _dated(prices: list[Any], tiers: Mapping[str, list[Any]] | None = None) -> DatedPrices:  # Any: JSON
    rows = tuple([(_when(when), price_of_tiers(of_prompt)) for when, of_prompt in prices])
    return DatedPrices(rows, {name: _dated(each) for name, each in (tiers or {}).items()})


def _matches(match: Any, model: str) -> bool:  # Any: JSON, whose shape the module describes
    """Whether a match is that of a model id.

    >>> _matches("^gpt-4", "gpt-4o"), _matches(["|", "=a", "*b"], "abc"), _matches(["&", "$c", "=a"], "abc")
    (True, True, False)
    """
    if isinstance(match, list):
        parts = [_matches(part, model) for part in match[1:]]
        return any(parts) if match[0] == "|" else all(parts)
    sign: str = match[0]
    text: str = match[1:]
    match sign:
        case "=":
            return model == text
        case "^":
            return model.startswith(text)
        case "$":
            return model.endswith(text)
        case "*":
            return text in model
        case _:
            return re.search(text, model) is not None


def _when(value: Any) -> int | tuple[int, int] | None:  # Any: JSON
    return (value[0], value[1]) if isinstance(value, list) else value


def price_of_tiers(tiers: list[tuple[int, Mapping[str, int]]] | None) -> Price | None:
    """Makes a price of tiers, as the table has them.

    >>> price_of_tiers([[0, {"input": 2, "output": 4}], [1000, {"input": 3, "output": 6}]]).of_prompt(1001).cache_read
    3
    """
    if tiers is None:
        return None
    made = [(above, _price(rates)) for above, rates in tiers]
    return attrs.evolve(made[0][1], tiers=tuple(made[1:]))


def _price(rates: Mapping[str, int]) -> Price:
    plain = rates.get("input", 0)
    return Price(
        input=plain,
        cache_read=rates.get("cache_read", plain),
        cache_write=rates.get("cache_write", plain),
        cache_write_1h=rates.get("cache_write_1h"),
        output=rates.get("output", 0),
        audio_input=rates.get("audio_input"),
        audio_output=rates.get("audio_output"),
        image_input=rates.get("image_input"),
        image_output=rates.get("image_output"),
        characters=rates.get("characters"),
        audio_hour=rates.get("audio_hour"),
        call=rates.get("call", 0),
    )


def read_table() -> PriceTable:
    """Reads the table that comes with the gateway. It takes about 2 ms."""
    return PriceTable(resources.files("trigate.prices").joinpath("table.json").read_bytes())
