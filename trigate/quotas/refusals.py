"""The errors of calls that a limit refuses: which limit, whose it is, and when enough will be free. Pure."""

from __future__ import annotations

import math

from trigate.errors import ConcurrencyExceeded, LimitReached, QuotaSpent, TokensExceeded
from trigate.quotas.counters import Budget, Counter, Requests, Slots, Tokens
from trigate.quotas.headers import dollars
from trigate.quotas.periods import DAY_S, FOREVER


def refusal(counter: Counter, amount: int, now: float, posix_s: float) -> LimitReached:
    """Returns the error of a call for which a counter has not enough.

    Args:
        amount: What the call needs.
        now, posix_s: The time, by Trio's clock and in seconds since 1970.
    """
    scope, limit, whose = counter.scope, counter.limit, _whose(counter.scope)
    after_s = counter.frees_in_s(amount, now)
    match counter:
        case Requests():
            message = (
                f"{whose} may make {limit} calls a minute (rpm), and has made them. Try again in {_shown(after_s)}."
            )
            return LimitReached(message, scope=scope, setting="rpm", limit=limit, retry_after_s=after_s)
        case Tokens():
            when = "which is more" if after_s is None else f"which will be free in {_shown(after_s)}"
            message = f"{whose} may use {limit} tokens a minute (tpm). This call may need {amount} of them, {when}."
            return TokensExceeded(message, scope=scope, setting="tpm", limit=limit, retry_after_s=after_s)
        case Slots():
            message = f"{whose} may have {limit} calls in flight (max_exchanges), and has them."
            return ConcurrencyExceeded(message, scope=scope, setting="max_exchanges", limit=limit, retry_after_s=1.0)
        case Budget():
            return _quota_spent(counter, amount, whose, posix_s)
    raise AssertionError(f"no error is known for {counter!r}")


def _quota_spent(budget: Budget, amount: int, whose: str, posix_s: float) -> QuotaSpent:
    period = "in all" if budget.period == "total" else f"a {budget.period}"
    message = (
        f"{whose} may spend {dollars(budget.limit)} USD {period}. {dollars(max(0, budget.spent))} USD are spent, and "
        f"calls in flight may cost {dollars(budget.held)} USD; this call may cost {dollars(amount)} USD."
    )
    after_s = None
    if budget.end_day != FOREVER:
        after_s = max(1.0, budget.end_day * DAY_S - posix_s)
        message += f" The next {budget.period} begins in {_shown(after_s)}."
    return QuotaSpent(message, scope=budget.scope, setting=budget.setting, limit=budget.limit, retry_after_s=after_s)


def _whose(scope: str) -> str:
    kind, _, name = scope.partition(":")
    return f"The {kind} {name}" if name else "This gateway"


def _shown(seconds: float | None) -> str:
    if seconds is None:
        return "a while"
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{math.ceil(seconds / 3600)} h"
