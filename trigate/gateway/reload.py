"""Reads the configuration again: at SIGHUP, and when its file changes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import trio

from trigate.config import load as structure_load
from trigate.config.sections import Config
from trigate.upstream import discovery

if TYPE_CHECKING:
    from trigate.gateway.gateway import Gateway

if TYPE_CHECKING:
    pass

_WATCH_FILE_S = 1.0


async def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = await trio.Path(path).stat()
    except OSError:
        return None  # noqa: ASYNC910 - a thread was asked
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def _reload_on_sighup(gateway: Gateway) -> Iterator[None]:
    """Makes SIGHUP a reload, where nobody else has claimed the signal. Works under Trio and in guest mode alike."""
    usable = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def on_signal(number: int, frame: object) -> None:
        token.run_sync_soon(gateway.reload_soon, idempotent=True)

    signal.signal(signal.SIGHUP, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def read_config(path: Path | None, env: Mapping[str, str]) -> Config:
    """Reads the configuration file, or, where there is none, finds what can be found.

    Raises:
        ConfigError: It cannot be used.
    """
    if path is not None:
        await trio.lowlevel.checkpoint()
        return structure_load.read(path, env=env)
    async with httpx2.AsyncHTTPTransport(verify=False, trust_env=False) as transport:
        return await discovery.discover(env, transport=transport)
