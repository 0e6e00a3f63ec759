"""Generations and their reload: a reload is atomic, is refused as a whole, and never affects a running request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import AsgiClient
from tests.support.logs import Logs
from tests.support.provider import DONE, MemoryTransport, Pause, Provider, Say, Stall, content, says
from tests.support.shortage import ERRORS, os_error
from trigate.asgi.application import create_app
from trigate.config.sections import ConfigError, UpstreamConfig
from trigate.config.structure import structure
from trigate.gateway import reload as gateway_reload
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.logs import log
from trigate.server import lifespan
from trigate.upstream import factory
from trigate.upstream.factory import TransportFactory, http_transport
from trigate.upstream.transport import SocketTransport
from trigate.upstream.upstream import Upstream


def toml(*upstreams: str, **limits: float) -> str:
    """A configuration with these upstreams, each with the model ``m``."""
    tables = [f'[upstreams.{name}]\nbase_url = "http://{name}.invalid/v1"\nmodels = ["m"]' for name in upstreams]
    return "\n".join([*tables, "[limits]", *(f"{name} = {value}" for name, value in limits.items())])


class Files:
    """A gateway that serves a file, and the transports of its upstreams."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.providers: dict[str, Provider] = {}
        self.transports: list[tuple[str, MemoryTransport]] = []
        self.looks = 0
        self.make: TransportFactory = self.transport
        self.gateway: Gateway
        self.client: AsgiClient

    def transport(self, name: str, config: UpstreamConfig) -> MemoryTransport:
        """Makes a transport and remembers it."""
        made = self.providers.setdefault(name, Provider()).transport()
        self.transports.append((name, made))
        return made

    @property
    def open_transports(self) -> list[str]:
        """The upstreams that have an open transport."""
        return [name for name, transport in self.transports if not transport.closed]

    def write(self, text: str) -> None:
        """Replaces the file in one step, since a half-written file would be read twice."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    async def reload(self, text: str) -> None:
        """Changes the file and waits until the gateway has processed the change."""
        self.write(text)
        self.gateway.reloader.request()
        await trio.sleep(0.5)

    async def wait_watched(self) -> None:
        """Waits until the gateway has checked the file several more times."""
        enough = self.looks + 3
        await _until(lambda: self.looks >= enough)

    async def models(self) -> list[str]:
        """The listed models, without their bare ids."""
        rows = (await self.client.ask("GET", "/v1/models")).json["data"]
        ids = {row["id"] for row in rows}
        return [row["id"] for row in rows if f"{row['owned_by']}/{row['id']}" not in ids]


async def _until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(100):  # of virtual time
        while not holds():  # noqa: ASYNC110
            await trio.sleep(1)


async def _without_a_thread(sync: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Replaces `trio.to_thread.run_sync` and runs the function at once, because a virtual clock does not wait for
    threads."""
    await trio.lowlevel.checkpoint()
    return sync(*args)


@pytest.fixture
async def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Files]:
    """A gateway that serves ``trigate.toml`` with the upstream ``a``."""
    found = Files(tmp_path / "trigate.toml")
    fingerprint = gateway_reload._fingerprint

    async def look(path: Path) -> tuple[int, int, int] | None:
        seen = await fingerprint(path)
        found.looks += 1
        return seen

    monkeypatch.setattr(gateway_reload, "_fingerprint", look)
    monkeypatch.setattr("trio._path.run_sync", _without_a_thread)
    found.write(toml("a"))
    app: Any = create_app(
        opener=lambda: open_gateway(env={"TRIGATE_CONFIG": str(found.path)}, transports=lambda *of: found.make(*of))
    )
    async with lifespan.open_lifespan(app), trio.open_nursery() as nursery:
        found.gateway, found.client = app.gateway, AsgiClient(app, nursery)
        try:
            yield found
        finally:
            found.client.cancel_all()
            nursery.cancel_scope.cancel()


