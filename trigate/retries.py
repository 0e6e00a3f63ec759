"""When something is tried again: pauses, what ``Retry-After`` means, and a budget. Pure: time and chance are arguments.

Sources: RFC 9110 section 10.2.3 (``Retry-After``: seconds or an HTTP date); ``retry-after-ms`` as OpenAI and Azure send
it, and as both official SDKs read it; "full jitter" from the AWS Architecture Blog, *Exponential Backoff and Jitter*;
the budget as in Finagle and Envoy (a share of the calls, and a few a second besides).
"""

from __future__ import annotations

from collections.abc import Mapping


def retry_after_s(headers: Mapping[str, str], *, now_epoch_s: float) -> float | None:
    """When a provider says to come back: in how many seconds, never negative; None where it says nothing that can be
    understood. ``retry-after-ms`` goes before ``retry-after``.

    Args:
        headers: By their names in lower case.
    """
    return None


def backoff_s(tries: int, *, base_s: float, max_s: float, chance: float) -> float:
    """The pause before a target is tried again.

    Args:
        tries: How often it has been tried; at least 1.
        chance: Between 0 and 1.
    """
    raise NotImplementedError


class Budget:
    """How many calls may be tries again: a share of all, and a few a second besides, so that rare calls have some.

    Args:
        share: Of the calls.
    """

    def __init__(self, share: float) -> None:
        raise NotImplementedError

    def note_call(self, now: float) -> None:
        """A first try was made."""
        raise NotImplementedError

    def take(self, now: float) -> bool:
        """Says whether there may be one more, and counts it."""
        raise NotImplementedError
