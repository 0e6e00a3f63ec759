"""The poller: who is called back, who no longer, and that nobody is held up."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.support.logs import Logs
from trigate.concurrency.poller import LINGER_S, PEER_CLOSED, READABLE, TURN, Poller, open_poller

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")

Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def _pairs(count: int) -> Iterator[list[Pair]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            near, far = socket.socketpair()
            for each in (near, far):
                each.setblocking(False)
                stack.enter_context(each)
            found.append((near, far))
        yield found


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Four pairs of connected sockets."""
    with _pairs(4) as found:
        yield found


@contextlib.asynccontextmanager
async def _opened():  # type: ignore[no-untyped-def]
    async with open_poller() as poller:
        assert poller is not None
        with trio.fail_after(5):
            yield poller


async def until(holds: Callable[[], object]) -> None:
    """Waits for what the poller's task brings about."""
    while not holds():  # noqa: ASYNC110 - it is made by a callback that knows nothing of this task
        await trio.sleep(0.001)


async def test_it_calls_back_while_something_is_ready(pairs: list[Pair]) -> None:
    """Again and again, as long as it is; with the events; and only for what is asked for."""
    (near, far), (quiet, _), *_ = pairs
    told: list[tuple[str, int]] = []
    async with _opened() as poller:
        poller.add(near.fileno(), READABLE, lambda events: told.append(("near", events)))
        poller.add(quiet.fileno(), READABLE, lambda events: told.append(("quiet", events)))
        assert len(poller) == 2
        await trio.sleep(0.005)
        assert told == []
        far.send(b"x")
        await until(lambda: len(told) > 3)  # nobody takes it
        assert set(told) == {("near", READABLE)}
        near.recv(1)
        count = len(told)
        await trio.sleep(0.005)
        assert len(told) == count


async def test_the_end_is_told_though_nothing_is_asked_for(pairs: list[Pair]) -> None:
    """With no events, what the peer sends is not told, and that it has gone is."""
    (near, far), *_ = pairs
    told: list[int] = []

    def note(events: int) -> None:
        told.append(events)
        poller.remove(near.fileno())

    async with _opened() as poller:
        poller.add(near.fileno(), 0, note)
        far.send(b"x")
        await trio.sleep(0.005)
        assert told == []
        far.close()
        await until(lambda: bool(told))
        assert told[0] & select.EPOLLHUP
        assert len(poller) == 0


async def test_a_half_close_is_told_behind_unread_bytes(pairs: list[Pair]) -> None:
    """`PEER_CLOSED` is told though bytes stand before it that nobody has read, and is not told for those."""
    (near, far), *_ = pairs
    told: list[int] = []

    def note(events: int) -> None:
        told.append(events)
        poller.remove(near.fileno())

    async with _opened() as poller:
        poller.add(near.fileno(), PEER_CLOSED, note)
        far.send(b"unread")
        await trio.sleep(0.005)
        assert told == []
        far.shutdown(socket.SHUT_WR)
        await until(lambda: told)
        assert told[0] & PEER_CLOSED


async def test_who_was_removed_is_not_called_back(pairs: list[Pair]) -> None:
    """Not even in this turn: two are ready, the first one called removes the other, whichever it is."""
    called: list[int] = []
    first, second = (near.fileno() for near, _ in pairs[:2])
    async with _opened() as poller:
        for mine, other in ((first, second), (second, first)):

            def take(_: int, mine: int = mine, other: int = other) -> None:
                called.append(mine)
                poller.remove(mine)
                poller.remove(other)

            poller.add(mine, READABLE, take)
        for _, far in pairs[:2]:
            far.send(b"x")
        await until(lambda: called)
        await trio.sleep(0.005)
        assert len(called) == 1
        assert len(poller) == 0


async def test_a_callback_adds_others_and_itself_again(pairs: list[Pair]) -> None:
    """What is added in a turn is called back in one after it, also the own socket with another callback."""
    called: list[str] = []
    (near, far), (other, other_far), *_ = pairs
    other_far.send(b"x")
    async with _opened() as poller:

        def first(_: int) -> None:
            called.append("first")
            poller.remove(near.fileno())
            poller.add(near.fileno(), READABLE, second)
            poller.add(other.fileno(), READABLE, third)
            assert called == ["first"]

        def second(_: int) -> None:
            called.append("second")
            poller.remove(near.fileno())

        def third(_: int) -> None:
            called.append("third")
            poller.remove(other.fileno())

        poller.add(near.fileno(), READABLE, first)
        far.send(b"x")
        await until(lambda: len(called) == 3)
        assert called[0] == "first"
        assert sorted(called) == ["first", "second", "third"]
        assert len(poller) == 0


