"""Shows a text that grows in messages of a platform: written once, then edited, and never faster than allowed.

What is shown is the newest text at the moment at which something may be sent. What came in between is never sent: an
edit that is refused or late is dropped, and not queued. What has to arrive is the text at the end, and that is a
delivery of the outbox, which goes on from what the display has shown (`Shown`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import trio


class NotShown(Exception):
    """A message was not written or edited, which does not matter much: more text follows.

    Args:
        after_s: How long the platform wants to be left alone; None = nothing more can be shown.
    """

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class Screen(Protocol):
    """Where in a platform one text is shown."""

    async def write(self, text: str) -> str:
        """Writes a new message, and returns its id. May raise `NotShown`."""

    async def edit(self, message_id: str, text: str) -> None:
        """Changes one. May raise `NotShown`."""


@attrs.frozen
class Shown:
    """A message that was written.

    Attributes:
        length: Of its text, in characters. A text that grows is the same where it is as long; -1 = it is not known.
    """

    id: str
    length: int


def next_step(shown: Sequence[Shown], passages: Sequence[str]) -> tuple[str | None, str] | None:
    """What is to be done next so that the passages are shown: the id of the message to edit (None = write a new one),
    and its text; None = there is nothing left to do.

    >>> next_step([Shown("1", 5), Shown("2", 3)], ["Hello", "you there"])
    ('2', 'you there')
    """
    for index, passage in enumerate(passages):
        if index >= len(shown):
            return None, passage
        if shown[index].length != len(passage):
            return shown[index].id, passage
    return None


class Display:
    """Shows one text. A `orders.Live`; it works while `run` does.

    Attributes:
        shown: The messages so far, in their order.

    Args:
        screen: Where.
        split: Makes passages of the text.
        interval_s: The time between two messages or edits, at least.
        shown: What was shown of it before.
    """

    def __init__(
        self, screen: Screen, *, split: Callable[[str], list[str]], interval_s: float, shown: Sequence[Shown] = ()
    ) -> None:
        self.shown = list(shown)
        self._screen = screen
        self._split = split
        self._interval_s = interval_s
        self._text = ""
        self._news = trio.Event()
        self._ending = trio.Event()
        self._ended = trio.Event()

    def show(self, text: str) -> None:
        """The text so far. Synchronous, and may be called as often as there is more."""
        self._text = text
        self._news.set()

    async def end(self) -> Mapping[str, Any]:
        """Stops showing, but waits for what is being sent: whether it arrived must be known. Returns what the delivery
        of the whole text goes on from: `dump` of what was shown, and whether nothing but edits are left to do, which
        may be done again (``repeatable``)."""
        self._ending.set()
        self._news.set()
        await self._ended.wait()
        return {**dump(self.shown), "repeatable": 0 < len(self._split(self._text)) <= len(self.shown)}

    async def run(self) -> None:  # noqa: ASYNC910 - only where it has ended before it began
        """Shows the text until `end`, or until nothing more can be shown."""
        try:
            while not self._ending.is_set():
                await self._news.wait()
                self._news = trio.Event()
                pause_s = await self._step()
                if pause_s is None:
                    return
                with trio.move_on_after(pause_s):
                    await self._ending.wait()
        finally:
            self._ended.set()

    async def _step(self) -> float | None:
        """Sends one thing at most; returns for how long to rest, None = for ever."""
        step = next_step(self.shown, self._split(self._text))
        if step is None or self._ending.is_set():
            await trio.lowlevel.checkpoint()
            return 0.0
        try:
            await take_step(self._screen, self.shown, step)
        except NotShown as error:
            if error.after_s is None:
                return None  # noqa: ASYNC910 - the platform was asked
            self._news.set()  # what was not shown is tried again, unless there is more by then
            return max(self._interval_s, error.after_s)  # noqa: ASYNC910 - as above
        if next_step(self.shown, self._split(self._text)) is not None:
            self._news.set()
        return self._interval_s


async def take_step(screen: Screen, shown: list[Shown], step: tuple[str | None, str]) -> None:
    """Does what `next_step` says, and notes it."""
    message_id, text = step
    if message_id is None:
        shown.append(Shown(await screen.write(text), len(text)))
        return
    await screen.edit(message_id, text)
    index = next(index for index, one in enumerate(shown) if one.id == message_id)
    shown[index] = Shown(message_id, len(text))


def dump(shown: Sequence[Shown]) -> dict[str, Any]:  # Any: JSON
    """What was shown, as JSON."""
    return {"shown": [[one.id, one.length] for one in shown]}


def load(value: Mapping[str, Any]) -> list[Shown]:
    """The inverse of `dump`; of what has no such key, nothing."""
    return [Shown(str(message_id), int(length)) for message_id, length in value.get("shown", ())]
