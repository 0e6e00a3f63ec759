"""One attempt to deliver a reply, on a scripted platform."""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs
import msgspec
import pytest
import trio

from tests.channels.services import open_services
from trigate.channels import replies
from trigate.channels.adapter import ChannelServices, PlatformError, RequestRejected, TokenRejected
from trigate.channels.delivery import Verdict, deliver
from trigate.channels.message_split import split
from trigate.runs.outbox import Receipt
from trigate.store.records import Delivery

GONE = RequestRejected("it was deleted", code="gone", status=200)
BLOCKED = RequestRejected("the user has blocked the bot", code="blocked", status=403)
THROTTLED = PlatformError("too often", after_s=2.0)
OUTAGE = PlatformError("connection refused")
UNANSWERED = PlatformError("no response", unsure=True)


@attrs.define(eq=False)
class ScriptedWriter:
    """A `ReplyWriter` in memory.

    Attributes:
        texts: The messages by their ids.
        calls: Each request: its name, and the text or the id.
        errors: Raised by the next requests, one each; None = this one succeeds.
        slow_s: How long a request takes.
    """

    texts: dict[str, str] = attrs.field(factory=dict)
    calls: list[tuple[str, str]] = attrs.field(factory=list)
    errors: deque[PlatformError | None] = attrs.field(factory=deque)
    slow_s: float = 0.0

    async def _request(self, name: str, argument: str) -> None:
        self.calls.append((name, argument))
        await trio.sleep(self.slow_s)
        error = self.errors.popleft() if self.errors else None
        if error is not None:
            raise error

    async def wait_allowed(self, message_id: str | None, *, until: float) -> None:
        """Allows every request."""
        await trio.lowlevel.checkpoint()

    async def write(self, text: str) -> str:
        """Writes a message."""
        await self._request("write", text)
        message_id = str(len(self.calls))
        self.texts[message_id] = text
        return message_id

    async def edit(self, message_id: str, text: str) -> None:
        """Edits a message."""
        await self._request("edit", message_id)
        self.texts[message_id] = text

    async def delete(self, message_id: str) -> None:
        """Deletes a message."""
        await self._request("delete", message_id)
        del self.texts[message_id]

    def classify(self, error: PlatformError, *, is_edit: bool) -> Verdict:
        """Only a deleted message is written anew."""
        if isinstance(error, RequestRejected):
            return "replace" if is_edit and error.code == "gone" else "fail"
        return "wait" if error.after_s is not None else "later"


def delivery_of(text: str, *, shown: dict[str, str] | None = None, failed: bool = False) -> Delivery:
    """The delivery of a reply; ``shown`` are the messages that show the run already."""
    body = {
        "type": "run.failed" if failed else "run.completed",
        "data": {"id": "run_1", "action": "chat", "status": 502 if failed else 200, "result": {"reply": text}},
        "reply_to": {},
        "live": {"shown": [[message_id, len(before)] for message_id, before in (shown or {}).items()]},
    }
    return Delivery(
        id="msg_1",
        run_id="run_1",
        channel="bot",
        target="1",
        body=msgspec.json.encode(body),
        created_at=0.0,
        due_at=0.0,
    )


async def attempt(
    writer: ScriptedWriter, delivery: Delivery, services: ChannelServices | None = None, **more: Any
) -> Receipt:
    """Makes one attempt of ten seconds, with messages of four characters."""
    options: dict[str, Any] = {"attempt_s": 10.0, "remainder_after_s": 5.0, **more}
    if services is None:
        async with open_services() as opened:
            return await attempt(writer, delivery, opened, **more)
    return await deliver(
        delivery, replies.decode(delivery), writer, services, split=lambda text: split(text, limit=4), **options
    )


async def remainder_of(services: ChannelServices) -> tuple[Delivery, list[list[Any]]]:
    """The delivery that holds the rest, and the messages that it lists."""
    [rest] = await services.store.deliveries.of_run("run_1")
    return rest, replies.decode(rest).live["shown"]


async def test_edits_and_writes(autojump_clock: object) -> None:
    """The shown message is edited if its text is another, and the missing ones are written."""
    writer = ScriptedWriter({"a": "on"})
    assert (await attempt(writer, delivery_of("one two", shown=writer.texts))).delivered
    assert writer.calls == [("edit", "a"), ("write", "two")]


