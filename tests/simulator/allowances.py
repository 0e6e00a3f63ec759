"""The random draws of limits, budgets and prices: a part of `draws`. Pure.

Which scopes have budgets, and of which periods, is drawn once for each gateway; all other limits anew for each
configuration.
"""

from __future__ import annotations

import random
from typing import Any

EPOCH_S = 1_780_272_000
"""The beginning of a Monday, a month and a day: 2026-06-01 in UTC."""
_DAY_S = 86_400
_CALL_USD = 0.00005
"""What a call costs, about."""
_PERIODS = ("day", "week", "month", "total")


def starts_at(rng: random.Random) -> float:
    """When a gateway opens, in seconds since 1970. Half of them see the day end, and some of these a week or a
    month."""
    return EPOCH_S + _DAY_S * rng.choice((0, 0, 1, 7, 30)) - rng.choice((rng.uniform(0.0, 40.0), 40_000.0))


def limits(shape: random.Random, amounts: random.Random, *, calls: float) -> dict[str, Any]:  # Any: TOML
    """The limits of a scope.

    Args:
        shape, amounts: The generators for which budgets there are, and for everything else.
        calls: How many calls a minute are made in the scope, about.
    """
    own: dict[str, Any] = {}  # Any: a table of TOML
    if amounts.random() < 0.4:
        own["rpm"] = max(1, int(calls * amounts.uniform(0.1, 1.0)))
    if amounts.random() < 0.4:
        own["tpm"] = int(4300 + 100 * calls * amounts.uniform(0.02, 0.4))
    if amounts.random() < 0.4:
        own["max_exchanges"] = max(1, int(calls / 30 * amounts.uniform(0.5, 2.0)))
    periods = shape.sample(_PERIODS, shape.choice((0, 1, 2)))
    if periods:
        own["budgets"] = {period: f"{0.017 + calls * _CALL_USD * amounts.uniform(0.3, 3.0):.6f}" for period in periods}
    return own


def prices(rng: random.Random, targets: list[str]) -> dict[str, Any]:  # Any: a table of TOML
    """The prices of targets; a few have none."""
    return {
        target: {
            "input_usd": rng.choice((0.5, 1, 3)),
            "output_usd": rng.choice((1, 4)),
            "call_usd": rng.choice((0, 0.00001)),
        }
        for target in targets
        if rng.random() < 0.9
    }
