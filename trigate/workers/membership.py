"""The worker processes of one machine, as one of them sees the others: which ones run, and which ones have exited.

Workers share a store and nothing else. Every second each of them stores a heartbeat with a snapshot of what it does,
and checks the others. Each listens at a Unix datagram socket (`notify`). A *notification* there means "check now":
what has changed is in the store, so a notification that is lost costs time and nothing else. A worker whose socket is
gone has exited; the next check detects that, without a timeout. A worker that is stopped or slow still has its socket.

A clean shutdown needs no special case: the worker closes its socket and notifies the others. The first one to check
adopts what the worker has left, if anything, and then deletes it from the store. If no other worker runs, the next one
to join does so. So it makes no difference how a worker ended, and no acknowledged work is lost between the ways.

With a store in memory there are no other workers: no socket and no heartbeats.

**Shape:** a notification is ``topic + b" " + body`` in one datagram.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.errors import StoreUnavailable
from trigate.logs import log
from trigate.store.interface import Store
from trigate.store.records import Worker
from trigate.workers.notify import NotifySocket, is_dead, open_notify_socket, remove_socket

Adopt = Callable[[str, Sequence[str]], Awaitable[None]]

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats, each with a check of the other workers."""
RETRY_S = 0.25
"""Seconds before `Workers.join_eventually` tries again; doubles up to `RETRY_MAX_S`."""
RETRY_MAX_S = 5.0

CHECK = "workers"
"""The topic of the notification that asks the others to check which workers run."""


