"""Keeps N worker processes serving the same sockets: a worker that exits is replaced, and the others continue.

The supervisor binds the sockets once, one for each worker (Linux), and the workers inherit their descriptors. So the
kernel spreads the connections evenly, and the port stays open while a worker is replaced. Each worker also holds the
read end of a pipe whose write end only the supervisor has (the *lifeline*): its end of file means that the supervisor
has exited for any reason, and the worker ends too.

Each worker reports that it is ready. In a hot restart (`hot_restart`), workers then wait at a *gate*, and none accepts
a connection before all are ready and the other gateway has been notified. So a hot restart that fails has not affected
a client.

The pause before a restart doubles with each early exit of a worker. When every worker has exited early `EARLY_EXITS`
times in a row, another start would not help, and `supervise` raises `WorkersFailed`.
"""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent
from trigate.config.sections import ServerConfig
from trigate.logs import log
from trigate.server import hot_restart
from trigate.server.hot_restart import Predecessor

SETTLED_S = 5.0
"""A worker that has been ready for so long has started successfully. How long its start takes says nothing."""
EARLY_EXITS = 3
"""How many early exits in a row of every worker make the supervisor give up."""
BACKOFF_S = 0.25
BACKOFF_MAX_S = 30.0
HANDED_OVER = signal.SIGUSR2
"""The signal that notifies a worker that another gateway has taken over."""
STOP_MARGIN_S = 20.0
"""How long a worker may take to stop, beyond its drain."""
FINAL_MESSAGE_S = 3.0
"""How long it may take after a second signal: to end its responses with an error, and to record their calls."""


class WorkersFailed(Exception):
    """The workers do not keep running; the message says how they exited."""


def sockets_from_fds(fds: Iterable[int]) -> list[socket.socket]:
    """Makes sockets of the descriptors that a worker inherits from its supervisor (worker side)."""
    sockets = []
    for fd in fds:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        sock.set_inheritable(False)  # a child of the worker must not hold the port
        sockets.append(sock)
    return sockets


async def wait_parent_gone(fd: int) -> None:
    """Waits until the supervisor has exited (worker side).

    Args:
        fd: The read end of the lifeline.
    """
    os.set_inheritable(fd, False)
    await trio.lowlevel.wait_readable(fd)


async def wait_gate(ready_fd: int, gate_fd: int | None) -> None:
    """Reports that this worker is ready, and waits until it may accept connections (worker side).

    Args:
        ready_fd: Where to report it. Closed.
        gate_fd: At its end of file, the worker may accept. Closed. None = it need not wait.
    """
    os.write(ready_fd, b"%d\n" % os.getpid())
    os.close(ready_fd)
    if gate_fd is None:
        await trio.lowlevel.checkpoint()
    else:
        await trio.lowlevel.wait_readable(gate_fd)
        os.close(gate_fd)


@attrs.define(eq=False)
class _Reports:
    """Which workers are ready.

    Attributes:
        ready_at: When each running process reported to be ready (Trio time), by its id.
        changed: Set when ``ready_at`` or the processes of the workers have changed.
        fd: What a worker inherits: where to report that it is ready.
    """

    ready_at: dict[int, float] = attrs.field(init=False, factory=dict)
    changed: RepeatedEvent = attrs.field(init=False, factory=RepeatedEvent)
    fd: int = attrs.field(init=False)
    _receiver: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._receiver, self.fd = os.pipe()

    async def receive(self) -> None:
        """Notes what the workers report, until cancelled."""
        line = b""
        async with trio.lowlevel.FdStream(os.dup(self._receiver)) as reports:
            async for data in reports:
                *pids, line = (line + bytes(data)).split(b"\n")
                self.ready_at.update((int(pid), trio.current_time()) for pid in pids)
                self.changed.set()

    def close(self) -> None:
        """Closes the pipe."""
        os.close(self.fd)
        os.close(self._receiver)


@attrs.define(eq=False)
class _Gate:
    """Holds the workers back until all are ready.

    Attributes:
        predecessor: The gateway that is being replaced.
        fd: What a worker inherits: at its end of file, it may accept connections.
    """

    predecessor: Predecessor
    fd: int = attrs.field(init=False)
    _open: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.fd, self._open = os.pipe()

    def open(self) -> None:
        """Notifies the other gateway, and then lets all workers accept connections."""
        self.predecessor.notify_ready()
        self.close()

    def close(self) -> None:
        """Closes the pipe. A worker that still waits may accept connections."""
        os.close(self.fd)
        os.close(self._open)


@attrs.define(eq=False)
class _Worker:
    """One of the workers, and the process that it is now."""

    number: int
    process: trio.Process | None = None
    early_exits: int = 0


