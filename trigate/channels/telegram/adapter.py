"""Telegram, by its Bot API: messages are polled for, or come in as calls of a webhook; replies grow before one's eyes.

**No message is lost, and none is answered twice.** An update is taken when its run is durable, and only then is
Telegram told so: by the offset of the next ``getUpdates``, or by status 200. If the process ends in between, the update
comes again, and the idempotency key of its run tells that it has been taken. One worker polls, the one that holds the
channel (`store.Channels.hold`); another one takes over when it has ended.

**What is shown while a run goes on does not matter, what is said at its end does.** The former is edited as often as
limits allow, and dropped where they do not. The latter is a delivery of the outbox. Telegram cannot tell a message that
is sent twice; so one that may have arrived is not sent again.

Texts are plain: there is no ``parse_mode``, so that nothing of a model's answer has to be escaped, or can be refused.
Link previews are off: Telegram fetches what a link leads to, and a model that was talked into writing a URL must not
send anything anywhere by that.

Source: Telegram Bot API, "Making requests", "Getting updates", "sendMessage", "editMessageText", "sendChatAction";
Bots FAQ, "My bot is hitting limits, how do I avoid this?": a message a second in a chat, 20 a minute in a group, 30 a
second in all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import ClassVar

import attrs
import msgspec
import structlog
import trio

from trigate.channels import live_message, replies
from trigate.channels.adapter import Channel, Refused, Response, Trouble
from trigate.channels.live_message import Display, NotShown
from trigate.channels.telegram.messages import Envelope, Incoming, Place, Update, User, WebhookInfo, incoming, split
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.errors import BadRequest, Overloaded, StoreUnavailable, Unavailable
from trigate.runs.outbox import Receipt
from trigate.runs.request import Live, RunRequest
from trigate.signatures import Verifier
from trigate.store.records import Delivery, Run

log = structlog.get_logger("trigate.channels.telegram.adapter")

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
ATTEMPT_S = 12.0
"""After how long an attempt of a delivery begins no further message: less, with one call, than the outbox allows."""
_BUSY_S = 1.0
_REST_S = 5.0
_NO_PREVIEW = {"is_disabled": True}

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
        self._rates = RateLimiter()
        self._doubt = trio.Event()
        self._quiet_until: dict[int, float] = {}  # in Trio's time, by chat: when Telegram will hear of it again
        self._moved: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<TelegramAdapter {self._channel!r}>"

    # -- the Bot API --------------------------------------------------------------------------------------------------

    async def _call(
        self, method: str, parameters: Mapping[str, object] | None = None, *, within_s: float | None = None
    ) -> msgspec.Raw:
        """Calls a method, and returns its result. What goes wrong is the channel's state, unless it is the request's.

        Args:
            parameters: Those that are None are left out.
            within_s: How long the answer may take; left out: `ANSWER_S`.

        Raises:
            Trouble: It was not done; `_Rejected`, `Refused`: nor will it be.
        """
        try:
            result = await self._exchange(method, parameters, within_s=ANSWER_S if within_s is None else within_s)
        except Trouble as error:
            if not isinstance(error, _Rejected) and error.after_s is None:
                self._channel.note_trouble(self._channel.redacted(error.message))
                self._doubt.set()
            raise
        if self._verifier is None:  # of a webhook, this does not say that Telegram can call
            self._channel.note_connected()
        return result

    async def _exchange(self, method: str, parameters: Mapping[str, object] | None, *, within_s: float) -> msgspec.Raw:
        body = msgspec.json.encode({name: value for name, value in (parameters or {}).items() if value is not None})
        path = f"/bot{self._channel.token}/{method}"
        answer = None
        with trio.move_on_after(within_s):
            answer = await self._channel.post(
                path, body, {"content-type": "application/json"}, once=method == "sendMessage"
            )
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
            raise Refused(f"Telegram does not take the token. {words}")
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
        await self._channel.gateway.workers.join_eventually()
        if self._verifier is not None:
            await self._watch_webhook()
        else:
            await self._poll_in_turn()

    async def _watch_webhook(self) -> None:
        """Says whether Telegram can call, for ever: from time to time, and at once when there is a doubt."""
        await self._introduce()
        while True:
            self._doubt = trio.Event()
            info = msgspec.json.decode(await self._call("getWebhookInfo"), type=WebhookInfo)
            if not info.url:
                raise Trouble("Telegram knows no webhook for this bot: setWebhook has to be called.")
            if info.last_error_message and time.time() - info.last_error_date < CHECK_S:
                self._channel.note_trouble(f"Telegram cannot call: {self._channel.redacted(info.last_error_message)}")
            else:
                self._channel.note_connected()
            with trio.move_on_after(CHECK_S):
                await self._doubt.wait()

    async def _poll_in_turn(self) -> None:
        """Polls, while no other worker does."""
        gateway, name = self._channel.gateway, self._channel.name
        worker = gateway.workers.id
        held = False
        try:
            while not gateway.aside.is_set():
                held = await gateway.store.channels.hold(name, worker=worker, dead=())
                if held:
                    await self._poll()
                else:
                    await trio.sleep(HOLD_S)
        finally:
            if held:
                gateway.store.channels.let_go(name, worker=worker)  # noqa: ASYNC102 - queued, and not waited for
        await trio.sleep_forever()  # others poll now; what has been taken here is answered from here

    async def _poll(self) -> None:
        """Takes what there is, while this worker holds the channel."""
        gateway, name = self._channel.gateway, self._channel.name
        me = await self._introduce()
        info = msgspec.json.decode(await self._call("getWebhookInfo"), type=WebhookInfo)
        if info.url:  # with one, there are no updates to be had
            await self._call("deleteWebhook", {"drop_pending_updates": False})
            log.warning("telegram_webhook_removed", channel=name)
        offset = await self._offset(me)
        while await gateway.store.channels.hold(name, worker=gateway.workers.id, dead=()):
            raw = await self._wait_updates(offset)
            if raw is None or gateway.aside.is_set():
                return  # they are left for the next one
            updates = msgspec.json.decode(raw, type=list[msgspec.Raw])
            for update in updates:
                offset = await self._take_from_queue(bytes(update)) + 1
            if updates:
                await gateway.store.channels.advance(name, f"{me.id}:{offset}")

    async def _wait_updates(self, offset: int | None) -> msgspec.Raw | None:
        """Waits for updates as long as Telegram does; None = the gateway steps aside. None of them is confirmed."""
        raw = None
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self._channel.gateway.aside.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            raw = await self._call(
                "getUpdates",
                {"offset": offset, "timeout": int(POLL_S), "allowed_updates": ["message"]},
                within_s=POLL_S + ANSWER_S,
            )
            nursery.cancel_scope.cancel()
        return raw

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
        try:
            await self._take(body)
        except Trouble as error:
            raise BadRequest(error.message) from error
        self._channel.note_connected()
        return 200, [(b"content-type", b"application/json")], b"{}"

    async def _take(self, body: bytes) -> int:
        """Takes an update: returns its id when its run is durable, or there is nothing to do.

        Raises:
            StoreUnavailable, Overloaded: It could not be taken; it has to come again.
            Unavailable: As before, since Telegram does not say who the bot is.
            Trouble: It has no id.
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

    def _order(self, message: Incoming) -> RunRequest:
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
            reply_to={**attrs.asdict(message.place), "target": str(message.place.chat)},
        )

    # -- what goes out ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, order: RunRequest) -> AsyncIterator[Live]:
        """As `orders.LiveView.watch`."""
        place = msgspec.convert(order.reply_to, Place)
        store = self._channel.gateway.store
        before = await replies.shown_before(store, run)
        interval_s: float = self._channel.config.edit_interval_s
        if place.is_group and interval_s:
            interval_s = max(interval_s, GROUP_INTERVAL_S)
        screen = _Screen(self, place, interval_s, functools.partial(replies.note_shown, store, run), bool(before))
        live = Display(screen, split=split, interval_s=interval_s, shown=before)
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
            except (_Rejected, Refused):
                return  # noqa: ASYNC910 - a request was made
            except Trouble:
                pass  # this time
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
        """As `outbox.Carrier.deliver`. What of it could not be written is another delivery, so that nothing is written
        twice."""
        told = replies.told(delivery)
        place = msgspec.convert(told.reply_to, Place)
        before = live_message.load(told.live)
        shown = [] if told.has_failed else list(before)
        passages = split(told.words())
        until = trio.current_time() + ATTEMPT_S
        writes = 0
        while (step := live_message.next_step(shown, passages)) is not None:
            message_id, _ = step
            is_new = message_id is None
            try:
                if writes and is_new and trio.current_time() > until:
                    raise Trouble("There is more to write than one attempt has time for.", after_s=0.0)
                await live_message.take_step(_Paper(self, place, is_first=not shown and not before), shown, step)
            except _Rejected as error:
                if is_new:
                    await trio.lowlevel.checkpoint()
                    return Receipt(delivered=False, status=error.status, error=error.message)
                # it is there no more, or too old: the rest is written anew
                del shown[next(index for index, one in enumerate(shown) if one.id == message_id) :]
            except Trouble as error:
                if error.after_s and trio.current_time() + error.after_s < until:
                    await trio.sleep(error.after_s)
                    continue
                unsure = error.unsure and is_new  # to edit twice does no harm
                if writes and not unsure:
                    return await self._leave_rest(delivery, shown, after_s=error.after_s or 0.0)
                await trio.lowlevel.checkpoint()
                return Receipt(delivered=False, again=True, after_s=error.after_s, error=error.message, unsure=unsure)
            else:
                writes += is_new
        for one in shown[len(passages) :]:  # of a run that was begun before, and said more then
            with contextlib.suppress(Trouble):
                await self._to(place, "deleteMessage", {"message_id": int(one.id)})
        await trio.lowlevel.checkpoint()
        return Receipt(delivered=True, status=200)

    async def _leave_rest(self, delivery: Delivery, shown: list[live_message.Shown], *, after_s: float) -> Receipt:
        gateway = self._channel.gateway
        try:
            await replies.leave_rest(gateway.store, delivery, shown, after_s=after_s)
        except StoreUnavailable as error:
            return Receipt(delivered=False, error=error.message, unsure=True)  # noqa: ASYNC910 - it was asked
        gateway.outbox.look()
        return Receipt(delivered=True, status=200)


