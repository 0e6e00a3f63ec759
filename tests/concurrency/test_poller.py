"""`trigate.concurrency.poller`: which callbacks are called, which are not, and that no task is delayed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.support.logs import Logs
from trigate.concurrency.poller import BATCH, LINGER_S, PEER_CLOSED, READABLE, Poller, open_poller

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")

Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def _pairs(count: int) -> Iterator[list[Pair]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            near, far = socket.socketpair()
            for sock in (near, far):
                sock.setblocking(False)
                stack.enter_context(sock)
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
    """Waits until a condition holds that the poller's task brings about."""
    while not holds():  # noqa: ASYNC110 - the callbacks do not know this task
        await trio.sleep(0.001)


async def test_it_calls_back_while_something_is_ready(pairs: list[Pair]) -> None:
    """It calls as long as an event is pending, with the pending events, and only for events that were asked for."""
    (near, far), (quiet, _), *_ = pairs
    reported: list[tuple[str, int]] = []
    async with _opened() as poller:
        poller.add(near.fileno(), READABLE, lambda events: reported.append(("near", events)))
        poller.add(quiet.fileno(), READABLE, lambda events: reported.append(("quiet", events)))
        assert len(poller) == 2
        await trio.sleep(0.005)
        assert reported == []
        far.send(b"x")
        await until(lambda: len(reported) > 3)  # the byte is not read
        assert set(reported) == {("near", READABLE)}
        near.recv(1)
        count = len(reported)
        await trio.sleep(0.005)
        assert len(reported) == count


async def test_a_hangup_is_reported_without_any_event(pairs: list[Pair]) -> None:
    """With an empty mask, input is not reported, and the end of the connection is."""
    (near, far), *_ = pairs
    reported: list[int] = []

    def note(events: int) -> None:
        reported.append(events)
        poller.remove(near.fileno())

    async with _opened() as poller:
        poller.add(near.fileno(), 0, note)
        far.send(b"x")
        await trio.sleep(0.005)
        assert reported == []
        far.close()
        await until(lambda: bool(reported))
        assert reported[0] & select.EPOLLHUP
        assert len(poller) == 0


async def test_a_half_close_is_reported_behind_unread_bytes(pairs: list[Pair]) -> None:
    """`PEER_CLOSED` is reported behind unread bytes, and is not reported for the bytes."""
    (near, far), *_ = pairs
    reported: list[int] = []

    def note(events: int) -> None:
        reported.append(events)
        poller.remove(near.fileno())

    async with _opened() as poller:
        poller.add(near.fileno(), PEER_CLOSED, note)
        far.send(b"unread")
        await trio.sleep(0.005)
        assert reported == []
        far.shutdown(socket.SHUT_WR)
        await until(lambda: reported)
        assert reported[0] & PEER_CLOSED


async def test_a_removed_socket_is_not_called_back(pairs: list[Pair]) -> None:
    """Not even in the same batch: of two ready sockets, the callback that is called first removes both."""
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
    """A socket that is added in a batch is called back in a later one, also the same socket with another callback."""
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
    """The crash is logged once, the socket is removed, its owner may still remove it, and others are called back."""
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
        poller.add(near.fileno(), READABLE, called.append)  # the epoll no longer has it
        poller.remove(near.fileno())
    assert len(logs.named("callback_crashed")) == 1


async def test_other_tasks_run_while_sockets_are_always_ready() -> None:
    """If more sockets are always ready than fit into a batch, each is called back, and no other task waits longer than
    one lingering batch."""
    counts: dict[int, int] = {}
    with _pairs(BATCH + 50) as pairs:
        async with _opened() as poller:
            for near, far in pairs:
                counts[near.fileno()] = 0

                def count(_: int, fd: int = near.fileno()) -> None:
                    counts[fd] += 1

                poller.add(near.fileno(), READABLE, count)
                far.send(b"x")
            steps = 0
            while min(counts.values()) < 20:
                before = sum(counts.values())
                await trio.lowlevel.checkpoint()
                steps += 1
                between = sum(counts.values()) - before
                assert between <= (LINGER_S / 1e-7)  # no callback is that cheap: finds a batch that never ends
            assert steps > 2
            assert max(counts.values()) <= 3 * min(counts.values()) + 3, "each socket has its share"
            for near, _ in pairs:
                poller.remove(near.fileno())


async def test_a_task_that_a_batch_wakes_runs_soon(pairs: list[Pair]) -> None:
    """A task that a callback wakes runs while other sockets are always ready, and so does a task that sleeps."""
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


async def test_now_is_the_time_of_the_batch(pairs: list[Pair]) -> None:
    """``now`` advances while the poller runs, and is not in the future."""
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
    """Its task and its descriptor are gone when its block raises; the sockets are still open."""
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
    with pytest.raises(OSError, match="Bad file descriptor"):
        kept[0].add(near.fileno(), READABLE, lambda _: None)


async def test_a_removal_after_the_close_does_nothing(pairs: list[Pair], logs: Logs) -> None:
    """A task that is cancelled after its poller was closed still removes its socket without an error. So does one whose
    socket was closed too early, which is logged."""
    (near, _), (early, _), *_ = pairs
    async with open_poller() as poller:
        assert poller is not None
        for sock in (near, early):
            poller.add(sock.fileno(), READABLE, lambda _: None)
        fd = early.fileno()
        early.close()
        logs.expect_error("poller_lost_a_socket")
        poller.remove(fd)
    poller.remove(near.fileno())


async def test_it_ends_while_sockets_are_ready(pairs: list[Pair]) -> None:
    """Also when its task is about to call back as the block ends."""
    (near, far), *_ = pairs
    far.send(b"x")
    for _ in range(20):
        async with _opened() as poller:
            poller.add(near.fileno(), READABLE, lambda _: None)
            await trio.lowlevel.checkpoint()


async def test_without_epoll_there_is_no_poller(monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without epoll, `open_poller` yields None."""
    monkeypatch.delattr(select, "epoll")
    async with open_poller() as poller:
        assert poller is None
