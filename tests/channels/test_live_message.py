"""A text that grows, in messages of a platform."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trigate.channels.live_message import Display, NotShown, Shown, dump, load
from trigate.channels.message_split import split


class Wall:
    """A screen in memory."""

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
        """A `Screen`'s."""
        await self._called("write", text)
        self._written += 1
        return str(self._written)

    async def edit(self, message_id: str, text: str) -> None:
        """A `Screen`'s."""
        await self._called(message_id, text)


def _display(wall: Wall) -> Display:
    return Display(wall, split=lambda text: split(text, limit=10), interval_s=1.0)


async def test_the_newest_text_is_shown_at_intervals(autojump_clock: object) -> None:
    """The first text at once; then the newest, and nothing in between, once an interval; a second message when full."""
    wall = Wall()
    display = _display(wall)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        for count in range(1, 27):
            display.show("abc def ghi jkl"[: count // 2 + 2])
            await trio.sleep(0.1)
        await trio.sleep(5)
        assert await display.end() == {"shown": [["1", 7], ["2", 7]], "repeatable": True}
    calls = [(round(at - began, 1), what, text) for at, what, text in wall.calls]
    assert calls == [
        (0.0, "write", "ab"),
        (1.0, "1", "abc def"),
        (2.0, "write", "ghi"),
        (3.0, "2", "ghi jkl"),
    ]


async def test_what_is_refused_is_dropped(autojump_clock: object) -> None:
    """Nothing is sent for as long as the platform says, and then the newest text only."""
    wall = Wall()
    wall.refuse = [7.0]
    display = _display(wall)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        for text in ("a", "ab", "abc"):
            display.show(text)
            await trio.sleep(2)
        await trio.sleep(2)
        await display.end()
    assert [(at - began, text) for at, _, text in wall.calls] == [(0.0, "a"), (7.0, "abc")]


async def test_after_a_last_refusal_nothing_is_sent(autojump_clock: object) -> None:
    """Where nothing more can be shown, the run goes on all the same."""
    wall = Wall()
    wall.refuse = [None]
    display = _display(wall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        display.show("a")
        await trio.sleep(3)
        display.show("ab")
        await trio.sleep(3)
        assert await display.end() == {"shown": [], "repeatable": False}
    assert len(wall.calls) == 1


async def test_the_end_waits_for_what_is_under_way(autojump_clock: object) -> None:
    """A message that is being written is known to the delivery, which would write it a second time."""
    wall = Wall()
    wall.slow_s = 4.0
    display = _display(wall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        display.show("a")
        await wait_all_tasks_blocked()
        began = trio.current_time()
        display.show("ab")
        assert load(await display.end()) == [Shown("1", 1)]
        assert trio.current_time() - began == pytest.approx(4.0)
    assert len(wall.calls) == 1


async def test_the_end_of_what_was_never_shown(autojump_clock: object) -> None:
    """It does not wait."""
    display = _display(Wall())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(display.run)
        assert await display.end() == {**dump([]), "repeatable": False}
    assert load({}) == []
