"""The limit on the duration of a test that is not marked ``slow``.

A test may take `LIMIT_S` of the machine on which the limit was set; a slower or busier machine gives more time. A
property test runs its function many times and gets `PROPERTY_FACTOR` times as long; under the tracer of coverage, every
test gets `TRACED_FACTOR` times as long.

A test that passes but takes longer runs again, up to `RUNS` times in all: the first run imports what later ones have,
and a busy disk or processor may hold up any run. The test fails if each run took longer than it may.

``TRIGATE_TEST_SLOW_S`` sets another limit in seconds, for this machine; ``inf`` turns the check off.
"""

from __future__ import annotations

import os
import sys
import time

import pytest
from _pytest.runner import runtestprotocol

LIMIT_S = 0.25
RUNS = 3
PROPERTY_FACTOR = 8
TRACED_FACTOR = 2
REFERENCE_S = 0.011
"""What `_compute` takes, at best, on the machine on which the limit was set."""
FULL = os.environ.get("TRIGATE_TEST_FULL", "") == "1"
"""Whether the longest tests run at their full size. Otherwise they are smaller, so that all tests take less than twenty
minutes on two processors."""
_ROUNDS = 8


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


def _limit_of_s(item: pytest.Item) -> float:
    allowed_s = limit_s()
    if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        allowed_s *= PROPERTY_FACTOR
    if sys.gettrace() is not None:
        allowed_s *= TRACED_FACTOR
    return allowed_s


def _excess(item: pytest.Item, reports: list[pytest.TestReport]) -> str | None:
    """How a test that has passed was too slow; None = it was not, or need not be quick."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("slow") is not None:
        return None
    if any(report.outcome != "passed" for report in reports):
        return None
    [call] = [report for report in reports if report.when == "call"]
    if call.duration <= (_given_s() or LIMIT_S):
        return None  # the usual case, without a measurement of the machine
    allowed_s = _limit_of_s(item)
    if call.duration <= allowed_s:
        return None
    return f"took {call.duration:.2f} s (limit {allowed_s:.2f} s): speed it up or mark it slow"


def run(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Runs the test and reports it, as failed if it took longer than it may."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for _ in range(RUNS):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)  # with new fixtures each time
        excess = _excess(item, reports)
        if excess is None:
            break
    for report in reports:
        if report.when == "call" and excess is not None:
            report.outcome, report.longrepr = "failed", excess
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
