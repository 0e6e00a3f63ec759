"""Alerts: signed webhooks about what somebody should look at, once per episode.

An episode begins when a condition begins to hold, and ends when it no longer does:

* a *budget*, or the soft part of one, is used up; it ends with the budget's period, and nobody is told;
* too large a share of the calls fails by the fault of a provider or of the gateway; it ends below half of that share;
* a target's circuit breaker is open; it ends when the breaker closes.

Budgets are reported by whoever counts them (`Alerts.note`). The other two are looked at every second, and only while
alerts are configured: so nothing of this is on the way of a call.

An alert is a delivery in the outbox, so it is sent at least once, also after a crash. Its id is made of what it says
and of the episode, so that several workers that notice the same thing send it once: of a budget, the episode is its
period; of the others, it is the `_SAME_S` in which it began or ended.

**Shape:** ``{"type": "alert.breaker", "timestamp": "2026-11-30T12:00:00Z", "data": {"state": "firing", "subject":
"up/m", "message": …, …}}``; ``state`` is ``firing`` or ``resolved``. **Source:** Standard Webhooks specification 1.0.0,
"Payload structure".
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping

import attrs
import msgspec
import trio

from trigate.concurrency.notify import Wakeup
from trigate.config.report_sections import AlertKind, AlertsConfig
from trigate.errors import StoreUnavailable
from trigate.exchange.live import LiveExchanges
from trigate.logs import log
from trigate.quotas.headers import dollars
from trigate.quotas.periods import DAY_S, period_of
from trigate.quotas.service import BudgetEvent
from trigate.routing.target_state import Targets
from trigate.runs.outbox import Outbox
from trigate.store.interface import Store
from trigate.store.records import Delivery
from trigate.webhooks.callbacks import ALERTS
from trigate.workers.membership import Workers

_LOOK_S = 1.0
_SAMPLES = 60
"""How many times in its window the share of failures is sampled."""
_SAME_S = 300
_MAX_WAITING = 1000
"""How many alerts wait for a store that cannot be used; of more, the oldest are dropped."""


@attrs.frozen(kw_only=True)
class Alert:
    """An alert.

    Attributes:
        subject: What it is about: a key, a target.
        message: A sentence for people.
        episode: Tells one episode from another; the same in all workers.
        facts: Further fields.
        is_resolved: The episode has ended.
    """

    kind: AlertKind
    subject: str
    message: str
    episode: str
    facts: Mapping[str, object] = attrs.field(factory=dict)
    is_resolved: bool = False

    def delivery(self, url: str, at: float) -> Delivery:
        """Returns what is to be delivered to this URL."""
        state = "resolved" if self.is_resolved else "firing"
        identity = "\n".join((self.kind, self.subject, state, self.episode))
        when = datetime.datetime.fromtimestamp(int(at), datetime.UTC).isoformat().replace("+00:00", "Z")
        data = {"state": state, "subject": self.subject, "message": self.message, **self.facts}
        return Delivery(
            id=f"msg_{hashlib.sha256(identity.encode()).hexdigest()[:32]}",
            run_id="",
            channel=ALERTS,
            target=url,
            body=msgspec.json.encode({"type": f"alert.{self.kind}", "timestamp": when, "data": data}),
            created_at=at,
            due_at=at,
        )


class Alerts:
    """The alerts of this worker. Made once by the composition root, which runs `run`.

    Args:
        live: For the share of calls that fail.
        targets: For their circuit breakers.
        now: Returns the POSIX time, in seconds.
    """

    def __init__(
        self,
        *,
        store: Store,
        workers: Workers,
        outbox: Outbox,
        live: LiveExchanges,
        targets: Targets,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._workers = workers
        self._outbox = outbox
        self._live = live
        self._targets = targets
        self._now = now
        self._settings = AlertsConfig()
        self._changed = Wakeup()
        self._waiting: deque[Alert] = deque(maxlen=_MAX_WAITING)
        self._open: dict[str, str] = {}
        """The targets whose breaker was open at the last look, with the message about each."""
        self._samples: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        """Calls and faults since the start, at the last times, the oldest first."""
        self._sampled_at = 0.0
        self._is_failing = False

    def __repr__(self) -> str:
        return f"<Alerts to {self._settings.url}, {len(self._waiting)} waiting>"

    def apply(self, settings: AlertsConfig) -> None:
        """Follows a changed configuration. Synchronous."""
        if settings != self._settings:
            self._settings = settings
            self._samples.clear()
            self._is_failing = False
            self._open.clear()
            self._changed.set()

    def note(self, alert: Alert) -> None:
        """Sends an alert, if it is one of those that are configured. Synchronous."""
        if self._settings.url is None or alert.kind not in self._settings.events:
            return
        self._waiting.append(alert)
        self._changed.set()

    async def run(self) -> None:
        """Looks for what is to be alerted, and hands alerts to the outbox; never returns."""
        while True:
            if self._settings.url is None:
                await self._changed.wait()
                continue
            with trio.move_on_after(_LOOK_S):
                await self._changed.wait()
            self._look()
            if self._waiting:
                await self._hand_over(self._settings.url)

    async def _hand_over(self, url: str) -> None:
        """Writes the waiting alerts to the outbox; those that cannot be written wait for the next time."""
        await trio.lowlevel.checkpoint()
        try:
            await self._workers.join()
            while self._waiting:
                alert = self._waiting[0]
                try:
                    await self._store.deliveries.add(alert.delivery(url, self._now()))
                except ValueError:  # another worker has said it, or this one before
                    pass
                else:
                    log.warning("alert", kind=alert.kind, subject=alert.subject, resolved=alert.is_resolved)
                if self._waiting and self._waiting[0] is alert:  # otherwise it was dropped meanwhile
                    self._waiting.popleft()
        except StoreUnavailable:
            return
        self._outbox.wake()

    def note_budget(self, event: BudgetEvent) -> None:
        """Sends the alert about a budget (`quotas.service.Quotas.on_budget`). Synchronous."""
        first_day, _ = period_of(event.period, int(self._now()) // DAY_S)
        what = "is used up" if event.kind == "budget" else "has reached the part from which a warning is given"
        self.note(
            Alert(
                kind=event.kind,
                subject=event.scope,
                message=f"The budget of {event.scope} ({event.period}) {what}.",
                episode=f"{event.period} {first_day}",
                facts={"period": event.period, "limit_usd": dollars(event.limit), "spent_usd": dollars(event.spent)},
            )
        )

    # -- what is looked at --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        events = self._settings.events
        if "breaker" in events:
            self._look_at_breakers()
        if "error_rate" in events and self._settings.error_rate:
            self._look_at_errors()

    def _look_at_breakers(self) -> None:
        now = trio.current_time()
        states = [(str(target), state.breaker.state(now)) for target, _, state in self._targets.items()]
        # A half-open breaker waits for a probe: the episode goes on.
        is_open = {target for target, state in states if state != "closed"}
        episode = self._moment()
        for target in sorted(is_open - self._open.keys()):
            self._open[target] = episode
            message = f"The circuit breaker of {target} is open: it gets no calls until it has answered a probe."
            self.note(Alert(kind="breaker", subject=target, message=message, episode=episode))
        for target in sorted(self._open.keys() - is_open):
            del self._open[target]
            message = f"The circuit breaker of {target} is closed again."
            self.note(Alert(kind="breaker", subject=target, message=message, episode=episode, is_resolved=True))

    def _look_at_errors(self) -> None:
        settings, totals = self._settings, self._live.totals
        now = trio.current_time()
        if self._samples and now < self._sampled_at + settings.window_s / _SAMPLES:
            return
        self._sampled_at = now
        self._samples.append((totals.exchanges, totals.faults))
        calls, faults = (new - old for new, old in zip(self._samples[-1], self._samples[0], strict=True))
        share = faults / calls if calls >= settings.min_calls else 0.0
        if self._is_failing is (share >= settings.error_rate / (2 if self._is_failing else 1)):
            return
        self._is_failing = not self._is_failing
        message = f"{faults} of the last {calls} calls failed by the fault of a provider or of the gateway."
        facts = {"calls": calls, "faults": faults, "window_s": settings.window_s, "worker": self._workers.id}
        self.note(
            Alert(
                kind="error_rate",
                subject="all calls",
                message=message,
                episode=self._moment(),
                facts=facts,
                is_resolved=not self._is_failing,
            )
        )

    def _moment(self) -> str:
        return str(int(self._now()) // _SAME_S)
