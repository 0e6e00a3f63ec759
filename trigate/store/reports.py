"""What the store is asked about the exchanges that have ended, and what it answers besides their records."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen(kw_only=True)
class ExchangeQuery:
    """Which records are asked for. None = any.

    Attributes:
        owner: The name of the key.
        id: The id of the exchange, or that of its request.
        failed: Only those that did not end as they should have: whose outcome is ``lost`` or an error code.
        since, before: From when on they began, and before when.
    """

    owner: str | None = None
    id: str | None = None
    model: str | None = None
    outcome: str | None = None
    failed: bool = False
    since: float | None = None
    before: float | None = None


UsageColumn = Literal["key", "group", "model", "target", "upstream", "hour", "day", "month"]
"""What the use can be grouped by: hours and days are numbers since 1970, months texts (``2026-11``)."""


@attrs.define(kw_only=True)
class UsageTotals:
    """The use of the gateway by some calls.

    Attributes:
        group: What they have in common: the values of the columns that were asked for.
        calls: How many.
        estimated: How many of them have token counts that no upstream has reported.
        unpriced: How many have used tokens whose price is not known.
        cost: Micro-dollars, without those.
        outcomes: How many calls ended with each outcome.
        durations, first_contents: Histograms of the time that complete answers took, and of that to the first content:
            counts by bucket. Bucket n has the times up to 2^(n/8) ms.
    """

    group: tuple[str | int, ...] = ()
    calls: int = 0
    estimated: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost: int = 0
    outcomes: dict[str, int] = attrs.field(factory=dict)
    durations: dict[int, int] = attrs.field(factory=dict)
    first_contents: dict[int, int] = attrs.field(factory=dict)
