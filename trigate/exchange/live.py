"""The exchanges in flight in this worker, and the totals of those that ended."""

from __future__ import annotations

from collections.abc import Container, Iterator

import attrs

from trigate.concurrency.notify import RepeatedEvent
from trigate.errors import Draining, GatewayError
from trigate.exchange.call_metrics import CallMetrics
from trigate.exchange.exchange_span import begin_trace, record_exchange
from trigate.exchange.outcome import Outcome
from trigate.exchange.record import complete_record
from trigate.exchange.state import ExchangeState
from trigate.keys.errors import KeyRevoked
from trigate.ledger.content_log import ContentLog
from trigate.ledger.ledger import Ledger
from trigate.tracing.tracer import Tracer


@attrs.define
class Totals:
    """Counters since the start of this worker."""

    exchanges: int = 0
    complete: int = 0
    cancelled: int = 0
    failed: int = 0
    faults: int = 0
    """Those that failed by the fault of a provider or of the gateway."""
    events: int = 0
    bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_microusd: int = 0
    unpriced: int = 0


def _is_fault(error: GatewayError | None) -> bool:
    """Whether a call failed by the fault of a provider or of the gateway. A provider that refuses what the client asks
    for is right; one that refuses the gateway's own key, or its rate, is not."""
    if error is None:
        return True
    return error.blame != "client" and (error.status >= 500 or error.status in (401, 403, 429))


class LiveExchanges:
    """The exchanges that have begun and not been settled, in the order in which they began.

    Attributes:
        totals: Counters of the settled exchanges.
        metrics: The same for Prometheus, in more detail.
        is_draining: New exchanges are refused.
        revoked_keys: The ids of the keys whose exchanges are refused.
        tracer: Takes the spans of exchanges; None = they are not traced.
    """

    def __init__(self, ledger: Ledger, contents: ContentLog) -> None:
        self._ledger = ledger
        self._contents = contents
        self._live: dict[ExchangeState, None] = {}
        self._none_left = RepeatedEvent()
        self.totals = Totals()
        self.metrics = CallMetrics()
        self.is_draining = False
        self.revoked_keys: Container[str] = ()
        self.tracer: Tracer | None = None

    def __repr__(self) -> str:
        return f"<LiveExchanges {len(self)} live of {self.totals.exchanges}>"

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[ExchangeState]:
        return iter(self._live)

    def begin(self, exchange: ExchangeState) -> None:
        """Records that an exchange has begun; `settle` records how it ended.

        Raises:
            KeyRevoked: Its key has been revoked since its request arrived.
            Draining: The gateway is shutting down.
        """
        request = exchange.request
        call = request.call
        exchange.record = self._ledger.begin(
            request_id=request.id,
            owner=request.owner,
            endpoint=call.endpoint.path,
            model=call.model,
            stream=call.stream,
        )
        if self.tracer is not None:
            begin_trace(request, self.tracer)
        if request.key.is_gone or request.key.id in self.revoked_keys:
            raise KeyRevoked
        if self.is_draining:
            raise Draining("The gateway is shutting down. Try again: another instance will answer.")
        if request.passed is None:
            exchange.content = self._contents.answer_for(request.key)
        self._live[exchange] = None
        request.generation.hold()

    def settle(self, exchange: ExchangeState) -> None:
        """Records how an exchange ended, once, even if it was refused. Synchronous, so that a cancellation of the
        exchange's task cannot prevent it."""
        if exchange in self._live:
            del self._live[exchange]
            exchange.request.generation.let_go()
            if not self._live:
                self._none_left.set()
        record = exchange.record
        assert record is not None, "an exchange is settled after it has begun"
        complete_record(record, exchange)
        self._ledger.settle(record)
        if exchange.content is not None:
            self._contents.add(record, exchange.request.call.body, exchange.content)
        self.metrics.count(exchange, record)
        if exchange.request.trace is not None:
            record_exchange(exchange, record)
        totals = self.totals
        totals.exchanges += 1
        totals.events += record.events
        totals.bytes += record.bytes
        if not record.counted:
            totals.prompt_tokens += record.prompt_tokens or 0
            totals.completion_tokens += record.completion_tokens or 0
        if record.cost is None:
            totals.unpriced += 1
        else:
            totals.cost_microusd += record.cost
        if record.outcome == Outcome.COMPLETE:
            totals.complete += 1
        elif record.outcome in (Outcome.CANCELLED, Outcome.FINISHED):
            totals.cancelled += 1
        else:
            totals.failed += 1
            totals.faults += _is_fault(exchange.error)

    def cancel_all(self, error: GatewayError) -> list[str]:
        """Cancels all exchanges with an error, which their clients get. Returns the request ids."""
        cancelled = list(self._live)
        for exchange in cancelled:
            exchange.cancel(error.copy())  # each task raises a copy of its own
        return [exchange.id for exchange in cancelled]

    def cancel_key(self, key_id: str) -> None:
        """Cancels the exchanges of a key that has been revoked."""
        for exchange in list(self._live):
            if exchange.request.key.id == key_id:
                exchange.cancel(KeyRevoked())

    async def wait_none_left(self) -> None:
        """Waits until no exchange is in flight."""
        while self._live:
            await self._none_left.wait()
