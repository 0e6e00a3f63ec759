"""The response headers that say what is left of the limits of a call. Pure.

**Source:** OpenAI's guide to rate limits (``x-ratelimit-…``: a reset is a duration such as ``6m0s``, the time until the
whole limit is available), and Anthropic's reference (``anthropic-ratelimit-…``: a reset is a time in RFC 3339).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import NamedTuple

from trigate.errors import Header
from trigate.openai.endpoints import Format
from trigate.quotas.counters import Budget, Limits, Rate
from trigate.quotas.periods import DAY_S, FOREVER


class _Names(NamedTuple):
    """The headers of one kind of rate."""

    limit: bytes
    remaining: bytes
    reset: bytes
    anthropic_limit: bytes
    anthropic_remaining: bytes
    anthropic_reset: bytes

    @classmethod
    def of(cls, kind: bytes) -> _Names:
        parts = (b"limit", b"remaining", b"reset")
        openai = [b"x-ratelimit-%b-%b" % (part, kind) for part in parts]
        return cls(*openai, *[b"anthropic-ratelimit-%b-%b" % (kind, part) for part in parts])


_REQUESTS, _TOKENS = _Names.of(b"requests"), _Names.of(b"tokens")
NEARLY = 0.75
"""From which share of a budget on Anthropic's headers warn."""


def limit_headers(limits: Limits, form: Format, now: float, posix_s: float, *, is_refused: bool) -> list[Header]:
    """Returns the headers of an answer.

    Args:
        limits: Those that the call was counted at. Of several rates of one kind, the one with the least left counts.
        now, posix_s: The time, by Trio's clock and in seconds since 1970.
        is_refused: The call was refused for a budget.
    """
    headers: list[Header] = []
    if limits.requests:
        _add_rate(headers, limits.requests, _REQUESTS, form, now, posix_s)
    if limits.tokens:
        _add_rate(headers, limits.tokens, _TOKENS, form, now, posix_s)
    budgets = limits.budgets
    if not budgets:
        return headers
    warned = [each for each in budgets if each.soft_limit is not None and each.spent >= each.soft_limit]
    if warned:
        text = ", ".join(f"{each.scope} has spent {dollars(each.spent)} USD" for each in warned)
        headers.append((b"x-trigate-budget-warning", text.encode()))
    if form == "anthropic":
        headers += _unified(budgets, is_refused=is_refused)
    return headers


def _add_rate(
    headers: list[Header], rates: Sequence[Rate], names: _Names, form: Format, now: float, posix_s: float
) -> None:
    rate = rates[0]
    left = rate.left(now)
    for other in rates[1:]:
        other_left = other.left(now)
        if other_left < left:
            rate, left = other, other_left
    reset_s = (rate.limit - left) / rate.limit * 60 if left < rate.limit else 0.0
    limit, remaining = b"%d" % rate.limit, b"%d" % (left + 1e-6 if left > 0 else 0)
    headers.append((names.limit, limit))
    headers.append((names.remaining, remaining))
    headers.append((names.reset, duration(reset_s).encode() if reset_s else b"0ms"))
    if form == "anthropic":
        headers.append((names.anthropic_limit, limit))
        headers.append((names.anthropic_remaining, remaining))
        headers.append((names.anthropic_reset, _rfc3339(posix_s + reset_s)))


def _unified(budgets: Sequence[Budget], *, is_refused: bool) -> list[Header]:
    """The headers by which Claude Code shows how much of a budget is used: those of the budget that is used most."""
    most = max(budgets, key=lambda each: each.spent / (each.limit or 1))
    share = most.spent / (most.limit or 1)
    status = b"rejected" if is_refused else b"allowed_warning" if share >= NEARLY else b"allowed"
    headers: list[Header] = [
        (b"anthropic-ratelimit-unified-status", status),
        (b"anthropic-ratelimit-unified-overage-status", status),
        (b"anthropic-ratelimit-unified-overage-utilization", b"%.4f" % share),
    ]
    if share >= NEARLY:
        passed = b"0.95" if share >= 0.95 else b"0.75"
        headers.append((b"anthropic-ratelimit-unified-overage-surpassed-threshold", passed))
    if most.end_day != FOREVER:
        reset = b"%d" % (most.end_day * DAY_S)
        headers.append((b"anthropic-ratelimit-unified-reset", reset))
        headers.append((b"anthropic-ratelimit-unified-overage-reset", reset))
    return headers


def duration(seconds: float) -> str:
    """Returns a duration as OpenAI writes one.

    >>> duration(0.0201), duration(1), duration(90.25), duration(3600)
    ('21ms', '1s', '1m30.25s', '1h0m0s')
    """
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole = milliseconds / 1000
    minutes, rest = divmod(whole, 60)
    text = f"{round(rest, 3):g}s"
    if minutes < 60:
        return f"{minutes:g}m{text}" if minutes else text
    return f"{minutes // 60:g}h{minutes % 60:g}m{text}"


def dollars(microusd: int) -> str:
    """Returns an amount of money in US dollars.

    >>> dollars(2_500_000), dollars(1)
    ('2.50', '0.000001')
    """
    whole, rest = divmod(microusd, 1_000_000)
    return f"{whole}.{f'{rest:06d}'.rstrip('0').ljust(2, '0')}"


def _rfc3339(posix_s: float) -> bytes:
    when = datetime.datetime.fromtimestamp(math.ceil(posix_s), datetime.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