@attrs.define(eq=False)
class _Supervisor:
    command: Sequence[str]
    sockets: Sequence[socket.socket]
    lifeline: int
    workers: Sequence[_Worker]
    reports: _Reports
    gate: _Gate | None = None
    stop: trio.Event = attrs.field(init=False, factory=trio.Event)
    _shares: list[list[int]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._shares = shares([sock.getsockname() for sock in self.sockets], len(self.workers))

    async def keep_running(self, worker: _Worker) -> None:
        """Keeps the process of a worker running until the supervisor stops.

        Raises:
            WorkersFailed: Every worker has exited early too often; or this one has exited while another gateway still
                serves, which then continues.
        """
        replaces: int | None = None
        while not self.stop.is_set():
            try:
                process = await self._start(worker, replaces)
            except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no thread can be started
                if self.stop.is_set():  # its sockets have just been closed
                    break
                log.warning("worker_not_started", worker=worker.number, reason=str(error))
                if self.gate is not None:
                    raise WorkersFailed(f"a worker cannot start ({error}): the other gateway keeps serving") from None
                await self._back_off(worker, f"could not start: {error}")
                continue
            try:
                status = await process.wait()
            finally:
                worker.process = None
                process.kill()  # does nothing if it has exited
                with trio.CancelScope(shield=True):  # bounded by: SIGKILL
                    await process.wait()
            ready_at = self.reports.ready_at.pop(process.pid, math.inf)
            how = _describe_exit(status)
            if self.stop.is_set():
                log.info("worker_stopped", worker=worker.number, pid=process.pid, how=how)
                break
            log.warning("worker_died", worker=worker.number, pid=process.pid, how=how)
            if self.gate is not None:
                raise WorkersFailed(f"a worker exited before all were ready ({how}): the other gateway keeps serving")
            replaces = process.pid
            if trio.current_time() - ready_at >= SETTLED_S:
                worker.early_exits = 0
            else:
                await self._back_off(worker, f"exited with {how}")
        self.close_unserved()

    async def _back_off(self, worker: _Worker, how: str) -> None:
        """Waits before the next start of a worker that has exited early or did not start.

        Raises:
            WorkersFailed: That has happened to every worker too often.
        """
        worker.early_exits += 1
        if all(other.early_exits >= EARLY_EXITS for other in self.workers):
            raise WorkersFailed(
                f"no worker keeps running: each of {len(self.workers)} exited {EARLY_EXITS} times "
                f"soon after its start, or could not start; the last one {how}"
            )
        with trio.move_on_after(_back_off_s(worker.early_exits)):
            await self.stop.wait()

    def close_unserved(self) -> None:
        """Closes the sockets that no running worker has. During a stop, no worker is replaced, and new connections
        would wait in them; with the others, the system spreads them over the workers that still serve."""
        served = {
            index for worker in self.workers if worker.process is not None for index in self._shares[worker.number - 1]
        }
        for index, sock in enumerate(self.sockets):
            if index not in served:
                sock.close()

    async def _start(self, worker: _Worker, replaces: int | None) -> trio.Process:
        # The sockets of an exited worker stay open here: new connections wait for its replacement.
        fds = [self.sockets[index].fileno() for index in self._shares[worker.number - 1]]
        arguments = [text for fd in fds for text in ("--fd", str(fd))]
        fds.append(self.reports.fd)
        arguments += ["--ready-fd", str(self.reports.fd)]
        if self.gate is not None:
            fds.append(self.gate.fd)
            arguments += ["--gate-fd", str(self.gate.fd)]
        # A process group of its own: a terminal's Ctrl-C reaches only the supervisor, which passes it on once. A worker
        # would take a second one for a second signal, and end at once.
        process = await trio.lowlevel.open_process(
            [*self.command, *arguments, "--parent-fd", str(self.lifeline)],
            pass_fds=[*fds, self.lifeline],
            process_group=0,
        )
        worker.process = process
        self.reports.changed.set()
        if replaces is None:
            log.info("worker_started", worker=worker.number, pid=process.pid)
        else:
            log.info("worker_replaced", worker=worker.number, pid=process.pid, replaces=replaces)
        if self.stop.is_set():  # it did not exist yet when the others were signalled
            process.terminate()
        return process

    def signal_all(self, number: signal.Signals) -> None:
        """Sends a signal to every running worker."""
        for worker in self.workers:
            if worker.process is not None:
                worker.process.send_signal(number)

    async def take_over(self) -> None:
        """Waits until all workers are ready, and then replaces the other gateway. Does nothing if there is none."""
        gate = self.gate
        if gate is None:
            return
        reports = self.reports
        while not all(worker.process is not None and worker.process.pid in reports.ready_at for worker in self.workers):
            await reports.changed.wait()
        self.gate = None
        gate.open()


def shares(names: Sequence[Hashable], workers: int) -> list[list[int]]:
    """Assigns listening sockets to workers.

    Each socket gets a worker, and each worker gets a socket of each address; if there are enough, one of its own. After
    a hot restart there are as many sockets as the other gateway had workers, and none may stay without a worker, as
    connections wait in it.

    Args:
        names: The addresses of the sockets.
        workers: The number of workers.

    Returns:
        For each worker, the indices of its sockets.

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


def _back_off_s(early_exits: int) -> float:
    """How long to wait before the next start, in seconds.

    >>> [_back_off_s(n) for n in (1, 2, 3, 100)]
    [0.25, 0.5, 1.0, 30.0]
    """
    return min(BACKOFF_S * 2.0 ** (min(early_exits, 20) - 1), BACKOFF_MAX_S)


def _describe_exit(status: int) -> str:
    """Describes how a process exited, from the status that `subprocess` returns.

    >>> _describe_exit(-9), _describe_exit(1)
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
    handover_sockets: Sequence[socket.socket] = (),
    predecessor: Predecessor | None = None,
) -> bool:
    """Runs ``config.workers`` workers until SIGTERM, SIGINT or a hot restart, and then stops them.

    Both signals reach the workers as SIGTERM. After the first one the workers drain, after a second one they end at
    once. A worker that takes longer than it may is killed. SIGHUP is passed on.

    Args:
        command: Starts a worker, which must understand ``--fd N`` (repeated), ``--parent-fd N`` and ``--ready-fd N``
            (see `sockets_from_fds`, `wait_parent_gone` and `wait_gate`), and with a predecessor ``--gate-fd N``.
        sockets: Listening sockets; as `listeners.open_sockets` returns them for this number of workers, or some that
            the workers share. Owned.
        config: The number of workers, and the drain timeouts.
        handover_sockets: Where another gateway may ask for the listening sockets; see `hot_restart.serve_handover`.
            Owned.
        predecessor: The gateway to replace as soon as all workers are ready.

    Returns:
        Whether the workers ended in order.

    Raises:
        ExceptionGroup: Contains a `WorkersFailed`: the workers do not keep running.

    **Cancels:** kills the workers.
    """
    lifeline, write_end = os.pipe()
    try:
        workers = [_Worker(number) for number in range(1, config.workers + 1)]
        gate = _Gate(predecessor) if predecessor is not None else None
        reports = _Reports()
        supervisor = _Supervisor(command, sockets, lifeline, workers, reports, gate)
        try:
            return await _supervise(supervisor, handover_sockets, config)
        finally:
            reports.close()
            if supervisor.gate is not None:
                supervisor.gate.close()
    finally:
        os.close(write_end)
        os.close(lifeline)
        for sock in (*sockets, *handover_sockets):
            sock.close()


