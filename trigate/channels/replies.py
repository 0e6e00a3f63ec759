"""What a channel says of a run that has ended, and what it remembers of that: the same for all platforms.

A reply is a delivery (`store.Delivery`). Messages that show a run while it goes on are kept too, as deliveries that
have arrived, which they are: if the process ends meanwhile, the next one goes on with them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from trigate.channels import live_message
from trigate.channels.live_message import Shown
from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import Delivery, Run


class Told(msgspec.Struct, kw_only=True):
    """The body of a delivery, as `runs` makes it.

    Attributes:
        data: A `orders.view`.
        live: What the adapter has shown (`orders.Live.end`).
    """

    type: str
    data: dict[str, Any]  # Any: JSON
    reply_to: dict[str, Any]
    live: dict[str, Any] = {}

    @property
    def has_failed(self) -> bool:
        """There is no answer, or half of one, and a line that says so. What was shown stays."""
        return self.type == "run.failed"

    def words(self) -> str:
        """What the user is told; ``""`` = nothing. Of an error, only what to do: its words are for who runs the
        gateway, and are with the run.

        >>> data = {"id": "run_1", "action": "chat", "status": 502}
        >>> Told(type="run.failed", data=data, reply_to={}).words()
        'No answer: the model could not be reached. Please try again later. (run_1)'
        >>> Told(type="run.completed", data={**data, "result": {"reply": "Hello"}}, reply_to={}).words()
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
            return reply  # whoever has stopped it knows
        return reply if reply.strip() else "The model answered with nothing."


_decoder = msgspec.json.Decoder(Told)


def told(delivery: Delivery) -> Told:
    """What a delivery says."""
    return _decoder.decode(delivery.body)


def _reason(status: int) -> str:
    if status == 409:
        return "the message before this one is still being answered. Please try again later."
    if status == 429:
        return "the model has too much to do. Please try again later."
    if status >= 500:
        return "the model could not be reached. Please try again later."
    return "the model does not take this message."


async def note_shown(  # noqa: ASYNC910 - the store is asked
    store: Store, run: Run, message_id: str
) -> None:
    """Keeps the id of a message that shows a run: if this process ends, the next one edits it."""
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


async def shown_before(store: Store, run: Run) -> list[Shown]:
    """The messages that showed a run when it was begun before."""
    deliveries = await store.deliveries.of_run(run.id)
    return [Shown(each.target, -1) for each in deliveries if each.id == f"{run.id}.{each.target}"]


async def leave_rest(store: Store, delivery: Delivery, shown: Sequence[Shown], *, after_s: float) -> None:
    """Makes another delivery of what was not written yet: whoever makes it knows what is there, in whichever process,
    and so writes nothing twice.

    Raises:
        StoreUnavailable: It is not known there.
    """
    now = time.time()
    rest = Delivery(
        id=f"{delivery.id}r",
        run_id=delivery.run_id,
        channel=delivery.channel,
        target=delivery.target,
        body=msgspec.json.encode(msgspec.structs.replace(told(delivery), live=live_message.dump(shown))),
        created_at=now,
        due_at=now + after_s,
        repeatable=delivery.repeatable,
    )
    await store.deliveries.add(rest)
