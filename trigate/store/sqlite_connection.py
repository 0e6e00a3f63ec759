"""One SQLite connection, and the thread in which alone it is used.

apsw has an asynchronous connection of its own. It imports asyncio, and its thread keeps a process alive whose Trio run
was abandoned.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    import apsw

T = TypeVar("T")

_CHECK_STEPS = 200_000
"""How many steps of SQLite's virtual machine (about 2 ms) lie between two looks whether a call is still wanted."""


class _Call:
    """A call that waits for the thread, is executed there, or has been."""

    __slots__ = ("done", "function", "is_abandoned", "result")

    def __init__(self, function: Callable[[apsw.Connection], Any]) -> None:
        self.function = function
        self.done = trio.Event()
        self.is_abandoned = False
        self.result: outcome.Maybe[Any] | None = None


class SqliteConnection:
    """A connection. Its thread starts at once, and is a daemon: it does not keep a process alive.

    Args:
        connect: Opens the connection, in the thread, at the first `call`.
    """

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._db: apsw.Connection | None = None
        self._current: _Call | None = None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._run, name="trigate store", daemon=True).start()

    async def call(self, function: Callable[[apsw.Connection], T]) -> T:
        """Calls a function in the thread with the connection, after the calls that were made before.

        **Cancels:** at any point. A function that has not begun is not called. In one that runs, a statement that
        takes long is interrupted.
        """
        call = _Call(function)
        self._calls.put(call)
        try:
            await call.done.wait()
        except trio.Cancelled:
            call.is_abandoned = True
            raise
        assert call.result is not None, "a call that is done has a result"
        result: T = call.result.unwrap()
        return result

    def end(self) -> None:
        """Has the thread close the connection after the calls that were made, and end."""
        self._calls.put(None)

    async def aclose(self) -> None:
        """Closes the connection, after the calls that were made. **Cancels:** it is closed all the same, later."""
        self.end()
        await self._closed.wait()

    def _run(self) -> None:
        with suppress(trio.RunFinishedError):  # the Trio run has ended or was abandoned: nobody waits any more
            while (call := self._calls.get()) is not None:
                if not call.is_abandoned:
                    self._current = call
                    call.result = outcome.capture(self._execute, call.function)
                    self._current = None
                    self._token.run_sync_soon(call.done.set)
                del call  # while this waits for the next one, nothing of this one is kept
        if self._db is not None:
            self._db.close(True)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._closed.set)

    def _execute(self, function: Callable[[apsw.Connection], T]) -> T:
        if self._db is None:
            self._db = self._connect()
            self._db.set_progress_handler(self._is_abandoned, _CHECK_STEPS)
        return function(self._db)

    def _is_abandoned(self) -> bool:
        return self._current is not None and self._current.is_abandoned
