"""The text that a channel sends when a run has ended, and the rows of the store that belong to it. The same for all
platforms.

A reply is a delivery (`store.records.Delivery`). The messages that show a run while it goes on are stored as deliveries
that have arrived. If the process exits meanwhile, the process that continues the run edits these messages.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import trio

from trigate.channels import live_message
from trigate.channels.live_message import Shown
from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import Delivery, Run


class Reply(msgspec.Struct, kw_only=True):
    """The body of a delivery, as `runs.request.delivery_of` makes it.

    Attributes:
        data: A `runs.request.view`.
        reply_to: The chat that the reply goes to, in the adapter's own form.
        live: The messages that the adapter has shown (`runs.request.Live.end`).
    """

    type: str
    data: dict[str, Any]  # Any: JSON
    reply_to: dict[str, Any]
    live: dict[str, Any] = {}

    @property
    def has_failed(self) -> bool:
        """Whether the run failed: the messages that show a part of the answer stay, and a further one reports it."""
        return self.type == "run.failed"

    def text(self) -> str:
        """The text for the user; ``""`` = none. Of an error, it contains only what the user can do: the details are for
        the operator, and are stored with the run.

        >>> data = {"id": "run_1", "action": "chat", "status": 502}
        >>> Reply(type="run.failed", data=data, reply_to={}).text()
        'No answer: the model could not be reached. Please try again later. (run_1)'
        >>> Reply(type="run.completed", data={**data, "result": {"reply": "Hello"}}, reply_to={}).text()
        'Hello'
        """
        data, result = self.data, self.data.get("result") or {}
        if self.has_failed:
            begun = "The answer above is incomplete" if live_message.load(self.live) else "No answer"
            return f"{begun}: {_reason(data.get('status') or 500)} ({data['id']})"
        if data["action"] == "reset":
            return "This conversation begins anew."
        if data["action"] == "stop":
            return "Stopped." if result.get("stopped") else "There was nothing to stop."
        reply = str(result.get("reply") or "")
        if self.type == "run.cancelled":
            return reply  # the user who stopped the run needs no explanation
        return reply if reply.strip() else "The model answered with nothing."


_decoder = msgspec.json.Decoder(Reply)


def decode(delivery: Delivery) -> Reply:
    """Reads the body of a delivery."""
    return _decoder.decode(delivery.body)


def _reason(status: int) -> str:
    if status == 409:
        return "the message before this one is still being answered. Please try again later."
    if status == 429:
        return "the model has too much to do. Please try again later."
    if status >= 500:
        return "the model could not be reached. Please try again later."
    return "the model does not take this message."


async def record_shown(store: Store, run: Run, message_id: str) -> None:
    """Stores the id of a message that shows a run, so that the process that continues the run edits it. If the store is
    unavailable, nothing is stored."""
    now = time.time()
    shown = Delivery(
        id=f"{run.id}.{message_id}",
        run_id=run.id,
        channel=run.channel,
        target=message_id,
        body=msgspec.json.encode({"live": message_id}),
        created_at=now,
        due_at=now,
        done_at=now,
        state="delivered",
    )
    with contextlib.suppress(StoreUnavailable):
        await store.deliveries.add(shown)
    await trio.lowlevel.checkpoint()


async def recorded_shown(store: Store, run: Run) -> list[Shown]:
    """The messages that show a run since an earlier start of it (`record_shown`).

    Raises:
        StoreUnavailable: They cannot be read.
    """
    deliveries = await store.deliveries.of_run(run.id)
    return [Shown(each.target, -1) for each in deliveries if each.id == f"{run.id}.{each.target}"]


async def add_remainder(store: Store, delivery: Delivery, shown: Sequence[Shown], *, after_s: float) -> None:
    """Stores the unwritten rest of a delivery as another delivery, which lists the messages that were written, so that
    no process writes them twice.

    Raises:
        StoreUnavailable: It could not be stored.
    """
    now = time.time()
    rest = Delivery(
        id=f"{delivery.id}r",
        run_id=delivery.run_id,
        channel=delivery.channel,
        target=delivery.target,
        body=msgspec.json.encode(msgspec.structs.replace(decode(delivery), live=live_message.dump(shown))),
        created_at=now,
        due_at=now + after_s,
        repeatable=delivery.repeatable,
    )
    await store.deliveries.add(rest)
