"""One try at one target, while it goes on and afterwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import trio

from trigate.errors import GatewayError
from trigate.openai.stream import StreamReader
from trigate.routing.plan import Step
from trigate.routing.routes import Target

if TYPE_CHECKING:
    from trigate.upstream.reply import Reply


@attrs.define(eq=False, kw_only=True)
class Attempt:
    """A try at a target.

    Its *half* is a cancel scope of its own: what ends the attempt (a limit in time, another one that won) ends what is
    done at the upstream at once, and nothing else.

    Attributes:
        phase: ``queued`` (for a place at the upstream), ``connecting`` (until the reply's head), ``waiting`` (for the
            first content), ``streaming``, ``reading`` (a JSON answer), ``ended``.
        outcome: None while it goes on; then ``complete``, ``cancelled`` (the client left, or the call ended), ``lost``
            (another attempt was first), or an error code.
        error: Why it failed.
        first_content_after_s: From its start.
    """

    step: Step
    target: Target
    started_at: float
    phase: str = "queued"
    outcome: str | None = None
    error: GatewayError | None = None
    first_content_after_s: float | None = None
    ended_at: float | None = None
    reply: Reply | None = None
    reader: StreamReader | None = None
    sent_at: float = math.inf
    """Since when its first token is awaited."""
    head_due_from: float = math.inf
    """Since when the reply's head is awaited."""
    heard_at: float = math.inf
    """When something of the reply came last."""
    reading: bool = False
    """Its task is inside `Reply.receive`."""
    task: trio.lowlevel.Task = attrs.field(factory=trio.lowlevel.current_task)
    lost: bool = False
    half: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    cause: GatewayError | None = None
    """Why its half was cancelled."""

    def cut(self, error: GatewayError) -> None:
        """Ends it now, for this reason. Only the first one counts."""
        if self.cause is None and not self.lost:
            self.cause = error
            self.half.cancel()

    def lose(self) -> None:
        """Ends it: another one was first."""
        if self.cause is None:
            self.lost = True
            self.half.cancel()

    def describe(self, since: float) -> dict[str, object]:
        """What can be told of it; times in seconds since the exchange began. Never the words of a provider: they may
        hold what a client wrote."""
        told: dict[str, object] = {
            "target": str(self.target),
            "why": self.step.why,
            "started_s": round(self.started_at - since, 4),
            **({"phase": self.phase} if self.outcome is None else {"outcome": self.outcome}),
        }
        if self.first_content_after_s is not None:
            told["first_content_s"] = round(self.first_content_after_s, 4)
        if self.ended_at is not None:
            told["duration_s"] = round(self.ended_at - self.started_at, 4)
        if self.error is not None:
            told["status"] = self.error.status
        return told
