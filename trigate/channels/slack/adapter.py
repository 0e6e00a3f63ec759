"""Slack, by its Events API (what comes in) and its Web API (what goes out). An `adapter.Adapter`.

What comes in is acknowledged as soon as it is durable, which takes far less than the 3 s after which Slack sends it
again. The model is asked after that. What goes out is a message at the first text, edits of it while the text grows,
and the whole text by the outbox.

Rules that are not obvious, and where they stand in Slack's documentation:

* The Web API answers errors with status 200 and ``{"ok": false, "error": …}``; a status of 429, with ``Retry-After``
  in seconds, is of the method in the workspace ("Web API", "Rate limits").
* ``chat.postMessage`` may be called about once a second for each conversation; ``chat.update`` is of tier 3, 50 times a
  minute in the workspace ("Rate limits"). So several replies at once share the edits.
* After ``fatal_error`` and ``internal_error`` some of the operation may have happened (the methods' references). A new
  message may then be there; an edit can be made again.
* Slack offers no key by which it would recognise a message that is sent twice, so a new message of which nobody knows
  whether it arrived is not sent again.
* A link in a message is fetched by Slack, unless ``unfurl_links`` and ``unfurl_media`` are false: a model that was
  talked into writing a URL must not send anything anywhere by that.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, ClassVar

import attrs
import msgspec
import structlog
import trio

from trigate.channels import live_message, replies
from trigate.channels.adapter import Channel, Refused, Response, Trouble
from trigate.channels.live_message import Display, NotShown
from trigate.channels.slack import messages
from trigate.channels.slack.messages import Incoming, escape, session_key
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.errors import StoreUnavailable
from trigate.runs.outbox import Receipt
from trigate.runs.request import Live, RunRequest
from trigate.signatures import Verifier, challenge
from trigate.store.records import Delivery, Run

log = structlog.get_logger("trigate.channels.slack.adapter")

CHECK_S = 60.0
"""How often Slack is asked whether it takes the token."""
CALL_TIMEOUT_S = 10.0
WRITES_PER_S = 1.0
"""New messages in one conversation."""
EDITS_PER_S = 50 / 60
"""In the workspace, so of all workers together. Of the edits of growing texts; that of a whole text is made in any
case."""
_EDIT_BURST = 5
_REST_S = 5.0
_ATTEMPT_S = 15.0
"""After how long an attempt of a delivery begins no further message: less, with one call, than the outbox allows."""

_TOKEN_REFUSED = frozenset(
    (
        *("not_authed", "invalid_auth", "account_inactive", "token_revoked", "token_expired", "not_allowed_token_type"),
        *("missing_scope", "no_permission", "org_login_required", "team_access_not_granted", "ekm_access_denied"),
        *("accesslimited", "two_factor_setup_required", "access_denied", "enterprise_is_restricted"),
    )
)
"""Errors that are the token's or the app's, and not a message's."""
_PASSING = frozenset(
    (
        *("service_unavailable", "team_added_to_org", "request_timeout", "ratelimited", "rate_limited"),
        *("update_failed", "external_channel_migrating"),
    )
)
_UNSURE = frozenset(("internal_error", "fatal_error"))
_NOT_EDITABLE = frozenset(("message_not_found", "cant_update_message", "edit_window_closed", "msg_too_long"))

_OK: Response = (200, [(b"content-type", b"text/plain")], b"")


