"""What a message asks for and what it gets: the values of a run, and their JSON.

A `RunRequest` holds everything needed to execute a run, also after a restart with another configuration. A `RunResult`
is how the run ends: its body goes to a client that waits, and `view` shows the ended run to a client that asks later.
`delivery_of` makes the delivery of a result that has to be sent somewhere.

**Source:** the body of a callback has the shape that the Standard Webhooks specification 1.0.0 gives.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import msgspec

from trigate.config.sections import Action
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call, decode_call
from trigate.store.records import Delivery, Run, RunState, Turn

CLIENT_LEFT = 499
"""The status of a run whose client disconnected. Stored only: it is no HTTP status, and no client receives it."""

_CHAT = ENDPOINTS["/v1/chat/completions"]


@attrs.frozen(kw_only=True)
class RunRequest:
    """What a message asks for: everything needed to execute it, also after a restart with another configuration.
    Stored as JSON in `store.records.Run.request`.

    Attributes:
        channel: The hook or channel that received the message.
        owner: The owner of the session.
        session: The key of the session; None = nothing is remembered.
        text: The prompt (``chat``) or the note (``note``).
        sender: The sender's id; ``""`` = the message names none.
        reply_to: Where the result is delivered: a callback's URL, or what the channel's adapter needs to reply, where
            ``target`` names the chat that receives one reply at a time. None = the result is not delivered: a client
            waits for it or fetches it.
        finish: Whether the run continues after the client that waits for it disconnects.
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
        """Encodes the request as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, request: bytes) -> RunRequest:
        """Decodes what `encode` has made."""
        return cls(**msgspec.json.decode(request))

    def call(self) -> Call:
        """Makes the chat request, always streamed and with usage.

        Raises:
            BadRequest: The parameters of the hook do not make a valid chat request.
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
    """The display of one run on a channel: a message that is edited while the answer grows."""

    def show(self, text: str) -> None:
        """Takes the text so far. Synchronous, and called for each event: an implementation keeps the latest text and
        displays it at its own pace."""

    async def end(self) -> Mapping[str, Any]:
        """Stops the display. Returns what the delivery of the final text needs (the id of the message to edit), as
        JSON; ``repeatable`` true in it says that a second delivery does no harm."""


class LiveView(Protocol):
    """A channel that displays runs while they are executed. The final result is a delivery (`outbox.Carrier`)."""

    def watch(self, run: Run, request: RunRequest, /) -> contextlib.AbstractAsyncContextManager[Live]:
        """Displays a run for as long as the context is open."""


def waits_for_turn(action: str) -> bool:
    """Whether a run with this action queues for a slot and a session turn. The other actions control a session, and so
    must not queue behind the run that they control.

    >>> [waits_for_turn(action) for action in ("chat", "note", "reset", "history", "stop")]
    [True, True, False, False, False]
    """
    return action in ("chat", "note")


# -- results ----------------------------------------------------------------------------------------------------------


def result_body(
    run: Run,
    request: RunRequest,
    *,
    reply: str | None,
    finish_reason: str | None = None,
    usage: Usage | None = None,
    **more: object,
) -> bytes:
    """Encodes the body of a result: the same fields for every action, and those of ``more``."""
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
            "model": request.model if run.action == "chat" else None,
            "finish_reason": finish_reason,
            "usage": counts,
            "created": int(run.created_at),
            **more,
        }
    )


def is_final(status: int) -> bool:
    """Whether a retry under the same idempotency key gets this result again.

    An unavailable provider, a limit and a busy session say nothing about the message, so a sender that retries gets a
    new run.

    >>> [is_final(status) for status in (200, 400, 409, 429, 499, 502)]
    [True, True, False, False, False, False]
    """
    return status < 500 and status not in (408, 409, 429, CLIENT_LEFT)


@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ends: the arguments of `store.interface.Runs.finish`.

    Attributes:
        status: The HTTP status of the result, or `CLIENT_LEFT`.
        result: The body, as JSON: `result_body`, or that of an error.
        turn: What the run appends to its session.
        live: What the channel's `Live.end` returned.
        frees_key: Whether the idempotency key becomes free, so that a retry makes a new run.
    """

    state: RunState
    status: int
    result: bytes
    turn: Turn | None = None
    live: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON of the channel's adapter
    frees_key: bool = False


def with_result(run: Run, result: RunResult) -> Run:
    """The run as it is once it has ended, now, with this result."""
    return attrs.evolve(run, state=result.state, status=result.status, result=result.result, finished_at=time.time())


def view(run: Run) -> dict[str, Any]:  # Any: JSON
    """The run as clients see it: in ``GET /hooks/NAME/runs/ID``, and in the delivery of its result."""
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


def callback_body(*, state: RunState, at: float, data: bytes) -> bytes:
    """Encodes the body of a callback.

    Args:
        state: The state in which the run ended.
        at: When it ended, in POSIX seconds.
        data: The run as ``GET /hooks/NAME/runs/ID`` shows it, as JSON.

    >>> callback_body(state="completed", at=1674087231.5, data=b'{"id":"run_1"}').decode()
    '{"type":"run.completed","timestamp":"2023-01-19T00:13:51.500000Z","data":{"id":"run_1"}}'
    """
    ended_at = datetime.datetime.fromtimestamp(at, datetime.UTC).replace(tzinfo=None)
    timestamp = ended_at.isoformat(timespec="microseconds") + "Z"
    return msgspec.json.encode({"type": f"run.{state}", "timestamp": timestamp, "data": msgspec.Raw(data)})


def delivery_of(run: Run, request: RunRequest, result: RunResult) -> Delivery | None:
    """The delivery of a run's result; None where the request has no ``reply_to``.

    The body is the `callback_body` of the `view`. For a channel's adapter it also has ``reply_to`` and ``live``.
    """
    if request.reply_to is None:
        return None
    ended = with_result(run, result)
    now = ended.finished_at or 0.0
    body = callback_body(state=result.state, at=now, data=msgspec.json.encode(view(ended)))
    target = request.reply_to
    if not isinstance(target, str):
        own = {"reply_to": request.reply_to, "live": result.live}
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
        # A callback's receiver recognises a repetition by its id. An adapter says when only edits are left to make;
        # after a failure it sends a new message, which must not arrive twice.
        repeatable=isinstance(request.reply_to, str)
        or (result.state != "failed" and bool(result.live.get("repeatable"))),
    )