async def test_superfluous_messages_are_deleted(autojump_clock: object) -> None:
    """If the reply is shorter than what is shown, the rest is deleted; an error there is ignored."""
    writer = ScriptedWriter({"a": "one", "b": "two", "c": "six"})
    writer.errors.append(OUTAGE)
    assert (await attempt(writer, delivery_of("one", shown=writer.texts))).delivered
    assert writer.texts == {"a": "one", "b": "two"}


async def test_failure_keeps_the_shown_messages(autojump_clock: object) -> None:
    """A failed run adds messages, and neither edits nor deletes those that are shown."""
    writer = ScriptedWriter({"a": "on"})
    assert (await attempt(writer, delivery_of("", shown=writer.texts, failed=True))).delivered
    assert writer.texts["a"] == "on"
    assert {name for name, _ in writer.calls} == {"write"}


async def test_replaced(autojump_clock: object) -> None:
    """A message that cannot be edited is written anew, with those after it."""
    writer = ScriptedWriter({"a": "on", "b": "tw"})
    writer.errors.append(GONE)
    assert (await attempt(writer, delivery_of("one two", shown=writer.texts))).delivered
    assert writer.calls == [("edit", "a"), ("write", "one"), ("write", "two")]


async def test_rejected(autojump_clock: object) -> None:
    """A rejected message fails the delivery for good, with the status of the platform."""
    writer = ScriptedWriter(errors=deque([BLOCKED]))
    receipt = await attempt(writer, delivery_of("one"))
    assert receipt == Receipt(delivered=False, status=403, error="the user has blocked the bot")


async def test_short_pause(autojump_clock: trio.testing.MockClock) -> None:
    """A pause that fits into the attempt is waited for."""
    writer = ScriptedWriter(errors=deque([THROTTLED]))
    began = trio.current_time()
    assert (await attempt(writer, delivery_of("one"))).delivered
    assert trio.current_time() - began == pytest.approx(2.0)


async def test_long_pause(autojump_clock: object) -> None:
    """A longer pause is left to another attempt."""
    writer = ScriptedWriter(errors=deque([THROTTLED]))
    receipt = await attempt(writer, delivery_of("one"), attempt_s=1.0)
    assert receipt == Receipt(delivered=False, again=True, after_s=2.0, error="too often")


@pytest.mark.parametrize("error", [OUTAGE, TokenRejected("not this token")])
async def test_nothing_written(autojump_clock: object, error: PlatformError) -> None:
    """If no message was written, the same delivery is tried again."""
    writer = ScriptedWriter(errors=deque([error]))
    receipt = await attempt(writer, delivery_of("one two"))
    assert receipt == Receipt(delivered=False, again=True, error=error.message)


async def test_remainder_after_an_error(autojump_clock: object) -> None:
    """After a message was written, the rest becomes another delivery that lists it; the next attempt completes it."""
    writer = ScriptedWriter(errors=deque([None, OUTAGE]))
    async with open_services() as services:
        assert (await attempt(writer, delivery_of("one two"), services)).delivered
        rest, shown = await remainder_of(services)
        assert shown == [["1", 3]]
        assert (rest.target, rest.state) == ("1", "pending")
        assert (await attempt(writer, rest, services)).delivered
    assert list(writer.texts.values()) == ["one", "two"]


async def test_remainder_after_the_time_limit(autojump_clock: object) -> None:
    """After the time limit, the first message is still tried, and no further one is started."""
    writer = ScriptedWriter(slow_s=11.0)
    async with open_services() as services:
        assert (await attempt(writer, delivery_of("one two six"), services)).delivered
        assert writer.calls == [("write", "one")]
        _, shown = await remainder_of(services)
        assert shown == [["1", 3]]


async def test_unsure(autojump_clock: object) -> None:
    """A new message that may have arrived ends the attempt as unsure, also after others; an edit is never unsure."""
    writer = ScriptedWriter(errors=deque([None, UNANSWERED]))
    async with open_services() as services:
        receipt = await attempt(writer, delivery_of("one two"), services)
        assert (receipt.delivered, receipt.again, receipt.unsure) == (False, True, True)
        assert await services.store.deliveries.of_run("run_1") == []
    writer = ScriptedWriter({"a": "on"}, errors=deque([UNANSWERED]))
    receipt = await attempt(writer, delivery_of("one", shown=writer.texts))
    assert (receipt.delivered, receipt.again, receipt.unsure) == (False, True, False)
