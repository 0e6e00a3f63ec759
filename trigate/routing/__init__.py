"""Which target serves a call, in which order, and the state of each target. Pure: decisions only.

The package knows no connection and no clock: time and chance are arguments. Read first `routes` (from a model id to its
targets), then `plan` (the attempts of one call).
"""

from __future__ import annotations

from trigate.routing.plan import Plan, Step
from trigate.routing.routes import Known, Target
from trigate.routing.target_state import Targets, TargetState

__all__ = ["Known", "Plan", "Step", "Target", "TargetState", "Targets"]
