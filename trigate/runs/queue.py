"""Where runs wait: for a slot of their channel, and for the turn of their session.

A hook's ``concurrency`` and ``queue`` bound how many of its runs are executed and how many wait. A run holds a *queue
slot* from its acceptance to its end, and one of the channel's *execution slots* while it is executed. It joins the
queue of its session as soon as it is stored, so messages are answered in the order of their acceptance.

Runs that control a session (``stop``, ``history``, ``reset``) hold neither: see `request.waits_for_turn`.
"""

from __future__ import annotations

import contextlib

import attrs
import trio

from trigate.config.sections import HookConfig
from trigate.errors import Overloaded, StoreUnavailable
from trigate.runs.request import waits_for_turn
from trigate.sessions.service import Sessions, SessionTurn
from trigate.store.records import Run
from trigate.upstream.generation import Generations

_DEFAULTS = HookConfig()
"""The bounds of a chat platform's channel, and of a hook that has been removed."""


@attrs.define(eq=False)
class RunQueue:
    """The queues that runs of this worker wait in. Made by `service.open_runs`."""

    _sessions: Sessions
    _generations: Generations
    _queue_slots: dict[str, set[str]] = attrs.field(factory=dict, init=False)  # ids of runs, by channel
    _limiters: dict[str, trio.CapacityLimiter] = attrs.field(factory=dict, init=False)  # by channel
    _turns: dict[str, SessionTurn] = attrs.field(factory=dict, init=False)  # by the ids of runs

    def __repr__(self) -> str:
        return f"<RunQueue, {len(self)} runs>"

    def __len__(self) -> int:
        """How many runs hold a queue slot: those that are executed, and those that wait."""
        return sum(map(len, self._queue_slots.values()))

    def acquire_nowait(self, run: Run) -> None:
        """Takes a queue slot of the run's channel; `release` returns it. Synchronous.

        Raises:
            Overloaded: The channel has no free slot.
        """
        if not waits_for_turn(run.action):
            return
        settings = self._settings(run.channel)
        slots = self._queue_slots.setdefault(run.channel, set())
        if len(slots) >= settings.concurrency + settings.queue:
            raise Overloaded(
                f"{len(slots)} messages of {run.channel} are being answered or are waiting, which is the limit."
            )
        slots.add(run.id)

    async def join_sessions(self, *runs: Run) -> None:
        """Takes the tickets of runs for the turns of their sessions, in this order. A run for which the store fails
        takes its ticket when it is executed."""
        limits = self._generations.config.sessions
        pending = [
            (run.id, self._sessions.take_ticket(run.owner, run.session, limits=limits, run=run.id))
            for run in runs
            if run.session is not None and waits_for_turn(run.action)
        ]
        for run_id, turn in pending:
            with contextlib.suppress(StoreUnavailable):
                self._turns[run_id] = await turn
        # Shielded: a cancellation here would leave adopted runs that no task executes.
        await trio.lowlevel.cancel_shielded_checkpoint()

    def turn_of(self, run: Run) -> SessionTurn | None:
        """The session turn of a run, with its ticket; None = the run has not joined the queue of its session."""
        return self._turns.get(run.id)

    def release(self, run: Run) -> None:
        """Releases the queue slot of a run, and the ticket of its session turn. Synchronous."""
        turn = self._turns.pop(run.id, None)
        if turn is not None:
            self._sessions.return_ticket(turn)
        slots = self._queue_slots.get(run.channel, set())
        slots.discard(run.id)
        if not slots:
            self._queue_slots.pop(run.channel, None)

    def execution_slot(self, channel: str) -> trio.CapacityLimiter:
        """The limiter of a channel: a run holds one of its tokens while it is executed."""
        concurrency = self._settings(channel).concurrency
        limiter = self._limiters.get(channel)
        if limiter is None:
            limiter = self._limiters[channel] = trio.CapacityLimiter(concurrency)
        limiter.total_tokens = concurrency
        return limiter

    def _settings(self, channel: str) -> HookConfig:
        return (self._generations.config.hooks or {}).get(channel) or _DEFAULTS
