"""The periods of budgets: days, weeks from Monday, and months of UTC. Pure."""

from __future__ import annotations

import datetime

from trigate.config.key_sections import Period

DAY_S = 86_400
FOREVER = 10_000_000
"""A day that never comes: the end of a budget for all time."""
_EPOCH = datetime.date(1970, 1, 1).toordinal()


def period_of(kind: Period, day: int) -> tuple[int, int]:
    """Returns the first day of the period in which a day is, and the first day after it, in days since 1970.

    >>> period_of("week", 4), period_of("month", 31), period_of("day", 7)  # 5 January 1970 was a Monday
    ((4, 11), (31, 59), (7, 8))
    """
    match kind:
        case "day":
            return day, day + 1
        case "week":
            first = day - (day + 3) % 7
            return first, first + 7
        case "month":
            date = datetime.date.fromordinal(_EPOCH + day)
            following = datetime.date(date.year + date.month // 12, date.month % 12 + 1, 1)
            return date.replace(day=1).toordinal() - _EPOCH, following.toordinal() - _EPOCH
        case "total":
            return 0, FOREVER
