"""Lets a Trio ASGI app live under an asyncio server, by Trio's guest mode.

``hypercorn trigate:app`` runs hypercorn's default worker, which is asyncio's, and uvicorn has no
other; a QuartTrio app called there dies with ``AttributeError: 'RunContext' object has no attribute
'runner'``. Such a server calls `AsyncioHost` in the app's place, and that starts a *guest run*: a
whole Trio run whose steps are callbacks of the asyncio loop. Both worlds share one thread and take
turns on it, so nothing here needs a lock.

The strategy, and the rules for editing this file:

- **One guest run for each loop**, in a nest of indentation (`_Guest._main`): the app's lifespan
  encloses the nursery of the requests, so they have all ended when the app is told to shut down.
- **The server's lifespan call owns the guest run** and returns after it. What the app says last
  (``startup.failed``, ``shutdown.complete``) is held back until the run has ended: hypercorn looks,
  at the very step in which ``startup.failed`` reaches it, whether the lifespan call is over, and
  goes on to serve if it is not. A server without lifespan (``uvicorn --lifespan off``) is helped
  out: the first request starts the run, and it ends when `asyncio.run`, before it closes the loop,
  cancels every task there is.
- **A request is two tasks**: the server's, which only waits, and Trio's, which runs the app under a
  cancel scope of its own. The server's ends after Trio's, whatever happens. An exception of the app
  goes to the server, and to nobody else.
- **Each ``receive`` and ``send`` of the server runs in an asyncio task of its own**, as servers may
  rely on `asyncio.current_task`. Most end in their first step; so the Trio side yields once before
  it goes to sleep, which lets that step run ahead of Trio's next tick. It spares the round trip
  through the thread in which a sleeping guest waits for I/O: the cost of guest mode.
- **Cancelling the Trio side abandons a call of the server's, it does not cancel it.** The message
  of an abandoned ``receive`` is the next one's, so none is lost; an abandoned ``send`` goes out
  whole, before the next. (Cut short, it leaves hypercorn's HTTP/1.1 state behind the bytes that it
  has written, and an HTTP/2 frame half written.)
- **Of Trio, asyncio's side calls synchronous functions only**: `trio.Event.set`,
  `trio.CancelScope.cancel`, `trio.Nursery.start_soon`.

Bounds: at most one message of a request each way is in here, so back-pressure is the server's. A
request that is told to end may talk for `_LAST_WORDS_S`; then its sends fail, lest a client that
has stopped reading hold up the end by a shielded send.

Known warts:

- Trio allows one guest run in a thread: two `AsyncioHost` on one loop are one too many.
- A loop that is closed without cancelling its tasks abandons the run on it. uvicorn does so when
  SIGTERM reaches it under ``--lifespan off``: it raises the signal again before its loop closes.
- hypercorn on Python 3.12 and later waits at SIGTERM until its clients have left, whatever its
  graceful timeout says (its issue 308): nothing of that reaches an app before.
- uvicorn mistakes an exception out of a lifespan for a missing lifespan and does not show it. So
  the crash of a guest run is logged here, and a second time by servers that do show it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast

import attrs
import outcome
import structlog
import trio

if TYPE_CHECKING:
    from hypercorn.typing import (
        ASGIFramework,
        ASGIReceiveCallable,
        ASGIReceiveEvent,
        ASGISendCallable,
        ASGISendEvent,
        LifespanScope,
        Scope,
        WWWScope,
    )

log = structlog.get_logger("trigate.server.asyncio_host")

# How long a request may still talk to its client after it was told to end.
_LAST_WORDS_S = 1.0

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class AsyncioHost:
    """An ASGI app for asyncio servers, made of one for Trio.

    Holds no state of a loop that has ended: it can serve one loop after the other.

    Args:
        app: An ASGI 3 app that runs on Trio, such as a QuartTrio app.
    """

    def __init__(self, app: ASGIFramework) -> None:
        self._app = app
        self._guest: _Guest | None = None
        self._keeper: asyncio.Task[None] | None = None  # asyncio itself holds its tasks weakly

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serves one call of an asyncio server: its lifespan, a request or a WebSocket.

        Raises:
            RuntimeError: The app did not start, has crashed, or has been shut down.

        Cancels:
            The app is cancelled, and awaited, before the cancellation goes on.
        """
        if scope["type"] == "lifespan":
            await self._serve_lifespan(scope, receive, send)
        else:
            await self._guest_here().serve(scope, receive, send)

    async def _serve_lifespan(self, scope: LifespanScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()  # lifespan.startup
        guest = self._start_guest(scope)
        shutdown: asyncio.Future[ASGIReceiveEvent] | None = None
        try:
            await asyncio.wait((guest.startup,))
            if guest.has_lifespan and guest.refusal is None:
                await send({"type": "lifespan.startup.complete"})
                shutdown = asyncio.ensure_future(receive())
                await asyncio.wait((shutdown, guest.ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if shutdown is not None:
                shutdown.cancel()
            await guest.aclose()
        if not guest.has_lifespan:
            # The server is to see what it would see of the app itself. If it serves nevertheless,
            # the first request starts anew.
            self._guest = None
            if guest.absence is not None:
                raise guest.absence
        if guest.farewell is not None:
            await send(guest.farewell)
        if guest.crash is not None:
            raise guest.crash

    def _guest_here(self) -> _Guest:
        """Finds the guest run of the running loop, or plays the server's part in starting one."""
        loop = asyncio.get_running_loop()
        if self._guest is not None and self._guest.loop is loop:
            return self._guest
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": {},
        }
        # In an empty context: the first request's is not for everything that the app starts.
        guest = contextvars.Context().run(self._start_guest, cast("LifespanScope", scope))
        guest.state = guest.scope["state"]
        self._keeper = loop.create_task(guest.keep())
        return guest

    def _start_guest(self, scope: LifespanScope) -> _Guest:
        guest = _Guest(app=self._app, scope=scope)
        guest.start()
        self._guest = guest
        return guest


@attrs.define(eq=False, kw_only=True)
class _Guest:
    """One guest run: the app's lifespan around the requests.

    Attributes:
        startup: Done when the app has answered ``lifespan.startup``, or will not any more.
        ended: Done when the run is over.
        state: The lifespan's, of which each request gets a copy; where the server does not do that.
        has_lifespan: Whether the app answered. One that did not serves requests nevertheless.
        absence: What the app raised instead of an answer.
        farewell: What the app said last, and the server has yet to be told.
        refusal: Why there can be no requests any more.
        crash: What the app raised out of its lifespan after that, or what broke the run down.
    """

    app: ASGIFramework
    scope: LifespanScope
    loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop)
    startup: asyncio.Future[None] = attrs.field(init=False)
    ended: asyncio.Future[None] = attrs.field(init=False)
    state: dict[str, object] | None = None
    has_lifespan: bool = False
    absence: Exception | None = None
    farewell: ASGISendEvent | None = None
    refusal: str | None = None
    crash: BaseException | None = None
    _nursery: trio.Nursery | None = None
    _calls: set[_Call] = attrs.field(factory=set)
    _closing: trio.Event = attrs.field(factory=trio.Event)
    _lifespan_scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def __attrs_post_init__(self) -> None:
        self.startup = self.loop.create_future()
        self.ended = self.loop.create_future()

    # -- asyncio's side ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begins the run.

        Raises:
            RuntimeError: There is a Trio run in this thread.
        """
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self.loop.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=self.loop.call_soon,
            done_callback=self._end,
            host_uses_signal_set_wakeup_fd=True,
        )

    async def keep(self) -> None:
        """Lasts as long as the run, which it ends when it is cancelled."""
        try:
            await asyncio.wait((self.ended,))
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Ends the run: first the requests, then the app.

        Cancels:
            The app is cancelled in place of being told to shut down, then awaited.
        """
        self._close("it has been shut down")
        if not self.startup.done():
            self._lifespan_scope.cancel()
        await _outlast((self.ended,), self._lifespan_scope.cancel)

    async def serve(self, scope: WWWScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Runs the app for one request, which starts after the app has."""
        if not self.startup.done():
            await asyncio.wait((self.startup,))
        if self.refusal is not None or self._nursery is None:
            raise RuntimeError(f"The app cannot serve this request: {self.refusal}.") from self.crash
        if self.state is not None:
            scope = cast("WWWScope", {**scope, "state": self.state.copy()})
        call = _Call(loop=self.loop, server_receive=receive, server_send=send)
        self._calls.add(call)
        try:
            self._nursery.start_soon(call.run, self.app, scope)
            await call.wait()
        finally:
            self._calls.discard(call)

    def _close(self, reason: str) -> None:
        self.refusal = self.refusal or reason
        self._closing.set()

    def _end(self, result: outcome.Outcome[None]) -> None:
        if isinstance(result, outcome.Error):
            self.crash = result.error
            log.error("guest_run_crashed", exc_info=result.error)
        self._close("it has ended")
        for call in self._calls:
            call.finish()  # a no-op, but for a run that broke down without ending its tasks
        if not self.startup.done():
            self.startup.set_result(None)
        self.ended.set_result(None)

    # -- Trio's side ------------------------------------------------------------------------------

    async def _main(self) -> None:
        to_app, from_server = trio.open_memory_channel["ASGIReceiveEvent"](2)
        await to_app.send({"type": "lifespan.startup"})
        async with trio.open_nursery() as lifespan:
            lifespan.start_soon(self._run_lifespan, from_server)
            async with trio.open_nursery() as self._nursery:
                await self._closing.wait()
                for call in self._calls:
                    call.cancel()
            await to_app.send({"type": "lifespan.shutdown"})
        if self.crash is not None:
            raise self.crash

    async def _run_lifespan(  # noqa: ASYNC910 - the app waits
        self, from_server: trio.MemoryReceiveChannel[ASGIReceiveEvent]
    ) -> None:
        async def receive() -> ASGIReceiveEvent:
            if self.farewell is not None:
                self._lifespan_scope.cancel()  # it has said its last word: nothing comes any more
            return await from_server.receive()

        try:
            with self._lifespan_scope:
                await self.app(self.scope, receive, self._hear)
        except Exception as error:
            if self.has_lifespan:
                self.crash = error
                self._close("it has crashed")
            else:
                self.absence = error
                log.warning("lifespan_unsupported", error=repr(error))
        if not self.startup.done():
            self.startup.set_result(None)

    async def _hear(self, message: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint()
        match message["type"]:
            case "lifespan.startup.complete":
                pass
            case "lifespan.startup.failed":
                self.farewell = message
                self._close(f"it did not start: {message.get('message', '')}")
            case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                self.farewell = message
            case other:
                raise ValueError(f"{other} is not for a lifespan")
        self.has_lifespan = True
        if not self.startup.done():
            self.startup.set_result(None)


@attrs.define(eq=False, kw_only=True)
class _Call:
    """One request or WebSocket: the two tasks and what goes between them."""

    loop: asyncio.AbstractEventLoop
    server_receive: ASGIReceiveCallable
    server_send: ASGISendCallable
    _context: contextvars.Context = attrs.field(factory=contextvars.copy_context)
    _cancel_scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _ended: asyncio.Future[None] = attrs.field(init=False)
    _error: Exception | None = None
    _receiving: asyncio.Task[outcome.Outcome[ASGIReceiveEvent]] | None = None
    _sending: asyncio.Task[outcome.Outcome[None]] | None = None
    _last_words: asyncio.TimerHandle | None = None
    _silenced: bool = False

    def __attrs_post_init__(self) -> None:
        self._ended = self.loop.create_future()

    # -- asyncio's side ---------------------------------------------------------------------------

    async def wait(self) -> None:
        """Waits for the app, and leaves nothing of the request behind.

        Raises:
            Exception: What the app raised.
        """
        try:
            await _outlast((self._ended,), self.cancel)
        except asyncio.CancelledError:
            if self._error is not None:
                log.error("request_crashed_when_cancelled", exc_info=self._error)
            raise
        finally:
            if self._last_words is not None:
                self._last_words.cancel()
            self._silence()
            left = [task for task in (self._receiving, self._sending) if task is not None]
            await _outlast(left, self._silence)  # noqa: ASYNC102 - asyncio's; that is what it is for
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Cancels the app, which may still talk for `_LAST_WORDS_S`."""
        self._cancel_scope.cancel()
        if self._last_words is None:
            self._last_words = self.loop.call_later(_LAST_WORDS_S, self._silence)

    def finish(self) -> None:
        """Says that the app has ended."""
        if not self._ended.done():
            self._ended.set_result(None)

    def _silence(self) -> None:
        self._silenced = True
        for task in (self._receiving, self._sending):
            if task is not None:
                task.cancel()

    # -- Trio's side ------------------------------------------------------------------------------

    async def run(self, app: ASGIFramework, scope: WWWScope) -> None:  # noqa: ASYNC910 - the app waits
        """Runs the app. Raises nothing that the app raises."""
        try:
            with self._cancel_scope:
                await app(scope, self._receive, self._send)
        except Exception as error:
            self._error = error
        finally:
            self.finish()

    async def _receive(self) -> ASGIReceiveEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._receiving is None:
                self._receiving = self._begin(self.server_receive)
            task = self._receiving
            await _slept_through(task)
            if self._receiving is task:  # else another task of the app has taken the message
                self._receiving = None
                return _result_of(task)

    async def _send(self, message: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._sending is not None and not self._sending.done():
            await _slept_through(self._sending)
        self._sending = task = self._begin(self.server_send, message)
        await _slept_through(task)
        _result_of(task)

    def _begin(self, call: Callable[[*_Args], Awaitable[_T]], *args: *_Args) -> asyncio.Task[outcome.Outcome[_T]]:
        """Begins a call of the server's, in a task that raises nothing: `_result_of` does."""
        if self._silenced:
            raise ConnectionAbortedError("this request is over")
        return self.loop.create_task(outcome.acapture(call, *args), context=self._context)


async def _slept_through(task: asyncio.Task[outcome.Outcome[_T]]) -> None:
    """Waits, on Trio, for a task of asyncio's; when cancelled it leaves the task alone."""
    await trio.lowlevel.cancel_shielded_checkpoint()
    if not task.done():
        done = trio.Event()
        task.add_done_callback(lambda _: done.set())
        await done.wait()


def _result_of(task: asyncio.Task[outcome.Outcome[_T]]) -> _T:
    result = outcome.Error(asyncio.CancelledError()) if task.cancelled() else task.result()
    if isinstance(result, outcome.Error) and isinstance(result.error, asyncio.CancelledError):
        # Of the other world: to Trio it is an error of the server's.
        raise ConnectionAbortedError("the server has ended this request")
    return result.unwrap()


async def _outlast(  # noqa: ASYNC910 - asyncio's
    futures: Collection[asyncio.Future[Any]],  # Any: their results are nobody's concern here
    on_cancel: Callable[[], object],
) -> None:
    """Waits, on asyncio, until all are done; a cancellation meanwhile goes on only then."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:  # noqa: ASYNC103 - raised below
            cancelled = error
            on_cancel()
    if cancelled is not None:
        raise cancelled