class Workers:
    """This worker and the others. Made by `open_workers`.

    Attributes:
        id: The id of this worker: ``w_…``, a new one at each start.
        started_at: POSIX seconds.
    """

    def __init__(self, store: Store) -> None:
        self.id = f"w_{secrets.token_hex(8)}"
        self.started_at = time.time()
        self._store = store
        self._snapshot: Callable[[], bytes] = lambda: b"{}"
        self._adopters: list[Adopt] = []
        self._callbacks: dict[bytes, list[Callable[[bytes], None]]] = {}
        self._socket: NotifySocket | None = None
        self._others: dict[str, str] = {}  # id → address
        self._joining = trio.Lock()
        self._joined = trio.Event()
        self._check_now = Wakeup()
        self._is_failing = False
        self.on_notify(CHECK, lambda _: self._check_now.set())

    def __repr__(self) -> str:
        return f"<Workers {self.id} and {len(self._others)} others{'' if self.is_joined else ', not joined'}>"

    @property
    def is_joined(self) -> bool:
        """Whether `join` has succeeded."""
        return self._joined.is_set()

    @property
    def count(self) -> int:
        """The number of workers, including this one, at the last check."""
        return 1 + len(self._others)

    # -- registered before `join` -------------------------------------------------------------------------------------

    def report_with(self, snapshot: Callable[[], bytes]) -> None:
        """Registers what this worker reports with each heartbeat, as a JSON object. Register before `join`; without a
        registration, the worker reports ``{}``."""
        self._snapshot = snapshot

    def adopt_with(self, adopt: Adopt) -> None:
        """Registers what takes over from workers that exited. It is awaited with the id of this worker and theirs
        before they are deleted from the store. Register before `join`.

        It may be awaited again for the same workers, here and in other workers, and must not call `join`.
        """
        self._adopters.append(adopt)

    def on_notify(self, topic: str, callback: Callable[[bytes], None]) -> None:
        """Registers a synchronous callback for the notifications of a topic. It gets their bodies."""
        self._callbacks.setdefault(topic.encode(), []).append(callback)

    # -- joining ------------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Joins the other workers, once: opens the store, stores the first heartbeat, and adopts what exited workers
        have left. Code that uses the store for something that outlives a request awaits this first.

        Raises:
            StoreUnavailable: The store cannot be used; the next call tries again.
        """
        if self.is_joined:
            await trio.lowlevel.checkpoint()
            return
        async with self._joining:
            if self._joined.is_set():  # another task has joined meanwhile
                return
            await self._store.check()
            if self._socket is None and self._store.statistics().kind != "memory":
                self._socket = open_notify_socket(self._store.statistics().path, self.id)
            await self._heartbeat()
            await self._check()
            self._joined.set()
        self.notify(CHECK)

    async def join_eventually(self) -> None:
        """Joins the other workers, and tries again for as long as the store is unavailable."""
        pause_s = RETRY_S
        while True:
            try:
                await self.join()
                return
            except StoreUnavailable as error:
                self._note_failure(error)
            except Exception:  # a defect must not end the gateway
                self._note_crash()
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def wait_joined(self) -> None:
        """Waits until `join` has succeeded."""
        await self._joined.wait()

    # -- the others ---------------------------------------------------------------------------------------------------

    def notify(self, topic: str, body: bytes = b"") -> None:
        """Notifies all other workers. Synchronous; never fails, but a notification may be lost."""
        if self._socket is not None:
            self._socket.send(self._others.values(), topic.encode() + b" " + body)

    async def all(self) -> Sequence[Worker]:
        """Returns every running worker, including this one, with its last snapshot, the oldest first. Before `join`, it
        returns this worker alone and does not ask the store.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        return sorted([self._myself(), *await self.others()], key=lambda each: (each.started_at, each.id))

    async def others(self) -> Sequence[Worker]:
        """Returns every running worker but this one; before `join`, none.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        if self._socket is None or not self.is_joined:
            await trio.lowlevel.checkpoint()
            return ()
        return [each for each in await self._store.workers.all() if each.id != self.id and not is_dead(each.address)]

    def _myself(self) -> Worker:
        return Worker(
            id=self.id,
            pid=os.getpid(),
            address=self._socket.address if self._socket is not None else "",
            started_at=self.started_at,
            seen_at=time.time(),
            snapshot=self._snapshot(),
        )

    # -- heartbeats and checks ----------------------------------------------------------------------------------------

    async def _heartbeat(self) -> None:
        await self._store.workers.heartbeat(self._myself())

    async def _check(self) -> None:
        """Finds out which workers run, and takes over from those that exited."""
        others = {each.id: each.address for each in await self._store.workers.all() if each.id != self.id}
        dead = {id_: address for id_, address in others.items() if is_dead(address)}
        self._others = {id_: address for id_, address in others.items() if id_ not in dead}
        if not dead:
            return
        for adopt in self._adopters:
            await adopt(self.id, list(dead))
        await self._store.workers.remove(list(dead))
        for address in dead.values():
            remove_socket(address)
        log.info("workers_adopted", worker=self.id, dead=list(dead))

    async def _run(self) -> None:
        await self.wait_joined()
        notify_socket = self._socket
        if notify_socket is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, notify_socket)
            while True:
                with trio.move_on_after(HEARTBEAT_S):
                    await self._check_now.wait()
                try:
                    notify_socket.keep_reachable()
                    await self._heartbeat()
                    await self._check()
                except StoreUnavailable as error:
                    self._note_failure(error)
                except Exception:  # a defect must not end the gateway, and the next heartbeat may succeed
                    self._note_crash()
                else:
                    if self._is_failing:
                        log.info("heartbeat_recovered", worker=self.id)
                    self._is_failing = False

    def _note_failure(self, error: StoreUnavailable) -> None:
        if not self._is_failing:  # logged once, and not at every heartbeat
            log.warning("heartbeat_failed", worker=self.id, error=error.message)
        self._is_failing = True

    def _note_crash(self) -> None:
        if not self._is_failing:
            log.exception("heartbeat_crashed", worker=self.id)
        self._is_failing = True

    async def _receive(self, notify_socket: NotifySocket) -> None:
        while True:
            topic, _, body = (await notify_socket.receive()).partition(b" ")
            for callback in self._callbacks.get(topic, ()):
                try:
                    callback(body)
                except Exception:
                    log.exception("notify_callback_crashed", topic=topic.decode(errors="replace"))

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close_receiver()
            self.notify(CHECK)  # the others check, and find that this worker has exited
            self._socket.close()


@contextlib.asynccontextmanager
async def open_workers(store: Store) -> AsyncIterator[Workers]:
    """Opens the service. It opens and writes nothing before the first `Workers.join`.

    **Resource handling:** from `join` on, two Unix datagram sockets; the block's end closes them and removes the file.
    """
    workers = Workers(store)
    try:
        async with open_service(workers._run):
            yield workers
    finally:
        workers._close()