async def test_a_crash_ends_the_watch_of_that_socket_only(pairs: list[Pair], logs: Logs) -> None:
    """It is logged once, the socket is forgotten, its owner may still remove it, and others are called back."""
    logs.expect_error("callback_crashed")
    (near, far), (other, other_far), *_ = pairs
    called: list[int] = []

    def crash(_: int) -> None:
        raise ValueError("in a callback")

    async with _opened() as poller:
        poller.add(near.fileno(), READABLE, crash)
        poller.add(other.fileno(), READABLE, called.append)
        far.send(b"x")
        await until(lambda: logs.named("callback_crashed"))
        other_far.send(b"x")
        await until(lambda: called)
        assert len(poller) == 1
        poller.remove(near.fileno())
        poller.remove(other.fileno())
        assert len(poller) == 0
        poller.add(near.fileno(), READABLE, called.append)  # the epoll has forgotten it too
        poller.remove(near.fileno())
    assert len(logs.named("callback_crashed")) == 1


async def test_others_have_their_turn_while_sockets_are_always_ready() -> None:
    """More sockets are ready for ever than fit into a turn: each is called back, and no other task waits for longer
    than a linger and the turn in it."""
    counts: dict[int, int] = {}
    with _pairs(TURN + 50) as pairs:
        async with _opened() as poller:
            for near, far in pairs:
                counts[near.fileno()] = 0

                def count(_: int, fd: int = near.fileno()) -> None:
                    counts[fd] += 1

                poller.add(near.fileno(), READABLE, count)
                far.send(b"x")
            turns = 0
            while min(counts.values()) < 20:
                before = sum(counts.values())
                await trio.lowlevel.checkpoint()
                turns += 1
                between = sum(counts.values()) - before
                assert between <= (LINGER_S / 1e-7)  # no callback is that cheap: a turn that never ends is found
            assert turns > 2
            assert max(counts.values()) <= 3 * min(counts.values()) + 3, "each socket has its share"
            for near, _ in pairs:
                poller.remove(near.fileno())


async def test_what_a_turn_wakes_runs_soon(pairs: list[Pair]) -> None:
    """A task that a callback wakes runs though sockets are ready without an end, and so does one that only sleeps."""
    (near, far), (busy, busy_far), *_ = pairs
    busy_far.send(b"x")
    woken = trio.Event()
    async with _opened() as poller:
        poller.add(busy.fileno(), READABLE, lambda _: None)
        poller.add(near.fileno(), READABLE, lambda _: woken.set())
        far.send(b"x")
        await woken.wait()
        slept = trio.current_time()
        await trio.sleep(0.01)
        assert trio.current_time() - slept < 1


async def test_now_is_the_time_of_the_turn(pairs: list[Pair]) -> None:
    """``now`` moves on while it runs, and is not in the future."""
    (near, far), *_ = pairs
    seen: list[tuple[float, float]] = []
    async with _opened() as poller:
        began = poller.now
        await trio.sleep(0.02)

        def note(_: int) -> None:
            seen.append((poller.now, trio.current_time()))
            near.recv(1)

        poller.add(near.fileno(), READABLE, note)
        far.send(b"x")
        await until(lambda: seen)
        assert began + 0.02 <= seen[0][0] <= seen[0][1] < seen[0][0] + 1


def _epolls() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "eventpoll" in os.readlink(f"/proc/self/fd/{fd}")
    return found


async def test_nothing_is_left_when_it_is_closed(pairs: list[Pair]) -> None:
    """Its task and its descriptor are gone, however its block ended; the sockets are still their owners'."""
    (near, far), *_ = pairs
    before = _epolls()
    kept: list[Poller] = []
    with pytest.RaisesGroup(ValueError):
        async with open_poller() as poller:
            assert poller is not None
            kept.append(poller)
            poller.add(near.fileno(), READABLE, lambda _: None)
            far.send(b"x")
            await trio.sleep(0.005)
            assert _epolls() == before + 1
            raise ValueError("out of the block")
    assert _epolls() == before
    assert near.recv(1) == b"x"
    with pytest.raises(ValueError, match="closed"):
        kept[0].add(near.fileno(), READABLE, lambda _: None)


async def test_it_ends_while_sockets_are_ready(pairs: list[Pair]) -> None:
    """Also where its task was just about to call back as the block ended."""
    (near, far), *_ = pairs
    far.send(b"x")
    for _ in range(20):
        async with _opened() as poller:
            poller.add(near.fileno(), READABLE, lambda _: None)
            await trio.lowlevel.checkpoint()


async def test_without_epoll_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that have no epoll give None, and whoever would use one does without."""
    monkeypatch.delattr(select, "epoll")
    async with open_poller() as poller:
        assert poller is None
