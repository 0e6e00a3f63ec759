"""The fixtures of all tests.

An ERROR in the log fails a test that does not expect it, and no test touches the user's own store. Tests in virtual
time request ``autojump_clock`` *by name*: a fixture cannot set the clock for them.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from tests.support import gateway, slow
from tests.support.gateway import OpenApp, OpenServer
from tests.support.gateway import open_app as _open_app
from tests.support.logs import Logs, capture_logs
from trigate.store import opening

# A background job of a shell ignores SIGINT, and so do its children; the processes that tests start must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# for processes too that are not started through tests/support/processes.py
os.environ["TRIGATE_STORE"] = opening.MEMORY


def pytest_collection_finish() -> None:
    """Keeps thousands of tests out of the garbage collections of the code under test: one would take a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Fails a test that is too slow without the mark ``slow``; see `tests.support.slow`."""
    slow.run(item, nextitem)
    return True


@pytest.fixture(autouse=True)
def default_store_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the default store in memory, so that no test touches the data of the user who runs it."""
    monkeypatch.setattr(opening, "default_location", lambda: opening.MEMORY)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """Captures the log. A test that logs an ERROR fails, unless it called `Logs.expect_error`."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def open_app() -> OpenApp:
    """Opens a gateway with scripted upstreams in memory: ``async with open_app(config, providers) as served``."""
    return _open_app


@pytest.fixture
def open_server() -> OpenServer:
    """Serves a gateway over real sockets: ``async with open_server(config) as (client, app)``."""
    return gateway.open_server
