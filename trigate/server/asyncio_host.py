"""Runs a Trio ASGI app under an asyncio server, in Trio's guest mode.

``hypercorn trigate:app`` runs hypercorn's default worker, which is asyncio's, and uvicorn has no other. A QuartTrio app
that is called there fails with ``AttributeError: 'RunContext' object has no attribute 'runner'``. Such a server calls
`AsyncioHost` in place of the app, and that starts a *guest run*: a whole Trio run whose steps are callbacks of the
asyncio loop. Both loops share one thread and alternate on it, so nothing here needs a lock.

The strategy, and the rules for editing this file:

- **There is one guest run for each loop**, in nested blocks (`_Guest._main`): the app's lifespan encloses the nursery
  of the requests, so all requests have ended when the app receives ``lifespan.shutdown``.
- **The server's lifespan call owns the guest run**, and returns after it. The app's final message
  (``startup.failed``, ``shutdown.complete``) is held back until the run has ended: in the very step in which
  ``startup.failed`` reaches it, hypercorn checks whether the lifespan call has returned, and starts to serve if it has
  not. For a server without lifespan (``uvicorn --lifespan off``), the first request starts the run. It ends when
  `asyncio.run` cancels all tasks before it closes the loop.
- **A request is two tasks**: the server's, which only waits, and Trio's, which runs the app in a cancel scope of its
  own. The server's task always ends after Trio's. Only the server gets an exception of the app.
- **Each ``receive`` and ``send`` of the server runs in an asyncio task of its own**, as servers may rely on
  `asyncio.current_task`. Most of them end in their first step. So the Trio side yields once before it sleeps, and that
  step runs before Trio's next tick. This saves a round trip through the thread in which a sleeping guest waits for
  I/O, which is the cost of guest mode.
- **Cancelling the Trio side abandons a call of the server, and does not cancel it.** The message of an abandoned
  ``receive`` goes to the next one, so none is lost. An abandoned ``send`` is sent completely, before the next one. (If
  it were cancelled, hypercorn's HTTP/1.1 state would lag behind the bytes that it has written, and an HTTP/2 frame
  could be half written.)
- **The asyncio side calls only synchronous functions of Trio**: `trio.Event.set`, `trio.CancelScope.cancel`,
  `trio.Nursery.start_soon`.

Bounds: this module holds at most one message of a request each way, so back-pressure is the server's. A cancelled
request may send for `_FINAL_MESSAGE_S`; then its sends fail, so that a client that has stopped reading cannot delay the
end by a shielded send.

Known warts:

- Trio allows one guest run in a thread, so two `AsyncioHost` on one loop do not work.
- A loop that is closed without cancelling its tasks abandons its run. uvicorn does so when SIGTERM reaches it under
  ``--lifespan off``: it raises the signal again before its loop closes.
- On Python 3.12 and later, hypercorn waits at SIGTERM until its clients have disconnected, and ignores its
  graceful timeout (its issue 308). The app is not notified before.
- uvicorn takes an exception out of a lifespan for a missing lifespan, and does not show it. So the crash of a guest run
  is logged here; servers that show it log it a second time.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast

import attrs
import outcome
import trio

from trigate.logs import log

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

_FINAL_MESSAGE_S = 1.0
"""How long a request may still send to its client after it was cancelled."""

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class AsyncioHost:
    """Makes an ASGI app for asyncio servers from one for Trio.

    It keeps no state of a loop that has ended, so it can serve one loop after another.

    Args:
        app: An ASGI 3 app that runs on Trio, such as a QuartTrio app.
    """

    def __init__(self, app: ASGIFramework) -> None:
        self._app = app
        self._guest: _Guest | None = None
        self._keeper: asyncio.Task[None] | None = None  # asyncio holds only weak references to tasks

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serves one call of an asyncio server: its lifespan, a request or a WebSocket.

        Raises:
            RuntimeError: The app did not start, has crashed, or has been shut down.

        **Cancels:** the app is cancelled, and awaited, before the cancellation continues.
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
            # The server gets the exception that the app would have raised to it. If the server serves nevertheless,
            # the first request starts a new guest run.
            self._guest = None
            if guest.lifespan_error is not None:
                raise guest.lifespan_error
        if guest.final_message is not None:
            await send(guest.final_message)
        if guest.crash is not None:
            raise guest.crash

    def _guest_here(self) -> _Guest:
        """Returns the guest run of the running loop, or starts one in place of the server."""
        loop = asyncio.get_running_loop()
        if self._guest is not None and self._guest.loop is loop:
            return self._guest
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": {},
        }
        # In an empty context: the context of the first request must not reach everything that the app starts.
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
        app: The app.
        scope: The scope of the lifespan.
        loop: The asyncio loop that runs it.
        startup: Done when the app has answered ``lifespan.startup``, or cannot answer any more.
        ended: Done when the run is over.
        state: The lifespan's state, where the server does not copy it into the requests; each request gets a copy.
        has_lifespan: Whether the app has answered. An app that has not serves requests all the same.
        lifespan_error: The exception that the app raised instead of an answer.
        final_message: The app's last lifespan message, which the server has not received yet.
        refusal: Why no more requests can be served.
        crash: The exception that the app raised out of its lifespan later, or that ended the run.
    """

    app: ASGIFramework
    scope: LifespanScope
    loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop)
    startup: asyncio.Future[None] = attrs.field(init=False)
    ended: asyncio.Future[None] = attrs.field(init=False)
    state: dict[str, object] | None = None
    has_lifespan: bool = False
    lifespan_error: Exception | None = None
    final_message: ASGISendEvent | None = None
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
        """Starts the run.

        Raises:
            RuntimeError: Another Trio run is active in this thread.
        """
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self.loop.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=self.loop.call_soon,
            done_callback=self._end,
            host_uses_signal_set_wakeup_fd=True,
        )

    async def keep(self) -> None:
        """Waits until the run is over. Ends the run when it is cancelled."""
        try:
            await asyncio.wait((self.ended,))
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Ends the run: first the requests, then the app.

        **Cancels:** the app is cancelled in place of ``lifespan.shutdown``, and then awaited.
        """
        self._close("it has been shut down")
        if not self.startup.done():
            self._lifespan_scope.cancel()
        await _wait_all_done((self.ended,), self._lifespan_scope.cancel)

    async def serve(self, scope: WWWScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Runs the app for one request, after the app has started.

        Raises:
            RuntimeError: The app did not start, has crashed, or has been shut down.
        """
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
            call.finish()  # has an effect only if the run has failed without ending its tasks
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

    async def _run_lifespan(self, from_server: trio.MemoryReceiveChannel[ASGIReceiveEvent]) -> None:
        async def receive() -> ASGIReceiveEvent:
            if self.final_message is not None:
                self._lifespan_scope.cancel()  # nothing follows the final message
            return await from_server.receive()

        try:
            with self._lifespan_scope:
                await self.app(self.scope, receive, self._send_lifespan)
        except Exception as error:
            if self.has_lifespan:
                self.crash = error
                self._close("it has crashed")
            else:
                self.lifespan_error = error
                log.warning("lifespan_unsupported", error=repr(error))
        if not self.startup.done():
            self.startup.set_result(None)

    async def _send_lifespan(self, message: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint()
        match message["type"]:
            case "lifespan.startup.complete":
                pass
            case "lifespan.startup.failed":
                self.final_message = message
                self._close(f"it did not start: {message.get('message', '')}")
            case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                self.final_message = message
            case other:
                raise ValueError(f"{other} is not a message of an ASGI lifespan")
        self.has_lifespan = True
        if not self.startup.done():
            self.startup.set_result(None)


@attrs.define(eq=False, kw_only=True)
class _Call:
    """One request or WebSocket: its two tasks, and the messages between them."""

    loop: asyncio.AbstractEventLoop
    server_receive: ASGIReceiveCallable
    server_send: ASGISendCallable
    _context: contextvars.Context = attrs.field(factory=contextvars.copy_context)
    _cancel_scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _ended: asyncio.Future[None] = attrs.field(init=False)
    _error: Exception | None = None
    _receiving: asyncio.Task[outcome.Outcome[ASGIReceiveEvent]] | None = None
    _sending: asyncio.Task[outcome.Outcome[None]] | None = None
    _final_message_timer: asyncio.TimerHandle | None = None
    _silenced: bool = False

    def __attrs_post_init__(self) -> None:
        self._ended = self.loop.create_future()

    # -- asyncio's side ---------------------------------------------------------------------------

    async def wait(self) -> None:
        """Waits until the app has returned, and then ends the pending calls of the server.

        Raises:
            Exception: The exception of the app.
        """
        try:
            await _wait_all_done((self._ended,), self.cancel)
        except asyncio.CancelledError:
            if self._error is not None:
                log.error("request_crashed_when_cancelled", exc_info=self._error)
            raise
        finally:
            if self._final_message_timer is not None:
                self._final_message_timer.cancel()
            self._silence()
            pending = [task for task in (self._receiving, self._sending) if task is not None]
            await _wait_all_done(pending, self._silence)  # noqa: ASYNC102 - asyncio's, which a cancellation does not end
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Cancels the app, which may still send for `_FINAL_MESSAGE_S`."""
        self._cancel_scope.cancel()
        if self._final_message_timer is None:
            self._final_message_timer = self.loop.call_later(_FINAL_MESSAGE_S, self._silence)

    def finish(self) -> None:
        """Marks the app as ended."""
        if not self._ended.done():
            self._ended.set_result(None)

    def _silence(self) -> None:
        self._silenced = True
        for task in (self._receiving, self._sending):
            if task is not None:
                task.cancel()

    # -- Trio's side ------------------------------------------------------------------------------

    async def run(self, app: ASGIFramework, scope: WWWScope) -> None:
        """Runs the app, and keeps its exception for `wait`."""
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
            await _wait_task(task)
            if self._receiving is task:  # otherwise another task of the app has received the message
                self._receiving = None
                return _result_of(task)

    async def _send(self, message: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._sending is not None and not self._sending.done():
            await _wait_task(self._sending)
        self._sending = task = self._begin(self.server_send, message)
        await _wait_task(task)
        _result_of(task)

    def _begin(self, call: Callable[[*_Args], Awaitable[_T]], *args: *_Args) -> asyncio.Task[outcome.Outcome[_T]]:
        """Starts a call of the server in an asyncio task, which raises nothing: `_result_of` does."""
        if self._silenced:
            raise ConnectionAbortedError("this request is over")
        return self.loop.create_task(outcome.acapture(call, *args), context=self._context)


async def _wait_task(task: asyncio.Task[outcome.Outcome[_T]]) -> None:
    """Waits on Trio for an asyncio task. A cancellation ends the wait, not the task."""
    await trio.lowlevel.cancel_shielded_checkpoint()
    if not task.done():
        done = trio.Event()
        task.add_done_callback(lambda _: done.set())
        await done.wait()


def _result_of(task: asyncio.Task[outcome.Outcome[_T]]) -> _T:
    result = outcome.Error(asyncio.CancelledError()) if task.cancelled() else task.result()
    if isinstance(result, outcome.Error) and isinstance(result.error, asyncio.CancelledError):
        # On the Trio side, asyncio's cancellation is an error of the server.
        raise ConnectionAbortedError("the server has ended this request")
    return result.unwrap()


async def _wait_all_done(
    futures: Collection[asyncio.Future[Any]],  # Any: their results are not used
    on_cancel: Callable[[], object],
) -> None:
    """Waits on asyncio until all futures are done. A cancellation calls ``on_cancel``, and continues after that."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:  # noqa: ASYNC103 - raised below
            cancelled = error
            on_cancel()
    if cancelled is not None:
        raise cancelled
