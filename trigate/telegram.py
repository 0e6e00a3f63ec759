"""Telegram, by its Bot API: messages are polled for, or come in as calls of a webhook; replies grow before one's eyes.

**No message is lost, and none is answered twice.** An update is taken when its run is durable, and only then is
Telegram told so: by the offset of the next ``getUpdates``, or by status 200. If the process ends in between, the update
comes again, and the idempotency key of its run tells that it has been taken. One worker polls, the one that holds the
channel (`store.Channels.hold`); another one takes over when it has ended.

**What is shown while a run goes on does not matter, what is said at its end does.** The former is edited as often as
limits allow, and dropped where they do not. The latter is a delivery of the outbox. Telegram cannot tell a message that
is sent twice; so one that may have arrived is not sent again.

Texts are plain: there is no ``parse_mode``, so that nothing of a model's answer has to be escaped, or can
be refused. Link previews are off: an answer that is being written would load each half of a URL.

Source: Telegram Bot API, "Making requests", "Getting updates", "sendMessage", "editMessageText", "sendChatAction";
Bots FAQ, "My bot is hitting limits, how do I avoid this?": a message a second in a chat, 20 a minute in a group, 30 a
second in all.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, ClassVar

import attrs
import msgspec
import structlog
import trio

from trigate import display
from trigate.adapter import Channel, Refused, Response, Trouble
from trigate.display import Display, NotShown
from trigate.errors import Overloaded, Unavailable
from trigate.outbox import Receipt
from trigate.rates import Rates
from trigate.runs import Live, Order
from trigate.store import Delivery, Run
from trigate.telegram_messages import Envelope, Incoming, Place, Update, User, WebhookInfo, incoming, split
from trigate.verification import Verifier

log = structlog.get_logger("trigate.telegram")

POLL_S = 50.0
"""How long Telegram waits for a message before it answers that there is none."""
ANSWER_S = 15.0
"""How long any other answer may take, or that one longer than it waits."""
HOLD_S = 1.0
"""How often a worker that does not poll looks whether it has to."""
CHECK_S = 60.0
"""How often Telegram is asked how the webhook does."""
TYPING_S = 4.0
"""How often the bot says that it is typing, which is shown for five seconds."""
GROUP_INTERVAL_S = 3.0
"""The time between two edits in a group, at least."""
EDITS_PER_S = 25.0
"""How many edits a second there may be in all chats together; the rest of what Telegram allows is for answers."""
PATIENCE_S = 10.0
"""How long a delivery waits where Telegram says so, before it is tried again as another attempt."""
_BUSY_S = 1.0
_NO_PREVIEW = {"is_disabled": True}
_MAX_PROGRESS = 1000

_decode_envelope = msgspec.json.Decoder(Envelope).decode
_decode_update = msgspec.json.Decoder(Update).decode


class _Rejected(Trouble):
    """Telegram will not do that, however often it is asked. The channel itself is well.

    Args:
        moved_to: The group has become a supergroup, which has this id.
    """

    def __init__(self, message: str, *, status: int, moved_to: int | None) -> None:
        super().__init__(message)
        self.status = status
        self.moved_to = moved_to


class TelegramAdapter:
    """An `adapter.Adapter`."""

    default_base_url: ClassVar[str] = "https://api.telegram.org"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._me: User | None = None
        config = channel.config
        self._verifier: Verifier | None = None
        if config.mode == "webhook":
            self._verifier = Verifier("telegram", tuple(secret.literal or "" for secret in config.secrets))
        self._rates = Rates()
        self._quiet_until: dict[int, float] = {}  # in Trio's time, by chat: when Telegram will hear of it again
        self._moved: dict[int, int] = {}
        self._progress: dict[str, list[display.Shown]] = {}  # of deliveries that have another attempt

    def __repr__(self) -> str:
        return f"<TelegramAdapter {self._channel!r}>"

    # -- the Bot API --------------------------------------------------------------------------------------------------

    async def _call(
        self, method: str, parameters: Mapping[str, object] | None = None, *, within_s: float | None = None
    ) -> msgspec.Raw:
        """Calls a method, and returns its result.

        Args:
            parameters: Those that are None are left out.
            within_s: How long the answer may take; left out: `ANSWER_S`.

        Raises:
            Trouble: It was not done; `_Rejected`, `Refused`: nor will it be.
        """
        body = msgspec.json.encode({name: value for name, value in (parameters or {}).items() if value is not None})
        path = f"/bot{self._channel.token}/{method}"
        answer = None
        within_s = ANSWER_S if within_s is None else within_s
        with trio.move_on_after(within_s):
            answer = await self._channel.post(path, body, {"content-type": "application/json"})
        if answer is None:
            raise Trouble(f"{method} was not answered within {within_s:g} s.", unsure=True)
        try:
            envelope = _decode_envelope(answer.body)
        except msgspec.DecodeError:
            raise Trouble(f"{method} was answered with {answer.status} and no JSON.", unsure=True) from None
        if envelope.ok:
            return envelope.result
        code = envelope.error_code or answer.status
        said = self._channel.redacted(envelope.description[:200])
        words = f"{method}: {code} {said}"
        if code in (401, 404):  # 404 is also what a token that cannot be one is answered with
            refused = Refused(f"Telegram does not take the token. {words}")
            self._channel.note_trouble(refused.message)
            raise refused
        if code == 429:
            raise Trouble(words, after_s=envelope.parameters.retry_after or 1.0)
        if code in (400, 403):
            raise _Rejected(words, status=code, moved_to=envelope.parameters.migrate_to_chat_id)
        raise Trouble(words)

    async def _introduce(self) -> User:
        """Finds out who the bot is."""
        if self._me is None:
            self._me = msgspec.json.decode(await self._call("getMe"), type=User)
        else:
            await trio.lowlevel.checkpoint()
        return self._me

    # -- what comes in ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """As `Adapter.run`."""
        await self._channel.gateway.workers.join_at_last()
        if self._verifier is not None:
            await self._watch_webhook()
        else:
            await self._poll_in_turn()

    async def _watch_webhook(self) -> None:
        """Says whether Telegram can call, for ever."""
        await self._introduce()
        while True:
            info = msgspec.json.decode(await self._call("getWebhookInfo"), type=WebhookInfo)
            if not info.url:
                raise Trouble("Telegram knows no webhook for this bot: setWebhook has to be called.")
            if info.last_error_message and time.time() - info.last_error_date < CHECK_S:
                self._channel.note_trouble(f"Telegram cannot call: {self._channel.redacted(info.last_error_message)}")
            else:
                self._channel.note_connected()
            await trio.sleep(CHECK_S)

    async def _poll_in_turn(self) -> None:
        """Polls, while no other worker does."""
        gateway, name = self._channel.gateway, self._channel.name
        worker = gateway.workers.id
        held = False
        try:
            while True:
                held = await gateway.store.channels.hold(name, worker=worker, dead=())
                if not held or gateway.draining:
                    await trio.sleep(HOLD_S)
                    continue
                await self._poll()
        finally:
            if held:
                gateway.store.channels.let_go(name, worker=worker)  # noqa: ASYNC102 - queued, and not waited for

    async def _poll(self) -> None:
        """Takes what there is, while this worker holds the channel."""
        gateway, name = self._channel.gateway, self._channel.name
        me = await self._introduce()
        info = msgspec.json.decode(await self._call("getWebhookInfo"), type=WebhookInfo)
        if info.url:  # with one, there are no updates to be had
            await self._call("deleteWebhook", {"drop_pending_updates": False})
            log.warning("telegram_webhook_removed", channel=name)
        self._channel.note_connected()  # the first answer to a poll can take a while
        offset = await self._offset(me)
        while await gateway.store.channels.hold(name, worker=gateway.workers.id, dead=()):
            raw = await self._call(
                "getUpdates",
                {"offset": offset, "timeout": int(POLL_S), "allowed_updates": ["message"]},
                within_s=POLL_S + ANSWER_S,
            )
            self._channel.note_connected()
            updates = msgspec.json.decode(raw, type=list[msgspec.Raw])
            if gateway.draining:
                return  # they are left for the next one
            for update in updates:
                offset = await self._take_from_queue(bytes(update)) + 1
            if updates:
                await gateway.store.channels.advance(name, f"{me.id}:{offset}")

    async def _offset(self, me: User) -> int | None:
        """Where to go on; None = at the first update that nobody has confirmed. That of another bot says nothing."""
        for record in await self._channel.gateway.store.channels.all():
            bot, _, offset = record.cursor.partition(":")
            if record.name == self._channel.name and bot == str(me.id):
                return int(offset)
        return None

    async def _take_from_queue(self, body: bytes) -> int:
        """Takes an update, however long that has to wait for room, and returns its id."""
        while True:
            try:
                return await self._take(body)
            except Overloaded:
                await trio.sleep(_BUSY_S)

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """As `Adapter.receive`."""
        if self._verifier is None:
            raise Unavailable("This channel polls, and takes no calls.", status=503)
        self._verifier.verify(headers, body, now=time.time())
        await self._take(body)
        self._channel.note_connected()
        return 200, [(b"content-type", b"application/json")], b"{}"

    async def _take(self, body: bytes) -> int:
        """Takes an update: returns its id when its run is durable, or there is nothing to do.

        Raises:
            StoreUnavailable, Overloaded: It could not be taken; it has to come again.
            Unavailable: As before, since Telegram does not say who the bot is.
        """
        gateway, channel = self._channel.gateway, self._channel
        config = channel.config
        try:
            update = _decode_update(body)
        except (msgspec.DecodeError, RecursionError) as error:
            log.warning("telegram_update_unreadable", channel=channel.name, error=str(error)[:200])
            await trio.lowlevel.checkpoint()
            return _id_of(body)
        try:
            me = await self._introduce()
        except Trouble as error:
            raise Unavailable("Telegram does not say who the bot is.", status=503) from error
        message = incoming(update, me=me, groups=config.groups)
        if message is None:
            return update.update_id
        if not message.is_allowed(config.allow):
            await gateway.store.channels.count(channel.name, at=time.time(), received=1)
            return update.update_id
        # Ids of updates begin anew after a week of silence; with those of the message they do not come again.
        key = f"{update.update_id}/{message.place.chat}/{message.place.message}"
        order = self._order(message)
        claim = await gateway.runs.accept(order, acknowledged=True, idempotency=(key, _digest(message)))
        if claim.is_new:
            gateway.runs.perform_soon(claim.run)
        return update.update_id

    def _order(self, message: Incoming) -> Order:
        config = self._channel.config
        return Order(
            channel=self._channel.name,
            owner=f"channel:{self._channel.name}",
            session=message.session_key(self._channel.name, config.session),
            action=message.action,
            text=message.text,
            sender=str(message.sender),
            model=config.model,
            system=config.system,
            parameters=config.parameters,
            reply_to=attrs.asdict(message.place),
        )

    # -- what goes out ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, order: Order) -> AsyncIterator[Live]:
        """As `runs.Audience.watch`."""
        assert isinstance(order.reply_to, Mapping)
        place = Place(**order.reply_to)
        interval_s: float = self._channel.config.edit_interval_s
        if place.is_group and interval_s:
            interval_s = max(interval_s, GROUP_INTERVAL_S)
        live = Display(_Screen(self, place, interval_s), split=split, interval_s=interval_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._aside, self._type, place)
            nursery.start_soon(self._aside, live.run)
            try:
                yield live
            finally:
                nursery.cancel_scope.cancel()

    async def _aside(  # noqa: ASYNC910 - what is shown is sent
        self, show: Callable[..., Awaitable[None]], *arguments: object
    ) -> None:
        """Runs what only shows something: what is wrong with it must not end the run."""
        try:
            await show(*arguments)
        except Exception:
            log.exception("telegram_display_crashed", channel=self._channel.name)

    async def _type(self, place: Place) -> None:
        """Says that the bot is typing, until it is cancelled, or Telegram does not want to know."""
        while True:
            try:
                await self._to(place, "sendChatAction", {"message_thread_id": place.thread, "action": "typing"})
            except Trouble:
                return  # noqa: ASYNC910 - a request was made
            await trio.sleep(TYPING_S)

    async def write(self, place: Place, text: str, *, is_first: bool) -> str:
        """Sends a message, and returns its id. In a group, the first one says what it answers."""
        answers = {"message_id": place.message, "allow_sending_without_reply": True}
        raw = await self._to(
            place,
            "sendMessage",
            {
                "message_thread_id": place.thread,
                "text": text,
                "link_preview_options": _NO_PREVIEW,
                "reply_parameters": answers if place.is_group and is_first else None,
            },
        )
        return str(msgspec.json.decode(raw)["message_id"])

    async def edit(  # noqa: ASYNC910 - a request is made
        self, place: Place, message_id: str, text: str
    ) -> None:
        """Changes a message. That it is so already is no trouble."""
        try:
            await self._to(
                place,
                "editMessageText",
                {"message_id": int(message_id), "text": text, "link_preview_options": _NO_PREVIEW},
            )
        except _Rejected as error:
            if "message is not modified" not in error.message:
                raise

    async def _to(self, place: Place, method: str, parameters: Mapping[str, object]) -> msgspec.Raw:
        """Calls a method for a chat, wherever that has moved to; notes when it is to be left alone."""
        try:
            try:
                return await self._call(method, {"chat_id": self._chat_of(place), **parameters})
            except _Rejected as error:
                if error.moved_to is None:
                    raise
                self._moved[place.chat] = error.moved_to
            return await self._call(method, {"chat_id": self._chat_of(place), **parameters})
        except Trouble as error:
            if error.after_s is not None:
                self._quiet_until[place.chat] = trio.current_time() + error.after_s
            raise

    def _chat_of(self, place: Place) -> int:
        return self._moved.get(place.chat, place.chat)

    def wait_for_edit_s(self, place: Place, interval_s: float) -> float:
        """How long an edit has to wait, by the limits and by what Telegram has said; 0 = it counts as done."""
        now = trio.current_time()
        quiet_s = self._quiet_until.get(place.chat, -math.inf) - now
        if quiet_s > 0:
            return quiet_s
        self._quiet_until.pop(place.chat, None)
        wait_s = self._rates.take(f"chat {place.chat}", rate_per_s=1 / interval_s, burst=1, now=now)
        return wait_s or self._rates.take("all", rate_per_s=EDITS_PER_S, burst=int(EDITS_PER_S), now=now)

    async def deliver(self, delivery: Delivery) -> Receipt:
        """As `outbox.Carrier.deliver`."""
        body = msgspec.json.decode(delivery.body)
        place = Place(**body["reply_to"])
        shown = display.load(body["live"])
        text, keeps_shown = words_of_result(body)
        passages = split(text)
        # The messages that hold the text. What a worker has written before its attempt failed is known to that one.
        told = self._progress.pop(delivery.id, [] if keeps_shown else list(shown))
        patience_s = PATIENCE_S
        while (step := display.next_step(told, passages)) is not None:
            message_id, passage = step
            try:
                if message_id is None:
                    is_first = not told and not shown
                    told.append(display.Shown(await self.write(place, passage, is_first=is_first), len(passage)))
                else:
                    index = next(index for index, one in enumerate(told) if one.id == message_id)
                    try:
                        await self.edit(place, message_id, passage)
                        told[index] = display.Shown(message_id, len(passage))
                    except _Rejected:
                        del told[index:]  # it is there no more, or too old: the rest is written anew
            except _Rejected as error:
                await trio.lowlevel.checkpoint()
                return Receipt(delivered=False, status=error.status, error=error.message)
            except Trouble as error:
                if error.after_s is not None and error.after_s <= patience_s:
                    patience_s -= error.after_s
                    await trio.sleep(error.after_s)
                    continue
                if len(self._progress) < _MAX_PROGRESS:
                    self._progress[delivery.id] = told
                await trio.lowlevel.checkpoint()
                unsure = error.unsure and message_id is None  # to edit twice does no harm
                return Receipt(delivered=False, again=True, after_s=error.after_s, error=error.message, unsure=unsure)
        await trio.lowlevel.checkpoint()
        return Receipt(delivered=True, status=200)


@attrs.frozen
class _Screen:
    """Where a run is shown (`display.Screen`): as far as limits allow."""

    adapter: TelegramAdapter
    place: Place
    interval_s: float
    written: list[str] = attrs.field(factory=list)

    async def write(self, text: str) -> str:
        """As `Screen.write`."""
        await self._wait_allowed()
        with _as_not_shown():
            message_id = await self.adapter.write(self.place, text, is_first=not self.written)
        self.written.append(message_id)
        return message_id

    async def edit(self, message_id: str, text: str) -> None:
        """As `Screen.edit`."""
        await self._wait_allowed()
        with _as_not_shown():
            await self.adapter.edit(self.place, message_id, text)

    async def _wait_allowed(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self.interval_s:
            raise NotShown
        wait_s = self.adapter.wait_for_edit_s(self.place, self.interval_s)
        if wait_s > 0:
            raise NotShown(wait_s)


@contextlib.contextmanager
def _as_not_shown() -> Iterator[None]:
    try:
        yield
    except _Rejected as error:
        raise NotShown from error
    except Trouble as error:
        raise NotShown(error.after_s or ANSWER_S) from error


def _digest(message: Incoming) -> bytes:
    return hashlib.sha256(msgspec.json.encode([message.sender, message.action, message.text])).digest()


def _id_of(body: bytes) -> int:
    """The id of an update of which nothing else can be read."""

    class Id(msgspec.Struct):
        update_id: int

    return msgspec.json.decode(body, type=Id).update_id


def words_of_result(body: Mapping[str, Any]) -> tuple[str, bool]:
    """What the user is told of a run that has ended, and whether what was shown of it stays as it is.

    A run that failed has no answer, and none is made up: there is one line that says so.

    Args:
        body: A `store.Delivery.body`.

    >>> words_of_result({"type": "run.completed", "data": {"action": "chat", "reply": "Hello"}})
    ('Hello', False)
    >>> words_of_result({"type": "run.failed", "data": {"action": "chat", "id": "run_1", "status": 502}, "live": {}})
    ('No answer: the model could not be reached. Please try again later. (run_1)', False)
    """
    data = body["data"]
    action = data["action"]
    if body["type"] == "run.failed":
        was_shown = bool(display.load(body["live"]))
        begun = "The answer above is incomplete" if was_shown else "No answer"
        return f"{begun}: {_reason(data.get('status', 500))} ({data['id']})", was_shown
    if action == "reset":
        return "This conversation begins anew.", False
    if action == "stop":
        return ("Stopped." if data.get("stopped") else "There is nothing to stop."), False
    reply = data.get("reply") or ""
    if body["type"] == "run.cancelled":
        return reply, False  # whoever stopped it knows
    return (reply if reply.strip() else "The model gave an empty answer."), False


def _reason(status: int) -> str:
    if status == 409:
        return "the message before this one is still being answered. Please try again later."
    if status == 429:
        return "the model has too much to do. Please try again later."
    if status >= 500:
        return "the model could not be reached. Please try again later."
    return "the model does not take this message."
