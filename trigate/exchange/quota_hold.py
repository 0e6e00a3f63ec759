"""What an exchange holds of the limits of its key, its group, its model and the gateway, while it is in flight.

It is held before the exchange queues for admission, and settled with it.
"""

from __future__ import annotations

import trio

from trigate.exchange.call_amounts import amounts_of
from trigate.exchange.state import ExchangeState
from trigate.exchange.upstream_call import UpstreamServices
from trigate.exchange.watchdog import call_timed_out
from trigate.quotas.counters import Amounts
from trigate.quotas.service import Quotas
from trigate.upstream.generation import Route


def hold_nowait(state: ExchangeState, route: Route, services: UpstreamServices) -> Amounts | None:
    """Holds what an exchange may use, if that needs no wait.

    Returns:
        None = it is held, or nothing limits the exchange; else the amounts for `hold`.
    """
    record, key, quotas = state.record, state.request.key, services.quotas
    assert record is not None, "an exchange that holds something has begun"
    if key.settings.group is not None:
        record.key_group = key.settings.group
    if route.alias in state.generation.config.models:
        record.alias = route.alias
    limits = quotas.limits(key, route.alias, record.started_at)
    if not limits.all:
        return None
    state.limits = limits
    amounts = amounts_of(state.request.call, state.generation, route.targets, limits, quotas, services.targets)
    state.reservation = limits.reserve(amounts, state.started_at)
    return amounts if state.reservation is None else None


async def hold(state: ExchangeState, amounts: Amounts, quotas: Quotas) -> None:
    """Holds what an exchange may use, as soon as it can be leased.

    Raises:
        LimitReached, StoreUnavailable: As `Quotas.reserve`.
        GatewayError: The exchange was cancelled, or has no time left.
    """
    left_s = max(0.0, state.deadline_at - trio.current_time())  # the wait for a session's turn may have taken it all
    with state.waiting_in_queue(left_s, lambda: None):
        state.reservation = await quotas.reserve(state.limits, amounts)
    if state.reservation is None:
        raise call_timed_out(state.allowed_s)


def settle(state: ExchangeState, quotas: Quotas) -> None:
    """Counts what an exchange has used, from its completed record. Synchronous."""
    reservation, record = state.reservation, state.record
    if record is not None and record.cost and record.target is not None and quotas.limits_upstreams:
        quotas.spend_at(record.target.partition("/")[0], record.cost, record.started_at)
    if reservation is None or record is None:
        return
    answer = record.completion_tokens or 0
    if answer and not record.counted:
        quotas.sizes.note(record.model, answer)
    quotas.settle(reservation, Amounts(tokens=(record.prompt_tokens or 0) + answer, cost=record.cost or 0))
