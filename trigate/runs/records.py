"""The stored records of runs: reads them, waits for their results, and stores those results.

A result is always stored, also when the task of the run is cancelled: `RunRecords.finish_later` queues the write
without waiting for it, and retries it in the service's nursery until it succeeds.

The worker that ends a run notifies the others (topic ``run``, the body is the run's id), so a client that waits in
another worker learns of it at once. A notification may be lost, so `RunRecords.wait_ended` also polls.
"""

from __future__ import annotations

import time

import attrs
import trio

from trigate.concurrency.notify import Wakeup
from trigate.errors import NotFound, StoreUnavailable
from trigate.logs import log
from trigate.runs.outbox import Outbox
from trigate.runs.request import RunRequest, RunResult, delivery_of
from trigate.sessions.service import SessionTurn
from trigate.store.interface import Store, Write
from trigate.store.records import ENDED, Run
from trigate.workers.membership import Workers

RETRY_S = 1.0
"""The first pause before a retry, in seconds; doubles up to `RETRY_MAX_S`."""
RETRY_MAX_S = 30.0
POLL_S = 1.0
"""How often a task that waits for a run reads it again, in seconds, in case a notification was lost."""


@attrs.define(eq=False)
class RunRecords:
    """The records of runs in the store. Made by `service.open_runs`."""

    _store: Store
    _workers: Workers
    _outbox: Outbox
    _nursery: trio.Nursery
    _acknowledged_late: set[str] = attrs.field(factory=set, init=False)
    _waiting: dict[str, set[Wakeup]] = attrs.field(factory=dict, init=False)  # one for each task that waits

    def __repr__(self) -> str:
        return f"<RunRecords, {len(self._waiting)} runs waited for>"

    @property
    def waited_for(self) -> int:
        """How many runs have tasks of this worker that wait for their end."""
        return len(self._waiting)

    async def get(self, run_id: str) -> Run:
        """Reads one run.

        Raises:
            NotFound: The run does not exist, or has been pruned.
            StoreUnavailable: The store cannot be read.
        """
        run = await self._store.runs.get(run_id)
        if run is None:
            raise NotFound(f"There is no run {run_id[:100]}.")
        return run

    async def wait_ended(self, run_id: str) -> Run:
        """Waits until a run has ended, in whichever worker it is executed, and returns it.

        Raises:
            NotFound: The run does not exist.
            StoreUnavailable: The store cannot be read.
        """
        wakeup = Wakeup()  # remembers a notification that comes while the run is being read
        wakeups = self._waiting.setdefault(run_id, set())
        wakeups.add(wakeup)
        try:
            while True:
                run = await self.get(run_id)
                if run.state in ENDED:
                    return run
                with trio.move_on_after(POLL_S):
                    await wakeup.wait()
        finally:
            wakeups.discard(wakeup)
            if not wakeups:
                self._waiting.pop(run_id, None)

    def start(self, run: Run) -> Write[bool]:
        """Records that this worker executes a run. False = it has ended already, or belongs to another worker."""
        return self._store.runs.start(run.id, worker=self._workers.id)

    # -- acknowledgement ----------------------------------------------------------------------------------------------

    def acknowledge_late(self, run: Run) -> None:
        """Acknowledges a run that is being executed, because its client has disconnected and the run continues.
        Synchronous."""
        self._acknowledged_late.add(run.id)
        self._store.runs.acknowledge(run.id)

    def is_acknowledged(self, run: Run) -> bool:
        """Whether the run was acknowledged, at its acceptance or later."""
        return run.acknowledged or run.id in self._acknowledged_late

    def forget(self, run: Run) -> None:
        """Drops what is kept in memory of a run that has ended. Synchronous."""
        self._acknowledged_late.discard(run.id)

    # -- results ------------------------------------------------------------------------------------------------------

    def finish(
        self, run: Run, result: RunResult, *, request: RunRequest | None = None, turn: SessionTurn | None = None
    ) -> Write[bool]:
        """Queues the write of a result, in one transaction with everything that belongs to it: the session turn, the
        release of its ticket and the delivery. Synchronous. False = the run had ended already, and nothing changed.

        Args:
            request: The run's request; None = it cannot be decoded, so nothing is delivered.
            turn: The session turn whose ticket is released.
        """
        delivery = delivery_of(run, request, result) if request is not None else None
        return self._store.runs.finish(
            run.id,
            state=result.state,
            status=result.status,
            result=result.result,
            at=time.time(),
            turn=result.turn,
            ticket=turn.ticket if turn is not None else None,
            deliveries=(delivery,) if delivery is not None else (),
            frees_key=result.frees_key,
        )

    def finish_later(
        self, run: Run, result: RunResult, *, request: RunRequest | None = None, turn: SessionTurn | None = None
    ) -> None:
        """Ends a run from a task that cannot wait. Synchronous. The write is queued now, and retried until it
        succeeds."""
        write = self.finish(run, result, request=request, turn=turn)
        self._nursery.start_soon(self._retry_finish, write, run, result, request, turn)

    async def _retry_finish(
        self, write: Write[bool], run: Run, result: RunResult, request: RunRequest | None, turn: SessionTurn | None
    ) -> None:
        pause_s = RETRY_S
        while True:
            try:
                is_stored = await write
                break
            except StoreUnavailable as error:
                log.warning("run_result_not_stored", run=run.id, error=error.message)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            write = self.finish(run, result, request=request, turn=turn)
        if is_stored:
            self.note_ended(attrs.evolve(run, state=result.state, status=result.status), request)

    def note_ended(self, run: Run, request: RunRequest | None) -> None:
        """Notifies the tasks that wait for a run, here and in other workers, and the outbox. Synchronous."""
        self.on_run_ended(run.id.encode())
        self._workers.notify("run", run.id.encode())
        if request is not None and request.reply_to is not None:
            self._outbox.wake()
        log.info(
            "run",
            run=run.id,
            channel=run.channel,
            action=run.action,
            state=run.state,
            status=run.status,
            duration_s=round(max(0.0, time.time() - run.created_at), 4),
        )

    def on_run_ended(self, run_id: bytes) -> None:
        """Wakes the tasks that wait for a run. Handles the notification ``run``. Synchronous."""
        for wakeup in self._waiting.get(run_id.decode(errors="replace"), ()):
            wakeup.set()
