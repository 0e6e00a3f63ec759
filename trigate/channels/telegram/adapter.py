"""Telegram: updates come in by polling or as webhook calls; replies grow while the model writes.

**No message is lost, and none is answered twice.** An update is taken when its run is durable, and only then is it
confirmed to Telegram: by the offset of the next ``getUpdates`` (see `polling`), or by status 200. If the process exits
in between, Telegram sends the update again, and the idempotency key of its run shows that it was taken.

**The display of a growing answer is best effort; the final text is not.** The display is edited as often as the limits
allow, and edits are dropped where they do not. The final text is a delivery of the outbox (see `delivery`).

Texts are plain: without ``parse_mode``, nothing in a model's answer has to be escaped, and nothing can be rejected.
Link previews are off, since Telegram fetches a link to preview it: a prompt that makes the model write a URL must not
be able to send data anywhere.

Source: Telegram Bot API, "Making requests", "Getting updates", "sendMessage", "editMessageText", "sendChatAction".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import ClassVar

import msgspec
import trio

from trigate.channels import replies
from trigate.channels.adapter import Channel, PlatformError, RequestRejected, Response, TokenRejected
from trigate.channels.delivery import deliver
from trigate.channels.live_message import Display, LimitedScreen, load
from trigate.channels.telegram.api import BotApi, ChatWriter
from trigate.channels.telegram.messages import Chat, Incoming, Update, incoming, split
from trigate.channels.telegram.polling import UpdatePoller
from trigate.concurrency.notify import open_service
from trigate.errors import BadRequest, Unavailable
from trigate.logs import log
from trigate.openai.raw_json import with_whole_characters
from trigate.runs.outbox import Receipt
from trigate.runs.request import Live, RunRequest
from trigate.signatures import Verifier
from trigate.store.records import Delivery, Run

CHECK_S = 60.0
"""How often Telegram is asked for the state of the webhook."""
TYPING_S = 4.0
"""How often the bot reports that it is typing, which Telegram shows for five seconds."""
GROUP_INTERVAL_S = 3.0
"""The minimum time between two edits in a group."""
ATTEMPT_S = 12.0
"""After how long an attempt of a delivery writes no further message. With one more call, it is less than
`runs.outbox.ATTEMPT_S`."""

_decode_update = msgspec.json.Decoder(Update).decode


class TelegramAdapter:
    """One bot. A `channels.adapter.Adapter`."""

    default_base_url: ClassVar[str] = "https://api.telegram.org"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        config = channel.config
        self._verifier: Verifier | None = None  # None = the bot polls
        if config.mode == "webhook":
            self._verifier = Verifier("telegram", tuple(secret.literal or "" for secret in config.secrets))
        self._api = BotApi(channel, is_polling=self._verifier is None)

    def __repr__(self) -> str:
        return f"<TelegramAdapter {self._channel!r}>"

    # -- incoming messages --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Polls, or checks the webhook. Never returns; raises as `Adapter.run`."""
        await self._channel.services.workers.join_eventually()
        if self._verifier is not None:
            await self._watch_webhook()
        else:
            await UpdatePoller(self._channel, self._api, self._take).run()

    async def _watch_webhook(self) -> None:
        """Checks whether Telegram can call, for ever: every `CHECK_S`, and at once when a call of the API failed."""
        await self._api.me()
        while True:
            if self._api.failed.is_set:
                await self._api.failed.wait()  # this check answers the failures so far
            info = await self._api.webhook()
            if not info.url:
                raise PlatformError("Telegram knows no webhook for this bot: setWebhook has to be called.")
            if info.last_error_message and time.time() - info.last_error_date < CHECK_S:
                error = self._channel.redacted(info.last_error_message)
                self._channel.note_disconnected(f"Telegram cannot call: {error}")
            else:
                self._channel.note_connected()
            with trio.move_on_after(CHECK_S):
                await self._api.failed.wait()

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """Takes one webhook call; status 200 confirms the update. Raises as `Adapter.receive`."""
        if self._verifier is None:
            raise Unavailable("This channel polls, and takes no calls.", status=503)
        self._verifier.verify(headers, body, now=time.time())
        try:
            await self._take(body)
        except PlatformError as error:
            raise BadRequest(error.message) from error
        self._channel.note_connected()
        return 200, [(b"content-type", b"application/json")], b"{}"

    async def _take(self, body: bytes) -> int:
        """Takes an update, and returns its id once its run is durable, or there is nothing to do.

        Raises:
            StoreUnavailable, Overloaded: The update was not taken; Telegram has to send it again.
            Unavailable: As above, since Telegram did not return the name of the bot (``getMe``).
            PlatformError: The body has no update id.
        """
        services, channel = self._channel.services, self._channel
        config = channel.config
        try:
            update = _decode_update(with_whole_characters(body))
        except (msgspec.DecodeError, RecursionError) as error:
            log.warning("telegram_update_unreadable", channel=channel.name, error=str(error)[:200])
            await trio.lowlevel.checkpoint()
            return _id_of(body)
        try:
            me = await self._api.me()
        except PlatformError as error:
            raise Unavailable("Telegram does not return the name of the bot (getMe).", status=503) from error
        message = incoming(update, me=me, groups=config.groups)
        if message is None:
            return update.update_id
        if not message.is_allowed(config.allow):
            await services.store.channels.count(channel.name, at=time.time(), received=1)
            return update.update_id
        # Update ids start anew after a week of silence; together with the ids of the message they do not repeat.
        key = f"{update.update_id}/{message.chat.id}/{message.chat.message_id}"
        request = self._run_request(message)
        claim = await services.runs.accept(request, acknowledged=True, idempotency=(key, _digest(message)))
        if claim.is_new:
            services.runs.execute_soon(claim.run)
        return update.update_id

    def _run_request(self, message: Incoming) -> RunRequest:
        config = self._channel.config
        return RunRequest(
            channel=self._channel.name,
            owner=f"channel:{self._channel.name}",
            session=message.session_key(self._channel.name, config.session),
            action=message.action,
            text=message.text,
            sender=str(message.sender),
            model=config.model,
            system=config.system,
            parameters=config.parameters,
            reply_to={**msgspec.to_builtins(message.chat), "target": str(message.chat.id)},
        )

    # -- replies ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, request: RunRequest) -> AsyncIterator[Live]:
        """Shows a run while the block lasts: that the bot is typing, and the text as it grows."""
        chat = msgspec.convert(request.reply_to, Chat)
        store = self._channel.services.store
        shown = await replies.recorded_shown(store, run)
        interval_s: float = self._channel.config.edit_interval_s
        if chat.is_group and interval_s:
            interval_s = max(interval_s, GROUP_INTERVAL_S)

        def allowed_in_s(message_id: str | None) -> float | None:
            return self._api.edit_allowed_in_s(chat, interval_s) if interval_s else None

        writer = ChatWriter(self._api, chat, has_begun=bool(shown))
        screen = LimitedScreen(writer, allowed_in_s, functools.partial(replies.record_shown, store, run))
        display = Display(screen, split=split, interval_s=interval_s, shown=shown)
        show_typing = functools.partial(self._show_typing, chat)
        async with open_service(
            functools.partial(self._guard, show_typing), functools.partial(self._guard, display.run)
        ):
            yield display

    async def _guard(self, show: Callable[[], Awaitable[None]]) -> None:
        """Runs a task of the display: a defect in it must not end the run."""
        await trio.lowlevel.checkpoint()
        try:
            await show()
        except Exception:
            log.exception("telegram_display_crashed", channel=self._channel.name)

    async def _show_typing(self, chat: Chat) -> None:
        """Reports that the bot is typing, until it is cancelled or Telegram rejects the report."""
        while True:
            await trio.lowlevel.checkpoint()
            try:
                await self._api.call_chat(
                    chat, "sendChatAction", {"message_thread_id": chat.thread_id, "action": "typing"}
                )
            except (RequestRejected, TokenRejected):
                return
            except PlatformError:
                pass  # the next report may succeed
            await trio.sleep(TYPING_S)

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt to deliver a reply; see `delivery.deliver`."""
        reply = replies.decode(delivery)
        chat = msgspec.convert(reply.reply_to, Chat)
        return await deliver(
            delivery,
            reply,
            ChatWriter(self._api, chat, has_begun=bool(load(reply.live))),
            self._channel.services,
            split=split,
            attempt_s=ATTEMPT_S,
            remainder_after_s=0.0,
        )


def _digest(message: Incoming) -> bytes:
    return hashlib.sha256(msgspec.json.encode([message.sender, message.action, message.text])).digest()


class _Id(msgspec.Struct):
    update_id: int


def _id_of(body: bytes) -> int:
    """The id of an update that is otherwise unreadable.

    Raises:
        PlatformError: It has none.
    """
    try:
        return msgspec.json.decode(body, type=_Id).update_id
    except msgspec.DecodeError as error:
        raise PlatformError(f"This is no update of the Bot API: {error}") from None
