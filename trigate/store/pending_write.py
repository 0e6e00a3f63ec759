"""A write whose result comes later: a small future for one waiter."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")


class PendingWrite(Generic[T]):
    """An `interface.Write`. The store calls `settle` or `fail` exactly once; one task may await it, before or after.

    An error is kept until the write is awaited. If the write is never awaited, the error is not reported.
    """

    __slots__ = ("_done", "_error", "_is_done", "_result")

    def __init__(self) -> None:
        self._done: trio.Event | None = None
        self._is_done = False
        self._error: Exception | None = None
        self._result: T

    def settle(self, result: T) -> None:
        """Records that the write was done, and its result."""
        self._result = result
        self._end()

    def fail(self, error: Exception) -> None:
        """Records that the write was not done. Awaiting it raises ``error``."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._is_done = True
        if self._done is not None:
            self._done.set()

    async def _wait(self) -> T:
        if self._is_done:
            await trio.lowlevel.checkpoint()
        else:
            self._done = trio.Event()
            await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()
