"""A client of Telegram's Bot API: calls methods, translates its errors, and keeps to its limits.

Source: Telegram Bot API, "Making requests", "ResponseParameters", "sendMessage", "editMessageText"; Bots FAQ, "My bot
is hitting limits, how do I avoid this?": a message a second in a chat, 20 a minute in a group, 30 a second in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import msgspec
import trio

from trigate.channels.adapter import Channel, PlatformError, RequestRejected, TokenRejected
from trigate.channels.delivery import Verdict
from trigate.channels.telegram.messages import Chat, Envelope, User, WebhookInfo
from trigate.concurrency.notify import Wakeup
from trigate.concurrency.rate_limiter import RateLimiter

ANSWER_S = 15.0
"""The timeout of a method. A long poll may take this much longer than the time for which Telegram waits."""
EDITS_PER_S = 25.0
"""Edits a second in all chats together. The rest of the 30 requests that Telegram allows is for final replies."""
_NO_PREVIEW = {"is_disabled": True}

_decode_envelope = msgspec.json.Decoder(Envelope).decode


class ChatMoved(RequestRejected):
    """The group has become a supergroup.

    Args:
        chat_id: The supergroup's id.
    """

    def __init__(self, message: str, *, status: int, chat_id: int) -> None:
        super().__init__(message, code=str(status), status=status)
        self.chat_id = chat_id


class BotApi:
    """The Bot API with the token of one channel.

    The result of each call is also the state of the channel, unless it concerns one request only.

    Attributes:
        failed: Set when a call fails for a reason that is not its own. A webhook is checked again then.

    Args:
        is_polling: A successful call means that the channel is connected. (In webhook mode it does not mean that
            Telegram can call.)
    """

    def __init__(self, channel: Channel, *, is_polling: bool) -> None:
        self.failed = Wakeup()
        self._channel = channel
        self._is_polling = is_polling
        self._me: User | None = None
        self._rates = RateLimiter()
        self._quiet_until: dict[int, float] = {}  # Trio's time, by chat: Telegram refuses requests until then
        self._moved: dict[int, int] = {}  # from a group's id to its supergroup's

    def __repr__(self) -> str:
        return f"<BotApi of {self._channel!r}>"

    async def call(
        self, method: str, parameters: Mapping[str, object] | None = None, *, within_s: float | None = None
    ) -> msgspec.Raw:
        """Calls a method, and returns its result.

        Args:
            parameters: Those that are None are left out.
            within_s: The timeout; left out: `ANSWER_S`.

        Raises:
            PlatformError: The method was not executed; ``unsure`` if it may have been.
            TokenRejected: Telegram does not accept the token.
            RequestRejected: Telegram refuses this call for good.
        """
        try:
            result = await self._exchange(method, parameters, within_s=ANSWER_S if within_s is None else within_s)
        except PlatformError as error:
            if not isinstance(error, RequestRejected) and error.after_s is None:
                self._channel.note_disconnected(self._channel.redacted(error.message))
                self.failed.set()
            raise
        if self._is_polling:
            self._channel.note_connected()
        return result

    async def _exchange(self, method: str, parameters: Mapping[str, object] | None, *, within_s: float) -> msgspec.Raw:
        body = msgspec.json.encode({name: value for name, value in (parameters or {}).items() if value is not None})
        path = f"/bot{self._channel.token}/{method}"
        answer = None
        with trio.move_on_after(within_s):
            answer = await self._channel.post(
                path, body, {"content-type": "application/json"}, at_most_once=method == "sendMessage"
            )
        if answer is None:
            raise PlatformError(f"{method} was not answered within {within_s:g} s.", unsure=True)
        try:
            envelope = _decode_envelope(answer.body)
        except msgspec.DecodeError:
            raise PlatformError(f"{method} was answered with {answer.status} and no JSON.", unsure=True) from None
        if envelope.ok:
            return envelope.result
        status = envelope.error_code or answer.status
        message = f"{method}: {status} {self._channel.redacted(envelope.description[:200])}"
        if status in (401, 404):  # 404 is the response to a malformed token
            raise TokenRejected(f"Telegram does not take the token. {message}")
        if status == 429:
            raise PlatformError(message, after_s=envelope.parameters.retry_after or 1.0)
        if status in (400, 403):
            moved_to = envelope.parameters.migrate_to_chat_id
            if moved_to is not None:
                raise ChatMoved(message, status=status, chat_id=moved_to)
            raise RequestRejected(message, code=str(status), status=status)
        raise PlatformError(message)

    async def me(self) -> User:
        """The bot's own user; asked for once. Raises as `call`."""
        if self._me is None:
            self._me = msgspec.json.decode(await self.call("getMe"), type=User)
        else:
            await trio.lowlevel.checkpoint()
        return self._me

    async def webhook(self) -> WebhookInfo:
        """The webhook that is set for the bot. Raises as `call`."""
        return msgspec.json.decode(await self.call("getWebhookInfo"), type=WebhookInfo)

    # -- chats --------------------------------------------------------------------------------------------------------

    async def call_chat(self, chat: Chat, method: str, parameters: Mapping[str, object]) -> msgspec.Raw:
        """Calls a method for a chat, also after it has moved. Raises as `call`."""
        try:
            try:
                return await self.call(method, {"chat_id": self._current_id(chat), **parameters})
            except ChatMoved as error:
                self._moved[chat.id] = error.chat_id
            return await self.call(method, {"chat_id": self._current_id(chat), **parameters})
        except PlatformError as error:
            if error.after_s is not None:
                self._quiet_until[chat.id] = trio.current_time() + error.after_s
            raise

    def _current_id(self, chat: Chat) -> int:
        return self._moved.get(chat.id, chat.id)

    def edit_allowed_in_s(self, chat: Chat, interval_s: float) -> float:
        """Seconds until a growing text may be edited, by the limits and by what Telegram asked for; 0.0 = now, and this
        edit is counted.

        Args:
            interval_s: The minimum time between two edits in the chat.
        """
        now = trio.current_time()
        quiet_s = self._quiet_until.get(chat.id, -math.inf) - now
        if quiet_s > 0:
            return quiet_s
        self._quiet_until.pop(chat.id, None)
        wait_s = self._rates.take(f"chat {chat.id}", rate_per_s=1 / interval_s, burst=1, now=now)
        return wait_s or self._rates.take("all", rate_per_s=EDITS_PER_S, burst=int(EDITS_PER_S), now=now)


