"""A fake of Telegram's Bot API on a real socket, as far as bots that write texts use it, with its limits and errors.

It rejects what the real API rejects; the error messages are those of the official server
(https://github.com/tdlib/telegram-bot-api). A test plays the users: `say` writes a message, `texts` reads the chat.

**Source:** Telegram Bot API, "Making requests", "getUpdates", "sendMessage", "editMessageText", "sendChatAction",
"getMe", "setWebhook", "ResponseParameters".
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

import attrs
import msgspec
import trio

from tests.support.provider import _read_request
from trigate.concurrency.notify import RepeatedEvent

TOKEN = "123456:AAF-telegram-token-of-a-test-000000"
ME = {"id": 123456, "is_bot": True, "first_name": "Trigate", "username": "trigate_bot"}


class Refusal(Exception):
    """An error response."""

    def __init__(self, code: int, description: str, **parameters: object) -> None:
        self.code = code
        self.description = description
        self.parameters = parameters


@attrs.define(eq=False, kw_only=True)
class Called:
    """One call of a method."""

    method: str
    parameters: Mapping[str, Any]  # Any: JSON
    at: float


class TelegramServer:
    """The server, with one bot.

    Attributes:
        token: The bot's token. A test may replace it; calls with another one are rejected.
        calls: The calls with the right token, in order.
        messages: The current texts of the bot's messages, by chat and id.
        blocked: Chats whose user has blocked the bot.
        moved: From the ids of groups to the ids of the supergroups that they have become.
        webhook: Overrides fields of ``WebhookInfo``.
        polling: How many ``getUpdates`` are waiting.
        refused: The error responses, in order.
        edits_per_s: The limit of messages and edits a second in a chat; None = no limit.
    """

    def __init__(self) -> None:
        self.token = TOKEN
        self.calls: list[Called] = []
        self.messages: dict[tuple[int, int], str] = {}
        self.blocked: set[int] = set()
        self.moved: dict[int, int] = {}
        self.edits_per_s: float | None = None
        self.webhook: dict[str, Any] = {}
        self.polling = 0
        self.refused: list[Refusal] = []
        self._updates: deque[dict[str, Any]] = deque()
        self._refusals: dict[str, deque[Refusal | None]] = {}
        self._update_ids = itertools.count(700_000_001)
        self._message_ids = itertools.count(1)
        self._sent_at: dict[int, float] = {}
        self._changed = RepeatedEvent()
        self._poller: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<TelegramServer {len(self.calls)} calls, {len(self._updates)} updates>"

    # -- for tests ----------------------------------------------------------------------------------------------------

    def say(
        self,
        text: str | None = None,
        *,
        chat: int = 1,
        sender: int | None = None,
        name: str | None = None,
        entities: tuple[Mapping[str, Any], ...] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """A user writes a message, in a private chat or (a negative id) in a group. Returns the update."""
        message = {
            "message_id": next(self._message_ids),
            "date": 1_700_000_000,
            "chat": {"id": chat, "type": "private" if chat > 0 else "supergroup"},
            "from": {
                "id": sender if sender is not None else abs(chat),
                "is_bot": False,
                "first_name": "Ann",
                **({"username": name} if name else {}),
            },
            **({"text": text} if text is not None else {}),
            **({"entities": list(entities)} if entities else {}),
            **more,
        }
        return self.update(message=message)

    def update(self, **content: Any) -> dict[str, Any]:
        """Adds an update for the bot."""
        update = {"update_id": next(self._update_ids), **content}
        self._updates.append(update)
        self._changed.set()
        return update

    def refuse(self, method: str, *refusals: Refusal | None) -> None:
        """Makes the next calls of a method fail, one for each argument (None = this call succeeds)."""
        self._refusals.setdefault(method, deque()).extend(refusals)

    def texts(self, chat: int = 1) -> list[str]:
        """The current texts of the bot's messages in a chat."""
        return [text for (in_chat, _), text in sorted(self.messages.items()) if in_chat == chat]

    def called(self, method: str) -> list[Mapping[str, Any]]:
        """The parameters of the calls of a method."""
        return [call.parameters for call in self.calls if call.method == method]

    @property
    def waiting(self) -> int:
        """How many updates are unconfirmed."""
        return len(self._updates)

    async def wait_until(self, holds: Callable[[TelegramServer], bool]) -> None:
        """Waits until a condition holds."""
        while not holds(self):
            await self._changed.wait()

    # -- methods ------------------------------------------------------------------------------------------------------

    async def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Answers one request: the status and the JSON of the response."""
        try:
            result = await self._answer(path, body)
        except Refusal as error:
            self.refused.append(error)
            reply = {"ok": False, "error_code": error.code, "description": error.description}
            if error.parameters:
                reply["parameters"] = error.parameters
            return error.code, msgspec.json.encode(reply)
        finally:
            self._changed.set()
        return 200, msgspec.json.encode({"ok": True, "result": result})

    async def _answer(self, path: str, body: bytes) -> Any:
        _, bot, method = (*path.split("/"), "", "")[:3]
        if not bot.startswith("bot") or ":" not in bot or not method:
            raise Refusal(404, "Not Found")
        if bot != f"bot{self.token}":
            raise Refusal(401, "Unauthorized")
        parameters = msgspec.json.decode(body) if body else {}
        self.calls.append(Called(method=method, parameters=parameters, at=trio.current_time()))
        self._changed.set()
        refusals = self._refusals.get(method)
        refusal = refusals.popleft() if refusals else None
        if refusal is not None:
            raise refusal
        match method:
            case "getMe":
                return ME
            case "getUpdates":
                return await self._get_updates(**parameters)
            case "sendMessage":
                return self._send(**parameters)
            case "editMessageText":
                return self._edit(**parameters)
            case "deleteMessage":
                return self._delete(**parameters)
            case "sendChatAction":
                self._check_chat(parameters["chat_id"])
                return True
            case "getWebhookInfo":
                return {
                    "url": "",
                    "has_custom_certificate": False,
                    "pending_update_count": self.waiting,
                    **self.webhook,
                }
            case "deleteWebhook":
                self.webhook = {}
                return True
            case _:
                raise Refusal(404, "Not Found: method not found")

    async def _get_updates(
        self,
        offset: int = 0,
        limit: int = 100,
        timeout: float = 0,  # noqa: ASYNC109 - the name of the API
        allowed_updates: tuple[str, ...] = (),
    ) -> Any:
        if self.webhook.get("url"):
            raise Refusal(
                409,
                "Conflict: can't use getUpdates method while webhook is active; "
                "use deleteWebhook to delete the webhook first",
            )
        while self._updates and self._updates[0]["update_id"] < offset:
            self._updates.popleft()
        self._changed.set()
        if self._poller is not None:
            self._poller.cancel()
        self.polling += 1
        try:
            with trio.CancelScope() as mine:
                self._poller = mine
                with trio.move_on_after(timeout):
                    while not self._updates:
                        await self._changed.wait()
                await trio.lowlevel.checkpoint()
        finally:
            self.polling -= 1
            if self._poller is mine:
                self._poller = None
        if mine.cancelled_caught:
            raise Refusal(
                409, "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running"
            )
        return list(itertools.islice(self._updates, limit))

    def _check_chat(self, chat_id: int) -> None:
        if chat_id in self.moved:
            raise Refusal(
                400,
                "Bad Request: group chat was upgraded to a supergroup chat",
                migrate_to_chat_id=self.moved[chat_id],
            )
        if chat_id in self.blocked:
            raise Refusal(403, "Forbidden: bot was blocked by the user")

    def _check_rate(self, chat_id: int) -> None:
        if self.edits_per_s is None:
            return
        now = trio.current_time()
        if now < self._sent_at.get(chat_id, -1.0) + 1 / self.edits_per_s:
            raise Refusal(429, "Too Many Requests: retry after 1", retry_after=1)
        self._sent_at[chat_id] = now

    def _send(self, chat_id: int, text: str, **rest: Any) -> Any:
        self._check_chat(chat_id)
        if not text.strip():
            raise Refusal(400, "Bad Request: message text is empty")
        if len(text.strip().encode("utf-16-le")) > 2 * 4096:
            raise Refusal(400, "Bad Request: message is too long")
        self._check_rate(chat_id)
        message_id = next(self._message_ids)
        self.messages[chat_id, message_id] = text.strip()
        return self._message(chat_id, message_id)

    def _edit(self, chat_id: int, message_id: int, text: str, **rest: Any) -> Any:
        self._check_chat(chat_id)
        if not text.strip():
            raise Refusal(400, "Bad Request: message text is empty")
        if len(text.strip().encode("utf-16-le")) > 2 * 4096:
            raise Refusal(400, "Bad Request: MESSAGE_TOO_LONG")
        if (chat_id, message_id) not in self.messages:
            raise Refusal(400, "Bad Request: message to edit not found")
        if self.messages[chat_id, message_id] == text.strip():
            raise Refusal(
                400,
                "Bad Request: message is not modified: specified new message content and reply markup are exactly the "
                "same as a current content and reply markup of the message",
            )
        self._check_rate(chat_id)
        self.messages[chat_id, message_id] = text.strip()
        return self._message(chat_id, message_id)

    def _delete(self, chat_id: int, message_id: int) -> Any:
        self._check_chat(chat_id)
        if self.messages.pop((chat_id, message_id), None) is None:
            raise Refusal(400, "Bad Request: message to delete not found")
        return True

    def _message(self, chat_id: int, message_id: int) -> Any:
        return {
            "message_id": message_id,
            "from": ME,
            "date": 1_700_000_000,
            "chat": {"id": chat_id, "type": "private" if chat_id > 0 else "supergroup"},
            "text": self.messages[chat_id, message_id],
        }


@contextlib.asynccontextmanager
async def open_telegram(server: TelegramServer | None = None) -> AsyncIterator[tuple[TelegramServer, str]]:
    """Serves the fake on loopback; yields it and its base URL."""
    server = server or TelegramServer()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, partial(_serve, server), 0, host="127.0.0.1"))
        try:
            yield server, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        finally:
            nursery.cancel_scope.cancel()


async def _serve(server: TelegramServer, stream: trio.SocketStream) -> None:
    received = bytearray()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while (request := await _read_request(stream, received)) is not None:
            _, path, _, body = request
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_end_at_disconnect, stream, received, nursery.cancel_scope)
                status, reply = await server.answer(path, body)
                head = f"HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {len(reply)}\r\n\r\n"
                await stream.send_all(head.encode() + reply)
                nursery.cancel_scope.cancel()


async def _end_at_disconnect(stream: trio.SocketStream, received: bytearray, scope: trio.CancelScope) -> None:
    """Ends a call whose client disconnects."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await stream.receive_some():
            received.extend(data)
    scope.cancel()
