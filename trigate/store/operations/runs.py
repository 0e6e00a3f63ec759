"""Operations on runs and on the idempotency keys that stand for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from trigate.errors import Draining
from trigate.store.interface import Write
from trigate.store.operations.channels import count_events
from trigate.store.operations.deliveries import check_new
from trigate.store.operations.sessions import append_turn
from trigate.store.operations.transactions import Transactions
from trigate.store.records import ENDED, Claim, Delivery, Run, RunState, Ticket, Turn
from trigate.store.tables import Tables


def _add(tables: Tables, run: Run) -> None:
    if tables.run(run.id) is not None:
        raise ValueError(f"there is a run {run.id} already")
    tables.put_run(run)
    count_events(tables, run.channel, at=run.created_at, received=1)


def _adopt(tables: Tables, worker: str, dead: Sequence[str], at: float) -> Sequence[Run]:
    adopted = []
    for run in tables.unfinished_of(dead):
        if run.acknowledged:
            adopted.append(attrs.evolve(run, worker=worker, state="queued"))
            tables.put_run(adopted[-1])
            if ticket := tables.ticket_of(run.id):
                tables.put_ticket(attrs.evolve(ticket, worker=worker))
            continue
        status, _, result = Draining("The process that worked on this has ended; ask again.").to_response()
        tables.put_run(attrs.evolve(run, state="failed", finished_at=at, status=status, result=result))
        tables.drop_claims(run.id)
    return adopted


@attrs.define(eq=False, slots=False)
class RunOperations:
    """Implements `interface.Runs`, which documents the methods."""

    _transactions: Transactions

    def add(self, run: Run) -> Write[None]:
        """Fails with ValueError if the id is in use."""
        return self._transactions.write(lambda tables: _add(tables, run))

    async def get(self, run_id: str) -> Run | None:
        return await self._transactions.read(lambda tables: tables.run(run_id))

    def acknowledge(self, run_id: str) -> Write[None]:
        """Ignores an unknown id."""

        def operation(tables: Tables) -> None:
            if run := tables.run(run_id):
                tables.put_run(attrs.evolve(run, acknowledged=True))

        return self._transactions.write(operation)

    def start(self, run_id: str, *, worker: str) -> Write[bool]:

        def operation(tables: Tables) -> bool:
            run = tables.run(run_id)
            if run is None or run.state in ENDED or run.worker != worker:
                return False
            tables.put_run(attrs.evolve(run, state="running", starts=run.starts + 1))
            return True

        return self._transactions.write(operation)

    def finish(
        self,
        run_id: str,
        *,
        state: RunState,
        status: int,
        result: bytes,
        at: float,
        turn: Turn | None = None,
        ticket: Ticket | None = None,
        deliveries: Iterable[Delivery] = (),
        frees_key: bool = False,
    ) -> Write[bool]:
        """Fails with ValueError if the id of a delivery is in use."""
        added = tuple(deliveries)

        def operation(tables: Tables) -> bool:
            run = tables.run(run_id)
            is_open = run is not None and run.state not in ENDED
            if is_open:
                check_new(tables, added)
            if ticket is not None:
                tables.drop_ticket(ticket)
            if run is None or not is_open:
                return False
            tables.put_run(attrs.evolve(run, state=state, status=status, result=result, finished_at=at))
            if turn is not None:
                append_turn(tables, turn)
            for delivery in added:
                tables.put_delivery(delivery)
            if state == "completed" and not added:
                count_events(tables, run.channel, at=at, replied=1)
            if frees_key:
                tables.drop_claims(run_id)
            return True

        return self._transactions.write(operation)

    def adopt(self, worker: str, *, dead: Iterable[str], at: float) -> Write[Sequence[Run]]:
        workers = tuple(dead)
        return self._transactions.write(lambda tables: _adopt(tables, worker, workers, at))

    async def unfinished(self, channel: str) -> int:
        return await self._transactions.read(lambda tables: tables.count_unfinished(channel))


@attrs.define(eq=False, slots=False)
class IdempotencyOperations:
    """Implements `interface.Idempotency`, which documents the methods."""

    _transactions: Transactions

    def claim(self, scope: str, key: str, *, digest: bytes, run: Run) -> Write[Claim]:
        """Treats a key whose run was deleted as free."""

        def operation(tables: Tables) -> Claim:
            if (claimed := tables.claimed(scope, key)) and (older := tables.run(claimed[1])):
                return Claim(run=older, is_new=False, differs=claimed[0] != digest)
            _add(tables, run)
            tables.put_claim(scope, key, digest, run.id)
            return Claim(run=run, is_new=True)

        return self._transactions.write(operation)
