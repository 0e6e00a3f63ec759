"""Operations on deliveries: the outbox."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs

from trigate.store.interface import Write
from trigate.store.operations.channels import count_events
from trigate.store.operations.transactions import Transactions
from trigate.store.records import Delivery, DeliveryState
from trigate.store.tables import Tables

SENDER_ENDED = "the process that was sending it has ended"
"""`Delivery.last_error` of a delivery whose sending worker exited."""


def check_new(tables: Tables, deliveries: Iterable[Delivery]) -> None:
    """Raises ValueError if the id of a delivery is in use."""
    for delivery in deliveries:
        if tables.delivery(delivery.id) is not None:
            raise ValueError(f"there is a delivery {delivery.id} already")


def _take(tables: Tables, worker: str, at: float, limit: int, channels: Sequence[str]) -> Sequence[Delivery]:
    taken = [
        attrs.evolve(delivery, state="sending", worker=worker, attempts=delivery.attempts + 1)
        for delivery in tables.due(at, channels, limit=limit)
    ]
    for delivery in taken:
        tables.put_delivery(delivery)
    return taken


def _release(tables: Tables, dead: Sequence[str]) -> Sequence[Delivery]:
    released = []
    for delivery in tables.sending(dead):
        state: DeliveryState = "pending" if delivery.repeatable else "unknown"
        released.append(attrs.evolve(delivery, state=state, worker=None, last_error=SENDER_ENDED))
        tables.put_delivery(released[-1])
    return released


@attrs.define(eq=False, slots=False)
class DeliveryOperations:
    """Implements `interface.Deliveries`, which documents the methods."""

    _transactions: Transactions

    def add(self, delivery: Delivery) -> Write[None]:
        """Fails with ValueError if the id is in use."""

        def operation(tables: Tables) -> None:
            check_new(tables, [delivery])
            tables.put_delivery(delivery)

        return self._transactions.write(operation)

    def take(self, worker: str, *, at: float, limit: int, channels: Iterable[str]) -> Write[Sequence[Delivery]]:
        names = tuple(channels)
        return self._transactions.write(lambda tables: _take(tables, worker, at, limit, names))

    def note(
        self,
        delivery_id: str,
        *,
        state: DeliveryState,
        at: float,
        due_at: float | None = None,
        status: int = 0,
        error: str | None = None,
    ) -> Write[None]:
        """Changes nothing of a delivery that is unknown or ``delivered``."""

        def operation(tables: Tables) -> None:
            delivery = tables.delivery(delivery_id)
            if delivery is None or delivery.state == "delivered":  # a worker that was taken for dead may note it late
                return
            noted = attrs.evolve(
                delivery,
                state=state,
                worker=delivery.worker if state == "sending" else None,
                due_at=delivery.due_at if due_at is None else due_at,
                done_at=None if state in ("pending", "sending") else at,
                last_status=status,
                last_error=error,
            )
            tables.put_delivery(noted)
            if state == "delivered":
                count_events(tables, delivery.channel, at=at, replied=1)

        return self._transactions.write(operation)

    def release(self, *, dead: Iterable[str]) -> Write[Sequence[Delivery]]:
        workers = tuple(dead)
        return self._transactions.write(lambda tables: _release(tables, workers))

    async def of_run(self, run_id: str) -> Sequence[Delivery]:
        return await self._transactions.read(lambda tables: tables.deliveries(run_id))

    async def next_due_at(self, channels: Iterable[str]) -> float | None:
        names = tuple(channels)
        first = await self._transactions.read(lambda tables: tables.due(math.inf, names, limit=1))
        return first[0].due_at if first else None

    async def depth(self) -> dict[str, int]:
        return await self._transactions.read(lambda tables: tables.depth())
