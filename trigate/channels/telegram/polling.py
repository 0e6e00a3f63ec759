"""Polls Telegram for updates, in one worker at a time.

An update is taken in this order: its run is made durable, then the update is confirmed to Telegram, by the offset of
the next ``getUpdates``. If the process exits in between, Telegram sends the update again, and the idempotency key of
its run shows that it was taken.

The worker that holds the channel in the store polls (`store.Channels.hold`). Another worker takes over when the holder
has exited, or when its process shuts down and lets go of the channel.

Source: Telegram Bot API, "Getting updates".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import msgspec
import trio

from trigate.channels.adapter import Channel
from trigate.channels.telegram import api as bot_api
from trigate.channels.telegram.api import BotApi
from trigate.channels.telegram.messages import User
from trigate.concurrency.notify import open_service
from trigate.errors import Overloaded
from trigate.logs import log

POLL_S = 50.0
"""How long Telegram waits for an update before it answers that there is none."""
HOLD_S = 1.0
"""How often a worker that does not poll checks whether it has to."""
_BUSY_S = 1.0
"""The pause after an update for which there was no capacity."""


@attrs.frozen
class UpdatePoller:
    """Reads the updates of one bot.

    Attributes:
        take: Takes one update as JSON, and returns its id once its run is durable. Raises `Overloaded` if there is no
            capacity.
    """

    channel: Channel
    api: BotApi
    take: Callable[[bytes], Awaitable[int]]

    async def run(self) -> None:
        """Polls while no other worker does. Never returns.

        Raises:
            PlatformError: As `BotApi.call`.
            GatewayError: The store is unavailable.
        """
        services, name = self.channel.services, self.channel.name
        worker = services.workers.id
        held = False
        try:
            while not services.handing_over.is_set():
                held = await services.store.channels.hold(name, worker=worker, dead=())
                if held:
                    await self._poll()
                else:
                    await trio.sleep(HOLD_S)
        finally:
            if held:
                services.store.channels.let_go(name, worker=worker)  # queued, and not waited for
        await trio.sleep_forever()  # other workers poll now; this one still answers the updates that it has taken

    async def _poll(self) -> None:
        """Takes updates while this worker holds the channel."""
        services, name = self.channel.services, self.channel.name
        me = await self.api.me()
        if (await self.api.webhook()).url:  # Telegram returns no updates while one is set
            await self.api.call("deleteWebhook", {"drop_pending_updates": False})
            log.warning("telegram_webhook_removed", channel=name)
        offset = await self._stored_offset(me)
        while await services.store.channels.hold(name, worker=services.workers.id, dead=()):
            raw = await self._get_updates(offset)
            if raw is None or services.handing_over.is_set():
                return  # unconfirmed, so the next poller gets these updates
            updates = msgspec.json.decode(raw, type=list[msgspec.Raw])
            for update in updates:
                offset = await self._take_when_possible(bytes(update)) + 1
            if updates:
                await services.store.channels.advance(name, f"{me.id}:{offset}")

    async def _get_updates(self, offset: int | None) -> msgspec.Raw | None:
        """Waits for updates; None = this process is handing over. Confirms the updates before ``offset``."""
        raw = None
        with trio.CancelScope() as scope:

            async def cancel_at_handover() -> None:
                await self.channel.services.handing_over.wait()
                scope.cancel()

            async with open_service(cancel_at_handover):
                raw = await self.api.call(
                    "getUpdates",
                    {"offset": offset, "timeout": int(POLL_S), "allowed_updates": ["message"]},
                    within_s=POLL_S + bot_api.ANSWER_S,
                )
        return raw

    async def _stored_offset(self, me: User) -> int | None:
        """Where to continue; None = at the first unconfirmed update. The offset of another bot is ignored."""
        for record in await self.channel.services.store.channels.all():
            bot, _, offset = record.cursor.partition(":")
            if record.name == self.channel.name and bot == str(me.id):
                return int(offset)
        return None

    async def _take_when_possible(self, update: bytes) -> int:
        """Takes an update, however long that has to wait for capacity, and returns its id."""
        while True:
            try:
                return await self.take(update)
            except Overloaded:
                await trio.sleep(_BUSY_S)
