"""Keeps N worker processes serving the same sockets: a worker that dies is replaced, the others go on.

The supervisor binds the sockets once, one for each worker (Linux), and hands their descriptors down, so the kernel
spreads the connections evenly, and the port stays open while a worker is replaced. Each worker also holds the read end
of a pipe that only the supervisor could write to (the *lifeline*): its end of file tells a worker
that the supervisor is gone, by whatever death, and the worker ends too.

Where they take the place of another gateway (`takeover`), workers wait at a *gate* between their start and their first
connection: each says that it is ready, and none accepts before all are, and the other gateway has been told. So a
takeover that fails has not touched a client.

A worker that dies soon after its start is started again later and later. When every worker has died
soon `EARLY_DEATHS` times in a row, nothing is to be expected from another start, and `supervise`
gives up.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence

import attrs
import structlog
import trio

from trigate.config.sections import ServerConfig
from trigate.server import hot_restart
from trigate.server.hot_restart import Predecessor

log = structlog.get_logger("trigate.server.supervisor")

SETTLED_S = 5.0
"""A worker that lived this long has started well."""
EARLY_DEATHS = 3
BACKOFF_S = 0.25
BACKOFF_MAX_S = 30.0
SUCCEEDED = signal.SIGUSR2
"""Tells a worker that another gateway has taken over."""
STOP_MARGIN_S = 20.0
"""What a worker may take to stop, beyond its drain."""
LAST_WORDS_S = 3.0
"""What it may take after a second signal: to tell its clients, and to keep what became of their calls."""


class WorkersFailed(Exception):
    """No worker stays alive; the message says how they died."""


def sockets_from_fds(fds: Iterable[int]) -> list[socket.socket]:
    """Takes over the listening sockets that a supervisor has handed down (worker side)."""
    sockets = []
    for fd in fds:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        sock.set_inheritable(False)  # a child of the worker must not hold the port
        sockets.append(sock)
    return sockets


async def wait_parent_gone(fd: int) -> None:
    """Returns when the supervisor behind the lifeline is gone (worker side)."""
    os.set_inheritable(fd, False)
    await trio.lowlevel.wait_readable(fd)


async def wait_gate(ready_fd: int, gate_fd: int) -> None:
    """Says that this worker is ready, and waits until it may accept connections (worker side)."""
    os.write(ready_fd, b"%d\n" % os.getpid())
    os.close(ready_fd)
    await trio.lowlevel.wait_readable(gate_fd)
    os.close(gate_fd)


@attrs.define(eq=False)
class _Gate:
    """Where workers wait until all are ready.

    Attributes:
        fds: What a worker is handed: where to say that it is ready, and what it waits for.
        ready: The process ids of those that have said so.
        changed: Set at each change of that, or of what processes there are.
    """

    predecessor: Predecessor
    ready: set[int] = attrs.field(init=False, factory=set)
    changed: trio.Event = attrs.field(init=False, factory=trio.Event)
    fds: tuple[int, int] = attrs.field(init=False)
    _said: int = attrs.field(init=False)
    _bar: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._said, say = os.pipe()
        wait, self._bar = os.pipe()
        self.fds = (say, wait)

    def note(self) -> None:
        """Something has changed."""
        self.changed.set()
        self.changed = trio.Event()

    async def listen(self) -> None:
        """Notes who says that he is ready, for ever."""
        line = b""
        async with trio.lowlevel.FdStream(os.dup(self._said)) as said:
            async for data in said:
                *pids, line = (line + bytes(data)).split(b"\n")
                self.ready.update(map(int, pids))
                self.note()

    def open(self) -> None:
        """Tells the other gateway, and then lets all pass."""
        self.predecessor.succeed()
        self.close()

    def close(self) -> None:
        """Nobody waits here any more."""
        for fd in (*self.fds, self._said, self._bar):
            os.close(fd)
        self.fds = ()  # type: ignore[assignment]


@attrs.define(eq=False)
class _Worker:
    """One place among the workers, and the process that holds it now."""

    number: int
    process: trio.Process | None = None
    early_deaths: int = 0


@attrs.define(eq=False)
class _Supervisor:
    command: Sequence[str]
    sockets: Sequence[socket.socket]
    lifeline: int
    workers: Sequence[_Worker]
    gate: _Gate | None = None
    stop: trio.Event = attrs.field(init=False, factory=trio.Event)

    async def keep(self, worker: _Worker) -> None:  # noqa: ASYNC910 - it waits for a process
        """Keeps a process at this place until the supervisor stops.

        Raises:
            WorkersFailed: This was one early death too many, at all places; or the first one, where another gateway
                serves and goes on.
        """
        replaces: int | None = None
        while not self.stop.is_set():
            try:
                process = await self._start(worker, replaces)
            except (OSError, ValueError):
                if self.stop.is_set():  # its sockets have just been closed
                    return  # noqa: ASYNC910 - it was tried
                raise
            started_at = trio.current_time()
            try:
                status = await process.wait()
            finally:
                worker.process = None
                process.kill()  # nothing, if it has ended
                with trio.CancelScope(shield=True):
                    await process.wait()
            how = _how_it_ended(status)
            if self.stop.is_set():
                log.info("worker_stopped", worker=worker.number, pid=process.pid, how=how)
                return
            log.warning("worker_died", worker=worker.number, pid=process.pid, how=how)
            if self.gate is not None:
                raise WorkersFailed(f"a worker has ended before all were ready, by {how}: the other gateway goes on")
            settled = trio.current_time() - started_at >= SETTLED_S
            worker.early_deaths = 0 if settled else worker.early_deaths + 1
            if all(each.early_deaths >= EARLY_DEATHS for each in self.workers):
                raise WorkersFailed(
                    f"no worker stays alive: each of {len(self.workers)} died {EARLY_DEATHS} times "
                    f"soon after its start; the last one by {how}"
                )
            if not settled:
                with trio.move_on_after(_back_off_s(worker.early_deaths)):
                    await self.stop.wait()
            replaces = process.pid

    async def _start(self, worker: _Worker, replaces: int | None) -> trio.Process:
        # Those of a worker that has died stay open here, and whoever connects meanwhile waits for the next one.
        names = [sock.getsockname() for sock in self.sockets]
        fds = [self.sockets[index].fileno() for index in shares(names, len(self.workers))[worker.number - 1]]
        arguments = [text for fd in fds for text in ("--fd", str(fd))]
        if self.gate is not None:
            fds += self.gate.fds
            arguments += ["--ready-fd", str(self.gate.fds[0]), "--gate-fd", str(self.gate.fds[1])]
        # A process group of its own: a terminal's Ctrl-C goes to the supervisor alone, which passes
        # it on once. A worker would take a second one for "now".
        process = await trio.lowlevel.open_process(
            [*self.command, *arguments, "--parent-fd", str(self.lifeline)],
            pass_fds=[*fds, self.lifeline],
            process_group=0,
        )
        worker.process = process
        if self.gate is not None:
            self.gate.note()
        if replaces is None:
            log.info("worker_started", worker=worker.number, pid=process.pid)
        else:
            log.info("worker_replaced", worker=worker.number, pid=process.pid, replaces=replaces)
        if self.stop.is_set():  # it was not there yet when the others were told
            process.terminate()
        return process

    def signal_all(self, number: signal.Signals) -> None:
        """Sends a signal to every worker that runs."""
        for worker in self.workers:
            if worker.process is not None:
                worker.process.send_signal(number)

    async def take_over(self) -> None:
        """Waits until all workers are ready, and lets them take the place of the other gateway."""
        gate = self.gate
        if gate is None:
            await trio.lowlevel.checkpoint()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.listen)
            while not all(each.process is not None and each.process.pid in gate.ready for each in self.workers):
                await gate.changed.wait()
            nursery.cancel_scope.cancel()
        self.gate = None
        gate.open()


def shares(names: Sequence[Hashable], workers: int) -> list[list[int]]:
    """Which of some sockets each worker listens on, by their addresses. Each socket has a worker, and each worker has a
    socket of each address; as far as it goes, one that no other has.

    Sockets that were taken over are as many as the other gateway had workers, and none may be left alone:
    connections wait in it.

    Returns:
        The indices of their sockets, for each worker.

    >>> shares(["a", "a", "b", "b"], 2)
    [[0, 2], [1, 3]]
    >>> shares(["a"], 2), shares(["a", "a"], 1), shares(["a", "a", "a"], 2)
    ([[0], [0]], [[0, 1]], [[0, 2], [1]])
    """
    found: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    parts: list[list[int]] = [[] for _ in range(workers)]
    for indices in found.values():
        for number in range(max(workers, len(indices))):
            parts[number % workers].append(indices[number % len(indices)])
    return parts


def _back_off_s(early_deaths: int) -> float:
    """How long to wait before the next start.

    >>> [_back_off_s(n) for n in (1, 2, 3, 100)]
    [0.25, 0.5, 1.0, 30.0]
    """
    return min(BACKOFF_S * 2.0 ** (min(early_deaths, 20) - 1), BACKOFF_MAX_S)


def _how_it_ended(status: int) -> str:
    """Says how a process ended, by the status that `subprocess` gives.

    >>> _how_it_ended(-9), _how_it_ended(1)
    ('SIGKILL', 'exit status 1')
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