async def test_a_reload_replaces_everything(files: Files, autojump_clock: MockClock) -> None:
    """The new upstreams serve, the old ones are removed and closed, and the reload is logged."""
    assert await files.models() == ["default", "a/m"]
    await files.reload(toml("b"))
    assert await files.models() == ["default", "b/m"]
    assert (await files.client.chat(model="b/m").wait()).body.endswith(DONE)
    assert (await files.client.chat(model="a/m").wait()).status == 404
    assert files.open_transports == ["b"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[upstreams", "is not TOML"),
        (toml("b") + "\nnonsense = 1", "limits: unknown key nonsense"),
        (toml("b", keep_alive_s=-1), "limits.keep_alive_s"),
        ('[upstreams.b]\nbase_url = "ftp://x"', "upstreams.b.base_url"),
        ('[upstreams.b]\nbase_url = "http://192.168.1.300:8080/v1"', "upstreams.b.base_url"),
        (toml("b") + '\n[models.x]\ntargets = ["nobody/m"]', "nobody"),
        ("x = " + 20_000 * "[", "nested too deeply"),
    ],
    ids=["not TOML", "unknown key", "bad value", "bad URL", "no such address", "bad target", "too deep"],
)
async def test_a_bad_file_changes_nothing(
    files: Files, logs: Logs, autojump_clock: MockClock, text: str, why: str
) -> None:
    """The old configuration stays, ``/status`` gives the reason, and the next good file clears it."""
    logs.expect_error("reload_refused")
    generation = files.gateway.generations.current
    await files.reload(text)
    assert files.gateway.generations.current is generation
    assert await files.models() == ["default", "a/m"]
    assert (await files.client.chat(model="a/m").wait()).body.endswith(DONE)
    status = (await files.client.ask("GET", "/status")).json
    assert why in status["reload_error"]
    assert str(files.path) in status["reload_error"]
    assert files.open_transports == ["a"]
    await files.reload(toml("a", "b"))
    assert (await files.client.ask("GET", "/status")).json["reload_error"] is None
    assert await files.models() == ["default", "a/m", "b/m"]


