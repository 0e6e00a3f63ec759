"""`trigate.server.hot_restart`: one gateway replaces another without a failed request; real processes first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trio.testing

from tests.support.processes import Gateway, environment, run_gateway
from tests.support.slow import FULL
from trigate.config.sections import Count, Port, ServerConfig
from trigate.server import hot_restart, listeners
from trigate.server.hot_restart import HotRestartRefused, Predecessor, request_sockets, serve_handover
from trigate.server.listeners import ListenError, Listening, open_listening

RESTARTS = 10 if FULL else 5

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are no takeovers")

WORDS = 20
CONFIG = f"""
[server]
drain_timeout_s = 10
[upstreams.parrot]
kind = "echo"
words_per_s = {WORDS}
"""
TEXT = " ".join(f"word{number}" for number in range(WORDS))
GONE_S = 20.0
"""The longest time in which a replaced gateway exits. It exceeds the drain, whose end would be logged."""


# -- real processes under load ----------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@attrs.define(eq=False)
class Restarts:
    """Starts gateways on one port, one after another."""

    port: int
    directory: Path
    stack: contextlib.ExitStack
    env: dict[str, str] = attrs.field(factory=dict)
    count: int = 0

    def start(self, *options: str, config: str = CONFIG) -> Gateway:
        """Starts the next gateway, and waits until it serves."""
        self.count += 1
        directory = self.directory / str(self.count)
        directory.mkdir()
        command = (sys.executable, "-m", "trigate", "serve", "--port", str(self.port), *options)
        return self.stack.enter_context(run_gateway(config, directory, command=command, env=self.env))

    def try_to_start(self, *options: str, config: str = CONFIG) -> subprocess.CompletedProcess[str]:
        """Starts a gateway that is expected to fail."""
        self.count += 1
        path = self.directory / f"{self.count}.toml"
        path.write_text(config)
        return subprocess.run(
            [sys.executable, "-m", "trigate", "serve", "--port", str(self.port), *options],
            env=environment(path),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def health(self) -> int:
        """Returns the status of the health check, on a new connection."""
        return httpx2.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code


@pytest.fixture
def restarts(port: int, tmp_path: Path) -> Iterator[Restarts]:
    """A `Restarts` whose gateways are killed at the end."""
    with contextlib.ExitStack() as stack:
        yield Restarts(port, tmp_path, stack)


@attrs.define(eq=False)
class Load:
    """Clients that send requests all the time.

    Attributes:
        answered: How many calls succeeded, by the kind of client.
        failed: What went wrong with the others.
    """

    url: str
    answered: dict[str, int] = attrs.field(factory=dict)
    failed: list[str] = attrs.field(factory=list)
    finish: bool = False

    async def run(self, kind: str, *, stream: bool, keep_alive: bool) -> None:
        """Runs one client."""
        self.answered[kind] = 0
        async with contextlib.AsyncExitStack() as stack:
            kept = await stack.enter_async_context(self._client())
            while not self.finish:
                try:
                    if keep_alive:
                        await self._call(kept, stream)
                    else:
                        async with self._client() as client:
                            await self._call(client, stream)
                except (httpx2.HTTPError, AssertionError) as error:
                    self.failed.append(f"{kind}: {error!r}")
                else:
                    self.answered[kind] += 1

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url, trust_env=False, timeout=20)

    async def _call(self, client: httpx2.AsyncClient, stream: bool) -> None:
        payload = {"model": "parrot/echo", "messages": [{"role": "user", "content": TEXT}], "stream": stream}
        async with client.stream("POST", "/v1/chat/completions", json=payload) as response:
            body = (await response.aread()).decode()
        assert response.status_code == 200, body
        if not stream:
            assert json.loads(body)["choices"][0]["message"]["content"] == TEXT
            return
        events = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT


@contextlib.asynccontextmanager
async def open_load(url: str) -> AsyncIterator[Load]:
    """Runs clients of each kind for as long as the block lasts, and waits for their last calls."""
    load = Load(url)
    async with trio.open_nursery() as nursery:
        for stream in (True, False):
            for keep_alive in (True, False):
                for number in range(3):
                    kind = f"{'stream' if stream else 'json'} {'kept' if keep_alive else 'new'} {number}"

                    async def run(kind: str = kind, stream: bool = stream, keep_alive: bool = keep_alive) -> None:
                        await load.run(kind, stream=stream, keep_alive=keep_alive)

                    nursery.start_soon(run)
        yield load
        load.finish = True


async def roll(restarts: Restarts, starts: Sequence[Sequence[str]]) -> Load:
    """Starts one gateway after another under load; all but the last one exit by themselves, in order."""
    gateways = [await trio.to_thread.run_sync(restarts.start, *starts[0])]
    async with open_load(gateways[0].url) as load:
        for options in starts[1:]:
            await trio.sleep(0.5)
            gateways.append(await trio.to_thread.run_sync(restarts.start, *options))
            before = gateways[-2].process
            assert await trio.to_thread.run_sync(before.wait, GONE_S) == 0, gateways[-2].log()
        await trio.sleep(0.5)
    for gateway in gateways:
        assert "Traceback" not in gateway.log()
    for gateway in gateways[:-1]:
        assert "taken_over" in gateway.log()
        assert "cut=0" in gateway.log()
        assert "forced=0" in gateway.log()
    assert gateways[-1].process.poll() is None
    return load


@pytest.mark.slow
async def test_rolling_restarts_under_load(restarts: Restarts) -> None:
    """No call fails, with kept connections or new ones, streamed or not."""
    load = await roll(restarts, [()] * (RESTARTS + 1))
    assert load.failed == []
    assert min(load.answered.values()) >= RESTARTS, load.answered


@pytest.mark.slow
async def test_workers_take_over_from_workers(restarts: Restarts) -> None:
    """No call fails with several workers, whatever their number was before."""
    load = await roll(restarts, [(f"--workers={count}",) for count in (2, 2, 1, 3, 2)])
    assert load.failed == []
    assert min(load.answered.values()) >= 3, load.answered


@pytest.mark.slow
def test_a_session_continues(restarts: Restarts) -> None:
    """A turn at the new gateway that waits for one at the old gateway follows it, and the session has both."""
    with tempfile.TemporaryDirectory(
        prefix="tri"
    ) as directory:  # pytest's own paths are too long for the name of a socket
        restarts.env["TRIGATE_STORE"] = str(Path(directory) / "trigate.db")
        first = restarts.start()
        url = f"{first.url}/v1/chat/completions"

        def body(text: str, *, stream: bool) -> dict[str, Any]:
            return {"model": "parrot/echo", "messages": [{"role": "user", "content": text}], "stream": stream}

        options: dict[str, Any] = {"headers": {"x-session-key": "s"}, "timeout": 20}
        with httpx2.stream("POST", url, json=body(TEXT, stream=True), **options) as response:
            pieces = response.iter_text()
            text = next(pieces)
            second = restarts.start()
            wait_logged(first, "draining")
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(httpx2.post, url, json=body("Then", stream=False), **options)
                assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
                assert waiting.result().status_code == 200
        assert first.process.wait(GONE_S) == 0
        messages = httpx2.get(f"{second.url}/v1/sessions/s/messages").json()["data"]
        assert [message["message"]["content"] for message in messages] == [TEXT, TEXT, "Then", "Then"]
        assert second.stop()[0] == 0


# -- failed hot restarts ----------------------------------------------------------------------------------------------

BAD_CONFIG = CONFIG.replace("echo", "no-such-kind")
NO_CERTIFICATES = CONFIG + '[upstreams.far]\nbase_url = "https://far.invalid/v1"\n'


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_start_changes_nothing(restarts: Restarts, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old gateway keeps serving if the configuration of the new one is invalid, or fails at its start."""
    options = (f"--workers={workers}",)
    first = restarts.start(*options)
    failed = restarts.try_to_start(*options, config=BAD_CONFIG)
    assert failed.returncode == 1
    assert "no-such-kind" in failed.stderr
    assert "takeover" not in first.log()  # it has received no request
    with monkeypatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(restarts.directory / "nothing"))
        failed = restarts.try_to_start(*options, config=NO_CERTIFICATES)
    assert failed.returncode == 1
    assert "SSL_CERT_FILE" in failed.stderr
    assert restarts.health() == 200
    assert first.process.poll() is None
    assert "takeover_begun" in first.log()
    wait_logged(first, "takeover_failed")
    assert "draining" not in first.log()
    second = restarts.start(*options)  # and it can still be replaced
    assert first.process.wait(GONE_S) == 0
    assert restarts.health() == 200
    assert second.stop()[0] == 0


