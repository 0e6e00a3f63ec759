"""A gateway with scripted upstreams, on real sockets and in a thread of its own, for a browser in the test's thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
import trio

from tests.support.gateway import make_config, open_server
from tests.support.provider import Provider, Script, open_socket_provider
from trigate.asgi.application import GatewayApp

T = TypeVar("T")
_START_S = 30.0


@attrs.define(eq=False)
class Site:
    """A running gateway.

    Attributes:
        url: Its address, without a slash at the end.
        providers: The upstreams by their names.
    """

    url: str
    app: GatewayApp
    providers: Mapping[str, Provider]
    _token: trio.lowlevel.TrioToken
    _scopes: Mapping[str, trio.CancelScope]

    def ask(self, function: Callable[[], T]) -> T:
        """Calls a function in the gateway's thread."""
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def kill(self, name: str) -> None:
        """Ends an upstream: its connections break, and its port is closed."""
        self.ask(self._scopes[name].cancel)

    def wait(self, what: str, holds: Callable[[], object], at_most_s: float = 10.0) -> None:
        """Waits until something holds in the gateway's thread."""

        async def wait() -> None:
            with trio.fail_after(at_most_s):
                while not holds():  # noqa: ASYNC110 - any condition
                    await trio.sleep(0.01)

        try:
            trio.from_thread.run(wait, trio_token=self._token)
        except trio.TooSlowError:
            raise AssertionError(f"{what} did not happen within {at_most_s:g} s") from None


@contextlib.contextmanager
def open_site(
    scripts: Mapping[str, tuple[Script, ...]], upstreams: Mapping[str, Mapping[str, Any]] | None = None, **sections: Any
) -> Iterator[Site]:
    """Runs a gateway.

    Args:
        scripts: What each upstream plays, by its name.
        upstreams: Further settings of upstreams, by their names.
        sections: As for `make_config`.
    """
    ready = threading.Event()
    found: list[Site] = []
    crashes: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    async def provide(
        name: str,
        providers: dict[str, Provider],
        scopes: dict[str, trio.CancelScope],
        *,
        task_status: trio.TaskStatus[str],
    ) -> None:
        with trio.CancelScope() as scopes[name]:
            async with open_socket_provider(*scripts[name]) as (providers[name], url):
                task_status.started(url)
                await trio.sleep_forever()

    async def serve() -> None:
        providers: dict[str, Provider] = {}
        scopes: dict[str, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            stop.append(nursery.cancel_scope.cancel)
            urls = {name: await nursery.start(provide, name, providers, scopes) for name in scripts}
            own = upstreams or {}
            tables = {name: {"base_url": url, **own.get(name, {})} for name, url in urls.items()}
            async with open_server(make_config(tables, **sections)) as (client, app):
                token = trio.lowlevel.current_trio_token()
                found.append(Site(str(client.base_url).rstrip("/"), app, providers, token, scopes))
                ready.set()
                await trio.sleep_forever()

    def run() -> None:
        try:
            trio.run(serve)
        except BaseException as crash:
            crashes.append(crash)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="site")
    thread.start()
    try:
        assert ready.wait(_START_S), "the gateway did not start"
        if crashes:
            raise crashes[0]
        yield found[0]
    finally:
        if found and thread.is_alive():
            found[0].ask(stop[0])
        thread.join(_START_S)
    if crashes:
        raise crashes[0]
