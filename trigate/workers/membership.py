"""The worker processes of one machine, as one of them sees the others: who is there, who has died, and a bell.

Workers share a store and nothing else. Each says every second that it is there and what it does (`store.Workers.beat`),
and listens at a Unix datagram socket. A *ring* there says "look now"; what there is to see is in the store, so a ring
that is lost costs time and nothing else. The kernel closes the socket with its process, however that ends: so a
worker is dead when nobody listens at its address, and is found to be at the next look, without a clock. One that is
merely stopped, or slow, still has its socket.

A worker that ends in order is no special case: it closes its socket, and rings. Whoever looks first adopts what it has
left, if anything, and forgets it; where nobody is left to look, the next one to join does. So nothing depends on how a
worker ended, and no promise is lost between "in order" and "not quite".

With a store in memory there are no others: no socket, no beats.

**Shape:** a ring is ``topic + b" " + body`` in one datagram.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import attrs
import structlog
import trio

from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import Worker

log = structlog.get_logger("trigate.workers.membership")

Adopt = Callable[[str, Sequence[str]], Awaitable[None]]

BEAT_S = 1.0
"""How often a worker says that it is there, and looks for the others."""
RETRY_S = 0.25
"""How soon `Workers.join_at_last` tries again; doubles up to `RETRY_MAX_S`."""
RETRY_MAX_S = 5.0
_MAX_ADDRESS_BYTES = 103
"""The shortest ``sun_path`` of the systems (macOS), without its NUL."""
_MAX_RING_BYTES = 64 * 1024
_ASIDE = "trigate-"
"""How the directory of a socket begins that found no room beside the database."""


class Workers:
    """This worker and the others. Made by `open_workers`.

    Attributes:
        id: This worker's: ``w_…``, another one after each start.
        started_at: POSIX seconds.
    """

    def __init__(self, store: Store, snapshot: Callable[[], bytes]) -> None:
        self.id = f"w_{secrets.token_hex(8)}"
        self._store = store
        self._snapshot = snapshot
        self.started_at = time.time()
        self._adopters: list[Adopt] = []
        self._heed: dict[bytes, list[Callable[[bytes], None]]] = {}
        self._bell: _Bell | None = None
        self._others: dict[str, str] = {}  # their addresses
        self._joining = trio.Lock()
        self._joined = trio.Event()
        self._look_now = trio.Event()
        self._troubled = False
        self.on_notify("workers", lambda _: self._look_now.set())

    def __repr__(self) -> str:
        return f"<Workers {self.id} and {len(self._others)} others{'' if self.is_joined else ', not joined'}>"

    @property
    def is_joined(self) -> bool:
        """Whether `join` has been done."""
        return self._joined.is_set()

    @property
    def count(self) -> int:
        """How many there are, this one included, at the last look."""
        return 1 + len(self._others)

    async def join(self) -> None:
        """Joins the others, once: opens the store, is known there, and has adopted what dead workers left. Whoever is
        about to use the store for something that outlives a request waits for this first.

        Raises:
            StoreUnavailable: The store cannot be used; the next call tries again.
        """
        if self.is_joined:
            await trio.lowlevel.checkpoint()
            return
        async with self._joining:
            if self._joined.is_set():  # meanwhile
                return
            await self._store.check()
            if self._bell is None and self._store.statistics().kind != "memory":
                self._bell = _open_bell(self._store.statistics().path, self.id)
            await self._beat()
            await self._look()
            self._joined.set()
        self.notify("workers")

    async def join_at_last(self) -> None:
        """Joins the others, however long the store is unavailable."""
        pause_s = RETRY_S
        while True:
            try:
                await self.join()
                return
            except StoreUnavailable as error:
                self._note_trouble(error)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def wait_joined(self) -> None:
        """Waits until somebody has joined."""
        await self._joined.wait()

    def adopt_with(self, adopt: Adopt) -> None:
        """Registers what takes over from dead workers: it is awaited with this worker's id and theirs before they are
        forgotten. Register before `join`. It may be awaited again for the same ones, here and in other workers, and
        must not itself `join`."""
        self._adopters.append(adopt)

    def on_notify(self, topic: str, heed: Callable[[bytes], None]) -> None:
        """Registers a synchronous callback for the rings of a topic."""
        self._heed.setdefault(topic.encode(), []).append(heed)

    def notify(self, topic: str, body: bytes = b"") -> None:
        """Rings all other workers. Synchronous, never fails, may be lost."""
        if self._bell is not None:
            self._bell.notify(self._others.values(), topic.encode() + b" " + body)

    async def all(self) -> Sequence[Worker]:
        """Every living worker, this one included, with what they last said of themselves, the oldest first. Before
        `join`, it is this one alone, and the store is not asked.

        Raises:
            StoreUnavailable: Who else there is cannot be read.
        """
        return sorted([self._myself(), *await self.others()], key=lambda each: (each.started_at, each.id))

    async def others(self) -> Sequence[Worker]:
        """As `all`, without this one."""
        if self._bell is None or not self.is_joined:
            await trio.lowlevel.checkpoint()
            return ()
        return [each for each in await self._store.workers.all() if each.id != self.id and not _is_dead(each.address)]

    def _myself(self) -> Worker:
        return Worker(
            id=self.id,
            pid=os.getpid(),
            address=self._bell.address if self._bell is not None else "",
            started_at=self.started_at,
            seen_at=time.time(),
            snapshot=self._snapshot(),
        )

    # -- beats and looks ----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        await self._store.workers.heartbeat(self._myself())

    async def _look(self) -> None:
        """Sees who is there, and takes over from who is not any more."""
        others = {each.id: each.address for each in await self._store.workers.all() if each.id != self.id}
        dead = {id_: address for id_, address in others.items() if _is_dead(address)}
        self._others = {id_: address for id_, address in others.items() if id_ not in dead}
        if not dead:
            return
        for adopt in self._adopters:
            await adopt(self.id, list(dead))
        await self._store.workers.remove(list(dead))
        for address in dead.values():
            _remove_socket(address)
        log.info("workers_adopted", worker=self.id, dead=list(dead))

    async def _run(self) -> None:
        await self.wait_joined()
        if self._bell is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            while True:
                with trio.move_on_after(BEAT_S):
                    await self._look_now.wait()
                self._look_now = trio.Event()
                try:
                    self._bell.tend()
                    await self._beat()
                    await self._look()
                except StoreUnavailable as error:
                    self._note_trouble(error)
                except Exception:  # whatever it is, the gateway goes on, and the next beat may be better
                    if not self._troubled:
                        log.exception("beat_crashed", worker=self.id)
                    self._troubled = True
                else:
                    if self._troubled:
                        log.info("beating_again", worker=self.id)
                    self._troubled = False

    def _note_trouble(self, error: StoreUnavailable) -> None:
        if not self._troubled:  # once, and not at every beat
            log.warning("beat_failed", worker=self.id, error=error.message)
        self._troubled = True

    async def _hear(self) -> None:
        assert self._bell is not None
        while True:
            topic, _, body = (await self._bell.wait_rung()).partition(b" ")
            for heed in self._heed.get(topic, ()):
                try:
                    heed(body)
                except Exception:
                    log.exception("ring_crashed", topic=topic.decode(errors="replace"))

    def _leave(self) -> None:
        if self._bell is not None:
            self._bell.close()
            self.notify("workers")  # they look, and find nobody here
            self._bell.voice.close()


@contextlib.asynccontextmanager
async def open_workers(store: Store, snapshot: Callable[[], bytes]) -> AsyncIterator[Workers]:
    """Opens the service; nothing is opened or written before the first `Workers.join`.

    Args:
        snapshot: Says what this worker does, as JSON.
    """
    workers = Workers(store, snapshot)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers._run)
            try:
                yield workers
            finally:
                nursery.cancel_scope.cancel()
    finally:
        workers._leave()


# -- bells ------------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Bell:
    """A socket that can be rung, and one to ring others with.

    Attributes:
        address: The path of the socket.
    """

    database: str
    worker: str
    address: str
    ears: trio.socket.SocketType
    voice: socket.socket

    async def wait_rung(self) -> bytes:
        """Waits for the next ring."""
        while True:
            with contextlib.suppress(trio.ClosedResourceError):  # by `tend`, which has made another one
                return await self.ears.recv(_MAX_RING_BYTES)

    def notify(self, addresses: Iterable[str], datagram: bytes) -> None:
        """Rings at these addresses; does not wait, nor complain."""
        for address in addresses:
            with contextlib.suppress(OSError):
                self.voice.sendto(datagram, address)

    def tend(self) -> None:
        """Sees to it that the socket can be found: whoever removed its file made this worker seem dead."""
        try:
            os.utime(self.address)  # nothing that cleans up takes it for forgotten
        except FileNotFoundError:
            self.ears.close()
            self.address, self.ears = _bind(self.database, self.worker)

    def close(self) -> None:
        """Ends it, with its file."""
        self.ears.close()
        _remove_socket(self.address)


def _open_bell(database: str, worker: str) -> _Bell:
    address, ears = _bind(database, worker)
    voice = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    voice.setblocking(False)
    return _Bell(database, worker, address, ears, voice)


def _bind(database: str, worker: str) -> tuple[str, trio.socket.SocketType]:
    """Listens beside the database; where no socket can be there, in a directory of its own among temporary files.

    Raises:
        StoreUnavailable: Nor there.
    """
    ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ears.setblocking(False)
    address = f"{database}-{worker}"
    try:
        try:
            if len(os.fsencode(address)) > _MAX_ADDRESS_BYTES:
                raise OSError("the path is too long for a socket")
            ears.bind(address)
        except OSError:  # also: that file system has no sockets
            address = os.path.join(tempfile.mkdtemp(prefix=_ASIDE), "bell")
            ears.bind(address)
        os.chmod(address, 0o600)
    except OSError as error:
        ears.close()
        raise StoreUnavailable(
            f"The other workers cannot be met: no socket can be made at {address}: {error}."
        ) from error
    return address, trio.socket.from_stdlib_socket(ears)


def _is_dead(address: str) -> bool:
    """Whether nobody listens at an address. Rings nobody, and does not depend on how full the other's queue is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False  # whatever that is, it does not say so
    return False


def _remove_socket(address: str) -> None:
    directory = os.path.dirname(address)
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            os.unlink(address)
        if os.path.basename(directory).startswith(_ASIDE):
            os.rmdir(directory)
