"""Slack: events come in as webhook calls; replies grow while the model writes.

An event is acknowledged as soon as its message is durable, well within the 3 s after which Slack sends it again. The
model is asked after that. The reply is a message at the first text, edits of it while the text grows, and the final
text as a delivery of the outbox (see `delivery`).

Source: "The Events API" for what comes in; `api` for what goes out.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, ClassVar

import msgspec
import trio

from trigate.channels import replies
from trigate.channels.adapter import Channel, Response
from trigate.channels.delivery import deliver
from trigate.channels.live_message import Display, LimitedScreen
from trigate.channels.slack import messages
from trigate.channels.slack.api import RETRY_S, Conversation, ConversationWriter, WebApi
from trigate.channels.slack.messages import Incoming, session_key
from trigate.concurrency.notify import open_service
from trigate.logs import log
from trigate.runs.outbox import Receipt
from trigate.runs.request import Live, RunRequest
from trigate.signatures import Verifier, challenge
from trigate.store.records import Delivery, Run

CHECK_S = 60.0
"""How often Slack is asked whether it accepts the token."""
ATTEMPT_S = 15.0
"""After how long an attempt of a delivery writes no further message. With one more call, it is less than
`runs.outbox.ATTEMPT_S`."""

_OK: Response = (200, [(b"content-type", b"text/plain")], b"")


class SlackAdapter:
    """One app in one workspace. A `channels.adapter.Adapter`."""

    default_base_url: ClassVar[str] = "https://slack.com/api"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._owner = f"channel:{channel.name}"
        self._verifier = Verifier("slack", tuple(secret.literal or "" for secret in channel.config.secrets))
        self._bot: str | None = None  # the bot's user id, once it is known
        self._api = WebApi(channel)

    def __repr__(self) -> str:
        return f"<SlackAdapter {self._channel!r}>"

    # -- incoming messages --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Checks whether Slack accepts the token: every `CHECK_S`, and at once when a call of the API failed. Never
        returns; raises as `Adapter.run`."""
        while True:
            if self._api.failed.is_set:
                await self._api.failed.wait()  # this check answers the failures so far
            answer = await self._api.call("auth.test", {})
            self._bot = answer.user_id
            with trio.move_on_after(CHECK_S):
                await self._api.failed.wait()

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """Takes one event. Raises as `Adapter.receive`.

        An event that needs no reply is acknowledged as well: Slack would send it again, and disables an app that fails
        too often ("The Events API").
        """
        self._verifier.verify(headers, body, now=time.time())
        verification = challenge("slack", "POST", {}, body, tokens=())
        if verification is not None:
            await trio.lowlevel.checkpoint()
            return verification.to_response()
        message = messages.read(body, bot=self._bot)
        if message is None or not await self._is_for_bot(message):
            await trio.lowlevel.checkpoint()
            return _OK
        # The digest is the key's: the two events of a mention are one message, and have different bodies.
        key = message.key
        runs = self._channel.services.runs
        claim = await runs.accept(self._run_request(message), acknowledged=True, idempotency=(key, key.encode()))
        if claim.is_new:
            runs.execute_soon(claim.run)
        return _OK

    def _run_request(self, message: Incoming) -> RunRequest:
        config = self._channel.config
        return RunRequest(
            channel=self._channel.name,
            owner=self._owner,
            session=session_key(self._channel.name, message, config.session),
            action=message.action,
            text=message.text,
            sender=message.user,
            model=config.model,
            system=config.system,
            parameters=config.parameters,
            # One delivery at a time in a conversation, since Slack's limits count by conversation too.
            reply_to={"target": message.channel, "channel": message.channel, "thread_ts": message.reply_thread},
        )

    async def _is_for_bot(self, message: Incoming) -> bool:
        config = self._channel.config
        if config.allow and message.user not in config.allow:
            services = self._channel.services
            await services.workers.join()
            await services.store.channels.count(self._channel.name, at=time.time(), received=1)
            return False
        if message.is_direct or config.groups == "all" or (config.groups == "mention" and message.is_mention):
            await trio.lowlevel.checkpoint()
            return True
        if config.groups == "mention" and message.thread_ts is not None:
            return await self._takes_part(message)
        await trio.lowlevel.checkpoint()
        return False

    async def _takes_part(self, message: Incoming) -> bool:
        """Whether the thread is a conversation with the bot: users need not mention it again there."""
        key = session_key(self._channel.name, message, self._channel.config.session)
        if key is None:
            await trio.lowlevel.checkpoint()
            return False
        services = self._channel.services
        await services.workers.join()
        sessions = services.store.sessions
        return await sessions.get(self._owner, key) is not None or bool(await sessions.tickets(self._owner, key))

    # -- replies ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, request: RunRequest) -> AsyncIterator[Live]:
        """Shows the text of a run as it grows, while the block lasts."""
        interval_s = self._channel.config.edit_interval_s
        if not interval_s:
            yield _NoDisplay()
            return
        conversation = msgspec.convert(request.reply_to, Conversation)
        store = self._channel.services.store
        screen = live_screen(self._api, conversation, functools.partial(replies.record_shown, store, run))
        display = Display(
            screen, split=messages.split, interval_s=interval_s, shown=await replies.recorded_shown(store, run)
        )
        async with open_service(functools.partial(self._run_display, display)):
            yield display

    async def _run_display(self, display: Display) -> None:
        """Runs the display: a defect in it must not end the run."""
        await trio.lowlevel.checkpoint()
        try:
            await display.run()
        except Exception:
            log.exception("slack_display_crashed", channel=self._channel.name)

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt to deliver a reply; see `delivery.deliver`."""
        reply = replies.decode(delivery)
        return await deliver(
            delivery,
            reply,
            ConversationWriter(self._api, msgspec.convert(reply.reply_to, Conversation)),
            self._channel.services,
            split=messages.split,
            attempt_s=ATTEMPT_S,
            remainder_after_s=RETRY_S,
        )


def live_screen(api: WebApi, conversation: Conversation, record: Callable[[str], Awaitable[None]]) -> LimitedScreen:
    """Where a growing text is shown in a conversation.

    Args:
        record: Stores the id of a message that was written.
    """

    def allowed_in_s(message_id: str | None) -> float:
        return api.write_allowed_in_s(conversation) if message_id is None else api.edit_allowed_in_s()

    return LimitedScreen(ConversationWriter(api, conversation), allowed_in_s, record)


class _NoDisplay:
    """Shows nothing: the reply is written when it is complete."""

    def show(self, text: str) -> None:
        """Ignores the text."""

    async def end(self) -> Mapping[str, Any]:
        """Returns nothing to continue from."""
        await trio.lowlevel.checkpoint()
        return {}
