"""When an attempt is retried: pauses, ``Retry-After``, and a budget. Pure: time and chance are arguments.

Sources: RFC 9110 section 10.2.3 (``Retry-After``: seconds or an HTTP date); ``retry-after-ms`` as OpenAI and Azure send
it, and as both official SDKs read it; "full jitter" from the AWS Architecture Blog, *Exponential Backoff and Jitter*;
the budget as in Finagle and Envoy (a share of the calls, plus a few per second).
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping
from typing import Literal

from trigate.config.sections import Reason
from trigate.dialects.content_filter import is_refusal
from trigate.dialects.overflow import overflow_of
from trigate.errors import GatewayError, ProtocolViolation, Rejected, Unavailable, Untranslatable, UpstreamTimeout

MAX_TOKENS = 10.0
"""The most retries that can be saved up."""
MAX_RETRY_AFTER_S = 3600.0
"""The longest ``Retry-After`` that is believed: a time in years is a mistake, and a day is retried once an hour."""
REFUSALS = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422, 501})
"""Statuses which say that the request or the key is wrong, or that the provider does not do this. It works."""
_NUMBER = re.compile(r"[0-9]{1,40}(\.[0-9]{1,9})?", re.ASCII)


def retry_after_s(headers: Mapping[str, str], *, now_epoch_s: float) -> float | None:
    """Seconds until the provider allows a retry, from 0 to `MAX_RETRY_AFTER_S`; None if no header can be parsed.

    ``retry-after-ms`` takes precedence over ``retry-after``.

    Args:
        headers: The response headers by their lower-case names.
        now_epoch_s: The time now, in seconds since 1970.
    """
    given = headers.get("retry-after-ms")
    if given is not None and _NUMBER.fullmatch(given.strip()):
        return min(MAX_RETRY_AFTER_S, float(given) / 1000)
    given = headers.get("retry-after", "").strip()
    if not given:
        return None
    if _NUMBER.fullmatch(given):
        return min(MAX_RETRY_AFTER_S, float(given))
    date = email.utils.parsedate_tz(given)
    if date is None:
        return None
    try:
        return min(MAX_RETRY_AFTER_S, max(0.0, email.utils.mktime_tz(date) - now_epoch_s))
    except (OverflowError, ValueError):
        return None


def backoff_s(tries: int, *, base_s: float, max_s: float, chance: float) -> float:
    """The pause in seconds before a target is retried.

    Args:
        tries: How many attempts there have been at the target; at least 1.
        chance: Between 0 and 1.

    >>> [backoff_s(tries, base_s=0.1, max_s=1.0, chance=1.0) for tries in (1, 2, 3, 4, 5, 10_000)]
    [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    return chance * min(max_s, base_s * 2.0 ** min(tries - 1, 64))


def may_resend(error: GatewayError, rule: Literal["never", "refused", "always"]) -> bool:
    """Whether a call that failed with this error may be sent to the same target again, by ``retries.resend``.

    A provider that has received the whole call may have served it, and will bill it again. ``never``: only a call that
    did not reach it. ``refused``: also one that it explicitly refused: 429, or 503 with a time to try again.
    ``always``: also after any other failure. A timeout, an invalid answer and a refusal would only come again.

    >>> [may_resend(Unavailable("down", reachable=True), rule) for rule in ("never", "refused", "always")]
    [False, False, True]
    """
    if isinstance(error, UpstreamTimeout | ProtocolViolation | Untranslatable) or error.status in REFUSALS:
        return False
    if rule == "always" or (isinstance(error, Unavailable) and not error.sent):
        return True
    return rule == "refused" and (
        error.status == 429
        or (isinstance(error, Unavailable) and error.status == 503 and error.retry_after_s is not None)
    )


def reasons_of(error: GatewayError) -> frozenset[Reason]:
    """The reasons (``models.ALIAS.on``) for which an attempt failed; none = another target would fail as well.

    What a stream reports before its content was always a reason to try the next target. So a request that is too long
    is also an ``error`` if it was reported there, and nothing else if it was refused.

    >>> sorted(reasons_of(Rejected("prompt is too long: 9 tokens > 8 maximum", status=400)))
    ['context_length']
    >>> sorted(reasons_of(UpstreamTimeout("slow", phase="idle"))), sorted(reasons_of(Rejected("no", status=400)))
    (['timeout'], [])
    """
    found: set[Reason] = set()
    if is_refusal(error):
        found.add("content_filter")
    if overflow_of(error) is not None or (isinstance(error, Rejected) and error.status == 413):
        found.add("context_length")
    if error.status == 429:
        found.add("rate_limit")
    elif isinstance(error, UpstreamTimeout) or error.status == 408:
        found.add("timeout")
    elif error.retryable:
        found.add("error")
    return frozenset(found) if error.blame == "provider" or error.retryable else frozenset()


class Budget:
    """How many retries are allowed: a share of the calls, plus some per second, so that rare calls can be retried too.

    It is a token bucket: each call adds ``share`` tokens, each second adds ``per_second``, and a retry takes one token.
    It holds at most `MAX_TOKENS`.

    Args:
        share: Retries per call, 0 to 1; 0 = no retries.
        per_second: Further retries per second.
        initial: The tokens at the start.
    """

    __slots__ = ("_at", "_per_second", "_tokens", "share")

    def __init__(self, share: float, *, per_second: float = 1.0, initial: float = MAX_TOKENS) -> None:
        self.share = share
        self._per_second = per_second
        self._tokens = initial
        self._at = math.inf  # the time of the last `take`

    def note_call(self) -> None:
        """Records a first attempt."""
        self._tokens = min(MAX_TOKENS, self._tokens + self.share)

    def take(self, now: float) -> bool:
        """Takes a token for one retry; False = there is none."""
        self._tokens = min(MAX_TOKENS, self._tokens + self._per_second * max(0.0, now - self._at))
        self._at = now
        if self._tokens < 1 or not self.share:
            return False
        self._tokens -= 1
        return True