async def supervise(
    command: Sequence[str],
    sockets: Sequence[socket.socket],
    config: ServerConfig,
    *,
    doors: Sequence[socket.socket] = (),
    predecessor: Predecessor | None = None,
) -> bool:
    """Runs ``config.workers`` workers until SIGTERM or SIGINT, or until another gateway has taken over, and stops them.

    Such signals reach the workers as SIGTERM. After the first one they may drain, after a second one they end at once;
    those that take longer than they may are killed. SIGHUP is passed on.

    Args:
        command: Starts a worker, which must understand ``--fd N`` (repeated) and ``--parent-fd N``: see
            `sockets_from_fds` and `wait_parent_gone`; and, where there is a predecessor, ``--ready-fd N`` and
            ``--gate-fd N``: see `wait_gate`.
        sockets: Listening; as `listeners.open_sockets` gives them for so many workers, or some that all share. Owned.
        config: How many workers, and how long they may drain.
        doors: At which another gateway may ask for the sockets; see `takeover.attend`. Owned.
        predecessor: Whose place they take, as soon as all are ready.

    Returns:
        Whether the workers ended in order.

    Raises:
        ExceptionGroup: With a `WorkersFailed` in it: they do not stay alive.

    Cancels: Kills the workers.
    """
    lifeline, held = os.pipe()
    try:
        workers = [_Worker(number) for number in range(1, config.workers + 1)]
        gate = _Gate(predecessor) if predecessor is not None else None
        supervisor = _Supervisor(command, sockets, lifeline, workers, gate)
        try:
            return await _supervise(supervisor, doors, config)
        finally:
            if supervisor.gate is not None:
                supervisor.gate.close()
    finally:
        os.close(held)
        os.close(lifeline)
        for sock in (*sockets, *doors):
            sock.close()