@attrs.define(eq=False)
class ChatWriter:
    """Writes the messages of one reply to a chat. A `delivery.ReplyWriter`; it raises as `BotApi.call`.

    Attributes:
        has_begun: A message of the reply was written. In a group, the first one is a reply to the user's message.
    """

    api: BotApi
    chat: Chat
    has_begun: bool

    async def wait_allowed(self, message_id: str | None, *, until: float) -> None:
        """Returns at once: Telegram says when it was asked too often (429), and the delivery waits then."""
        await trio.lowlevel.checkpoint()

    async def write(self, text: str) -> str:
        """Sends a message, and returns its id."""
        replied_to = {"message_id": self.chat.message_id, "allow_sending_without_reply": True}
        raw = await self.api.call_chat(
            self.chat,
            "sendMessage",
            {
                "message_thread_id": self.chat.thread_id,
                "text": text,
                "link_preview_options": _NO_PREVIEW,
                "reply_parameters": replied_to if self.chat.is_group and not self.has_begun else None,
            },
        )
        self.has_begun = True
        return str(msgspec.json.decode(raw)["message_id"])

    async def edit(self, message_id: str, text: str) -> None:
        """Replaces the text of a message. An unchanged text is no error."""
        await trio.lowlevel.checkpoint()
        try:
            await self.api.call_chat(
                self.chat,
                "editMessageText",
                {"message_id": int(message_id), "text": text, "link_preview_options": _NO_PREVIEW},
            )
        except RequestRejected as error:
            if "message is not modified" not in error.message:
                raise

    async def delete(self, message_id: str) -> None:
        """Deletes a message."""
        await self.api.call_chat(self.chat, "deleteMessage", {"message_id": int(message_id)})

    def classify(self, error: PlatformError, *, is_edit: bool) -> Verdict:
        """A rejected edit means that the message was deleted or is too old, so it is written anew."""
        if isinstance(error, RequestRejected):
            return "replace" if is_edit else "fail"
        return "wait"
