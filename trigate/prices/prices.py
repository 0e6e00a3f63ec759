"""The prices of the models of one configuration: those that it sets, and the public ones of its providers."""

from __future__ import annotations

import attrs

from trigate.config.key_sections import MicroUsd, PriceConfig, Rates
from trigate.config.sections import Config, UpstreamConfig
from trigate.openai.answer import Usage
from trigate.prices.price import FREE, Price
from trigate.prices.table import DatedPrices, PriceTable, ProviderPrices, read_table

_KINDS = {"azure": "azure", "bedrock": "aws", "gemini": "google", "vertex": "google"}
"""The providers of the upstreams that are known by their kind, whatever their base URL is."""
_NORMAL_TIERS = frozenset(("", "default", "standard", "auto", "on_demand", "unspecified", "traffic_type_unspecified"))
"""The names of the service tier in which calls are served that ask for none, at the providers that name it."""
_OWN_KINDS = ("echo", "local")
_FREE = DatedPrices(((None, FREE),))
_NOTHING_SET = PriceConfig()
_MAX_KEPT = 4096


class Prices:
    """What the models of the upstreams cost. It is asked for each attempt, and looks a model up once.

    Attributes:
        source: Where the public prices come from; empty = no upstream needs them.
        unknown: The targets (``upstream/model``) whose price somebody has asked for, and which have none; if only one
            of its prices is missing, with its name behind: ``(flex)``, ``(images)``, ``(characters)`` …
    """

    def __init__(self, config: Config) -> None:
        self.source = ""
        self.unknown: dict[str, None] = {}
        self._config = config.upstreams
        self._own = config.prices
        self._upstreams: dict[str, ProviderPrices | DatedPrices | None] = {}
        self._found: dict[tuple[str, str], DatedPrices | None] = {}
        if any(each.kind not in _OWN_KINDS for each in self._config.values()):
            self.use(read_table())
        else:
            self._upstreams = dict.fromkeys(self._config, _FREE)

    def __repr__(self) -> str:
        return f"<Prices from {self.source or 'nowhere'}, {len(self.unknown)} unknown>"

    def use(self, table: PriceTable) -> None:
        """Takes the public prices from a table, from now on. Synchronous."""
        shared: dict[str, ProviderPrices] = {}
        for name, upstream in self._config.items():
            if upstream.kind in _OWN_KINDS:
                self._upstreams[name] = _FREE
                continue
            self.source = table.source
            provider = _provider_of(upstream, table)
            if provider is not None and provider not in shared:
                shared[provider] = table.models_of(provider)
            self._upstreams[name] = shared[provider] if provider is not None else None
        self._found.clear()
        self.unknown.clear()

    def cost(self, upstream: str, model: str, usage: Usage, at: float) -> MicroUsd | None:
        """Returns what a call has cost that began at a time in POSIX seconds; None = that is not known.

        Args:
            model: The id that the upstream knows it by.
        """
        price = self.price(upstream, model, at, usage.service_tier)
        if price is None:
            return None
        cost = price.cost(usage)
        if cost is None:
            counts = {"images": usage.images, "characters": usage.characters, "hours": usage.audio_ms, "tokens": 1}
            self._note_unknown(f"{upstream}/{model} ({next(what for what, count in counts.items() if count)})")
        return cost

    def price(self, upstream: str, model: str, at: float, tier: str = "") -> Price | None:
        """Returns what a model costs at an upstream, at a time in POSIX seconds; None = it is not known.

        Args:
            model: The id that the upstream knows it by.
            tier: The service tier, in lower case, as the upstream or the client names it.
        """
        found = self._known(upstream, model)
        price = found.at(at) if found is not None else None
        if price is None:
            self._note_unknown(f"{upstream}/{model}")
        elif tier not in _NORMAL_TIERS and price is not FREE and found is not None:
            price = found.in_tier(tier, at)
            if price is None:
                self._note_unknown(f"{upstream}/{model} ({tier})")
        return price

    def possible(self, upstream: str, model: str, at: float, tier: str) -> list[Price]:
        """Returns what a call may cost that asks for a service tier: a provider may serve it in its normal one."""
        found = self._known(upstream, model)
        if found is None:
            return []
        return [price for price in (found.at(at), found.in_tier(tier, at)) if price is not None]

    def _known(self, upstream: str, model: str) -> DatedPrices | None:
        key = (upstream, model)
        try:
            return self._found[key]
        except KeyError:
            if len(self._found) >= _MAX_KEPT:
                self._found.clear()  # clients choose the ids, so their number has no other bound
            found = self._found[key] = self._find(upstream, model)
            return found

    def _note_unknown(self, what: str) -> None:
        if len(self.unknown) < _MAX_KEPT:
            self.unknown[what] = None

    def _find(self, upstream: str, model: str) -> DatedPrices | None:
        for name in (f"{upstream}/{model}", f"{upstream}/*", model):
            if name in self._own:
                own = self._own[name]
                if own.service_tiers and attrs.evolve(own, service_tiers={}) == _NOTHING_SET:
                    return _with_tiers(self._find_public(upstream, model), own)
                return _with_tiers(DatedPrices(((None, _configured(own)),)), own)
        return self._find_public(upstream, model)

    def _find_public(self, upstream: str, model: str) -> DatedPrices | None:
        source = self._upstreams.get(upstream)
        return source.find(model) if isinstance(source, ProviderPrices) else source


def _provider_of(upstream: UpstreamConfig, table: PriceTable) -> str | None:
    found = table.provider_of(str(upstream.base_url)) if upstream.base_url is not None else None
    return found or _KINDS.get(upstream.kind)


def _with_tiers(prices: DatedPrices | None, config: PriceConfig) -> DatedPrices | None:
    if prices is None or not config.service_tiers:
        return prices
    own = {name.lower(): prices.times(factor) for name, factor in config.service_tiers.items()}
    return attrs.evolve(prices, tiers={**prices.tiers, **own})


def _configured(config: PriceConfig) -> Price:
    price = _price(config)
    if config.long_prompt is None:
        return price
    return attrs.evolve(price, tiers=((config.long_prompt_tokens or 0, _price(config.long_prompt)),))


def _price(rates: Rates) -> Price:
    def or_input(value: int | None) -> int:
        return rates.input_usd if value is None else value

    return Price(
        input=rates.input_usd,
        cache_read=or_input(rates.cache_read_usd),
        cache_write=or_input(rates.cache_write_usd),
        cache_write_1h=rates.cache_write_1h_usd,
        output=rates.output_usd,
        audio_input=rates.audio_input_usd,
        audio_output=rates.audio_output_usd,
        image_input=rates.image_input_usd,
        image_output=rates.image_output_usd,
        image=rates.image_usd,
        characters=rates.characters_usd,
        audio_hour=rates.audio_hour_usd,
        call=rates.call_usd,
    )
