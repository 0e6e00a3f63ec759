"""Telegram, by its Bot API."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import ClassVar

from trigate.adapter import Channel, Response
from trigate.outbox import Receipt
from trigate.runs import Live, Order
from trigate.store import Delivery, Run


class TelegramAdapter:
    """An `adapter.Adapter`."""

    default_base_url: ClassVar[str] = "https://api.telegram.org"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def run(self) -> None:
        """As `Adapter.run`."""
        raise NotImplementedError

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """As `Adapter.receive`."""
        raise NotImplementedError

    async def deliver(self, delivery: Delivery) -> Receipt:
        """As `outbox.Carrier.deliver`."""
        raise NotImplementedError

    def watch(self, run: Run, order: Order) -> contextlib.AbstractAsyncContextManager[Live]:
        """As `runs.Audience.watch`."""
        raise NotImplementedError
