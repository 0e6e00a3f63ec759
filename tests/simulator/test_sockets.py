"""The soak on real sockets: a short one, and that it finds growth."""

from __future__ import annotations

import sys

import pytest

from tests.simulator import sockets
from tests.simulator.sockets import Sample, growth_bytes
from tests.support.slow import FULL

MIB = 2**20


def _samples(memory_mib: list[float]) -> list[Sample]:
    return [Sample(float(at), int(mib * MIB), 20) for at, mib in enumerate(memory_mib)]


@pytest.mark.parametrize(
    ("memory_mib", "grows_mib"),
    [
        ([50 + at for at in range(21)], 10),  # without an end
        ([50 + min(at, 10) for at in range(21)], 0),  # until the caches are full
        ([50 + 10 * (at == 15) for at in range(21)], 0),  # for a moment
    ],
    ids=["a leak", "a cache", "a peak"],
)
def test_the_growth_is_that_of_the_second_half(memory_mib: list[float], grows_mib: float) -> None:
    """A leak counts, and neither a cache that has filled nor a single high sample does."""
    assert growth_bytes(_samples(memory_mib)) == pytest.approx(grows_mib * MIB, abs=0.1 * MIB)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows() -> None:
    """A gateway under mixed load with faults: after 20 s (40 at full size) nothing of a call is left, and memory has
    not grown in the second half."""
    report = sockets.soak(40.0 if FULL else 20.0, 1)
    assert report.calls > 200
    assert report.outcomes["left"]
    assert report.outcomes["stream 200"]
