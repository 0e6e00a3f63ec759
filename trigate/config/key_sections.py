"""The sections about who may use the gateway, how much, and at what price: keys, groups, limits, budgets, prices.

Money is a whole number of micro-dollars (`MicroUsd`), never a float. In the configuration it is a number or a string of
US dollars, which is read as a decimal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NewType

import attrs

from trigate.config.secrets import Secret
from trigate.config.values import Seconds, Url

MicroUsd = NewType("MicroUsd", int)
"""Millionths of a US dollar."""
Factor = NewType("Factor", int)
"""Millionths of a factor by which a price is multiplied; in the configuration a number or a string."""
Tokens = NewType("Tokens", int)
"""A number of tokens, of which there may be more than `sections.Limit` allows."""
Instant = NewType("Instant", float)
"""A point in time: POSIX seconds; in the configuration also a date and time of TOML, or one of ISO 8601."""
MIN_PRICE_INTERVAL_S = 60
"""The shortest ``interval_s`` of ``[price_table]``."""
Period = Literal["day", "week", "month", "total"]
"""The time that a budget is for; days, weeks (from Monday) and months are those of UTC."""


@attrs.frozen(kw_only=True)
class Allowance:
    """What a key, a group, a model or an upstream may use. None = no limit of its own."""

    rpm: Tokens | None = None
    """Calls per minute in the long run; a minute's calls may come at once."""
    tpm: Tokens | None = None
    """Tokens per minute, of prompts and answers."""
    max_exchanges: Tokens | None = None
    """Exchanges in flight."""
    budget_usd: MicroUsd | None = None
    """What may be spent in one ``budget_period``."""
    budget_period: Period = "month"
    budgets: Mapping[Period, MicroUsd] = attrs.field(factory=dict)
    """Further budgets, each for its own period."""

    @property
    def all_budgets(self) -> dict[Period, MicroUsd]:
        """Every budget, by its period."""
        own: dict[Period, MicroUsd] = {} if self.budget_usd is None else {self.budget_period: self.budget_usd}
        return {**self.budgets, **own}


@attrs.frozen(kw_only=True)
class GroupConfig(Allowance):
    """``[groups.NAME]``: what the keys of a group may use together. The limits of a key hold beside those of its
    group."""

    models: tuple[str, ...] | None = None
    """The models that its keys may use, with ``*`` for any text. None = all."""
    soft_budget_usd: MicroUsd | None = None
    """From which part of its budgets on a warning is given."""


@attrs.frozen(kw_only=True)
class KeySettings(GroupConfig):
    """What a key may do: the settings of ``[keys.NAME]`` without the secret, which are also those of a key that is made
    at run time (``POST /v1/keys``)."""

    group: str | None = None
    """Its group in ``[groups]``."""
    priority: int = 0
    """Of its calls in the queue for a slot of the gateway: those of a higher one go first."""
    tags: tuple[str, ...] = ()
    """Words under which its use is reported, besides its name."""
    expires_at: Instant | None = None
    hooks: tuple[str, ...] | None = None
    """The webhooks that it may call, with ``*`` for any text. None = all."""
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """Anything that its owner wants to remember with it."""
    content_log: bool = False
    """Whether its calls are in the log of contents, if there is one (``[content_log]``)."""
    include_cost: bool = False
    """Whether the last event with token counts of its streams has their cost as well."""


@attrs.frozen(kw_only=True)
class KeyConfig(KeySettings):
    """``[keys.NAME]``: a key of the gateway, and what it may do. ``NAME = secret`` is a key that may do everything but
    administer."""

    secret: Secret


@attrs.frozen(kw_only=True)
class Rates:
    """What a model costs, in US dollars per million tokens of each kind, and per call."""

    input_usd: MicroUsd = MicroUsd(0)
    """Tokens of the prompt that no cache had."""
    output_usd: MicroUsd = MicroUsd(0)
    """Tokens of the answer, those of its reasoning included."""
    cache_read_usd: MicroUsd | None = None
    """Tokens that the provider reads from its cache. None = ``input_usd``."""
    cache_write_usd: MicroUsd | None = None
    """Tokens that it writes into its cache. None = ``input_usd``."""
    cache_write_1h_usd: MicroUsd | None = None
    """Tokens that it keeps in its cache for an hour. None = ``cache_write_usd``."""
    audio_input_usd: MicroUsd | None = None
    """Tokens of sound in the prompt. None = ``input_usd``."""
    audio_output_usd: MicroUsd | None = None
    """Tokens of sound in the answer. None = ``output_usd``."""
    image_input_usd: MicroUsd | None = None
    """Tokens of images in the prompt. None = ``input_usd``."""
    image_output_usd: MicroUsd | None = None
    """Tokens of images in the answer. None = ``output_usd``."""
    image_usd: MicroUsd | None = None
    """Of each image that ``/v1/images`` makes, besides its tokens. None = an image without token counts has no known
    price, if there are rates of tokens."""
    characters_usd: MicroUsd | None = None
    """Of a million characters of a text that ``/v1/audio/speech`` reads out. None = not known."""
    audio_hour_usd: MicroUsd | None = None
    """Of an hour of sound that is transcribed. None = not known."""
    call_usd: MicroUsd = MicroUsd(0)
    """Of each call, besides its tokens."""


@attrs.frozen(kw_only=True)
class PriceConfig(Rates):
    """``[prices."MODEL"]``: the price of a model, instead of the public one. ``MODEL`` is the id that the upstream
    knows it by, at any upstream; or ``UPSTREAM/MODEL``, or ``UPSTREAM/*`` for all others of one upstream."""

    long_prompt_tokens: Tokens | None = None
    """With more tokens than this, the whole call costs what ``long_prompt`` says."""
    long_prompt: Rates | None = None
    service_tiers: Mapping[str, Factor] = attrs.field(factory=dict)
    """What the price is multiplied by in each of the provider's service tiers. Alone, they hold for the public
    price."""


@attrs.frozen(kw_only=True)
class PriceTableConfig:
    """``[price_table]``: where newer public prices come from than those of the release. Without it, nothing is read."""

    url: Url | None = None
    """The data of genai-prices, as it is published."""
    file: str | None = None
    """The same data in a file. Only one of the two."""
    interval_s: Seconds = Seconds(86_400.0)
    """How often it is read, besides at the start and at each reload; 0 = not besides."""

    @property
    def source(self) -> str:
        """Where the prices come from; empty = from the release."""
        return self.url or self.file or ""


@attrs.frozen(kw_only=True)
class AdminConfig:
    """``[admin]``: who administers keys, and sees all."""

    key: Secret | None = None
    """The admin's key. None = ``TRIGATE_ADMIN_KEY``, else nobody administers."""
