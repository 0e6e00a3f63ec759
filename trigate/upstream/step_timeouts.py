"""Time limits for the steps of a request, as `httpx2` has them."""

from __future__ import annotations

import math
from collections.abc import Awaitable
from typing import TypeVar

import attrs
import httpx2
import trio

_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class StepTimeouts:
    """Limits for the steps of a request, for callers that cannot use a cancel scope (the interface of `httpx2`).

    **Units:** seconds; ``math.inf`` = no limit.
    """

    queue_s: float = math.inf
    read_s: float = math.inf
    write_s: float = math.inf


async def within(seconds: float, error: type[httpx2.TimeoutException], step: Awaitable[_T]) -> _T:
    """Awaits one step of a request, and raises ``error`` if it takes longer than ``seconds``."""
    with trio.move_on_after(seconds):
        return await step
    raise error(f"nothing within {seconds:g} s")
