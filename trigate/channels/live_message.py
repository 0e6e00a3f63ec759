"""Shows a growing text in messages of a platform: written once, then edited, never faster than the platform allows.

Each edit shows the newest text at the moment when a request is allowed. Versions in between are never sent: an edit
that is rejected or late is dropped, not queued. Only the final text must arrive. That is a delivery of the outbox,
which continues from the messages that are shown already (`Shown`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import trio

from trigate.channels.adapter import PlatformError, RequestRejected, TokenRejected
from trigate.concurrency.notify import Wakeup

RETRY_S = 5.0
"""The pause after an error for which the platform did not ask for a certain pause."""


class NotShown(Exception):
    """A message was not written or not edited. More text follows, so the text of this one is dropped.

    Args:
        after_s: Seconds until the next attempt; None = nothing more can be shown.
    """

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class Screen(Protocol):
    """The chat of a platform in which one text is shown. For a `Display`, its methods raise `NotShown` only."""

    async def write(self, text: str) -> str:
        """Writes a new message, and returns its id."""

    async def edit(self, message_id: str, text: str) -> None:
        """Replaces the text of a message."""


@attrs.frozen
class LimitedScreen:
    """A `Screen` that keeps to the limits of a platform and whose errors do not end the run.

    Attributes:
        screen: Writes and edits without a limit; raises `PlatformError`.
        allowed_in_s: Seconds until a message may be edited (its id) or written (None); 0.0 = now, and this one is
            counted. None = never.
        record: Stores the id of a message that was written.
    """

    screen: Screen
    allowed_in_s: Callable[[str | None], float | None]
    record: Callable[[str], Awaitable[None]]

    async def write(self, text: str) -> str:
        """Writes a message, and stores its id. Raises `NotShown`."""
        await self._check_allowed(None)
        try:
            message_id = await self.screen.write(text)
        except PlatformError as error:
            # a message that may have arrived is not written again while the text grows
            raise NotShown(None if error.unsure else _pause_s(error)) from error
        await self.record(message_id)
        return message_id

    async def edit(self, message_id: str, text: str) -> None:
        """Edits a message. Raises `NotShown`."""
        await self._check_allowed(message_id)
        try:
            await self.screen.edit(message_id, text)
        except PlatformError as error:
            raise NotShown(_pause_s(error)) from error

    async def _check_allowed(self, message_id: str | None) -> None:
        await trio.lowlevel.checkpoint()
        wait_s = self.allowed_in_s(message_id)
        if wait_s is None or wait_s > 0:
            raise NotShown(wait_s)


def _pause_s(error: PlatformError) -> float | None:
    return None if isinstance(error, RequestRejected | TokenRejected) else error.after_s or RETRY_S


@attrs.frozen
class Shown:
    """A message that was written.

    Attributes:
        length: Of its text, in characters. The text only grows, so an equal length means an equal text; -1 = unknown.
    """

    id: str
    length: int


def next_step(shown: Sequence[Shown], passages: Sequence[str]) -> tuple[str | None, str] | None:
    """The next request that brings the messages closer to the passages.

    Returns:
        The id of the message to edit (None = write a new one), and its text. None = the passages are shown.

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
    """Shows one text. A `runs.request.Live`; it shows while `run` runs.

    Attributes:
        shown: The messages so far, in their order.

    Args:
        screen: Where the text is shown.
        split: Splits the text into passages, one for each message.
        interval_s: The minimum time between two requests.
        shown: The messages that show the text already.
    """

    def __init__(
        self, screen: Screen, *, split: Callable[[str], list[str]], interval_s: float, shown: Sequence[Shown] = ()
    ) -> None:
        self.shown = list(shown)
        self._screen = screen
        self._split = split
        self._interval_s = interval_s
        self._text = ""
        self._changed = Wakeup()
        self._ending = trio.Event()
        self._ended = trio.Event()

    def show(self, text: str) -> None:
        """Takes the text so far. Synchronous; may be called any number of times."""
        self._text = text
        self._changed.set()

    async def end(self) -> Mapping[str, Any]:
        """Stops showing. Waits for a request in progress, since the delivery must know whether it arrived.

        Returns:
            What the delivery of the whole text continues from: the messages shown (`dump`), and ``repeatable``: whether
            only edits are left to do, which may be done twice.
        """
        self._ending.set()
        self._changed.set()
        await self._ended.wait()
        return {**dump(self.shown), "repeatable": 0 < len(self._split(self._text)) <= len(self.shown)}

    async def run(self) -> None:
        """Shows the text until `end`, or until nothing more can be shown."""
        try:
            while True:
                await self._changed.wait()
                if self._ending.is_set():
                    return
                pause_s = await self._step()
                if pause_s is None:
                    return
                with trio.move_on_after(pause_s):
                    await self._ending.wait()
        finally:
            self._ended.set()

    async def _step(self) -> float | None:
        """Sends at most one request; returns the seconds to pause after it, None = nothing more can be shown."""
        await trio.lowlevel.checkpoint()
        step = next_step(self.shown, self._split(self._text))
        if step is None or self._ending.is_set():
            return 0.0
        try:
            await take_step(self._screen, self.shown, step)
        except NotShown as error:
            if error.after_s is None:
                return None
            self._changed.set()  # try again, with the newest text of that time
            return max(self._interval_s, error.after_s)
        if next_step(self.shown, self._split(self._text)) is not None:
            self._changed.set()
        return self._interval_s


async def take_step(screen: Screen, shown: list[Shown], step: tuple[str | None, str]) -> None:
    """Sends the request that `next_step` returned, and updates ``shown``."""
    message_id, text = step
    if message_id is None:
        shown.append(Shown(await screen.write(text), len(text)))
        return
    await screen.edit(message_id, text)
    shown[index_of(shown, message_id)] = Shown(message_id, len(text))


def index_of(shown: Sequence[Shown], message_id: str) -> int:
    """The index of a message that is shown."""
    return next(index for index, message in enumerate(shown) if message.id == message_id)


def dump(shown: Sequence[Shown]) -> dict[str, Any]:  # Any: JSON
    """The messages shown, as JSON."""
    return {"shown": [[message.id, message.length] for message in shown]}


def load(value: Mapping[str, Any]) -> list[Shown]:
    """The inverse of `dump`; without that key, an empty list."""
    return [Shown(str(message_id), int(length)) for message_id, length in value.get("shown", ())]
