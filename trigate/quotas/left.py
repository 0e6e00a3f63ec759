"""What is left of the limits of a key, for those who ask."""

from __future__ import annotations

import math
import time

import attrs
import trio

from trigate.keys.key import Key
from trigate.quotas.counters import Budget
from trigate.quotas.periods import DAY_S, FOREVER
from trigate.quotas.service import NO_LIMIT, Quotas
from trigate.store.interface import Store


@attrs.frozen(kw_only=True)
class Left:
    """A limit that calls of a key count for, and what is left of it.

    Attributes:
        scope: Whose limit it is: ``key:ada``, ``group:team``, ``all``.
        setting: ``rpm``, ``tpm``, ``max_exchanges``, or ``budgets.PERIOD``.
        limit, left: Of a budget in micro-dollars; of the others in requests, tokens or exchanges. Of what other workers
            have leased, this worker knows nothing, and takes it to be free.
        ends_at: When the period of a budget ends (POSIX seconds); None = it is no budget, or has no end.
    """

    scope: str
    setting: str
    limit: int
    left: int
    ends_at: int | None = None


async def limits_left(quotas: Quotas, store: Store, key: Key) -> list[Left]:
    """Returns the limits of a key, of its group and of all calls. Limits of models are not among them.

    Raises:
        StoreUnavailable: What has been spent cannot be read.
    """
    await trio.lowlevel.checkpoint()
    found = []
    now = trio.current_time()
    for counter in quotas.limits(key, "", time.time()).all:
        left, ends_at = counter.left(now), None
        if isinstance(counter, Budget):
            if counter.limit >= NO_LIMIT:
                continue
            first_day, end_day = counter.first_day, counter.end_day
            stored = await store.quotas.spent(counter.scope, first_day=first_day, end_day=end_day)
            left = min(left, counter.limit - stored)
            ends_at = end_day * DAY_S if end_day != FOREVER else None
        shown = max(0, math.floor(left))
        found.append(
            Left(scope=counter.scope, setting=counter.setting, limit=counter.limit, left=shown, ends_at=ends_at)
        )
    return found
