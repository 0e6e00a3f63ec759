"""Keeps N worker processes serving the same sockets: a worker that dies is replaced, the others go on.

The supervisor binds the sockets once, one for each worker (Linux), and hands their descriptors down, so the kernel
spreads the connections evenly, and the port stays open while a worker is replaced. Each worker also holds the read end
of a pipe that only the supervisor could write to (the *lifeline*): its end of file tells a worker
that the supervisor is gone, by whatever death, and the worker ends too.

A worker that dies soon after its start is started again later and later. When every worker has died
soon `EARLY_DEATHS` times in a row, nothing is to be expected from another start, and `supervise`
gives up.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence

import attrs
import structlog
import trio

from trigate.config import ServerConfig

log = structlog.get_logger("trigate.supervisor")

SETTLED_S = 5.0
"""A worker that lived this long has started well."""
EARLY_DEATHS = 3
BACKOFF_S = 0.25
BACKOFF_MAX_S = 30.0
STOP_MARGIN_S = 20.0
"""What a worker may take to stop, beyond its drain."""


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
    stop: trio.Event = attrs.field(init=False, factory=trio.Event)

    async def keep(self, worker: _Worker) -> None:  # noqa: ASYNC910 - it waits for a process
        """Keeps a process at this place until the supervisor stops.

        Raises:
            WorkersFailed: This was one early death too many, at all places.
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
        # One for each address, where there is one for each worker and address; else all, which they share. Those of a
        # worker that has died stay open here, and whoever connects meanwhile waits for the next one.
        apart = sys.platform == "linux" and len(self.sockets) % len(self.workers) == 0
        sockets = self.sockets[worker.number - 1 :: len(self.workers)] if apart else self.sockets
        fds = [sock.fileno() for sock in sockets]
        arguments = [text for fd in fds for text in ("--fd", str(fd))]
        # A process group of its own: a terminal's Ctrl-C goes to the supervisor alone, which passes
        # it on once. A worker would take a second one for "now".
        process = await trio.lowlevel.open_process(
            [*self.command, *arguments, "--parent-fd", str(self.lifeline)],
            pass_fds=[*fds, self.lifeline],
            process_group=0,
        )
        worker.process = process
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


async def supervise(command: Sequence[str], sockets: Sequence[socket.socket], config: ServerConfig) -> bool:
    """Runs ``config.workers`` workers until SIGTERM or SIGINT, and stops them.

    The first such signal reaches the workers as SIGTERM, and they may drain; a second one, or a drain
    that takes longer than it may, kills them. SIGHUP is passed on.

    Args:
        command: Starts a worker, which must understand ``--fd N`` (repeated) and ``--parent-fd N``: see
            `sockets_from_fds` and `wait_parent_gone`.
        sockets: Listening; as `server.open_sockets` gives them for so many workers, or some that all share. Owned.
        config: How many workers, and how long they may drain.

    Returns:
        Whether the workers ended in order.

    Raises:
        ExceptionGroup: With a `WorkersFailed` in it: they do not stay alive.

    Cancels: Kills the workers.
    """
    lifeline, held = os.pipe()
    try:
        workers = [_Worker(number) for number in range(1, config.workers + 1)]
        supervisor = _Supervisor(command, sockets, lifeline, workers)
        return await _supervise(supervisor, config.drain_timeout_s + STOP_MARGIN_S)
    finally:
        os.close(held)
        os.close(lifeline)
        for sock in sockets:
            sock.close()


async def _supervise(supervisor: _Supervisor, stop_timeout_s: float) -> bool:
    async def obey(received: AsyncIterator[int]) -> None:
        async for number in received:
            again = supervisor.stop.is_set()
            log.info("signal_received", signal=signal.Signals(number).name, again=again)
            if number == signal.SIGHUP:
                supervisor.signal_all(signal.SIGHUP)
            elif again:
                keeping.cancel()
            else:
                supervisor.stop.set()
                supervisor.signal_all(signal.SIGTERM)
                for sock in supervisor.sockets:
                    sock.close()  # else a new client would wait in a queue that nobody serves
                keeping.deadline = trio.current_time() + stop_timeout_s

    signals = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with signals as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, received)
            with trio.CancelScope() as keeping:
                async with trio.open_nursery() as places:
                    for worker in supervisor.workers:
                        places.start_soon(supervisor.keep, worker)
            nursery.cancel_scope.cancel()
    return not keeping.cancelled_caught
