"""The worker processes of one machine, as one of them sees the others: who is there, who has died, and a bell.

Workers share a store and nothing else. Each says every second that it is there and what it does (`store.Workers.beat`),
and listens at a Unix datagram socket. A *ring* there says "look now"; what there is to see is in the store, so a ring
that is lost costs time and nothing else. The kernel closes the socket with its process, however that ends: so a
worker is dead when nobody listens at its address, and is found to be at the next look, without a clock.

**Shape:** a ring is ``topic + b" " + body`` in one datagram.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from trigate.store import Store, Worker


class Workers:
    """This worker and the others. Made by `open_workers`.

    Attributes:
        id: This worker's: ``w_…``, another one after each start.
    """

    id: str

    def __init__(self, store: Store) -> None:
        self._store = store

    async def join(self) -> None:
        """Joins the others, once: opens the store, is known there, and has adopted what dead workers left. Whoever is
        about to use the store for something that outlives a request waits for this first.

        Raises:
            StoreUnavailable: The store cannot be used; the next call tries again.
        """
        raise NotImplementedError

    def adopt_with(self, adopt: Callable[[str, Sequence[str]], Awaitable[None]]) -> None:
        """Registers what takes over from dead workers: it is awaited with this worker's id and theirs before they are
        forgotten. Register before `join`."""
        raise NotImplementedError

    def listen(self, topic: str, heed: Callable[[bytes], None]) -> None:
        """Registers a synchronous callback for the rings of a topic."""
        raise NotImplementedError

    def ring(self, topic: str, body: bytes = b"") -> None:
        """Rings all other workers. Synchronous, never fails, may be lost."""
        raise NotImplementedError

    async def all(self) -> Sequence[Worker]:
        """Every living worker, this one included, with what they last said of themselves."""
        raise NotImplementedError


@contextlib.asynccontextmanager
async def open_workers(store: Store, snapshot: Callable[[], bytes]) -> AsyncIterator[Workers]:
    """Opens the service; nothing is opened or written before the first `Workers.join`.

    Args:
        snapshot: Says what this worker does, as JSON.
    """
    raise NotImplementedError
    yield
