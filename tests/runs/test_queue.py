"""The bounds of a channel: how many runs are accepted and executed at the same time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import attrs
import pytest

from tests.runs.test_records import RUN
from tests.runs.test_service import config
from trigate.errors import Overloaded
from trigate.runs.queue import RunQueue
from trigate.sessions.service import Sessions
from trigate.upstream.generation import Generations


def queue(**hook: object) -> tuple[RunQueue, SimpleNamespace]:
    """A queue for a hook ``h``, without sessions; and what holds its configuration."""
    generations = SimpleNamespace(config=config(**hook))
    return RunQueue(cast("Sessions", None), cast("Generations", generations)), generations


def test_a_channel_accepts_as_many_as_it_executes_and_queues() -> None:
    """One more is refused, until one is released. Releasing a run twice frees one slot."""
    runs, _ = queue(concurrency=1, queue=1)
    accepted = [attrs.evolve(RUN, id=f"run_{number}") for number in (2, 3)]
    for run in accepted:
        runs.acquire_nowait(run)
    with pytest.raises(Overloaded):
        runs.acquire_nowait(RUN)
    runs.release(accepted[0])
    runs.release(accepted[0])
    runs.acquire_nowait(RUN)
    with pytest.raises(Overloaded):
        runs.acquire_nowait(attrs.evolve(RUN, id="run_4"))
    assert len(runs) == 2


@pytest.mark.parametrize("action", ["stop", "history", "reset"])
def test_a_run_that_controls_a_session_needs_no_slot(action: str) -> None:
    """A full channel still accepts it."""
    runs, _ = queue(concurrency=1, queue=1)
    for number in range(2):
        runs.acquire_nowait(attrs.evolve(RUN, id=f"run_{number}"))
    runs.acquire_nowait(attrs.evolve(RUN, action=action))
    assert len(runs) == 2


def test_the_bounds_follow_the_configuration() -> None:
    """A reload changes them for runs that are accepted later, and for the limiter of a channel."""
    runs, generations = queue(concurrency=1, queue=1)
    limiter = runs.execution_slot("h")
    for number in range(2):
        runs.acquire_nowait(attrs.evolve(RUN, id=f"run_{number}"))
    generations.config = config(concurrency=3, queue=1)
    runs.acquire_nowait(attrs.evolve(RUN, id="run_2"))
    assert runs.execution_slot("h") is limiter
    assert limiter.total_tokens == 3
