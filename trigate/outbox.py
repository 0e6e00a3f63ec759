"""What has to be told to the outside, until it has been: attempts, back-off, and what became of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

import attrs

from trigate.store import Delivery, Store
from trigate.workers import Workers


@attrs.frozen(kw_only=True)
class Receipt:
    """How an attempt ended.

    Attributes:
        delivered: It arrived.
        again: Worth another attempt; else it has failed for good.
        after_s: The receiver said when; None = it did not.
        status: HTTP's; 0 = there was none.
        error: What is wrong, without a secret in it.
        unsure: It may have arrived although nobody said so.
    """

    delivered: bool
    again: bool = False
    after_s: float | None = None
    status: int = 0
    error: str | None = None
    unsure: bool = False


class Carrier(Protocol):
    """Who can deliver on a channel. Whatever it raises is an attempt that failed."""

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt. Bounded in time by the outbox."""


class Outbox:
    """The deliveries that this worker makes. Made by `open_outbox`."""

    carriers: dict[str, Carrier]
    """By the name of the channel; may change at any time."""

    def look(self) -> None:
        """There is something new to deliver. Synchronous."""
        raise NotImplementedError


@contextlib.asynccontextmanager
async def open_outbox(store: Store, workers: Workers) -> AsyncIterator[Outbox]:
    """Opens the outbox; what is due is delivered from now on, once `workers.join` has been called by anybody."""
    raise NotImplementedError
    yield