class Declined(Exception):
    """Slack has understood the request and will not do it, now or later.

    Args:
        code: Slack's.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class _Answer(msgspec.Struct):
    ok: bool
    error: str = ""
    ts: str = ""
    user_id: str | None = None


class _ReplyTo(msgspec.Struct):
    channel: str
    thread_ts: str | None = None


_answer = msgspec.json.Decoder(_Answer)


class SlackAdapter:
    """One app in one workspace."""

    default_base_url: ClassVar[str] = "https://slack.com/api"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._owner = f"channel:{channel.name}"
        self._verifier = Verifier("slack", tuple(each.literal or "" for each in channel.config.secrets))
        self._bot: str | None = None
        self._rates = RateLimiter()
        self._quiet_until_s: dict[str, float] = {}
        self._doubt = trio.Event()

    # -- what comes in ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """As `Adapter.run`: asks from time to time whether the token is taken, and at once when there is a doubt."""
        while True:
            self._doubt = trio.Event()
            answer = await self._call("auth.test", {})
            self._bot = answer.user_id
            with trio.move_on_after(CHECK_S):
                await self._doubt.wait()

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """As `Adapter.receive`. Whatever is not answered is acknowledged all the same: Slack would send it again, and
        switch off an app that fails too often ("The Events API")."""
        self._verifier.verify(headers, body, now=time.time())
        question = challenge("slack", "POST", {}, body, tokens=())
        if question is not None:
            await trio.lowlevel.checkpoint()
            return question.to_response()
        message = messages.read(body, bot=self._bot)
        if message is None or not await self._is_for_us(message):
            await trio.lowlevel.checkpoint()
            return _OK
        config = self._channel.config
        order = RunRequest(
            channel=self._channel.name,
            owner=self._owner,
            session=session_key(self._channel.name, message, config.session),
            action=message.action,
            text=message.text,
            sender=message.user,
            model=config.model,
            system=config.system,
            parameters=config.parameters,
            # one delivery at a time in a conversation, which is also how Slack counts them
            reply_to={"target": message.channel, "channel": message.channel, "thread_ts": message.reply_thread},
        )
        # The digest is the key's: the two events of a mention are one message, and have different bodies.
        key = message.key
        runs = self._channel.gateway.runs
        claim = await runs.accept(order, acknowledged=True, idempotency=(key, key.encode()))
        if claim.is_new:
            runs.execute_soon(claim.run)
        return _OK

    async def _is_for_us(self, message: Incoming) -> bool:
        config = self._channel.config
        if config.allow and message.user not in config.allow:
            gateway = self._channel.gateway
            await gateway.workers.join()
            await gateway.store.channels.count(self._channel.name, at=time.time(), received=1)
            return False
        if message.is_direct or config.groups == "all" or (config.groups == "mention" and message.is_mention):
            await trio.lowlevel.checkpoint()
            return True
        if config.groups == "mention" and message.thread_ts is not None:
            return await self._takes_part(message)
        await trio.lowlevel.checkpoint()
        return False

    async def _takes_part(self, message: Incoming) -> bool:
        """Whether the thread is a conversation with the bot: then nobody has to mention it again."""
        key = session_key(self._channel.name, message, self._channel.config.session)
        if key is None:
            await trio.lowlevel.checkpoint()
            return False
        gateway = self._channel.gateway
        await gateway.workers.join()
        sessions = gateway.store.sessions
        return await sessions.get(self._owner, key) is not None or bool(await sessions.tickets(self._owner, key))

    # -- what goes out ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, order: RunRequest) -> AsyncIterator[Live]:
        """As `orders.LiveView.watch`."""
        interval_s = self._channel.config.edit_interval_s
        if not interval_s:
            yield _Blind()
            return
        place = msgspec.convert(order.reply_to, _ReplyTo)
        store = self._channel.gateway.store
        screen = _LiveScreen(self, place, functools.partial(replies.note_shown, store, run))
        shown = Display(
            screen, split=messages.split, interval_s=interval_s, shown=await replies.shown_before(store, run)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_aside, shown)
            try:
                yield shown
            finally:
                nursery.cancel_scope.cancel()

    async def _run_aside(self, shown: Display) -> None:  # noqa: ASYNC910 - it waits for something to show
        """Shows a text: a defect in that must not end the run."""
        try:
            await shown.run()
        except Exception:
            log.exception("slack_display_crashed", channel=self._channel.name)

    async def deliver(self, delivery: Delivery) -> Receipt:
        """As `outbox.Carrier.deliver`. What of it could not be delivered is another delivery, so that nothing is
        written twice: whoever makes that knows what is there, in whichever process."""
        told = replies.told(delivery)
        place = msgspec.convert(told.reply_to, _ReplyTo)
        screen = _Screen(self, place)
        # Of a failure there is one line, and what was shown before it stays.
        shown = [] if told.has_failed else live_message.load(told.live)
        passages = messages.split(told.words())
        until = trio.current_time() + _ATTEMPT_S
        writes = 0
        while (step := live_message.next_step(shown, passages)) is not None:
            is_new = step[0] is None
            try:
                await self._wait_turn(place, step[0], until=until)
                await live_message.take_step(screen, shown, step)
            except Declined as error:
                if not is_new and error.code in _NOT_EDITABLE:
                    # somebody has deleted it, or the workspace forbids edits: it is written anew
                    del shown[next(index for index, one in enumerate(shown) if one.id == step[0]) :]
                    continue
                return Receipt(  # noqa: ASYNC910 - Slack was asked
                    delivered=False, status=200, error=f"Slack declined: {error.code}"
                )
            except Trouble as error:
                words, unsure = self._channel.redacted(error.message), is_new and error.unsure
                if writes and not unsure:
                    return await self._leave_rest(delivery, shown, after_s=error.after_s or _REST_S)
                return Receipt(  # noqa: ASYNC910 - Slack was asked, or it was waited for
                    delivered=False, again=True, after_s=error.after_s, error=words, unsure=unsure
                )
            writes += is_new
        for one in shown[len(passages) :]:  # of a run that was begun before, and said more then
            with contextlib.suppress(Declined, Trouble):
                await self._call("chat.delete", {"channel": place.channel, "ts": one.id})
        await trio.lowlevel.checkpoint()
        return Receipt(delivered=True, status=200)

    async def _wait_turn(self, place: _ReplyTo, message_id: str | None, *, until: float) -> None:
        """Waits until a message may be written. An edit is made in any case, and counted.

        Raises:
            Trouble: That takes too long.
        """
        while (wait_s := self.wait_s(place, message_id)) > 0 and message_id is None:
            if trio.current_time() + wait_s > until:
                raise Trouble("There is too much to write in this conversation.", after_s=wait_s)
            await trio.sleep(wait_s)
        await trio.lowlevel.checkpoint()

    async def _leave_rest(self, delivery: Delivery, shown: list[live_message.Shown], *, after_s: float) -> Receipt:
        """Leaves what was not written to another delivery."""
        gateway = self._channel.gateway
        try:
            await replies.leave_rest(gateway.store, delivery, shown, after_s=after_s)
        except StoreUnavailable as error:
            return Receipt(delivered=False, error=error.message, unsure=True)  # noqa: ASYNC910 - the store was asked
        gateway.outbox.wake()
        return Receipt(delivered=True, status=200)

    # -- the Web API --------------------------------------------------------------------------------------------------

    async def write(self, place: _ReplyTo, text: str) -> str:
        """Writes a new message, and returns its ``ts``, which is its id. Raises as `_call`."""
        fields = {
            "channel": place.channel,
            "text": escape(text),
            "unfurl_links": False,
            "unfurl_media": False,
        }
        if place.thread_ts is not None:
            fields["thread_ts"] = place.thread_ts
        return (await self._call("chat.postMessage", fields)).ts

    async def edit(self, place: _ReplyTo, message_id: str, text: str) -> None:
        """Changes a message. Raises as `_call`."""
        # its default for `parse` is another one than that of chat.postMessage
        fields = {"channel": place.channel, "ts": message_id, "text": escape(text), "parse": "none"}
        await self._call("chat.update", fields)

    def wait_s(self, place: _ReplyTo, message_id: str | None) -> float:
        """In how many seconds a message may be written (or edited); 0.0 = now, and that is counted."""
        now = trio.current_time()
        if message_id is None:
            return self._rates.take(f"write {place.channel}", rate_per_s=WRITES_PER_S, burst=1, now=now)
        share = self._channel.gateway.workers.count  # the others edit too
        burst = max(1, _EDIT_BURST // share)
        return self._rates.take("edit", rate_per_s=EDITS_PER_S / share, burst=burst, now=now)

    async def _call(self, method: str, fields: Mapping[str, object]) -> _Answer:
        """Calls a method.

        Raises:
            Trouble: It was not done, or nobody knows.
            Refused: The token is not taken.
            Declined: Slack will not do it.
        """
        quiet_s = self._quiet_until_s.get(method, 0.0) - trio.current_time()
        if quiet_s > 0:
            await trio.lowlevel.checkpoint()
            raise Trouble(f"Slack has asked for a pause of {method}.", after_s=quiet_s)
        try:
            return await self._exchange(method, fields)
        except Trouble as error:
            if error.after_s is None:
                self._channel.note_trouble(self._channel.redacted(error.message))
                self._doubt.set()
            raise

    async def _exchange(self, method: str, fields: Mapping[str, object]) -> _Answer:
        headers = {
            "authorization": f"Bearer {self._channel.token}",
            "content-type": "application/json; charset=utf-8",
        }
        with trio.move_on_after(CALL_TIMEOUT_S) as scope:
            found = await self._channel.post(
                f"/{method}", msgspec.json.encode(fields), headers, once=method == "chat.postMessage"
            )
        if scope.cancelled_caught:
            raise Trouble(f"{method} was not answered within {CALL_TIMEOUT_S:g} s.", unsure=True)
        after_s = _seconds(found.headers.get("retry-after"))
        if found.status == 429:
            after_s = _REST_S if after_s is None else after_s
            self._quiet_until_s[method] = trio.current_time() + after_s
            raise Trouble(f"{method} was called too often.", after_s=after_s)
        try:
            answer = _answer.decode(found.body)
        except ValueError:
            raise Trouble(f"{method} was answered with status {found.status} and no JSON.", unsure=True) from None
        if answer.ok:
            self._channel.note_connected()
            return answer
        if answer.error in _TOKEN_REFUSED:
            raise Refused(f"Slack says {answer.error} to {method}.")
        if answer.error in _UNSURE or (found.status >= 500 and answer.error not in _PASSING):
            raise Trouble(f"Slack says {answer.error} to {method}.", unsure=True)
        if answer.error in _PASSING:
            raise Trouble(f"Slack says {answer.error} to {method}.", after_s=_REST_S if after_s is None else after_s)
        self._channel.note_connected()
        raise Declined(answer.error)


@attrs.frozen
class _Screen:
    """A place in Slack where a delivery is written (`display.Screen`). Raises what the adapter does."""

    adapter: SlackAdapter
    place: _ReplyTo

    async def write(self, text: str) -> str:
        """As `Screen.write`."""
        return await self.adapter.write(self.place, text)

    async def edit(self, message_id: str, text: str) -> None:
        """As `Screen.edit`."""
        await self.adapter.edit(self.place, message_id, text)


@attrs.frozen
class _LiveScreen:
    """A place where a text is shown while it grows (`display.Screen`).

    Attributes:
        note: Keeps the id of a message that was written.
    """

    adapter: SlackAdapter
    place: _ReplyTo
    note: Callable[[str], Awaitable[None]]

    async def write(self, text: str) -> str:
        """As `Screen.write`."""
        await self._may(None)
        try:
            message_id = await self.adapter.write(self.place, text)
        except Trouble as error:
            # one that may be there is not written again while the text grows
            raise NotShown(None if error.unsure else error.after_s or _REST_S) from error
        except Declined as error:
            raise NotShown from error
        await self.note(message_id)
        return message_id

    async def edit(self, message_id: str, text: str) -> None:
        """As `Screen.edit`."""
        await self._may(message_id)
        try:
            await self.adapter.edit(self.place, message_id, text)
        except Trouble as error:
            raise NotShown(error.after_s or _REST_S) from error
        except Declined as error:
            raise NotShown from error

    async def _may(self, message_id: str | None) -> None:
        wait_s = self.adapter.wait_s(self.place, message_id)
        await trio.lowlevel.checkpoint()
        if wait_s > 0:
            raise NotShown(wait_s)


class _Blind:
    """Shows nothing: a reply is written when it is complete."""

    def show(self, text: str) -> None:
        """As `Live.show`."""

    async def end(self) -> Mapping[str, Any]:
        """As `Live.end`."""
        await trio.lowlevel.checkpoint()
        return {}


def _seconds(value: str | None) -> float | None:
    """``Retry-After``, which is a number of seconds ("Rate limits")."""
    return float(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 9 else None