def wait_logged(gateway: Gateway, text: str) -> None:
    """Waits until the log of a gateway contains a text."""
    give_up_at = time.monotonic() + 10
    while text not in gateway.log():
        assert time.monotonic() < give_up_at, gateway.log()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_port_in_use_by_another_program(restarts: Restarts) -> None:
    """If a program that is no gateway uses the port, the error says so."""
    with socket.create_server(("127.0.0.1", restarts.port)):
        failed = restarts.try_to_start()
    assert failed.returncode == 1
    assert f"127.0.0.1:{restarts.port} is in use by another program" in failed.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_gateway_of_another_user(restarts: Restarts) -> None:
    """It cannot be replaced; the error names its user, and its log has the attempt."""
    script = f"""
import encodings.idna, os  # the other user may not be able to import them
from trigate.config.sections import ServerConfig
from trigate.server.listeners import ListenError, open_listening
os.setuid(12345)
try:
    open_listening(ServerConfig(port={restarts.port}))
except ListenError as error:
    print(error)
"""
    first = restarts.start()
    tried = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert f"127.0.0.1:{restarts.port} is served by a gateway of another user (uid 0)" in tried.stdout, tried.stderr
    wait_logged(first, "takeover_refused")
    assert restarts.health() == 200
    assert "taken_over" not in first.log()


