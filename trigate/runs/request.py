"""What a message asks for, and what it gets: the values of a run, and their JSON.

A `RunRequest` holds everything needed to execute a run, also after a restart with another configuration. A result is
the body sent to a client that waits; a `view` is the run as its reader sees it later.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import msgspec

from trigate.config.sections import Action
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call, decode_call
from trigate.store.records import Delivery, Run, RunState, Turn
from trigate.webhooks.callbacks import callback_body

if TYPE_CHECKING:
    pass

CLIENT_LEFT = 499
"""The status of a run whose client did not wait for it. (No HTTP status: nobody is sent it.)"""

_CHAT = ENDPOINTS["/v1/chat/completions"]


@attrs.frozen(kw_only=True)
class RunRequest:
    """What a message asks for; everything that is needed to do it, also after a restart with another configuration.
    Kept as JSON in `store.Run.request`.

    Attributes:
        channel: The hook or channel that it came by.
        owner, session: Whose session it belongs to, and its key; session None = nothing is remembered.
        text: The prompt (``chat``) or the note (``note``).
        sender: Who sent it.
        reply_to: Where the result goes: a callback's URL, or what the channel's adapter needs to reply, of which
            ``target`` names the place where one reply at a time arrives (the chat); None = it is fetched.
        finish: It goes on where the client that waits for it leaves.
    """

    channel: str
    owner: str
    session: str | None
    action: Action
    text: str
    sender: str
    model: str
    system: str | None = None
    parameters: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON
    reply_to: Mapping[str, Any] | str | None = None
    finish: bool = False

    def encode(self) -> bytes:
        """Writes it as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, request: bytes) -> RunRequest:
        """Reads what `encode` has written."""
        return cls(**msgspec.json.decode(request))

    def call(self) -> Call:
        """The chat request that it stands for.

        Raises:
            BadRequest: It cannot be served.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            **self.parameters,
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": self.text}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return decode_call(_CHAT, msgspec.json.encode(body))


class Live(Protocol):
    """A reply that can be watched while it grows: what a channel shows of a run that goes on."""

    def show(self, text: str) -> None:
        """The text so far. Synchronous, and called often: whoever shows it takes the last one when it can."""

    async def end(self) -> Mapping[str, Any]:
        """Stops showing. Returns what the delivery of the final text has to know (the id of the message to edit), as
        JSON; with ``repeatable`` true, it may be delivered twice without harm."""


class LiveView(Protocol):
    """A channel that shows runs while they go on; what it is told at the end is a delivery (`outbox.Carrier`)."""

    def watch(self, run: Run, order: RunRequest) -> contextlib.AbstractAsyncContextManager[Live]:
        """Shows a run for as long as the context is open."""


def is_work(action: str) -> bool:
    """Whether it waits for its turn; what steers a session does not stand behind what it steers."""
    return action in ("chat", "note")


# -- results ----------------------------------------------------------------------------------------------------------


def body_of(
    run: Run,
    order: RunRequest,
    *,
    reply: str | None,
    finish_reason: str | None = None,
    usage: Usage | None = None,
    **more: object,
) -> bytes:
    """The body of a result: the same fields whatever was asked, and ``more``."""
    counts = None
    if usage is not None:
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        counts = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return msgspec.json.encode(
        {
            "id": run.id,
            "hook": run.channel,
            "session": run.session,
            "action": run.action,
            "reply": reply,
            "model": order.model if run.action == "chat" else None,
            "finish_reason": finish_reason,
            "usage": counts,
            "created": int(run.created_at),
            **more,
        }
    )


def is_final(status: int) -> bool:
    """Whether asking again under the same idempotency key gets this result again.

    A provider that is down, a limit, or a session that is busy says nothing about the message; senders try again then,
    and should be answered.

    >>> [is_final(status) for status in (200, 400, 409, 429, 499, 502)]
    [True, True, False, False, False, False]
    """
    return status < 500 and status not in (408, 409, 429, CLIENT_LEFT)


@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ends: what `store.Runs.finish` takes."""

    state: RunState
    status: int
    result: bytes
    turn: Turn | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON of the channel's adapter
    frees_key: bool = False


def as_ended(run: Run, end: RunResult) -> Run:
    return attrs.evolve(run, state=end.state, status=end.status, result=end.result, finished_at=time.time())


def view(run: Run) -> dict[str, Any]:  # Any: JSON
    """A run as its reader sees it: at ``GET /hooks/NAME/runs/ID``, and in what is delivered of it."""
    return {
        "id": run.id,
        "object": "run",
        "hook": run.channel,
        "session": run.session,
        "action": run.action,
        "state": run.state,
        "status": run.status or None,
        "created": int(run.created_at),
        "finished": int(run.finished_at) if run.finished_at is not None else None,
        "result": msgspec.Raw(run.result) if run.result else None,
    }


def delivery_of(run: Run, order: RunRequest, end: RunResult) -> Delivery | None:
    """What is to be told to the outside of a run that ends, if somebody is to be told.

    A callback's body is `callbacks.callback_body` of the `view`. That of a channel's adapter has ``reply_to`` and
    ``live`` besides, which are its own.
    """
    if order.reply_to is None:
        return None
    ended = as_ended(run, end)
    now = ended.finished_at or 0.0
    body = callback_body(state=end.state, at=now, data=msgspec.json.encode(view(ended)))
    target = order.reply_to
    if not isinstance(target, str):
        own = {"reply_to": order.reply_to, "live": end.extra}
        body = msgspec.json.encode({**msgspec.json.decode(body), **own})
        target = str(target["target"])
    return Delivery(
        id=f"msg_{secrets.token_hex(12)}",
        run_id=run.id,
        channel=run.channel,
        target=target,
        body=body,
        created_at=now,
        due_at=now,
        # a channel knows where it has nothing left to do but edits; of a failure there is a line to write
        repeatable=isinstance(order.reply_to, str) or (end.state != "failed" and bool(end.extra.get("repeatable"))),
    )