async def _supervise(supervisor: _Supervisor, doors: Sequence[socket.socket], config: ServerConfig) -> bool:
    is_told = is_cut = False
    stop_timeout_s = config.drain_timeout_s + STOP_MARGIN_S

    def end(number: signal.Signals, notice_s: float) -> None:
        supervisor.signal_all(number)
        if not supervisor.stop.is_set():
            supervisor.stop.set()
            keeping.deadline = trio.current_time() + notice_s + stop_timeout_s
            nursery.start_soon(close, notice_s)

    async def close(after_s: float) -> None:
        await trio.sleep(after_s)
        attending.cancel()
        for sock in supervisor.sockets:
            sock.close()  # else a new client would wait in a queue that nobody serves

    async def obey(received: AsyncIterator[int]) -> None:
        nonlocal is_told, is_cut
        async for number in received:
            log.info("signal_received", signal=signal.Signals(number).name, again=is_told)
            if number == signal.SIGHUP:
                supervisor.signal_all(signal.SIGHUP)
            elif is_told:
                is_cut = True
                supervisor.signal_all(signal.SIGTERM)
                keeping.deadline = min(keeping.deadline, trio.current_time() + LAST_WORDS_S)
            else:
                is_told = True
                gating.cancel()
                end(signal.SIGTERM, config.drain_notice_s)

    async def attend() -> None:
        with gating:
            await supervisor.take_over()
        with attending:
            await hot_restart.attend(doors, supervisor.sockets, lambda _: end(SUCCEEDED, 0.0))

    gating, attending = trio.CancelScope(), trio.CancelScope()
    signals = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with signals as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, received)
            nursery.start_soon(attend)
            with trio.CancelScope() as keeping:
                async with trio.open_nursery() as places:
                    for worker in supervisor.workers:
                        places.start_soon(supervisor.keep, worker)
            nursery.cancel_scope.cancel()
    return not (is_cut or keeping.cancelled_caught)
