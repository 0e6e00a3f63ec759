"""The limit on the duration of a test that is not marked ``slow``.

A test may take `LIMIT_S` of the machine on which the limit was set. Its duration is wall time, since a test that sleeps
is slow as well, without what is not the test's own:

- the time in which the test's thread waited for a processor (Linux), so that a busy machine fails no test;
- full garbage collections, which collect what other tests left behind.

A slower or busier machine gives more time: when a test exceeds the limit, a fixed computation is timed at once, and the
limit is multiplied by what it takes, compared with `REFERENCE_S`. A property test runs its function many times and gets
`PROPERTY_FACTOR` times as long; under the tracer of coverage, every test gets `TRACED_FACTOR` times as long.

``TRIGATE_TEST_SLOW_S`` sets another limit in seconds, for this machine; ``inf`` turns the check off.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

import pytest

LIMIT_S = 0.25
PROPERTY_FACTOR = 8
TRACED_FACTOR = 2
REFERENCE_S = 0.011
"""What `_compute` takes, at best, on the machine on which the limit was set."""
_ROUNDS = 8


class Stopwatch:
    """Measures the time since it was made."""

    def __init__(self) -> None:
        self._collecting_since_s = 0.0
        self._collected_s = 0.0
        gc.callbacks.append(self._on_collection)
        self._delay_before_s = _run_delay_s()
        self._began_s = time.perf_counter()

    def stop(self) -> float:
        """Returns the seconds that count, and stops."""
        elapsed_s = time.perf_counter() - self._began_s
        gc.callbacks.remove(self._on_collection)
        return elapsed_s - (_run_delay_s() - self._delay_before_s) - self._collected_s

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._collecting_since_s = time.perf_counter()
        else:
            self._collected_s += time.perf_counter() - self._collecting_since_s


def _run_delay_s() -> float:
    """The seconds that this thread has waited for a processor; 0 where the system does not say."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _compute() -> None:
    total: dict[int, int] = {}
    for number in range(50_000):
        total[number & 1023] = total.get(number & 511, 0) + number


def _given_s() -> float | None:
    given = os.environ.get("TRIGATE_TEST_SLOW_S")
    return float(given) if given else None


def limit_s() -> float:
    """The limit on this machine, as fast as it is now."""
    given_s = _given_s()
    if given_s is not None:
        return given_s
    began_s = time.perf_counter()
    for _ in range(_ROUNDS):
        _compute()
    mean_s = (time.perf_counter() - began_s) / _ROUNDS
    return LIMIT_S * max(1.0, mean_s / REFERENCE_S)


def check(item: pytest.Item, elapsed_s: float) -> None:
    """Fails the running test if it took longer than it may."""
    least_s = _given_s() or LIMIT_S
    if elapsed_s <= least_s or item.get_closest_marker("slow") is not None:
        return
    function: Any = getattr(item, "obj", None)  # Any: an Item need not be a function
    allowed_s = limit_s()
    if getattr(function, "is_hypothesis_test", False):
        allowed_s *= PROPERTY_FACTOR
    if sys.gettrace() is not None:
        allowed_s *= TRACED_FACTOR
    if elapsed_s > allowed_s:
        pytest.fail(f"took {elapsed_s:.2f} s (limit {allowed_s:.2f} s): speed it up or mark it slow", pytrace=False)
