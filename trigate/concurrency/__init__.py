"""Small tools for Trio that know nothing of HTTP or models.

A module here imports Trio, the standard library and the log, and nothing else of Trigate. Read `notify` first; then
`timers`, which says when the second scheduler (`poller`, `timers`, `cancel_queue`) is the wrong tool. `fair_limiter`
limits how much happens at once, and `rate_limiter` how often.

Every async function here is a checkpoint.
"""

from trigate.concurrency.cancel_queue import CancelQueue, open_cancel_queue
from trigate.concurrency.fair_limiter import Evicted, FairLimiter
from trigate.concurrency.notify import RepeatedEvent, Wakeup, open_service
from trigate.concurrency.poller import PEER_CLOSED, READABLE, WRITABLE, Poller, open_poller
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.concurrency.timers import Timer, Timers, open_timers

__all__ = [
    "PEER_CLOSED",
    "READABLE",
    "WRITABLE",
    "CancelQueue",
    "Evicted",
    "FairLimiter",
    "Poller",
    "RateLimiter",
    "RepeatedEvent",
    "Timer",
    "Timers",
    "Wakeup",
    "open_cancel_queue",
    "open_poller",
    "open_service",
    "open_timers",
]
