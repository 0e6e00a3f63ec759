"""A growing text is shown in messages of a platform."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trigate.channels.adapter import PlatformError, RequestRejected, TokenRejected
from trigate.channels.live_message import RETRY_S, Display, LimitedScreen, NotShown, Shown, dump, load
from trigate.channels.message_split import split


class MemoryScreen:
    """A `Screen` in memory.

    Attributes:
        calls: The time, the id of the edited message (or "write"), and the text of each request.
        refuse: The ``after_s`` of `NotShown` for the next requests.
        slow_s: How long a request takes.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, str]] = []
        self.refuse: list[float | None] = []
        self.slow_s = 0.0
        self._written = 0

    async def _called(self, what: str, text: str) -> None:
        self.calls.append((trio.current_time(), what, text))
        await trio.sleep(self.slow_s)
        if self.refuse:
            raise NotShown(self.refuse.pop(0))

    async def write(self, text: str) -> str:
        """Writes a message."""
        await self._called("write", text)
        self._written += 1
        return str(self._written)

    async def edit(self, message_id: str, text: str) -> None:
        """Edits a message."""
        await self._called(message_id, text)


def _display(screen: MemoryScreen) -> Display:
    return Display(screen, split=lambda text: split(text, limit=10), interval_s=1.0)


async def test_newest_text_at_intervals(autojump_clock: object) -> None:
    """The first text is shown at once, then the newest text once per interval; a second message when one is full."""
    screen = MemoryScreen()
    display = _display(screen)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        for count in range(1, 27):
            display.show("abc def ghi jkl"[: count // 2 + 2])
            await trio.sleep(0.1)
        await trio.sleep(5)
        assert await display.end() == {"shown": [["1", 7], ["2", 7]], "repeatable": True}
    calls = [(round(at - began, 1), what, text) for at, what, text in screen.calls]
    assert calls == [
        (0.0, "write", "ab"),
        (1.0, "1", "abc def"),
        (2.0, "write", "ghi"),
        (3.0, "2", "ghi jkl"),
    ]


async def test_refused_edit_is_dropped(autojump_clock: object) -> None:
    """Nothing is sent during the pause that the platform asked for, and only the newest text after it."""
    screen = MemoryScreen()
    screen.refuse = [7.0]
    display = _display(screen)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        for text in ("a", "ab", "abc"):
            display.show(text)
            await trio.sleep(2)
        await trio.sleep(2)
        await display.end()
    assert [(at - began, text) for at, _, text in screen.calls] == [(0.0, "a"), (7.0, "abc")]


async def test_final_refusal(autojump_clock: object) -> None:
    """After an error without a retry time, nothing more is sent, and `end` returns at once."""
    screen = MemoryScreen()
    screen.refuse = [None]
    display = _display(screen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        display.show("a")
        await trio.sleep(3)
        display.show("ab")
        await trio.sleep(3)
        assert await display.end() == {"shown": [], "repeatable": False}
    assert len(screen.calls) == 1


async def test_end_waits_for_a_request(autojump_clock: object) -> None:
    """`end` waits for a message that is being written: the delivery must know it, or it would write it again."""
    screen = MemoryScreen()
    screen.slow_s = 4.0
    display = _display(screen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        display.show("a")
        await wait_all_tasks_blocked()
        began = trio.current_time()
        display.show("ab")
        assert load(await display.end()) == [Shown("1", 1)]
        assert trio.current_time() - began == pytest.approx(4.0)
    assert len(screen.calls) == 1


async def test_end_without_text(autojump_clock: object) -> None:
    """Without any text, `end` returns at once."""
    display = _display(MemoryScreen())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        assert await display.end() == {**dump([]), "repeatable": False}
    assert load({}) == []


class FailingScreen:
    """A `Screen` that raises an error of the platform, if there is one."""

    def __init__(self, error: PlatformError | None = None) -> None:
        self.error = error
        self.edits = 0

    async def write(self, text: str) -> str:
        """Writes a message."""
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return "1"

    async def edit(self, message_id: str, text: str) -> None:
        """Edits a message."""
        self.edits += 1
        await self.write(text)


def limited(screen: FailingScreen, allowed_in_s: float | None = 0.0) -> tuple[LimitedScreen, list[str]]:
    """A screen with a limit, and the ids that it has recorded."""
    recorded: list[str] = []

    async def record(message_id: str) -> None:
        await trio.lowlevel.checkpoint()
        recorded.append(message_id)

    return LimitedScreen(screen, lambda message_id: allowed_in_s, record), recorded


async def test_limited_screen_records_messages() -> None:
    """The id of a new message is recorded; an edit is passed on."""
    inner = FailingScreen()
    screen, recorded = limited(inner)
    assert await screen.write("a") == "1"
    await screen.edit("1", "ab")
    assert (recorded, inner.edits) == (["1"], 1)


@pytest.mark.parametrize("allowed_in_s", [3.0, None])
async def test_limited_screen_keeps_to_the_limit(allowed_in_s: float | None) -> None:
    """Above the limit nothing is sent, and the error says when the next edit is allowed."""
    inner = FailingScreen()
    screen, _ = limited(inner, allowed_in_s)
    with pytest.raises(NotShown) as raised:
        await screen.edit("1", "a")
    assert (raised.value.after_s, inner.edits) == (allowed_in_s, 0)


@pytest.mark.parametrize(
    ("error", "written_after_s", "edited_after_s"),
    [
        (PlatformError("too often", after_s=7.0), 7.0, 7.0),
        (PlatformError("connection refused"), RETRY_S, RETRY_S),
        (PlatformError("no response", unsure=True), None, RETRY_S),
        (TokenRejected("not this token"), None, None),
        (RequestRejected("blocked", code="blocked", status=403), None, None),
    ],
)
async def test_limited_screen_translates_errors(
    error: PlatformError, written_after_s: float | None, edited_after_s: float | None
) -> None:
    """An error never leaves the screen but as `NotShown`. A message that may have arrived is not written again."""
    screen, recorded = limited(FailingScreen(error))
    with pytest.raises(NotShown) as raised:
        await screen.write("a")
    assert raised.value.after_s == written_after_s
    with pytest.raises(NotShown) as raised:
        await screen.edit("1", "a")
    assert raised.value.after_s == edited_after_s
    assert recorded == []
