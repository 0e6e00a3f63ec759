"""A client of Slack's Web API: calls methods, translates their errors, and keeps to their limits.

Rules that are not obvious, and their source in Slack's documentation:

* The Web API reports errors with status 200 and ``{"ok": false, "error": …}``; status 429, with ``Retry-After`` in
  seconds, concerns the method in the workspace ("Web API", "Rate limits").
* ``chat.postMessage`` may be called about once a second for each conversation; ``chat.update`` is of tier 3, 50 times a
  minute in the workspace ("Rate limits"). Therefore replies that grow at the same time share the edits.
* After ``fatal_error`` and ``internal_error``, a part of the operation may have happened (the methods' references). A
  new message may then exist; an edit can be repeated.
* Slack has no key by which it would recognise a message that is sent twice. Therefore a new message that may have
  arrived is not sent again.
* Slack fetches a link in a message, unless ``unfurl_links`` and ``unfurl_media`` are false: a prompt that makes the
  model write a URL must not be able to send data anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec
import trio

from trigate.channels.adapter import Channel, PlatformError, RequestRejected, TokenRejected
from trigate.channels.delivery import Verdict
from trigate.channels.slack.messages import escape
from trigate.concurrency.notify import Wakeup
from trigate.concurrency.rate_limiter import RateLimiter

CALL_TIMEOUT_S = 10.0
WRITES_PER_S = 1.0
"""New messages a second in one conversation."""
EDITS_PER_S = 50 / 60
"""Edits of growing texts a second in the workspace, of all workers together. The edit to a final text is counted, but
never held back."""
RETRY_S = 5.0
"""The pause after an error that passes, unless Slack asks for another."""
_EDIT_BURST = 5

_TOKEN_REJECTED = frozenset(
    (
        *("not_authed", "invalid_auth", "account_inactive", "token_revoked", "token_expired", "not_allowed_token_type"),
        *("missing_scope", "no_permission", "org_login_required", "team_access_not_granted", "ekm_access_denied"),
        *("accesslimited", "two_factor_setup_required", "access_denied", "enterprise_is_restricted"),
    )
)
"""Errors that concern the token or the app, and not one message."""
_PASSING = frozenset(
    (
        *("service_unavailable", "team_added_to_org", "request_timeout", "ratelimited", "rate_limited"),
        *("update_failed", "external_channel_migrating"),
    )
)
_UNSURE = frozenset(("internal_error", "fatal_error"))
_NOT_EDITABLE = frozenset(("message_not_found", "cant_update_message", "edit_window_closed", "msg_too_long"))


class Answer(msgspec.Struct):
    """The fields of a method's response that are used."""

    ok: bool
    error: str = ""
    ts: str = ""
    user_id: str | None = None


class Conversation(msgspec.Struct):
    """The conversation that a reply goes to, and the thread in it; None = not in a thread."""

    channel: str
    thread_ts: str | None = None


_decode_answer = msgspec.json.Decoder(Answer).decode


