"""The limits of upstreams, for the plan of one call: a target whose upstream is at its limit is passed over.

An attempt holds what it may use of the limits of its upstream, from when the plan begins it until the plan ends it. The
money that the call has cost is counted when its exchange is settled, as in its record: with the upstream of the target
that answered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import trio

from trigate.errors import GatewayError, LimitReached
from trigate.exchange.call_amounts import amounts_of
from trigate.exchange.request import ExchangeRequest
from trigate.openai.answer import Usage
from trigate.quotas.counters import Amounts, Limits, Reservation
from trigate.quotas.refusals import refusal
from trigate.quotas.service import Quotas
from trigate.routing.routes import Target
from trigate.routing.target_state import Targets


class UpstreamGate:
    """The `routing.plan.Gate` of one call. Made by `gate_of`."""

    def __init__(self, request: ExchangeRequest, states: Targets, quotas: Quotas) -> None:
        self._request = request
        self._states = states
        self._quotas = quotas
        self._at = time.time()
        self._needed: dict[Target, tuple[Limits, Amounts]] = {}
        self._held: dict[Target, Reservation] = {}

    async def prepare(self, targets: Sequence[Target]) -> None:
        """Leases what one attempt at each target needs, as far as there is as much."""
        await trio.lowlevel.checkpoint()
        for target in targets:
            if not self.admits(target):
                with contextlib.suppress(LimitReached):
                    await self._quotas.lease(*self._needs(target))

    def _needs(self, target: Target) -> tuple[Limits, Amounts]:
        """The limits of a target's upstream, and what an attempt there may use. The plan asks several times."""
        needed = self._needed.get(target)
        if needed is None:
            limits = self._quotas.upstream_limits(target.upstream, self._at)
            call, generation = self._request.call, self._request.generation
            needed = limits, amounts_of(call, generation, (target,), limits, self._quotas, self._states)
            self._needed[target] = needed
        return needed

    def admits(self, target: Target) -> bool:
        """Whether an attempt may begin."""
        limits, amounts = self._needs(target)
        return limits.first_short(amounts, trio.current_time()) is None

    def enter(self, target: Target) -> None:
        """An attempt begins."""
        limits, amounts = self._needs(target)
        if limits.all:
            self._held[target] = limits.hold(amounts)

    def leave(self, target: Target, usage: Usage | None) -> None:
        """An attempt has ended."""
        held = self._held.pop(target, None)
        if held is not None:
            tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
            held.settle(Amounts(tokens=tokens), trio.current_time())

    def refusal(self, target: Target) -> GatewayError:
        """The error of a call whose target is not admitted."""
        limits, amounts = self._needs(target)
        now = trio.current_time()
        short = limits.first_short(amounts, now) or limits.all[0]
        return refusal(short, amounts[short.which], now, self._at)


async def gate_of(request: ExchangeRequest, targets: Sequence[Target], states: Targets, quotas: Quotas) -> UpstreamGate:
    """Returns the gate of a call with these targets.

    Args:
        states: Those of all targets.

    Raises:
        StoreUnavailable: Nothing can be leased.
    """
    gate = UpstreamGate(request, states, quotas)
    await gate.prepare(targets)
    return gate
