"""The quotas of one worker: finds the counters of a call, reserves, and leases what the counters need.

`Quotas.limits` returns the limits of a call; for a call without any that is one look-up. `Limits.reserve` holds what a
call needs of all of them, or of none, in one synchronous step. Where a lease is too small, `Quotas.reserve` waits until
there is more of it.

The leases (`quotas.counters`) come from the store, which all workers of a machine share:

* A worker that is alone leases all that is free, so only the first call of a limit waits for the store. Of several
  workers, one takes what it needs and half of the rest.
* When nothing is left in the store, the worker asks the others. Each gives back at once what is needed, or half of what
  it does not use, if that is more, and answers. The worker that has asked tries again, and refuses the call when all
  have answered, or after `PATIENCE_S`. While a limit is reached, a worker asks every `ASK_AGAIN_S` only; calls between
  are refused at once.
* So all workers together never use more than a limit, and a call can be refused although something is left of the limit
  only if another worker has it in its lease and is slow to give it back. When a worker is killed, its leases become
  free as soon as another one has noticed (`trigate.workers`): a limit can be exceeded then by what the worker had used
  and not recorded, at most one lease.
* A lease is taken by a task of this service, and not by that of the call: no cancellation can lose one.

If the store cannot be used, calls are served from the leases that the worker has. A call that needs more is refused
with 503.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Literal

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent, open_service
from trigate.config.key_sections import Allowance, GroupConfig, MicroUsd, Period
from trigate.config.sections import Config
from trigate.errors import StoreUnavailable
from trigate.keys.key import Key
from trigate.logs import log
from trigate.quotas.answer_sizes import AnswerSizes
from trigate.quotas.counters import Amounts, Budget, Counter, Limits, Rate, Requests, Reservation, Slots, Tokens
from trigate.quotas.headers import dollars
from trigate.quotas.periods import DAY_S, period_of
from trigate.quotas.refusals import refusal
from trigate.store.interface import Store
from trigate.store.records import LeaseWish
from trigate.workers.membership import Workers

PATIENCE_S = 0.15
"""Seconds that a call waits for other workers to give back what they do not use."""
ASK_AGAIN_S = 0.1
"""Seconds before a worker asks again for more of a limit of exchanges in flight that is reached."""
_MAX_ASK_AGAIN_S = 1.0
"""The same for a budget, and for a rate that does not fill sooner."""
_ROUNDS = 3
_MAX_KNOWN = 20_000
NO_LIMIT = MicroUsd(2**60)
"""The limit of a budget of which only the soft part is set."""
TOPIC = "quotas"
"""The topic of the notification that asks other workers for a lease; its body is how much is needed, and the name of
the counter."""
ANSWERS = "quotas-answer"
"""That of their answer, whose body is the name: what they do not use is free."""


@attrs.frozen(kw_only=True)
class BudgetEvent:
    """A budget, or the part of it from which on a warning is given, has been reached: once in each period.

    Attributes:
        kind: ``budget`` or ``soft_budget``.
        scope: Whose budget: ``key:ada``, ``group:team``, ``model:gpt``, ``upstream:openai``, ``all``.
        period: ``day``, ``week``, ``month`` or ``total``.
        limit, spent: In micro-dollars.
    """

    kind: Literal["budget", "soft_budget"]
    scope: str
    period: Period
    limit: int
    spent: int


def _ignore(event: BudgetEvent) -> None:
    pass


@attrs.define(eq=False)
class _Known:
    """The limits of the calls of one key for one model on one day: budgets change with it."""

    limits: Limits
    day: int


class Quotas:
    """The quotas of this worker. Made by `open_quotas`.

    Attributes:
        sizes: Of the last answers.
        on_budget: Is told of each budget that is reached. Synchronous.
        limits_upstreams: Whether an upstream has limits.
    """

    def __init__(self, store: Store, workers: Workers, nursery: trio.Nursery) -> None:
        self._store = store
        self._workers = workers
        self._nursery = nursery
        self._config = Config()
        self._counters: dict[str, Counter] = {}
        self._known: dict[tuple[Key, str], _Known] = {}
        self._upstreams: dict[str, _Known] = {}
        self._renewing: dict[Counter, RepeatedEvent] = {}
        self._answered: dict[str, trio.MemorySendChannel[None]] = {}
        self._wanted: dict[Counter, int] = {}
        self._failures: dict[Counter, StoreUnavailable] = {}
        self._is_closed = False
        self.sizes = AnswerSizes()
        self.on_budget: Callable[[BudgetEvent], None] = _ignore
        self.limits_upstreams = False
        workers.on_notify(TOPIC, self._on_asked)
        workers.on_notify(ANSWERS, self._on_answer)

    def __repr__(self) -> str:
        return f"<Quotas, {len(self._counters)} counters>"

    def apply(self, config: Config) -> None:
        """Follows a configuration. Synchronous. What has been used and held stays."""
        self._config = config
        self._known.clear()
        self._upstreams.clear()
        self.limits_upstreams = any(_has_limits(each) for each in config.upstreams.values())

    def all_counters(self) -> Iterable[Counter]:
        """Returns all counters in use."""
        return self._counters.values()

    # -- the limits of a call -----------------------------------------------------------------------------------------

    def limits(self, key: Key, alias: str, posix_s: float) -> Limits:
        """Returns the limits of a call.

        Args:
            alias: The ``[models.NAME]`` of its model, or another text.
            posix_s: When it began, as in its record.
        """
        known = self._known.get((key, alias))
        if known is None or known.day != posix_s // DAY_S:
            known = self._find(key, alias, posix_s)
        return known.limits

    def upstream_limits(self, upstream: str, posix_s: float) -> Limits:
        """Returns the limits of an upstream."""
        known = self._upstreams.get(upstream)
        if known is None or known.day != posix_s // DAY_S:
            settings = self._config.upstreams.get(upstream, Allowance())
            day = int(posix_s // DAY_S)
            limits = Limits.of(self._of(f"upstream:{upstream}", settings, day))
            known = self._upstreams[upstream] = _Known(limits, day)
        return known.limits

    def _find(self, key: Key, alias: str, posix_s: float) -> _Known:
        config, day = self._config, int(posix_s // DAY_S)
        counters: list[Counter] = []
        if key.name:
            counters += self._of(f"key:{key.name}", key.settings, day)
        if key.group is not None:
            counters += self._of(f"group:{key.settings.group}", key.group, day)
        if alias in config.models:
            counters += self._of(f"model:{alias}", config.models[alias], day)
        counters += self._of("all", config.allowance, day)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        known = self._known[key, alias] = _Known(Limits.of(counters), day)
        return known

    def _of(self, scope: str, settings: Allowance, day: int) -> list[Counter]:
        """The counters of a scope. They are found by name, so those of two models share that of their key."""
        found: list[Counter] = []
        if settings.rpm is not None:
            found.append(self._keep(Requests(name=f"{scope}/rpm", scope=scope, setting="rpm", limit=settings.rpm)))
        if settings.tpm is not None:
            found.append(self._keep(Tokens(name=f"{scope}/tpm", scope=scope, setting="tpm", limit=settings.tpm)))
        if settings.max_exchanges is not None:
            limit, name = settings.max_exchanges, f"{scope}/max_exchanges"
            found.append(self._keep(Slots(name=name, scope=scope, setting="max_exchanges", limit=limit)))
        soft = settings.soft_budget_usd if isinstance(settings, GroupConfig) else None
        budgets = settings.all_budgets
        if soft is not None:
            budgets.setdefault(settings.budget_period, NO_LIMIT)
        for period, most in budgets.items():
            first, end = period_of(period, day)
            budget = Budget(
                name=f"{scope}/{period}/{first}",
                scope=scope,
                setting=f"budgets.{period}",
                period=period,
                limit=most,
                soft_limit=soft if period == settings.budget_period else None,
                first_day=first,
                end_day=end,
            )
            found.append(self._keep(budget))
        return found

    def _keep(self, new: Counter) -> Counter:
        counter = self._counters.get(new.name)
        if counter is None:
            if len(self._counters) >= _MAX_KNOWN:
                self._forget_unused()
            counter = self._counters[new.name] = new
        elif counter.limit != new.limit:
            self._change(counter, new.limit)
        if isinstance(counter, Budget) and isinstance(new, Budget):
            counter.soft_limit = new.soft_limit
        return counter

    def _change(self, counter: Counter, limit: int) -> None:
        """Follows a limit that has changed: the next call leases of the new one."""
        wish = self._wish(counter)
        amount = counter.follow(limit, trio.current_time())
        if amount:
            self._nursery.start_soon(self._return, counter, wish, amount)
        # A call that came before a key has changed may bring the former limit. The next one puts it right.
        self._known.clear()
        self._upstreams.clear()

    def _forget_unused(self) -> None:
        """Gives back the leases that are not in use, and forgets their counters."""
        now = trio.current_time()
        self._known.clear()
        self._upstreams.clear()
        for name, counter in list(self._counters.items()):
            spare = counter.give_back(now)
            if spare:
                self._nursery.start_soon(self._return, counter, self._wish(counter), spare)
            if counter.is_unused:
                del self._counters[name]

    # -- reserving ----------------------------------------------------------------------------------------------------

    async def reserve(self, limits: Limits, amounts: Amounts) -> Reservation:
        """As `Limits.reserve`, but leases what is missing.

        Raises:
            LimitReached, StoreUnavailable: As `lease`.

        **Cancels:** while it waits; nothing is held then.
        """
        await self.lease(limits, amounts)
        return limits.hold(amounts)

    async def lease(self, limits: Limits, amounts: Amounts) -> None:
        """Leases what a call needs of all its limits, and holds nothing.

        Raises:
            LimitReached: A limit is reached: the error says which, and when to try again.
            StoreUnavailable: Nothing can be leased.
        """
        await trio.lowlevel.checkpoint()
        while True:
            now = trio.current_time()
            short = limits.first_short(amounts, now)
            if short is None:
                return
            amount = amounts[short.which]
            if now < short.ask_again_at and short not in self._renewing:
                self._note_reached(short)
                raise refusal(short, amount, now, time.time())
            # What is leased may go to another call that waits for it. Then this one asks again, until nothing is left.
            await self._renew(short, max(1, amount))

    async def _renew(self, counter: Counter, amount: int) -> None:
        self._wanted[counter] = self._wanted.get(counter, 0) + amount
        done = self._renewing.get(counter)
        if done is None:
            done = self._renewing[counter] = RepeatedEvent()
            self._failures.pop(counter, None)
            self._nursery.start_soon(self._lease, counter, done)
        await done.wait()
        failure = self._failures.get(counter)
        if failure is not None:
            raise failure.copy()

    async def _lease(self, counter: Counter, done: RepeatedEvent) -> None:
        """Leases more of a counter, in a task of its own."""
        try:
            await self._workers.join()
            for _ in range(_ROUNDS):
                wanted = self._wanted[counter]
                if await self._lease_once(counter) and not self._has_enough(counter):
                    await self._ask_others(counter)
                if self._has_enough(counter) or self._wanted[counter] == wanted:
                    break  # else more calls have come meanwhile
            if not self._has_enough(counter):
                now = trio.current_time()
                after_s = counter.frees_in_s(self._wanted[counter], now)
                longest_s = ASK_AGAIN_S if isinstance(counter, Slots) else _MAX_ASK_AGAIN_S
                counter.ask_again_at = now + max(ASK_AGAIN_S, min(longest_s if after_s is None else after_s, longest_s))
        except StoreUnavailable as error:
            self._failures[counter] = error
        except Exception:  # a defect must not end the gateway
            log.exception("lease_crashed", limit=counter.name)
            self._failures[counter] = StoreUnavailable("A limit cannot be leased.")
        finally:
            del self._renewing[counter], self._wanted[counter]
            done.set()

    def _has_enough(self, counter: Counter) -> bool:
        return counter.available(trio.current_time()) >= self._wanted[counter]

    async def _ask_others(self, counter: Counter) -> None:
        """Leases what other workers give back."""
        send, receive = trio.open_memory_channel[None](math.inf)
        self._answered[counter.name] = send
        missing = max(1, math.ceil(self._wanted[counter] - counter.available(trio.current_time())))
        self._workers.notify(TOPIC, b"%d %b" % (missing, counter.name.encode()))
        try:
            give_up_at = trio.current_time() + PATIENCE_S
            for _ in range(self._workers.count - 1):
                with trio.move_on_at(give_up_at):
                    await receive.receive()
                await self._lease_once(counter)  # not within the time limit: a lease must not be lost
                if self._has_enough(counter) or trio.current_time() >= give_up_at:
                    break
        finally:
            del self._answered[counter.name]

    async def _lease_once(self, counter: Counter) -> bool:
        """Leases what is free, as far as this worker takes it; returns whether other workers have something."""
        now = trio.current_time()
        wish = self._wish(counter)
        missing = max(1, math.ceil(self._wanted[counter] - counter.available(now)))
        most = counter.limit if self._workers.count == 1 else missing + max(0, counter.limit - missing) // 2
        # Shielded: what the store has given must not be lost, also when the gateway closes meanwhile.
        with trio.CancelScope(shield=True):  # bounded by: the store, which answers or fails
            lease = await self._store.quotas.lease(attrs.evolve(wish, least=missing, most=most))
        if lease.amount:
            counter.add(lease.amount, lease.tokens, trio.current_time())
        if self._is_closed:
            self._give_back(counter)
        if isinstance(counter, Budget):
            # What is held in the store has shrunk by what this worker's records there have cost.
            counter.spent_elsewhere = lease.spent - (counter.granted - lease.held)
        return lease.others > 0

    def _wish(self, counter: Counter) -> LeaseWish:
        first, end = (counter.first_day, counter.end_day) if isinstance(counter, Budget) else (0, 0)
        return LeaseWish(
            name=counter.name,
            scope=counter.scope,
            worker=self._workers.id,
            limit=counter.limit,
            least=0,
            most=0,
            at=time.time(),
            is_rate=isinstance(counter, Rate),
            first_day=first,
            end_day=end,
        )

    def _on_asked(self, body: bytes) -> None:
        """Another worker needs more of a limit: gives back what is not in use."""
        needed, _, name = body.partition(b" ")
        counter = self._counters.get(name.decode(errors="replace"))
        if self._is_closed:
            return
        spare = counter.give_back(trio.current_time(), int(needed)) if counter is not None else 0
        if counter is not None and spare:
            self._nursery.start_soon(self._return, counter, self._wish(counter), spare)
        else:
            self._workers.notify(ANSWERS, name)

    def _on_answer(self, body: bytes) -> None:
        """Another worker has given back what it does not use."""
        send = self._answered.get(body.decode(errors="replace"))
        if send is not None:
            send.send_nowait(None)

    async def _return(self, counter: Counter, wish: LeaseWish, amount: int) -> None:
        try:
            await self._store.quotas.give_back(wish, amount)
        except StoreUnavailable:
            counter.add(amount, 0.0, trio.current_time())  # the store still has it as this worker's
        self._workers.notify(ANSWERS, counter.name.encode())

    def close(self) -> None:
        """Gives back all leases. Synchronous: the store writes what is queued before it closes."""
        self._is_closed = True
        for counter in self._counters.values():
            self._give_back(counter)

    def _give_back(self, counter: Counter) -> None:
        spare = counter.give_back(trio.current_time())
        if spare:
            self._store.quotas.give_back(self._wish(counter), spare)

    # -- settling -----------------------------------------------------------------------------------------------------

    def settle(self, reservation: Reservation, used: Amounts) -> None:
        """Counts what a call has used, in place of what it held. Synchronous; only the first call has an effect."""
        reservation.settle(used, trio.current_time())
        for budget in reservation.limits.budgets if used.cost else ():
            soft = budget.soft_limit
            if soft is not None and budget.spent >= soft:
                self._note_episode(budget, "soft_budget", soft)

    def spend_at(self, upstream: str, cost: int, posix_s: float) -> None:
        """Counts what a call has cost in the budgets of an upstream, which its attempts have held."""
        for budget in self.upstream_limits(upstream, posix_s).budgets:
            budget.settled += cost

    def _note_reached(self, counter: Counter) -> None:
        if isinstance(counter, Budget):
            self._note_episode(counter, "budget", counter.limit)

    def _note_episode(self, budget: Budget, kind: Literal["budget", "soft_budget"], limit: int) -> None:
        if kind in budget.episodes:
            return
        budget.episodes.add(kind)
        event = BudgetEvent(kind=kind, scope=budget.scope, period=budget.period, limit=limit, spent=budget.spent)
        log.warning(
            "budget_reached",
            kind=kind,
            scope=event.scope,
            period=event.period,
            limit_usd=dollars(event.limit),
            spent_usd=dollars(event.spent),
        )
        try:
            self.on_budget(event)
        except Exception:
            log.exception("budget_alert_crashed", scope=event.scope)


def _has_limits(settings: Allowance) -> bool:
    return not (settings.rpm is settings.tpm is settings.max_exchanges is None and not settings.all_budgets)


@contextlib.asynccontextmanager
async def open_quotas(store: Store, workers: Workers) -> AsyncIterator[Quotas]:
    """Opens the service. It uses the store from the first call that has a limit on."""
    async with open_service() as nursery:
        quotas = Quotas(store, workers, nursery)
        try:
            yield quotas
        finally:
            quotas.close()
