"""Reads the configuration, and reloads it at SIGHUP and when its file changes.

A reload opens the next generation, makes it the current one, and applies its configuration to the services that outlive
generations. The old generation closes after its last exchange. An unusable configuration changes nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import httpx2
import trio

from trigate.concurrency.notify import RepeatedEvent, Wakeup
from trigate.config import load
from trigate.config.sections import Config, ConfigError
from trigate.logs import log, message_of
from trigate.upstream import discovery
from trigate.upstream.generation import Generation, Generations

_FILE_CHECK_S = 1.0


class Reloader:
    """Replaces the generation in use on request.

    Args:
        read: Reads the configuration.
        open_generation: Opens a generation, which then closes after its last exchange.
        apply: Applies a configuration to the services that outlive generations.

    Attributes:
        error: Why the last reload was refused; None = it was not.
    """

    def __init__(
        self,
        generations: Generations,
        *,
        read: Callable[[], Awaitable[Config]],
        open_generation: Callable[[Config], Awaitable[Generation]],
        apply: Callable[[Config], None],
    ) -> None:
        self._generations = generations
        self._read = read
        self._open_generation = open_generation
        self._apply = apply
        self._requested = Wakeup()
        self._reloaded = RepeatedEvent()
        self.error: str | None = None

    def request(self) -> None:
        """Requests a reload. Synchronous; call it from Trio's thread."""
        self._requested.set()

    async def wait_reloaded(self) -> None:
        """Waits for the next reload that changes the configuration in use."""
        await self._reloaded.wait()

    async def run(self) -> None:
        """Reloads on each request; never returns."""
        while True:
            await self._requested.wait()
            source = self._generations.config.source
            try:
                config = await self._read()
                if not config.upstreams:  # many programs empty a file before they write it
                    raise ConfigError(config.source, ("upstreams: there are none",))
                generation = await self._open_generation(config)
            except ConfigError as error:
                self.error = str(error)
                log.error("reload_refused", source=error.source, problems=list(error.problems))
                continue
            except Exception as error:  # also a defect: the old configuration stays in use
                problem = f"cannot be put to use: {message_of(error)}"
                self.error = f"{source}: {problem}"
                log.exception("reload_refused", source=source, problems=[problem])
                continue
            self.error = None
            self._generations.replace(generation)
            self._apply(config)
            self._reloaded.set()
            log.info("reloaded", source=config.source, upstreams=list(config.upstreams))

    async def watch_file(self, path: Path) -> None:
        """Requests a reload when the configuration file changes; never returns."""
        seen = await _fingerprint(path)
        while True:
            await trio.sleep(_FILE_CHECK_S)
            now = await _fingerprint(path)
            if now != seen:
                seen = now
                self.request()


async def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes when the file does; None = the file cannot be read."""
    try:
        stat = await trio.Path(path).stat()
    except (OSError, RuntimeError):  # RuntimeError: no thread can be started
        await trio.lowlevel.checkpoint()
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def reload_on_sighup(reloader: Reloader) -> Iterator[None]:
    """Requests a reload at SIGHUP, unless the signal has a handler already. Works in guest mode, too."""
    is_usable = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if not is_usable or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def on_signal(number: int, frame: object) -> None:
        token.run_sync_soon(reloader.request, idempotent=True)

    signal.signal(signal.SIGHUP, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def read_config(path: Path | None, env: Mapping[str, str]) -> Config:
    """Reads the configuration file; without one, discovers upstreams (`upstream.discovery`).

    Raises:
        ConfigError: The configuration cannot be used.
    """
    if path is not None:
        await trio.lowlevel.checkpoint()
        return load.read(path, env=env)
    async with httpx2.AsyncHTTPTransport(verify=False, trust_env=False) as transport:
        return await discovery.discover(env, transport=transport)
