"""Runs: durable jobs that messages of hooks and channels ask for, from acceptance to result.

A run is a row in the store. While it is executed it is an exchange like any other: in the service's nursery with no
client, or in the nursery of the webhook request that waits for it. `Runs.accept` stores a run, `Runs.execute` and
`Runs.execute_soon` execute it (`execution`), `queue` says what it waits for, and `records` reads and ends it.

The rules:

* One transaction stores the result of a run, what the run appends to its session, its deliveries and the release of its
  ticket (`store.interface.Runs.finish`). The first such transaction counts, so a run that is executed twice, because a
  process crashed in between, has one result.
* An *acknowledged* run always gets a result. When the process stops, the run stays in the store; the worker that adopts
  the runs of the dead worker executes it again.
* A run that was not acknowledged has a client that waits for it. When the process stops or the store fails, that client
  gets the error.
* Every other run gets a result too, also when its task is cancelled: the write is queued without waiting for it, and
  retried until it succeeds (`RunRecords.finish_later`).
* An idempotency key stands for a run and its result, unless a retry makes sense: a run that failed through no fault of
  the message (`request.is_final`), or whose client disconnected, frees its key.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence

import attrs
import trio

from trigate.concurrency.notify import open_service
from trigate.errors import Internal, StoreUnavailable
from trigate.exchange.exchange import ExchangeServices
from trigate.keys.service import Keys
from trigate.logs import log
from trigate.runs.client import RunClient
from trigate.runs.execution import RunExecution, RunServices
from trigate.runs.outbox import Outbox
from trigate.runs.queue import RunQueue
from trigate.runs.records import RETRY_MAX_S, RETRY_S, RunRecords
from trigate.runs.request import CLIENT_LEFT, LiveView, RunRequest, RunResult, with_result
from trigate.sessions.service import Sessions
from trigate.store.interface import Store, Write
from trigate.store.records import Claim, Run
from trigate.upstream.generation import Generations
from trigate.workers.membership import Workers


@attrs.define(eq=False)
class RunHandle:
    """A run that the service executes.

    Attributes:
        run: The run as accepted; once ``done`` is set, as it has ended, or still as accepted where it is left for the
            next start.
        done: Set when the execution is over.
    """

    run: Run
    done: trio.Event = attrs.field(factory=trio.Event)


class Runs:
    """The runs of this worker. Made by `open_runs`.

    Attributes:
        live_views: The channels that display runs, by name; may change at any time.
    """

    def __init__(
        self,
        *,
        store: Store,
        workers: Workers,
        sessions: Sessions,
        outbox: Outbox,
        generations: Generations,
        keys: Keys,
        exchange_services: ExchangeServices,
        nursery: trio.Nursery,
    ) -> None:
        self.live_views: dict[str, LiveView] = {}
        self._store = store
        self._workers = workers
        self._nursery = nursery
        self._queue = RunQueue(sessions, generations)
        self._records = RunRecords(store, workers, outbox, nursery)
        self._services = RunServices(
            store=store,
            sessions=sessions,
            generations=generations,
            keys=keys,
            records=self._records,
            queue=self._queue,
            live_views=self.live_views,
            exchange_services=exchange_services,
        )
        workers.adopt_with(self._adopt)
        workers.on_notify("run", self._records.on_run_ended)

    def __repr__(self) -> str:
        return f"<Runs {len(self._queue)} accepted, {self._records.waited_for} waited for>"

    async def accept(
        self, request: RunRequest, *, acknowledged: bool, idempotency: tuple[str, bytes] | None = None
    ) -> Claim:
        """Stores a request as a run. The caller executes a new one at once (`execute`, `execute_soon`).

        Args:
            acknowledged: Whether the run must be finished, even if this process exits.
            idempotency: A key, unique among those of the same channel and owner, and a digest of the body.

        Raises:
            StoreUnavailable: The run could not be stored.
            Overloaded: The channel has no free slot.

        **Cancels:** a run that may have been stored by then ends as ``cancelled``.
        """
        run = Run(
            id=f"run_{secrets.token_hex(12)}",
            channel=request.channel,
            owner=request.owner,
            session=request.session,
            action=request.action,
            request=request.encode(),
            state="queued",
            acknowledged=acknowledged,
            worker=self._workers.id,
            created_at=time.time(),
        )
        self._queue.acquire_nowait(run)
        claim: Claim | None = None
        may_be_stored = False
        try:
            await self._workers.join()
            may_be_stored = True
            write: Write[Claim] | Write[None]
            if idempotency is None:
                write = self._store.runs.add(run)
            else:
                key, digest = idempotency
                scope = f"{request.channel}/{request.owner}"
                write = self._store.idempotency.claim(scope, key, digest=digest, run=run)
            # The ticket is the next write after the run, so tickets have the order in which messages are stored.
            await self._queue.join_sessions(run)
            claim = await write or Claim(run=run, is_new=True)
            return claim
        except StoreUnavailable:
            may_be_stored = False
            raise
        finally:
            if claim is None or not claim.is_new:
                self._queue.release(run)
            if claim is None and may_be_stored:  # cancelled: the caller does not know of the run
                cancelled = RunResult(state="cancelled", status=CLIENT_LEFT, result=b"{}", frees_key=True)
                self._records.finish_later(run, cancelled)

    async def execute(self, run: Run, *, client: RunClient | None = None) -> Run:
        """Executes a run in the caller's task, and returns it with its result.

        Args:
            client: Waits for the answer; None = no client does.

        **Cancels:** the run ends as ``cancelled`` with the partial answer; an acknowledged run continues in the
        service's nursery.
        """
        pause_s = RETRY_S
        execution: RunExecution | None = None
        interrupted, crashed = True, False
        try:
            while True:
                execution = RunExecution(self._services, run, client)
                await execution.execute()
                if not execution.should_retry:
                    break
                log.warning("run_retried", run=run.id, channel=run.channel, pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            interrupted = False
        except Exception:
            crashed = True
            raise
        finally:
            if execution is not None:
                execution.settle_cancelled()
            if execution is None or crashed or not execution.must_finish:
                self._queue.release(run)
                self._records.forget(run)
            elif interrupted and not self._nursery.cancel_scope.cancel_called:
                self.execute_soon(run)
            # Otherwise the run is left for the next start, and keeps the ticket of its session turn.
        return execution.ended or run

    def execute_soon(self, run: Run, *, client: RunClient | None = None) -> RunHandle:
        """Executes a run in the service's nursery. Synchronous; the handle says when it is done, and how it ended."""
        handle = RunHandle(run)
        self._nursery.start_soon(self._execute_supervised, handle, client)
        return handle

    async def _execute_supervised(self, handle: RunHandle, client: RunClient | None) -> None:
        run = handle.run
        try:
            handle.run = await self.execute(run, client=client)
        except Exception:  # a stored request that cannot be decoded, for example: the other runs continue
            log.exception("run_crashed", run=run.id, channel=run.channel)
            status, _, body = Internal(f"The gateway failed. Run: {run.id}.").to_response()
            result = RunResult(state="failed", status=status, result=body)
            handle.run = with_result(run, result)
            self._records.finish_later(run, result)
            await trio.lowlevel.checkpoint()
        finally:
            handle.done.set()

    def acknowledge_late(self, run: Run) -> None:
        """Acknowledges a run that is being executed: its client has disconnected, and the run continues.
        Synchronous."""
        self._records.acknowledge_late(run)

    async def get(self, run_id: str) -> Run:
        """Reads one run.

        Raises:
            NotFound: The run does not exist, or has been pruned.
            StoreUnavailable: The store cannot be read.
        """
        return await self._records.get(run_id)

    async def wait_ended(self, run_id: str) -> Run:
        """Waits until a run has ended, in whichever worker it is executed, and returns it.

        Raises:
            NotFound: The run does not exist.
            StoreUnavailable: The store cannot be read.
        """
        return await self._records.wait_ended(run_id)

    async def _adopt(self, worker: str, dead: Sequence[str]) -> None:
        """Takes over the acknowledged runs of dead workers, and executes them."""
        adopted = await self._store.runs.adopt(worker, dead=dead, at=time.time())
        await self._queue.join_sessions(*adopted)
        for run in adopted:
            log.info("run_adopted", run=run.id, channel=run.channel, starts=run.starts)
            self.execute_soon(run)


@contextlib.asynccontextmanager
async def open_runs(
    *,
    store: Store,
    workers: Workers,
    sessions: Sessions,
    outbox: Outbox,
    generations: Generations,
    keys: Keys,
    exchange_services: ExchangeServices,
) -> AsyncIterator[Runs]:
    """Opens the service. Open it before `Workers.join` is called, which adopts the runs of dead workers.

    Args:
        generations: Gives the configuration in use, and the upstreams of a new exchange.
        keys: Gives the keys of owners.
        exchange_services: What an `Exchange` takes.

    **Cancels:** all executions. Acknowledged runs stay in the store for the next start; the others end as
    ``cancelled``.
    """
    async with open_service() as nursery:
        yield Runs(
            store=store,
            workers=workers,
            sessions=sessions,
            outbox=outbox,
            generations=generations,
            keys=keys,
            exchange_services=exchange_services,
            nursery=nursery,
        )
