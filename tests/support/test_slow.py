"""The limit on the duration of tests, applied to a test suite of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import slow

pytest_plugins = ["pytester"]

CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8")
SUITE = """
import time
import pytest
from hypothesis import given, settings, strategies

def test_slow():
    time.sleep(0.03)

@pytest.mark.slow
def test_marked():
    time.sleep(0.03)

@given(strategies.booleans())
@settings(max_examples=2, deadline=None, database=None)
def test_property(_):
    time.sleep(0.03)

durations_s = [0, 0.03]

def test_slow_once():
    time.sleep(durations_s.pop())

def test_wrong():
    time.sleep(0.03)
    assert False, "the reason"

def test_quick():
    pass
"""


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the limit to 20 ms, on a machine of any speed."""
    monkeypatch.delenv("TRIGATE_TEST_SLOW_S", raising=False)
    monkeypatch.setattr(slow, "LIMIT_S", 0.02)
    monkeypatch.setattr(slow, "REFERENCE_S", 1e6)
    monkeypatch.setattr(slow, "TRACED_FACTOR", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("limit")
def test_an_unmarked_slow_test_fails(pytester: pytest.Pytester) -> None:
    """A test over the limit fails, unless it is marked, quick when run again, or a property test within its factor."""
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers = slow: slow\n")
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.fnmatch_lines(["took 0.0? s (limit 0.02 s): *", "*AssertionError: the reason"])


def test_a_slower_machine_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit grows with the time that a fixed computation takes, does not shrink, and can be set."""
    monkeypatch.delenv("TRIGATE_TEST_SLOW_S", raising=False)
    monkeypatch.setattr(slow, "REFERENCE_S", 1e-6)
    assert slow.limit_s() > 10 * slow.LIMIT_S
    monkeypatch.setattr(slow, "REFERENCE_S", 1e6)
    assert slow.limit_s() == slow.LIMIT_S
    monkeypatch.setenv("TRIGATE_TEST_SLOW_S", "1.5")
    assert slow.limit_s() == 1.5
