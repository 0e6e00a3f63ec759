"""Runs: what was asked for by messages of hooks and channels, from its acceptance to its result.

A run is a row in the store with a life of its own, and an exchange like any other while it is performed: in its own
nursery, with an in-process client, or in that of the webhook call that waits for it.

The rules:

* What a run appends to its session, what it delivers, its result and its place in the queue are one transaction
  (`store.Runs.finish`), and the first one counts. So a run that is done twice, since a process died in between, has
  been done once.
* A run that was *acknowledged* is finished whatever happens to this process. When the process stops, such a run is
  left as it is: the worker is then a dead one, and whoever adopts its runs does it again.
* A run that was not has a client that waits for it. When the process stops, or the store fails, the client is told so.
* A run ends however it ends: also where its task is cancelled, by a write that is queued and not waited for. What was
  not done is then tried again by the service, until it is.
* A key stands for a run and for its result, unless trying again is right: a run that failed by no fault of the message
  (`is_final`), or whose client left, gives its idempotency key back.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from trigate.config.sections import HookConfig
from trigate.errors import (
    Internal,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from trigate.runs.execution import RunExecution
from trigate.runs.request import CLIENT_LEFT, LiveView, RunRequest, RunResult, as_ended, delivery_of, is_work
from trigate.store.interface import Write
from trigate.store.records import ENDED, Claim, Run

if TYPE_CHECKING:
    from trigate.exchange.exchange import Downstream
    from trigate.gateway.gateway import Gateway
    from trigate.sessions.service import SessionTurn

log = structlog.get_logger("trigate.runs.service")

RETRY_S = 1.0
"""How soon what the gateway could not do is tried again; doubles up to `RETRY_MAX_S`."""
RETRY_MAX_S = 30.0
LOOK_S = 1.0
"""How often a run of another worker is looked at, whose bell may have been lost."""
_STOP_S = 5.0
_DEFAULTS = HookConfig()


@attrs.define(eq=False)
class RunHandle:
    """A run that the service does.

    Attributes:
        run: As it was; once ``done``, as it has ended. Of one that was left for the next start, as it was.
    """

    run: Run
    done: trio.Event = attrs.field(factory=trio.Event)


class Runs:
    """The runs of this worker. Made by `open_runs`.

    Attributes:
        live_views: By the name of the channel; may change at any time.
        promised: The ids of runs that were acknowledged after they had been begun.
        turns: The places of runs in the queues of their sessions, by the ids of the runs.
    """

    def __init__(self, gateway: Gateway, nursery: trio.Nursery) -> None:
        self.gateway = gateway
        self.live_views: dict[str, LiveView] = {}
        self.promised: set[str] = set()
        self.turns: dict[str, SessionTurn] = {}
        self._nursery = nursery
        self._doing: dict[str, trio.CapacityLimiter] = {}
        self._places: dict[str, dict[str, None]] = {}
        self._bells: dict[str, trio.Event] = {}
        gateway.workers.adopt_with(self._adopt)
        gateway.workers.on_notify("run", self._ring)

    def __repr__(self) -> str:
        return f"<Runs {sum(map(len, self._places.values()))} accepted, {len(self._bells)} waited for>"

    async def accept(
        self, order: RunRequest, *, acknowledged: bool, idempotency: tuple[str, bytes] | None = None
    ) -> Claim:
        """Keeps an order as a run, durably. Whoever gets a new one does it at once (`perform`, `perform_soon`).

        Args:
            acknowledged: It is promised to be finished.
            idempotency: A key, and a digest of the body; unique in the channel, for its owner.

        Raises:
            StoreUnavailable: It could not be kept.
            Overloaded: As many runs of the channel go on and wait as may.

        **Cancels:** what may have been kept meanwhile ends as cancelled.
        """
        run = Run(
            id=f"run_{secrets.token_hex(12)}",
            channel=order.channel,
            owner=order.owner,
            session=order.session,
            action=order.action,
            request=order.encode(),
            state="queued",
            acknowledged=acknowledged,
            worker=self.gateway.workers.id,
            created_at=time.time(),
        )
        self._take_place(run)
        store = self.gateway.store
        claim: Claim | None = None
        may_be_there = False
        try:
            await self.gateway.workers.join()
            may_be_there = True
            keeping: Write[Claim] | Write[None]
            if idempotency is None:
                keeping = store.runs.add(run)
            else:
                key, digest = idempotency
                scope = f"{order.channel}/{order.owner}"
                keeping = store.idempotency.claim(scope, key, digest=digest, run=run)
            await self._queue(run)  # right behind it, so in the order in which messages are kept
            claim = await keeping or Claim(run=run, is_new=True)
            return claim
        except StoreUnavailable:
            may_be_there = False
            raise
        finally:
            if claim is None or not claim.is_new:
                self._give_place_back(run)
            if claim is None and may_be_there:  # cancelled meanwhile: nobody would do it
                self.settle_soon(run, RunResult(state="cancelled", status=CLIENT_LEFT, result=b"{}", frees_key=True))

    async def perform(self, run: Run, *, down: Downstream | None = None) -> Run:
        """Does a run in the caller's task, and returns it with its result. Cancelled with the caller, it ends as
        ``cancelled`` with what there was of the answer; one that was acknowledged goes on in the service.

        Args:
            down: The client that the answer is streamed to, as chunks of OpenAI's; None = nobody watches.
        """
        pause_s = RETRY_S
        performance: RunExecution | None = None
        interrupted, crashed = True, False
        try:
            while True:
                performance = RunExecution(self, run, down)
                await performance.perform()
                if not performance.again:
                    break
                log.warning("run_again", run=run.id, channel=run.channel, pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            interrupted = False
        except Exception:
            crashed = True
            raise
        finally:
            if performance is not None:
                performance.release()
            if performance is None or crashed or not performance.is_owed:
                self._give_place_back(run)
                self.promised.discard(run.id)
            elif interrupted and not self._nursery.cancel_scope.cancel_called:
                self.perform_soon(run)
            # Else it is left for the next start, and so is its place in the queue of its session.
        return performance.ended or run

    def perform_soon(self, run: Run, *, down: Downstream | None = None) -> RunHandle:
        """Does a run in the nursery of the service. Synchronous; whoever wants to know how it ended may wait for it."""
        doing = RunHandle(run)
        self._nursery.start_soon(self._perform_alone, doing, down)
        return doing

    async def _perform_alone(self, doing: RunHandle, down: Downstream | None) -> None:  # noqa: ASYNC910 - as `perform`
        run = doing.run
        try:
            doing.run = await self.perform(run, down=down)
        except Exception:  # one that cannot even be read is not the end of the others
            log.exception("run_crashed", run=run.id, channel=run.channel)
            status, _, body = Internal(f"The gateway failed. Run: {run.id}.").to_response()
            end = RunResult(state="failed", status=status, result=body)
            doing.run = as_ended(run, end)
            self.settle_soon(run, end)
        finally:
            doing.done.set()

    def promise(self, run: Run) -> None:
        """Acknowledges a run that is being done: its client has left, and it shall go on. Synchronous."""
        self.promised.add(run.id)
        self.gateway.store.runs.acknowledge(run.id)

    async def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFound: There is none, or none any more.
        """
        run = await self.gateway.store.runs.get(run_id)
        if run is None:
            raise NotFound(f"There is no run {run_id[:100]}.")
        return run

    async def wait_ended(self, run_id: str) -> Run:
        """Waits until a run has ended, in whichever worker it is performed.

        Raises:
            NotFound: There is none.
        """
        while True:
            bell = self._bells.setdefault(run_id, trio.Event())
            try:
                run = await self.get(run_id)
                if run.state in ENDED:
                    return run
                with trio.move_on_after(LOOK_S):
                    await bell.wait()
            finally:
                if self._bells.get(run_id) is bell and not bell.statistics().tasks_waiting:
                    del self._bells[run_id]

    async def stop(self, owner: str, session: str) -> Sequence[Run]:
        """Stops the running turn of a session, and returns the runs that were cut, ended, with what there is of their
        answers in their results."""
        tickets = await self.gateway.sessions.stop(owner, session)
        found = []
        for run_id in [ticket.run for ticket in tickets if ticket.run is not None]:
            with trio.move_on_after(_STOP_S):
                run = await self.wait_ended(run_id)
                if run.state == "cancelled":
                    found.append(run)
        return found

    # -- for the runs themselves --------------------------------------------------------------------------------------

    def note_ended(self, run: Run, order: RunRequest | None) -> None:
        """A run has ended: tells whoever waits for it, and the outbox. Synchronous."""
        self._ring(run.id.encode())
        self.gateway.workers.notify("run", run.id.encode())
        if order is not None and order.reply_to is not None:
            self.gateway.outbox.look()
        log.info(
            "run",
            run=run.id,
            channel=run.channel,
            action=run.action,
            state=run.state,
            status=run.status,
            duration_s=round(max(0.0, time.time() - run.created_at), 4),
        )

    def write_end(
        self, run: Run, end: RunResult, *, order: RunRequest | None = None, turn: SessionTurn | None = None
    ) -> Write[bool]:
        """Queues the end of a run, with everything that belongs to it. Synchronous."""
        now = time.time()
        delivery = delivery_of(run, order, end) if order is not None else None
        return self.gateway.store.runs.finish(
            run.id,
            state=end.state,
            status=end.status,
            result=end.result,
            at=now,
            turn=end.turn,
            ticket=turn.ticket if turn is not None else None,
            deliveries=(delivery,) if delivery is not None else (),
            frees_key=end.frees_key,
        )

    def settle_soon(
        self, run: Run, end: RunResult, *, order: RunRequest | None = None, turn: SessionTurn | None = None
    ) -> None:
        """Ends a run from a task that cannot wait. Synchronous; what cannot be kept is tried again until it can."""
        write = self.write_end(run, end, order=order, turn=turn)
        self._nursery.start_soon(self._settle, write, run, end, order, turn)

    async def _settle(
        self, write: Write[bool], run: Run, end: RunResult, order: RunRequest | None, turn: SessionTurn | None
    ) -> None:
        pause_s = RETRY_S
        while True:
            try:
                done = await write
                break
            except StoreUnavailable as error:
                log.warning("run_not_kept", run=run.id, error=error.message)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            write = self.write_end(run, end, order=order, turn=turn)
        if done:
            self.note_ended(attrs.evolve(run, state=end.state, status=end.status), order)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _settings(self, channel: str) -> HookConfig:
        return (self.gateway.generation.config.hooks or {}).get(channel) or _DEFAULTS

    def _take_place(self, run: Run) -> None:
        settings = self._settings(run.channel)
        places = self._places.setdefault(run.channel, {})
        if is_work(run.action):
            if len(places) >= settings.concurrency + settings.queue:
                raise Overloaded(
                    f"{len(places)} messages of {run.channel} are being answered or wait, which is the limit."
                )
            places[run.id] = None

    async def _queue(self, *runs: Run) -> None:  # noqa: ASYNC910 - the store is waited for, or nothing is
        """Has runs stand in the queues of their sessions, in their order. One for which that fails does it later."""
        limits = self.gateway.generation.config.sessions
        takings = [
            (run.id, self.gateway.sessions.take_ticket(run.owner, run.session, limits=limits, run=run.id))
            for run in runs
            if run.session is not None and is_work(run.action)
        ]
        for run_id, taking in takings:
            with contextlib.suppress(StoreUnavailable):
                self.turns[run_id] = await taking

    def _give_place_back(self, run: Run) -> None:
        turn = self.turns.pop(run.id, None)
        if turn is not None:
            self.gateway.sessions.return_ticket(turn)
        places = self._places.get(run.channel, {})
        places.pop(run.id, None)
        if not places:
            self._places.pop(run.channel, None)

    def limiter(self, channel: str) -> trio.CapacityLimiter:
        """What a run of a channel holds one of while it is done."""
        settings = self._settings(channel)
        limiter = self._doing.get(channel)
        if limiter is None:
            limiter = self._doing[channel] = trio.CapacityLimiter(settings.concurrency)
        limiter.total_tokens = settings.concurrency
        return limiter

    # -- other workers ------------------------------------------------------------------------------------------------

    async def _adopt(self, worker: str, dead: Sequence[str]) -> None:
        adopted = await self.gateway.store.runs.adopt(worker, dead=dead, at=time.time())
        await self._queue(*adopted)
        for run in adopted:
            log.info("run_adopted", run=run.id, channel=run.channel, starts=run.starts)
            self.perform_soon(run)

    def _ring(self, run_id: bytes) -> None:
        bell = self._bells.pop(run_id.decode(errors="replace"), None)
        if bell is not None:
            bell.set()


@contextlib.asynccontextmanager
async def open_runs(gateway: Gateway) -> AsyncIterator[Runs]:
    """Opens the service; what other workers left is adopted at `workers.join`."""
    async with trio.open_nursery() as nursery:
        try:
            yield Runs(gateway, nursery)
        finally:
            nursery.cancel_scope.cancel()