@pytest.mark.parametrize("grouped", [False, True])
async def test_upstreams_that_cannot_be_opened_change_nothing(
    files: Files, logs: Logs, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """A file that parses may still fail to be applied, for any reason. The old configuration stays."""
    make = files.transport

    def transport(name: str, config: UpstreamConfig) -> MemoryTransport:
        if name == "b":
            raise ExceptionGroup("", [OSError("no luck")]) if grouped else OSError("no luck")
        return make(name, config)

    monkeypatch.setattr(files, "make", transport)
    logs.expect_error("reload_refused")
    await files.reload(toml("c", "b"))
    assert "no luck" in str(files.gateway.reloader.error)
    assert files.open_transports == ["a"]
    assert (await files.client.chat(model="a/m").wait()).body.endswith(DONE)
    await files.reload(toml("c"))
    assert files.gateway.reloader.error is None
    assert files.open_transports == ["c"]


@pytest.mark.parametrize("error", [*map(os_error, ERRORS), RuntimeError("can't start new thread")], ids=str)
async def test_a_file_that_the_system_does_not_read(
    files: Files, logs: Logs, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Neither a look at the file nor a reload that fails changes anything, and the next ones work."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("trio._path.run_sync", fail)
        if isinstance(error, OSError):
            logs.expect_error("reload_refused")
            patch.setattr(Path, "read_text", fail)
        await files.wait_watched()
        assert (await files.client.chat(model="a/m").wait()).body.endswith(DONE)
    await files.reload(toml("b"))
    assert await files.models() == ["default", "b/m"]
    assert files.gateway.reloader.error is None


async def test_missing_certificate_authorities(
    files: Files, logs: Logs, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked up with the first ``https:`` upstream. When that comes with a reload, the reload is refused."""
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setattr(files, "make", http_transport)
    logs.expect_error("reload_refused")
    await files.reload('[upstreams.b]\nbase_url = "https://127.0.0.1:9/v1"\nmodels = ["m"]')
    assert files.gateway.reloader.error == "SSL_CERT_FILE: cannot be used: No such file or directory"
    assert await files.models() == ["default", "a/m"]


async def test_a_missing_file_changes_nothing(files: Files, logs: Logs, autojump_clock: MockClock) -> None:
    """Editors remove a file before they write it."""
    logs.expect_error("reload_refused")
    await files.wait_watched()
    files.path.unlink()
    await _until(lambda: files.gateway.reloader.error is not None)
    assert "cannot be read" in str(files.gateway.reloader.error)
    assert (await files.client.chat(model="a/m").wait()).status == 200
    files.write(toml("a", "b"))
    await _until(lambda: files.gateway.reloader.error is None)
    assert await files.models() == ["default", "a/m", "b/m"]


async def test_a_running_exchange_keeps_its_generation(files: Files, autojump_clock: MockClock) -> None:
    """Its upstream, limits and connections stay until it ends and are then closed. New calls use the new generation."""
    files.providers["a"] = files.providers["a"]
    files.providers["a"].play((Say(content("one")), Pause(10), *says("two")))
    old = files.gateway.generations.current
    running = files.client.chat(model="a/m")
    await running.wait_for(b"one")
    await files.reload(toml("b", idle_timeout_s=1))
    assert files.gateway.generations.current is not old
    assert (await files.client.chat(model="b/m").wait()).body.endswith(DONE)
    assert files.open_transports == ["a", "b"]
    [exchange] = files.gateway.live
    assert exchange.generation is old
    assert (await running.wait()).body.endswith(DONE)
    await wait_all_tasks_blocked()
    assert files.open_transports == ["b"]


async def test_the_old_generation_waits_for_its_last_exchange(files: Files, autojump_clock: MockClock) -> None:
    """It does not close when the first exchange ends after the reload."""
    files.providers["a"].play((Say(content("x")), Pause(5), Say(DONE)), (Say(content("x")), Pause(10), Say(DONE)))
    calls = [files.client.chat(model="a/m"), files.client.chat(model="a/m")]
    for call in calls:
        await call.wait_for(b"x")
    await files.reload(toml("b"))
    await trio.sleep(7)
    assert sum(call.ended for call in calls) == 1
    assert files.open_transports == ["a", "b"]
    for call in calls:
        assert (await call.wait()).body.endswith(DONE)
    await wait_all_tasks_blocked()
    assert files.open_transports == ["b"]


async def test_a_disconnect_frees_the_old_generation(files: Files, autojump_clock: MockClock) -> None:
    """The old generation is freed however its last exchange ends."""
    files.providers["a"].play((Stall(),))
    running = files.client.chat(model="a/m")
    await wait_all_tasks_blocked()
    await files.reload(toml("b"))
    assert files.open_transports == ["a", "b"]
    running.disconnect()
    await running.wait()
    await wait_all_tasks_blocked()
    assert files.open_transports == ["b"]
    assert files.providers["a"].open_now == 0


async def test_many_reloads_leave_one_generation(files: Files, autojump_clock: MockClock) -> None:
    """The last file is the one in use, whether the reloads were awaited or not."""
    for round_ in range(10):
        files.write(toml(f"u{round_}"))
        files.gateway.reloader.request()
        files.gateway.reloader.request()
        await trio.sleep(0.01 * round_)
    await trio.sleep(1)
    assert await files.models() == ["default", "u9/m"]
    assert files.open_transports == ["u9"]


async def test_a_changed_file_is_noticed(files: Files, autojump_clock: MockClock) -> None:
    """A change is noticed within seconds without a signal. An unchanged file is not reloaded."""
    await files.wait_watched()
    assert len(files.transports) == 1
    files.write(toml("a", "b"))
    old = files.gateway.generations.current
    await _until(lambda: files.gateway.generations.current is not old)
    assert await files.models() == ["default", "a/m", "b/m"]
    await files.wait_watched()
    assert len(files.transports) == 3


async def test_a_drain_survives_a_reload(files: Files, autojump_clock: MockClock) -> None:
    """The drain belongs to the gateway and not to a generation: a cut reaches the exchanges of every generation."""
    files.providers["a"].play((Stall(),))
    running = files.client.chat(model="a/m")
    await wait_all_tasks_blocked()
    files.gateway.drain.begin()
    await files.reload(toml("b"))
    assert (await files.client.ask("GET", "/ready")).status == 503
    files.gateway.drain.cut()
    assert (await running.wait()).error["code"] == "draining"


async def test_limits_follow_the_generation(files: Files, autojump_clock: MockClock) -> None:
    """The new limits apply to the next call."""
    files.providers["a"].play((Stall(),))
    await files.reload(toml("a", first_token_timeout_s=2))
    begun = trio.current_time()
    call = await files.client.chat(model="a/m", stream=False).wait()
    assert call.status == 504
    assert trio.current_time() - begun == pytest.approx(2)


async def test_keys_follow_a_reload(files: Files, autojump_clock: MockClock) -> None:
    """A new key is required at once."""
    assert (await files.client.ask("GET", "/v1/models")).status == 200
    await files.reload(toml("a") + '\n[keys]\nme = "a-new-key"')
    assert (await files.client.ask("GET", "/v1/models")).status == 401
    headers = {"authorization": "Bearer a-new-key"}
    assert (await files.client.ask("GET", "/v1/models", headers=headers)).status == 200


async def test_the_level_of_the_log_follows_a_reload(files: Files, logs: Logs, autojump_clock: MockClock) -> None:
    """And is that of the environment again, once the file names none."""
    await files.reload(toml("a") + '\n[log]\nlevel = "error"')
    await files.client.chat(model="a/m").wait()
    assert not logs.named("exchange")
    await files.reload(toml("a") + '\n[log]\nlevel = "info"')
    await files.client.chat(model="a/m").wait()
    assert len(logs.named("exchange")) == 1
    await files.reload(toml("a"))
    log.debug("said")
    assert logs.named("said")


async def test_a_gateway_does_not_start_with_a_bad_file(tmp_path: Path) -> None:
    """At the start there is no old configuration to keep. The error says what is wrong."""
    path = tmp_path / "trigate.toml"
    path.write_text("[limits]\nnonsense = 1\nkeep_alive_s = true")
    with pytest.raises(ConfigError) as caught:
        async with open_gateway(env={"TRIGATE_CONFIG": str(path)}):
            pass
    assert caught.value.source == str(path)
    assert len(caught.value.problems) == 2


async def test_a_lifespan_that_cannot_start_says_why(tmp_path: Path, logs: Logs) -> None:
    """The server gets the reason as text."""
    logs.expect_error("startup_failed")
    path = tmp_path / "trigate.toml"
    path.write_text("nonsense = 1")
    app: Any = create_app(opener=lambda: open_gateway(env={"TRIGATE_CONFIG": str(path)}))
    with pytest.raises(lifespan.StartupFailed, match="nonsense"):
        async with lifespan.open_lifespan(app):
            pass
    assert "nonsense" in logs.named("startup_failed")[0]["error"]


# -- the route to an upstream -----------------------------------------------------------------------------------------


def _way(base_url: str, **settings: object) -> tuple[str, str | None]:
    table = {"base_url": base_url, **settings}
    upstream = structure({"upstreams": {"u": table}}, env={}, source="test").upstreams["u"]
    return type(http_transport("u", upstream)).__name__, factory._proxy_to(upstream)


@pytest.fixture
def set_proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets exactly these proxy variables in the environment."""

    def set_to(**variables: str) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_the_route_is_direct(set_proxies: Callable[..., None]) -> None:
    """Without a proxy and HTTP/2 requests use Trigate's own transport. With HTTP/2 they use httpx2's."""
    set_proxies()
    assert _way("http://up.example/v1") == _way("https://up.example/v1") == ("SocketTransport", None)
    assert _way("https://up.example/v1", http2=True) == ("AsyncHTTPTransport", None)


def test_the_route_through_the_upstreams_own_proxy(set_proxies: Callable[..., None]) -> None:
    """The upstream's setting takes precedence over the environment, for loopback addresses too."""
    set_proxies(ALL_PROXY="http://all.example:1", NO_PROXY="*")
    proxy = "http://user:word@proxy.example:3128"
    for url in ("http://up.example/v1", "https://up.example/v1", "http://127.0.0.1:1/v1"):
        assert _way(url, proxy=proxy) == ("AsyncHTTPTransport", proxy)
    set_proxies(ALL_PROXY="http://all.example:1")
    assert _way("http://up.example/v1", proxy="direct") == ("SocketTransport", None)


def test_the_route_through_the_environments_proxy(set_proxies: Callable[..., None]) -> None:
    """The proxy is chosen by scheme, names in NO_PROXY bypass it, and loopback addresses never use it."""
    set_proxies(HTTP_PROXY="plain.example:1", HTTPS_PROXY="http://tls.example:2", NO_PROXY="near.example,10.0.0.1")
    assert _way("http://up.example/v1") == ("AsyncHTTPTransport", "http://plain.example:1")
    assert _way("https://up.example/v1") == ("AsyncHTTPTransport", "http://tls.example:2")
    for host in (
        "near.example",
        "a.near.example",
        "10.0.0.1",
        "127.0.0.1:8000",
        "localhost:1",
        "[::1]:1",
        "a.localhost",
    ):
        assert _way(f"http://{host}/v1") == ("SocketTransport", None), host
    set_proxies(all_proxy="http://all.example:1")
    assert _way("https://up.example/v1") == ("AsyncHTTPTransport", "http://all.example:1")


async def test_a_proxy_that_is_not_http(set_proxies: Callable[..., None]) -> None:
    """The error concerns only that upstream and is reported when it is called. The gateway still starts."""
    set_proxies(ALL_PROXY="socks5://user:word@all.example:1")
    upstreams = structure({"upstreams": {"u": {"base_url": "http://up.example/v1"}}}, env={}, source="test").upstreams
    transport = http_transport("u", upstreams["u"])
    with pytest.raises(httpx2.ConnectError, match="socks5, not of HTTP"):
        await transport.handle_async_request(httpx2.Request("GET", "http://up.example/v1"))


async def test_a_request_goes_through_a_proxy(set_proxies: Callable[..., None]) -> None:
    """The proxy gets the whole URL and looks up the upstream's name."""
    set_proxies()
    lines = []

    async def play(stream: trio.SocketStream) -> None:
        lines.append(bytes(await stream.receive_some()).split(b"\r\n")[0])
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, play, 0, host="127.0.0.1"))
        proxy = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        table = {"base_url": "http://up.invalid/v1", "proxy": proxy}
        config = structure({"upstreams": {"u": table}}, env={}, source="test")
        async with (
            http_transport("u", config.upstreams["u"]) as transport,
            Upstream("u", config, transport).open("GET", "/models") as reply,
        ):
            assert await reply.read(10) == b"ok"
        nursery.cancel_scope.cancel()
    assert lines == [b"GET http://up.invalid/v1/models HTTP/1.1"]


async def test_idle_connections_of_a_generation_expire(mock_clock: MockClock) -> None:
    """The gateway runs the task that closes them."""
    ended = trio.Event()

    async def play(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        ended.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, play, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        config = structure({"upstreams": {"u": {"base_url": url, "models": ["m"]}}}, env={}, source="test")
        async with open_gateway(config, env={}) as served:
            upstream = served.generations.current.upstreams["u"]
            async with upstream.open("GET", "/models") as reply:
                assert await reply.read(10) == b"{}"
            assert isinstance(upstream.transport, SocketTransport)
            assert upstream.transport.statistics().idle == 1
            await wait_all_tasks_blocked()
            mock_clock.jump(31)
            await ended.wait()
            assert upstream.transport.statistics().open == 0
        nursery.cancel_scope.cancel()
