"""When something is tried again: pauses, what ``Retry-After`` means, and a budget. Pure: time and chance are arguments.

Sources: RFC 9110 section 10.2.3 (``Retry-After``: seconds or an HTTP date); ``retry-after-ms`` as OpenAI and Azure send
it, and as both official SDKs read it; "full jitter" from the AWS Architecture Blog, *Exponential Backoff and Jitter*;
the budget as in Finagle and Envoy (a share of the calls, and a few a second besides).
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping

MAX_TOKENS = 10.0
MAX_RETRY_AFTER_S = 3600.0
"""A provider that says to come back in years is mistaken; one that says tomorrow is asked once an hour until then."""
_NUMBER = re.compile(r"[0-9]{1,40}(\.[0-9]{1,9})?", re.ASCII)


def retry_after_s(headers: Mapping[str, str], *, now_epoch_s: float) -> float | None:
    """When a provider says to come back: in how many seconds, from 0 to `MAX_RETRY_AFTER_S`; None where it says nothing
    that can be understood. ``retry-after-ms`` goes before ``retry-after``.

    Args:
        headers: By their names in lower case.
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
    """The pause before a target is tried again.

    Args:
        tries: How often it has been tried; at least 1.
        chance: Between 0 and 1.

    >>> [backoff_s(tries, base_s=0.1, max_s=1.0, chance=1.0) for tries in (1, 2, 3, 4, 5, 10_000)]
    [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    return chance * min(max_s, base_s * 2.0 ** min(tries - 1, 64))


class Budget:
    """How many calls may be tries again: a share of all, and some a second besides, so that rare calls have some.

    It is a bucket: each call puts ``share`` of a token in, each second ``a_second``; a try again takes one out. It
    holds `MAX_TOKENS` at most, and ``at_first`` when it is made.

    Args:
        share: Of the calls; 0 = there are no tries again.
    """

    __slots__ = ("_a_second", "_at", "_tokens", "share")

    def __init__(self, share: float, *, a_second: float = 1.0, at_first: float = MAX_TOKENS) -> None:
        self.share = share
        self._a_second = a_second
        self._tokens = at_first
        self._at = math.inf  # when one was taken last

    def note_call(self) -> None:
        """A first try was made."""
        self._tokens = min(MAX_TOKENS, self._tokens + self.share)

    def take(self, now: float) -> bool:
        """Says whether there may be one more, and counts it."""
        self._tokens = min(MAX_TOKENS, self._tokens + self._a_second * max(0.0, now - self._at))
        self._at = now
        if self._tokens < 1 or not self.share:
            return False
        self._tokens -= 1
        return True
