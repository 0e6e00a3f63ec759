"""Samples of what flows, twice a second, for those who watch (``GET /status/events``).

There is one sampler for all viewers of a worker, and nothing is sampled while nobody watches. A sample is made and
encoded once for each owner whose exchanges are watched, however many viewers there are. Its size is bounded: at most
`MAX_ROWS` exchanges and the totals of all, so that ten thousand exchanges cost little more than two hundred.

A viewer that is slower than the sampler skips samples: it always gets the newest one.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import attrs
import msgspec
import trio

from trigate.concurrency.notify import RepeatedEvent, Wakeup
from trigate.errors import Overloaded, StoreUnavailable
from trigate.status import schema
from trigate.status.inflight import Found, InflightRequests
from trigate.status.reporter import StatusReporter

PERIOD_S = 0.5
"""Seconds between two samples."""
MAX_ROWS = 200
"""Maximum number of exchanges in a sample."""
MAX_VIEWERS = 100
"""Maximum number of viewers of a worker."""


@attrs.define(eq=False)
class Viewer:
    """One viewer. Made by `StatusSampler.watch`."""

    _sampler: StatusSampler
    _owner: str | None
    _seen: int

    async def next_sample(self) -> bytes:
        """Waits for a sample that is newer than the last one, and returns it as JSON."""
        await trio.lowlevel.checkpoint()
        sampler = self._sampler
        while sampler.number == self._seen or self._owner not in sampler.samples:
            await sampler.sampled.wait()
        self._seen = sampler.number
        return sampler.samples[self._owner]


@attrs.define(eq=False, kw_only=True)
class StatusSampler:
    """Samples the status while somebody watches. Made by `gateway`, which runs it.

    Attributes:
        samples: The last samples, as JSON, by the owner whose exchanges are in them; None = everybody's.
        number: How many times it has sampled.
        sampled: Set after each time.
    """

    _status: StatusReporter
    _inflight: InflightRequests
    samples: dict[str | None, bytes] = attrs.field(init=False, factory=dict)
    number: int = attrs.field(init=False, default=0)
    sampled: RepeatedEvent = attrs.field(init=False, factory=RepeatedEvent)
    _viewers: Counter[str | None] = attrs.field(init=False, factory=Counter)
    _wanted: Wakeup = attrs.field(init=False, factory=Wakeup)

    def __repr__(self) -> str:
        return f"<StatusSampler, {self._viewers.total()} viewers>"

    @contextlib.contextmanager
    def watch(self, owner: str | None) -> Iterator[Viewer]:
        """A block in which somebody watches.

        Args:
            owner: Whose exchanges; None = everybody's.

        Raises:
            Overloaded: Too many watch already.
        """
        if self._viewers.total() >= MAX_VIEWERS:
            raise Overloaded(f"{MAX_VIEWERS} clients watch the status already, which is the limit.")
        self._viewers[owner] += 1
        self._wanted.set()
        try:
            yield Viewer(self, owner, self.number)
        finally:
            self._viewers[owner] -= 1
            if not self._viewers[owner]:
                del self._viewers[owner]
                self.samples.pop(owner, None)

    async def run(self) -> None:
        """Samples for ever, while somebody watches."""
        while True:
            while not self._viewers:
                await self._wanted.wait()
            status = await self._status.status()
            for owner in list(self._viewers):
                sample = await self._sample(status, owner)
                if owner in self._viewers:
                    self.samples[owner] = sample
            self.number += 1
            self.sampled.set()
            await trio.sleep(PERIOD_S)

    async def _sample(self, status: schema.Status, owner: str | None) -> bytes:
        await trio.lowlevel.checkpoint()
        try:
            found = await self._inflight.list(owner=owner, limit=MAX_ROWS)
        except StoreUnavailable:  # the status says why
            found = Found(rows=(), count=0, cancelled=0, missing_workers=())
        # the rows say more than the oldest ones of the status, and only of the owner's exchanges
        shown = msgspec.structs.replace(status, streams=msgspec.structs.replace(status.streams, oldest=()))
        streams = schema.StreamList(data=found.rows, count=found.count, missing_workers=found.missing_workers)
        return msgspec.json.encode(schema.Sample(at=time.time(), status=shown, streams=streams))
