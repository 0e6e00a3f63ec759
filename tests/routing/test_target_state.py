"""The states of targets."""

from __future__ import annotations

from trigate.routing.routes import Target
from trigate.routing.target_state import Targets

A, B = Target("up", "a"), Target("up", "b")


def test_the_estimate_of_a_prompt() -> None:
    """It is corrected by the greatest factor of the targets that may serve the call; an unknown one has 1."""
    targets = Targets()
    targets.of(A, "/chat/completions").ratios.prompt.note(estimated=100, reported=250)
    targets.of(B, "/chat/completions").ratios.prompt.note(estimated=100, reported=50)
    assert targets.corrected_prompt(10, (A,), "/chat/completions") == 25
    assert targets.corrected_prompt(10, (B,), "/chat/completions") == 5
    assert targets.corrected_prompt(10, (B, A), "/chat/completions") == 25
    assert targets.corrected_prompt(10, (B, Target("up", "c")), "/chat/completions") == 10
    assert targets.corrected_prompt(10, (A,), "/responses") == 10
    assert len(targets.items()) == 2, "asking adds none"
