"""A gateway that kills itself (SIGKILL) at a chosen point: ``python -m tests.support.killed_gateway POINT serve …``.

============  ==========================================================================================================
``granted``   the store has a lease of this worker, which does not know it yet
``asked``     the worker is about to ask the others for a lease
``returned``  the worker has taken from a lease what another one needs, and the store does not know it yet
``queued``    a call has reserved what it needs, and waits for a slot of the gateway
``settled``   the journal has the record of a call, and the store does not
``stored``    the store has the record as well, and the journal still has it
============  ==========================================================================================================
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import attrs

from trigate.cli.commands import main
from trigate.concurrency.fair_limiter import FairLimiter
from trigate.ledger.ledger import Ledger
from trigate.quotas.counters import Slots
from trigate.quotas.service import Quotas
from trigate.store.operations.store import ExchangeOperations


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@attrs.frozen
class _Fatal:
    """A write; the process dies when it has been awaited."""

    write: Awaitable[Any]

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self.write.__await__()
        _die()


def _die_behind(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method behind which the process dies: at its end, or when what it returns has been awaited."""

    def replacement(*args: Any) -> Any:
        result = method(*args)
        return _Fatal(result) if result is not None else _die()

    return replacement


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "granted": (Slots, "add", _die),
    "asked": (Quotas, "_ask_others", _die),
    "returned": (Quotas, "_return", _die),
    "queued": (FairLimiter, "acquire", _die),
    "settled": (Ledger, "settle", _die_behind(Ledger.settle)),
    "stored": (ExchangeOperations, "put", _die_behind(ExchangeOperations.put)),
}

if __name__ == "__main__":
    setattr(*POINTS[sys.argv.pop(1)])
    main(sys.argv[1:], prog_name="trigate")
