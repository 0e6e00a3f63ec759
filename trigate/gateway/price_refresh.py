"""Keeps the public prices up to date, if the configuration says where they come from (``[price_table]``).

Each worker reads the data for itself: at the start, at each reload, and from time to time. One that has read other data
than before notifies the others, which then read as well; so all of them end up with the same prices. Data that cannot
be read, or is none, changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httpx2
import trio

from trigate.concurrency.notify import Wakeup
from trigate.config.config_error import ConfigError
from trigate.config.key_sections import PriceTableConfig
from trigate.logs import log, message_of
from trigate.prices.published import table_of
from trigate.prices.table import PriceTable
from trigate.upstream.generation import Generations
from trigate.workers.membership import Workers

MAX_BYTES = 16 * 1024 * 1024
READ_S = 30.0
"""How long it may take to read the data."""
RETRY_S = 60.0
"""The pause after a failure. It doubles with each further one, up to ``interval_s``. It is also the shortest pause
between two notifications that have an effect."""
MAX_RETRY_S = 3600.0
"""The longest pause after a failure, if no interval is set."""
_TOPIC = "prices"


Read = Callable[[PriceTableConfig], Awaitable[bytes]]


class PriceRefresh:
    """Reads the data, and gives the prices of the generation in use another table.

    Args:
        read: Reads it; None = from where the configuration says.

    Attributes:
        error: Why it could not be read the last time; None = it could, or nothing is to be read.
        refreshed_at: When it was read the last time (POSIX seconds); None = not yet.
    """

    def __init__(self, generations: Generations, workers: Workers, read: Read | None = None) -> None:
        self._generations = generations
        self._workers = workers
        self._read = read or self._read_source
        self._config = PriceTableConfig()
        self._table: PriceTable | None = None
        self._digest = b""
        self._wanted = Wakeup()
        self._notified_at = -math.inf
        self.error: str | None = None
        self.refreshed_at: float | None = None
        workers.on_notify(_TOPIC, self._on_notify)

    def __repr__(self) -> str:
        return f"<PriceRefresh from {self._config.source or 'nowhere'}>"

    def apply(self, config: PriceTableConfig) -> None:
        """Applies a configuration, after its generation has become the current one. Synchronous."""
        if (config.url, config.file) != (self._config.url, self._config.file):
            self._table, self._digest, self.error, self.refreshed_at = None, b"", None, None
        self._config = config
        if self._table is not None:
            self._generations.current.prices.use(self._table)
        self._wanted.set()

    async def run(self) -> None:
        """Reads the data again and again; never returns."""
        pause_s = math.inf
        while True:
            with trio.move_on_after(pause_s):
                await self._wanted.wait()
            config = self._config
            if not config.source:
                pause_s = math.inf
                continue
            try:
                await self._refresh(config)
            except (OSError, ValueError, ConfigError, trio.TooSlowError, httpx2.HTTPError, httpx2.InvalidURL) as error:
                reason = "it took too long" if isinstance(error, trio.TooSlowError) else message_of(error)
                if reason != self.error:
                    log.warning("prices_not_refreshed", source=config.source, error=reason)
                pause_s = RETRY_S if self.error is None else min(pause_s * 2, config.interval_s or MAX_RETRY_S)
                self.error = reason
            except Exception as error:  # a defect must not stop the gateway
                log.exception("prices_refresh_crashed", source=config.source)
                pause_s, self.error = RETRY_S, message_of(error)
            else:
                self.error = None
                pause_s = config.interval_s or math.inf

    async def _refresh(self, config: PriceTableConfig) -> None:
        with trio.fail_after(READ_S):
            data = await self._read(config)
        digest = hashlib.sha256(data).hexdigest()[:12].encode()
        table, source = self._table, f"{config.source} ({digest.decode()})"
        if digest != self._digest:
            table = await trio.to_thread.run_sync(lambda: PriceTable(table_of(data, source)))
        if config != self._config:
            return  # a reload has changed it, and another read follows
        self.refreshed_at = time.time()
        if digest == self._digest or table is None:
            return
        self._table, self._digest = table, digest
        self._generations.current.prices.use(table)
        log.info("prices_refreshed", source=source)
        self._workers.notify(_TOPIC, digest)

    async def _read_source(self, config: PriceTableConfig) -> bytes:
        if config.url is None:
            async with await trio.open_file(str(config.file), "rb") as file:
                data: bytes = await file.read(MAX_BYTES + 1)
                _check_size(data)
                return data
        is_https = urlsplit(config.url).scheme == "https"
        return await _fetch(config.url, self._generations.current.trust.context() if is_https else False)

    def _on_notify(self, digest: bytes) -> None:
        now = trio.current_time()
        if digest != self._digest and now - self._notified_at >= RETRY_S:
            self._notified_at = now
            self._wanted.set()


async def _fetch(url: str, verify: ssl.SSLContext | bool) -> bytes:
    """Fetches the data.

    Raises:
        ValueError: There is none, or too much.
        httpx2.HTTPError, httpx2.InvalidURL, OSError: As the client does.
    """
    body = bytearray()
    async with (
        httpx2.AsyncClient(verify=verify, follow_redirects=True, timeout=READ_S) as client,
        client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as response,
    ):
        if response.status_code != 200:
            raise ValueError(f"the server answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the server answered with a compressed body, which was not asked for")
        async with contextlib.aclosing(response.aiter_raw()) as pieces:
            async for piece in pieces:
                body += piece
                _check_size(body)
    return bytes(body)


def _check_size(data: bytes | bytearray) -> None:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