@pytest.mark.slow
def test_a_gateway_that_was_killed_leaves_nothing(restarts: Restarts) -> None:
    """After SIGKILL, the next gateway starts as if there had been none."""
    first = restarts.start()
    first.process.kill()
    first.process.wait()
    second = restarts.start()
    assert "took_over" not in second.log()
    assert restarts.health() == 200


@pytest.mark.slow
def test_a_signal_to_a_replaced_gateway(restarts: Restarts) -> None:
    """A replaced gateway keeps serving its open connections until it gets a signal. As it is the first one, it drains,
    and its streams finish."""
    first = restarts.start("--workers=2")
    body = {"model": "parrot/echo", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    with (
        httpx2.Client(base_url=first.url, trust_env=False, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        text = next(pieces)
        restarts.start("--workers=2")
        wait_logged(first, "taken_over")
        first.process.send_signal(signal.SIGTERM)
        assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
    assert first.process.wait(GONE_S) == 0
    assert "again=False" in first.log()
    assert "cut=0" in first.log()
    assert restarts.health() == 200


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_is_stopped_at_its_start(restarts: Restarts, workers: int, tmp_path: Path) -> None:
    """A gateway that is stopped during its start exits soon and replaces nothing; the old one keeps serving."""
    first = restarts.start()
    config, log = tmp_path / "second.toml", tmp_path / "second.log"
    # an upstream that does not list its models delays the start
    with socket.create_server(("127.0.0.1", 0)) as mute, log.open("wb") as output:
        config.write_text(CONFIG + f'[upstreams.mute]\nbase_url = "http://127.0.0.1:{mute.getsockname()[1]}"\n')
        command = [sys.executable, "-m", "trigate", "serve", f"--port={restarts.port}", f"--workers={workers}"]
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment(config)) as second:
            wait_logged(first, "takeover_begun")
            mute.accept()[0].close()  # the gateway is starting
            second.terminate()
            assert second.wait(GONE_S) == 0, log.read_text()
    wait_logged(first, "takeover_failed")
    assert "taken_over" not in first.log()
    assert restarts.health() == 200


@pytest.mark.slow
@pytest.mark.parametrize("notice_s", [0, 5])
def test_a_gateway_that_is_stopping(restarts: Restarts, notice_s: int) -> None:
    """A new gateway can start during the notice and the drain of the old one."""
    config = CONFIG.replace("[server]", f"[server]\ndrain_notice_s = {notice_s}")
    first = restarts.start(config=config)
    body = {"model": "parrot/echo", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    with (
        httpx2.Client(base_url=first.url, trust_env=False, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        text = next(pieces)
        first.process.terminate()
        wait_logged(first, "drain_announced" if notice_s else "draining")
        second = restarts.start()
        assert ("took_over" in second.log()) == bool(notice_s)
        assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
    assert first.process.wait(GONE_S) == 0
    assert restarts.health() == 200


# -- in one process ---------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Old:
    """The part of a gateway that listens and serves a handover socket.

    Attributes:
        listening: Its sockets.
        config: Its configuration.
        successors: The process ids of the successors that were ready.
        scope: Cancel it to stop serving the handover socket.
    """

    listening: Listening
    config: ServerConfig
    successors: list[int] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def run(self) -> None:
        """Serves the handover socket."""
        with self.scope:
            await serve_handover(self.listening.handover_sockets, self.listening.sockets, self.successors.append)

    async def ask(self) -> Predecessor | None:
        """Requests the sockets, as another process does."""
        return await trio.to_thread.run_sync(request_sockets, ("127.0.0.1", self.config.port))


@contextlib.asynccontextmanager
async def open_old(host: str = "127.0.0.1", workers: int = 1) -> AsyncIterator[Old]:
    """Listens and serves a handover socket for as long as the block lasts."""
    listening = open_listening(ServerConfig(host=host, port=Port(0), workers=Count(workers)))
    port = listening.sockets[0].getsockname()[1]
    async with trio.open_nursery() as nursery:
        old = Old(listening, ServerConfig(host=host, port=Port(port), workers=Count(workers)))
        nursery.start_soon(old.run)
        try:
            with trio.fail_after(10):
                yield old
        finally:
            nursery.cancel_scope.cancel()
            for sock in listening.sockets:
                sock.close()


async def test_sockets_are_handed_over() -> None:
    """All sockets are handed over, also a hundred; a connection that waits meanwhile is accepted afterwards."""
    async with open_old(workers=100) as old:
        client = socket.create_connection(("127.0.0.1", old.config.port))
        predecessor = await old.ask()
        assert predecessor is not None
        assert (len(predecessor.listening), len(predecessor.handover)) == (100, 1)
        assert predecessor.pid == os.getpid()
        for sock in old.listening.sockets:
            sock.close()
        assert old.successors == []
        predecessor.notify_ready()
        while not old.successors:  # noqa: ASYNC110 - a list has no event
            await trio.sleep(0.01)
        assert old.successors == [os.getpid()]
        accepted = []
        for sock in predecessor.listening:
            with contextlib.suppress(BlockingIOError):
                accepted.append(sock.accept()[0])
        assert [sock.getpeername() for sock in accepted] == [client.getsockname()]
        for each in (*accepted, client):
            each.close()
        predecessor.close()


async def test_the_serving_process_is_known() -> None:
    """A handover socket that an exited process has opened reports the process that serves it now."""
    async with open_old() as old:
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        handover = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handover.bind(f"\0trigate/127.0.0.1:{old.config.port}")
        code = f"import socket; socket.socket(fileno={handover.fileno()}).listen()"
        await trio.run_process([sys.executable, "-c", code], pass_fds=[handover.fileno()])
        handover.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_handover, [handover], old.listening.sockets, lambda _: None)
            await trio.testing.wait_all_tasks_blocked()
            predecessor = await old.ask()
            assert predecessor is not None
            assert predecessor.pid == os.getpid()
            predecessor.close()
            nursery.cancel_scope.cancel()


async def test_repeated_hot_restarts() -> None:
    """The handover socket is handed over too: the new gateway can be replaced in turn."""
    async with open_old() as old:
        first = await old.ask()
        assert first is not None
        first.notify_ready()
        async with trio.open_nursery() as nursery:
            pids: list[int] = []
            nursery.start_soon(serve_handover, first.handover, first.listening, pids.append)
            while not old.successors:  # noqa: ASYNC110 - a list has no event
                await trio.sleep(0.01)
            second = await old.ask()
            assert second is not None
            second.notify_ready()
            second.close()
        assert pids == [os.getpid()]
        first.close()
        assert await old.ask() is None


async def test_the_old_gateway_exits_during_the_handover() -> None:
    """A process that has the sockets does not need the old gateway: it serves, and can be replaced."""
    async with open_old() as old:
        predecessor = await old.ask()
        assert predecessor is not None
        assert not any(sock.get_inheritable() for sock in (*predecessor.listening, *predecessor.handover))
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        predecessor.notify_ready()
        assert old.successors == []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_handover, predecessor.handover, predecessor.listening, lambda _: None)
            second = await old.ask()
            assert second is not None
            second.close()
            nursery.cancel_scope.cancel()
        predecessor.close()


async def test_a_second_successor_is_refused(logs: Any) -> None:
    """A second successor is refused while there is a first one, and accepted when that has failed."""
    async with open_old() as old:
        first = await old.ask()
        assert first is not None
        with pytest.raises(HotRestartRefused, match=f"process {os.getpid()} is already replacing it"):
            await old.ask()
        first.close()
        while not logs.named("takeover_failed"):  # noqa: ASYNC110 - the log has no event
            await trio.sleep(0.01)
        second = await old.ask()
        assert second is not None
        second.close()
        assert old.successors == []


async def test_a_request_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway refuses a request of another version, and says so."""
    async with open_old() as old:

        def request_another_version() -> None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with connection:
                connection.connect(hot_restart._handover_name(f"127.0.0.1:{old.config.port}"))
                connection.send(b'{"type":"knock","version":99}')
                assert b"another version" in connection.recv(4096)

        await trio.to_thread.run_sync(request_another_version)
        assert old.successors == []


async def test_invalid_requests_do_no_harm(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage, silence, and a connection that is closed at once do not affect the handover socket."""
    monkeypatch.setattr(hot_restart, "REQUEST_TIMEOUT_S", 0.05)
    async with open_old() as old:
        name = hot_restart._handover_name(f"127.0.0.1:{old.config.port}")
        for data in (b"garbage", b"", None):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(name)
                if data:
                    connection.send(data)
                if data is not None:
                    connection.setblocking(False)
                    assert await trio.socket.from_stdlib_socket(connection).recv(10) == b""
        predecessor = await old.ask()
        assert predecessor is not None
        predecessor.close()
    assert [entry["successor"] for entry in logs.named("takeover_failed")][:1] == [os.getpid()]


async def test_a_gateway_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new process does not wait forever; a gateway that no longer serves its handover socket is not found."""
    monkeypatch.setattr(hot_restart, "RESPONSE_TIMEOUT_S", 0.05)
    async with open_old() as old:
        [handover] = old.listening.handover_sockets
        mute = socket.socket(fileno=os.dup(handover.fileno()))
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(HotRestartRefused, match="did not answer"):
            await old.ask()
        mute.close()
        assert await old.ask() is None
        with pytest.raises(ListenError, match="in use by another program"):
            await trio.to_thread.run_sync(open_listening, old.config)


async def test_a_handover_socket_that_cannot_be_opened(logs: Any) -> None:
    """It is logged, and the gateway serves all the same."""
    async with open_old() as old:
        assert hot_restart.open_handover_sockets(old.listening.sockets) == []
    [line] = logs.named("takeover_unavailable")
    assert line["address"] == f"127.0.0.1:{old.config.port}"


async def test_the_addresses_must_be_the_same() -> None:
    """A configuration with fewer addresses is refused, as connections wait at each; further addresses are added."""
    async with open_old() as old:
        listening = await trio.to_thread.run_sync(open_listening, old.config)
        assert listening.predecessor is not None
        assert [sock.getsockname() for sock in listening.sockets] == [("127.0.0.1", old.config.port)]
        listening.predecessor.close()
        other = socket.create_server(("127.0.0.2", 0))
        with pytest.raises(ListenError, match=r"also listens on 127\.0\.0\.2"):
            listeners.open_sockets(old.config, inherited=[*old.listening.sockets, other])
        other.close()
