"""What is left of the limits of a key, for those who ask."""

from __future__ import annotations

import math
import time

import attrs
import trio

from trigate.keys.key import Key
from trigate.quotas.counters import Budget, Rate, Slots
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
        match counter:
            case Budget():
                if counter.limit >= NO_LIMIT:
                    continue
                first_day, end_day = counter.first_day, counter.end_day
                stored = await store.quotas.spent(counter.scope, first_day=first_day, end_day=end_day)
                left = counter.limit - max(stored, counter.spent)
                ends_at = end_day * 86_400 if counter.period != "total" else None
                found.append(_left(counter.scope, counter.setting, counter.limit, left, ends_at))
            case Rate():
                left = math.floor(counter.available(now) + counter.limit - counter.share)
                found.append(_left(counter.scope, counter.setting, counter.limit, left))
            case Slots():
                left = math.floor(counter.available(now) + counter.limit - counter.granted)
                found.append(_left(counter.scope, counter.setting, counter.limit, left))
    return found


def _left(scope: str, setting: str, limit: int, left: int, ends_at: int | None = None) -> Left:
    return Left(scope=scope, setting=setting, limit=limit, left=max(0, left), ends_at=ends_at)