@attrs.frozen
class _Paper:
    """Where a delivery is written (`display.Screen`). Raises what the adapter does."""

    adapter: TelegramAdapter
    place: Place
    is_first: bool

    async def write(self, text: str) -> str:
        """As `Screen.write`."""
        return await self.adapter.write(self.place, text, is_first=self.is_first)

    async def edit(self, message_id: str, text: str) -> None:
        """As `Screen.edit`."""
        await self.adapter.edit(self.place, message_id, text)


@attrs.define(eq=False)
class _Screen:
    """Where a run is shown while it goes on (`display.Screen`): as far as limits allow.

    Attributes:
        note: Keeps the id of a message that was written.
    """

    adapter: TelegramAdapter
    place: Place
    interval_s: float
    note: Callable[[str], Awaitable[None]]
    has_begun: bool

    async def write(self, text: str) -> str:
        """As `Screen.write`."""
        await self._check_allowed()
        try:
            message_id = await self.adapter.write(self.place, text, is_first=not self.has_begun)
        except Trouble as error:
            # one that may be there is not written again while the text grows
            raise NotShown(None if error.unsure else _rest_s(error)) from error
        self.has_begun = True
        await self.note(message_id)
        return message_id

    async def edit(self, message_id: str, text: str) -> None:
        """As `Screen.edit`."""
        await self._check_allowed()
        try:
            await self.adapter.edit(self.place, message_id, text)
        except Trouble as error:
            raise NotShown(_rest_s(error)) from error

    async def _check_allowed(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self.interval_s:
            raise NotShown
        wait_s = self.adapter.wait_for_edit_s(self.place, self.interval_s)
        if wait_s > 0:
            raise NotShown(wait_s)


def _rest_s(error: Trouble) -> float | None:
    return None if isinstance(error, _Rejected | Refused) else error.after_s or _REST_S


def _digest(message: Incoming) -> bytes:
    return hashlib.sha256(msgspec.json.encode([message.sender, message.action, message.text])).digest()


class _Id(msgspec.Struct):
    update_id: int


def _id_of(body: bytes) -> int:
    """The id of an update of which nothing else can be read."""
    try:
        return msgspec.json.decode(body, type=_Id).update_id
    except msgspec.DecodeError as error:
        raise Trouble(f"This is no update of the Bot API: {error}") from None