class WebApi:
    """The Web API with the token of one channel.

    The result of each call is also the state of the channel, unless it concerns one request only.

    Attributes:
        failed: Set when a call fails for a reason that is not its own. The token is checked again then.
    """

    def __init__(self, channel: Channel) -> None:
        self.failed = Wakeup()
        self._channel = channel
        self._rates = RateLimiter()
        self._quiet_until: dict[str, float] = {}  # Trio's time, by method: Slack refuses calls until then

    def __repr__(self) -> str:
        return f"<WebApi of {self._channel!r}>"

    async def call(self, method: str, fields: Mapping[str, object]) -> Answer:
        """Calls a method.

        Raises:
            PlatformError: The method was not executed; ``unsure`` if it may have been.
            TokenRejected: Slack does not accept the token, or the app lacks a permission.
            RequestRejected: Slack refuses this call for good; its ``code`` is Slack's error.
        """
        quiet_s = self._quiet_until.get(method, 0.0) - trio.current_time()
        if quiet_s > 0:
            await trio.lowlevel.checkpoint()
            raise PlatformError(f"Slack has asked for a pause of {method}.", after_s=quiet_s)
        try:
            return await self._exchange(method, fields)
        except PlatformError as error:
            if not isinstance(error, RequestRejected) and error.after_s is None:
                self._channel.note_disconnected(error.message)
                self.failed.set()
            raise

    async def _exchange(self, method: str, fields: Mapping[str, object]) -> Answer:
        headers = {
            "authorization": f"Bearer {self._channel.token}",
            "content-type": "application/json; charset=utf-8",
        }
        with trio.move_on_after(CALL_TIMEOUT_S) as scope:
            response = await self._channel.post(
                f"/{method}", msgspec.json.encode(fields), headers, at_most_once=method == "chat.postMessage"
            )
        if scope.cancelled_caught:
            raise PlatformError(f"{method} was not answered within {CALL_TIMEOUT_S:g} s.", unsure=True)
        after_s = _retry_after_s(response.headers.get("retry-after"))
        if response.status == 429:
            after_s = RETRY_S if after_s is None else after_s
            self._quiet_until[method] = trio.current_time() + after_s
            raise PlatformError(f"{method} was called too often.", after_s=after_s)
        try:
            answer = _decode_answer(response.body)
        except ValueError:
            raise PlatformError(
                f"{method} was answered with status {response.status} and no JSON.", unsure=True
            ) from None
        if answer.ok:
            self._channel.note_connected()
            return answer
        code = self._channel.redacted(answer.error)
        message = f"Slack says {code} to {method}."
        if code in _TOKEN_REJECTED:
            raise TokenRejected(message)
        if code in _UNSURE or (response.status >= 500 and code not in _PASSING):
            raise PlatformError(message, unsure=True)
        if code in _PASSING:
            raise PlatformError(message, after_s=RETRY_S if after_s is None else after_s)
        self._channel.note_connected()
        raise RequestRejected(f"Slack declined: {code}", code=code, status=response.status)

    def write_allowed_in_s(self, conversation: Conversation) -> float:
        """Seconds until a new message may be written in a conversation; 0.0 = now, and this one is counted."""
        return self._rates.take(
            f"write {conversation.channel}", rate_per_s=WRITES_PER_S, burst=1, now=trio.current_time()
        )

    def edit_allowed_in_s(self) -> float:
        """Seconds until a message may be edited; 0.0 = now, and this edit is counted."""
        share = self._channel.services.workers.count  # the other workers edit too
        burst = max(1, _EDIT_BURST // share)
        return self._rates.take("edit", rate_per_s=EDITS_PER_S / share, burst=burst, now=trio.current_time())


@attrs.frozen
class ConversationWriter:
    """Writes the messages of one reply to a conversation. A `delivery.ReplyWriter`; it raises as `WebApi.call`."""

    api: WebApi
    conversation: Conversation

    async def wait_allowed(self, message_id: str | None, *, until: float) -> None:
        """Waits until a new message may be written, or counts an edit. Raises `PlatformError` if that takes longer than
        ``until``."""
        await trio.lowlevel.checkpoint()
        if message_id is not None:
            self.api.edit_allowed_in_s()
            return
        while (wait_s := self.api.write_allowed_in_s(self.conversation)) > 0:
            if trio.current_time() + wait_s > until:
                raise PlatformError("There is too much to write in this conversation.", after_s=wait_s)
            await trio.sleep(wait_s)

    async def write(self, text: str) -> str:
        """Writes a message, and returns its ``ts``, which is its id."""
        fields = {
            "channel": self.conversation.channel,
            "text": escape(text),
            "unfurl_links": False,
            "unfurl_media": False,
        }
        if self.conversation.thread_ts is not None:
            fields["thread_ts"] = self.conversation.thread_ts
        return (await self.api.call("chat.postMessage", fields)).ts

    async def edit(self, message_id: str, text: str) -> None:
        """Replaces the text of a message."""
        # `parse` has another default here than in chat.postMessage.
        fields = {"channel": self.conversation.channel, "ts": message_id, "text": escape(text), "parse": "none"}
        await self.api.call("chat.update", fields)

    async def delete(self, message_id: str) -> None:
        """Deletes a message."""
        await self.api.call("chat.delete", {"channel": self.conversation.channel, "ts": message_id})

    def classify(self, error: PlatformError, *, is_edit: bool) -> Verdict:
        """A message that was deleted, or that the workspace does not allow to edit, is written anew."""
        if isinstance(error, RequestRejected):
            return "replace" if is_edit and error.code in _NOT_EDITABLE else "fail"
        return "later"


def _retry_after_s(value: str | None) -> float | None:
    """The value of ``Retry-After``, which is a number of seconds ("Rate limits")."""
    return float(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 9 else None
