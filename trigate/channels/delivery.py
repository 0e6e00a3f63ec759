"""Makes one attempt to deliver a reply: the loop that all platforms share.

An attempt edits the messages that show the run already, writes those that are missing, and deletes those that are too
many (a run that was started again may have a shorter answer). Three rules keep a user from reading anything twice:

* A new message that may have arrived is never written again: platforms have no key by which they would recognise it.
  The attempt then ends as ``unsure``. An edit may be repeated.
* Once a message was written, an attempt that has to stop stores the rest as another delivery
  (`replies.add_remainder`), which lists the messages written so far. Repeating this delivery would write them twice.
* A message that can no longer be edited (deleted, too old) is written anew, with all that follow it.

**Units:** times are seconds of Trio's clock. An attempt starts no further message after its time limit, so that with
one more request it stays below `runs.outbox.ATTEMPT_S`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal, Protocol

import trio

from trigate.channels import live_message, replies
from trigate.channels.adapter import ChannelServices, PlatformError, RequestRejected
from trigate.channels.live_message import Screen, Shown
from trigate.channels.replies import Reply
from trigate.errors import StoreUnavailable
from trigate.runs.outbox import Receipt
from trigate.store.records import Delivery

Verdict = Literal["replace", "fail", "wait", "later"]
"""What follows an error: ``replace`` = the message cannot be edited, so write it anew; ``fail`` = give up; ``wait`` =
try again within this attempt, if the pause that the platform asked for is short enough; ``later`` = leave it to another
attempt."""


class ReplyWriter(Screen, Protocol):
    """Writes the messages of one reply to one chat. Its methods raise `PlatformError`."""

    async def wait_allowed(self, message_id: str | None, *, until: float) -> None:
        """Waits until the platform's limits allow a new message (None). An edit is counted, but never held back: it
        completes a reply that the user is reading.

        Raises:
            PlatformError: That would take longer than ``until``; its ``after_s`` says how long.
        """

    async def delete(self, message_id: str) -> None:
        """Deletes a message."""

    def classify(self, error: PlatformError, *, is_edit: bool) -> Verdict:
        """Decides what follows an error of `edit` (``is_edit``), or of `wait_allowed` and `write`."""


async def deliver(
    delivery: Delivery,
    reply: Reply,
    writer: ReplyWriter,
    services: ChannelServices,
    *,
    split: Callable[[str], list[str]],
    attempt_s: float,
    remainder_after_s: float,
) -> Receipt:
    """Makes one attempt to deliver a reply.

    Args:
        reply: The decoded body of the delivery.
        split: Splits a text into messages of the platform.
        attempt_s: After how many seconds the attempt writes no further message; the first is always tried.
        remainder_after_s: The pause before the rest of the reply is delivered, unless the platform asks for one.
    """
    # A failure is one line; the messages that show a part of the answer stay.
    shown = [] if reply.has_failed else live_message.load(reply.live)
    passages = split(reply.text())
    until = trio.current_time() + attempt_s
    written = 0
    while (step := live_message.next_step(shown, passages)) is not None:
        edited_id, _ = step
        try:
            await writer.wait_allowed(edited_id, until=until)
            if written and edited_id is None and trio.current_time() > until:
                return await _leave_remainder(services, delivery, shown, after_s=0.0)
            await live_message.take_step(writer, shown, step)
        except PlatformError as error:
            await trio.lowlevel.checkpoint()
            verdict = writer.classify(error, is_edit=edited_id is not None)
            if verdict == "replace" and edited_id is not None:
                del shown[live_message.index_of(shown, edited_id) :]
            elif verdict == "fail":
                status = error.status if isinstance(error, RequestRejected) else 0
                return Receipt(delivered=False, status=status, error=error.message)
            elif verdict == "wait" and error.after_s and trio.current_time() + error.after_s < until:
                await trio.sleep(error.after_s)
            else:
                unsure = error.unsure and edited_id is None
                if written and not unsure:
                    return await _leave_remainder(services, delivery, shown, after_s=error.after_s or remainder_after_s)
                return Receipt(delivered=False, again=True, after_s=error.after_s, error=error.message, unsure=unsure)
        else:
            written += edited_id is None
    for message in shown[len(passages) :]:
        with contextlib.suppress(PlatformError):
            await writer.delete(message.id)
    await trio.lowlevel.checkpoint()
    return Receipt(delivered=True, status=200)


async def _leave_remainder(
    services: ChannelServices, delivery: Delivery, shown: list[Shown], *, after_s: float
) -> Receipt:
    """Stores the rest of a delivery as another one; this one has then arrived."""
    await trio.lowlevel.checkpoint()
    try:
        await replies.add_remainder(services.store, delivery, shown, after_s=after_s)
    except StoreUnavailable as error:
        return Receipt(delivered=False, error=error.message, unsure=True)
    services.outbox.wake()
    return Receipt(delivered=True, status=200)