async def _supervise(supervisor: _Supervisor, handover_sockets: Sequence[socket.socket], config: ServerConfig) -> bool:
    stopping = stopping_at_once = False
    stop_timeout_s = config.drain_timeout_s + STOP_MARGIN_S

    def stop(number: signal.Signals, notice_s: float) -> None:
        supervisor.signal_all(number)
        if not supervisor.stop.is_set():
            supervisor.stop.set()
            running.deadline = trio.current_time() + notice_s + stop_timeout_s
            nursery.start_soon(close_sockets, notice_s)

    async def close_sockets(after_s: float) -> None:
        await trio.sleep(after_s)
        handing_over.cancel()
        for sock in supervisor.sockets:
            sock.close()  # otherwise a new client would wait in a queue that no process serves

    async def follow_signals(received: AsyncIterator[int]) -> None:
        nonlocal stopping, stopping_at_once
        async for number in received:
            log.info("signal_received", signal=signal.Signals(number).name, again=stopping)
            if number == signal.SIGHUP:
                supervisor.signal_all(signal.SIGHUP)
            elif stopping:
                stopping_at_once = True
                supervisor.signal_all(signal.SIGTERM)
                running.deadline = min(running.deadline, trio.current_time() + FINAL_MESSAGE_S)
            else:
                stopping = True
                taking_over.cancel()
                stop(signal.SIGTERM, config.drain_notice_s)

    async def hot_restarts() -> None:
        with taking_over:
            await supervisor.take_over()
        with handing_over:
            await hot_restart.serve_handover(handover_sockets, supervisor.sockets, lambda _: stop(HANDED_OVER, 0.0))

    taking_over, handing_over = trio.CancelScope(), trio.CancelScope()
    signals = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with signals as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow_signals, received)
            nursery.start_soon(supervisor.reports.receive)
            nursery.start_soon(hot_restarts)
            with trio.CancelScope() as running:
                async with trio.open_nursery() as workers:
                    for worker in supervisor.workers:
                        workers.start_soon(supervisor.keep_running, worker)
            nursery.cancel_scope.cancel()
    return not (stopping_at_once or running.cancelled_caught)
