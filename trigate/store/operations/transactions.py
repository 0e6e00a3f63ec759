"""How an operation reaches the tables: in a transaction of its own, in the order of the calls."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TypeVar

from trigate.store.interface import Write
from trigate.store.tables import Tables

T = TypeVar("T")


class Transactions(abc.ABC):
    """Runs operations. The rules of `trigate.store.interface` hold here."""

    @abc.abstractmethod
    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        """Queues an operation that changes something. What the operation raises, the write raises."""

    @abc.abstractmethod
    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        """Queues an operation that is repeated until it returns 0. The result is the sum. Not durable.

        A store that has other writes to do gives each repetition a transaction of its own, behind the writes that were
        queued meanwhile.
        """

    @abc.abstractmethod
    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Runs an operation that changes nothing.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
