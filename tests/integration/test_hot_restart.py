"""`trigate.server.hot_restart`: one gateway takes the place of another, real processes first, and nobody notices."""

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
from trigate.config.sections import Count, Port, ServerConfig
from trigate.server import hot_restart, listeners
from trigate.server.hot_restart import HotRestartRefused, Predecessor, request_sockets, serve_handover
from trigate.server.listeners import ListenError, Listening, open_listening

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
"""How long a predecessor may take to go, at most: longer than its drain, whose end would show in its log."""


# -- real processes under load ----------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@attrs.define(eq=False)
class House:
    """Gateways on one port, one after another."""

    port: int
    room: Path
    stack: contextlib.ExitStack
    env: dict[str, str] = attrs.field(factory=dict)
    count: int = 0

    def start(self, *options: str, config: str = CONFIG) -> Gateway:
        """Starts the next one, and waits until it serves."""
        self.count += 1
        room = self.room / str(self.count)
        room.mkdir()
        command = (sys.executable, "-m", "trigate", "serve", "--port", str(self.port), *options)
        return self.stack.enter_context(run_gateway(config, room, command=command, env=self.env))

    def try_to_start(self, *options: str, config: str = CONFIG) -> subprocess.CompletedProcess[str]:
        """Starts one that is expected to fail."""
        self.count += 1
        path = self.room / f"{self.count}.toml"
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
        """The status of the health check, on a new connection."""
        return httpx2.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code


@pytest.fixture
def house(port: int, tmp_path: Path) -> Iterator[House]:
    """Gateways that are killed in the end."""
    with contextlib.ExitStack() as stack:
        yield House(port, tmp_path, stack)


@attrs.define(eq=False)
class Load:
    """Clients that ask all the time.

    Attributes:
        answered: How many calls have been answered well, by the kind of client.
        failed: What was wrong with others.
    """

    url: str
    answered: dict[str, int] = attrs.field(factory=dict)
    failed: list[str] = attrs.field(factory=list)
    finish: bool = False

    async def run(self, kind: str, *, stream: bool, keep_alive: bool) -> None:
        """One client."""
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
    """Clients of each kind, for the time of the block; their last calls are waited for."""
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


async def roll(house: House, starts: Sequence[Sequence[str]]) -> Load:
    """Starts one gateway after another while clients ask; all but the last one end by themselves, in order."""
    gateways = [await trio.to_thread.run_sync(house.start, *starts[0])]
    async with open_load(gateways[0].url) as load:
        for options in starts[1:]:
            await trio.sleep(0.5)
            gateways.append(await trio.to_thread.run_sync(house.start, *options))
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
async def test_ten_rolling_restarts_under_load(house: House) -> None:
    """Nobody notices: not who keeps connections, nor who makes new ones, in streams or in plain calls."""
    load = await roll(house, [()] * 11)
    assert load.failed == []
    assert min(load.answered.values()) >= 10, load.answered


@pytest.mark.slow
async def test_workers_take_over_from_workers(house: House) -> None:
    """Nor with several processes, whatever their number was before."""
    load = await roll(house, [(f"--workers={count}",) for count in (2, 2, 1, 3, 2)])
    assert load.failed == []
    assert min(load.answered.values()) >= 3, load.answered


@pytest.mark.slow
def test_a_session_goes_on(house: House) -> None:
    """A turn that waits behind one of the old gateway comes after it, at the new one, and both are remembered."""
    with tempfile.TemporaryDirectory(prefix="tri") as room:  # pytest's own paths leave no room for a socket's name
        house.env["TRIGATE_STORE"] = str(Path(room) / "trigate.db")
        first = house.start()
        url = f"{first.url}/v1/chat/completions"

        def body(text: str, *, stream: bool) -> dict[str, Any]:
            return {"model": "parrot/echo", "messages": [{"role": "user", "content": text}], "stream": stream}

        options: dict[str, Any] = {"headers": {"x-session-key": "s"}, "timeout": 20}
        with httpx2.stream("POST", url, json=body(TEXT, stream=True), **options) as response:
            pieces = response.iter_text()
            text = next(pieces)
            second = house.start()
            wait_said(first, "draining")
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(httpx2.post, url, json=body("Then", stream=False), **options)
                assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
                assert waiting.result().status_code == 200
        assert first.process.wait(GONE_S) == 0
        messages = httpx2.get(f"{second.url}/v1/sessions/s/messages").json()["data"]
        assert [message["message"]["content"] for message in messages] == [TEXT, TEXT, "Then", "Then"]
        assert second.stop()[0] == 0


# -- takeovers that fail ----------------------------------------------------------------------------------------------

BAD_CONFIG = CONFIG.replace("echo", "no-such-kind")
NO_CERTIFICATES = CONFIG + '[upstreams.far]\nbase_url = "https://far.invalid/v1"\n'


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_cannot_start_changes_nothing(house: House, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with a bad configuration, nor with one that turns out to be unusable at the start: the old one serves."""
    options = (f"--workers={workers}",)
    first = house.start(*options)
    failed = house.try_to_start(*options, config=BAD_CONFIG)
    assert failed.returncode == 1
    assert "no-such-kind" in failed.stderr
    assert "takeover" not in first.log()  # it has not even been asked
    with monkeypatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(house.room / "nothing"))
        failed = house.try_to_start(*options, config=NO_CERTIFICATES)
    assert failed.returncode == 1
    assert "SSL_CERT_FILE" in failed.stderr
    assert house.health() == 200
    assert first.process.poll() is None
    assert "takeover_begun" in first.log()
    wait_said(first, "takeover_failed")
    assert "draining" not in first.log()
    second = house.start(*options)  # and then it can be taken over as ever
    assert first.process.wait(GONE_S) == 0
    assert house.health() == 200
    assert second.stop()[0] == 0


def wait_said(gateway: Gateway, text: str) -> None:
    """Waits until a gateway has logged something."""
    give_up_at = time.monotonic() + 10
    while text not in gateway.log():
        assert time.monotonic() < give_up_at, gateway.log()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_port_of_somebody_else(house: House) -> None:
    """A program that is no gateway is left alone, and the error says that it is there."""
    with socket.create_server(("127.0.0.1", house.port)):
        failed = house.try_to_start()
    assert failed.returncode == 1
    assert f"127.0.0.1:{house.port} is in use by another program" in failed.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_gateway_of_another_user(house: House) -> None:
    """It cannot be taken over from; the error says whose it is, and its log that somebody has tried."""
    script = f"""
import encodings.idna, os  # afterwards, there may be nothing to be imported
from trigate.config.sections import ServerConfig
from trigate.server.listeners import ListenError, open_listening
os.setuid(12345)
try:
    open_listening(ServerConfig(port={house.port}))
except ListenError as error:
    print(error)
"""
    first = house.start()
    tried = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert f"127.0.0.1:{house.port} is served by a gateway of another user (uid 0)" in tried.stdout, tried.stderr
    wait_said(first, "takeover_refused")
    assert house.health() == 200
    assert "taken_over" not in first.log()


@pytest.mark.slow
def test_a_gateway_that_was_killed_leaves_nothing(house: House) -> None:
    """After SIGKILL, the next one starts as if there had been none."""
    first = house.start()
    first.process.kill()
    first.process.wait()
    second = house.start()
    assert "took_over" not in second.log()
    assert house.health() == 200


@pytest.mark.slow
def test_a_signal_during_the_end(house: House) -> None:
    """A gateway that has been taken over goes on for clients that keep connections, until it gets a signal: its first
    one, so it drains, and does not end its streams."""
    first = house.start("--workers=2")
    body = {"model": "parrot/echo", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    with (
        httpx2.Client(base_url=first.url, trust_env=False, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        text = next(pieces)
        house.start("--workers=2")
        wait_said(first, "taken_over")
        first.process.send_signal(signal.SIGTERM)
        assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
    assert first.process.wait(GONE_S) == 0
    assert "again=False" in first.log()
    assert "cut=0" in first.log()
    assert house.health() == 200


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_is_stopped_at_its_start(house: House, workers: int, tmp_path: Path) -> None:
    """It does not take over any more, and ends soon; the old one goes on."""
    first = house.start()
    config, log = tmp_path / "second.toml", tmp_path / "second.log"
    # an upstream that does not answer to be asked for its models, so that the start takes a moment
    with socket.create_server(("127.0.0.1", 0)) as mute, log.open("wb") as output:
        config.write_text(CONFIG + f'[upstreams.mute]\nbase_url = "http://127.0.0.1:{mute.getsockname()[1]}"\n')
        command = [sys.executable, "-m", "trigate", "serve", f"--port={house.port}", f"--workers={workers}"]
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment(config)) as second:
            wait_said(first, "takeover_begun")
            mute.accept()[0].close()  # it is at its start
            second.terminate()
            assert second.wait(GONE_S) == 0, log.read_text()
    wait_said(first, "takeover_failed")
    assert "taken_over" not in first.log()
    assert house.health() == 200


@pytest.mark.slow
@pytest.mark.parametrize("notice_s", [0, 5])
def test_one_that_stops_already(house: House, notice_s: int) -> None:
    """The next one need not wait for the end of its drain, nor for that of its notice."""
    config = CONFIG.replace("[server]", f"[server]\ndrain_notice_s = {notice_s}")
    first = house.start(config=config)
    body = {"model": "parrot/echo", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    with (
        httpx2.Client(base_url=first.url, trust_env=False, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        text = next(pieces)
        first.process.terminate()
        wait_said(first, "drain_announced" if notice_s else "draining")
        second = house.start()
        assert ("took_over" in second.log()) == bool(notice_s)
        assert (text + "".join(pieces)).endswith("data: [DONE]\n\n")
    assert first.process.wait(GONE_S) == 0
    assert house.health() == 200


# -- in one process ---------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Old:
    """Somebody who listens and attends a door.

    Attributes:
        succeeded: The process ids of those who were ready.
        scope: Cancelled, it attends no longer.
    """

    listening: Listening
    config: ServerConfig
    succeeded: list[int] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def run(self) -> None:
        """Attends."""
        with self.scope:
            await serve_handover(self.listening.handover_sockets, self.listening.sockets, self.succeeded.append)

    async def ask(self) -> Predecessor | None:
        """Asks for the sockets, as another process would."""
        return await trio.to_thread.run_sync(request_sockets, ("127.0.0.1", self.config.port))


@contextlib.asynccontextmanager
async def open_old(host: str = "127.0.0.1", workers: int = 1) -> AsyncIterator[Old]:
    """Listens, and attends a door, for the time of the block."""
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


async def test_sockets_change_hands() -> None:
    """All of them, however many; a connection that waits when they do is accepted afterwards."""
    async with open_old(workers=100) as old:
        client = socket.create_connection(("127.0.0.1", old.config.port))
        predecessor = await old.ask()
        assert predecessor is not None
        assert (len(predecessor.listening), len(predecessor.handover)) == (100, 1)
        assert predecessor.pid == os.getpid()
        for sock in old.listening.sockets:
            sock.close()
        assert old.succeeded == []
        predecessor.notify_ready()
        while not old.succeeded:  # noqa: ASYNC110 - it is a list
            await trio.sleep(0.01)
        assert old.succeeded == [os.getpid()]
        accepted = []
        for sock in predecessor.listening:
            with contextlib.suppress(BlockingIOError):
                accepted.append(sock.accept()[0])
        assert [each.getpeername() for each in accepted] == [client.getsockname()]
        for each in (*accepted, client):
            each.close()
        predecessor.close()


async def test_it_is_known_who_serves() -> None:
    """A door that another process has opened, which has gone, names who attends it now."""
    async with open_old() as old:
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.bind(f"\0trigate/127.0.0.1:{old.config.port}")
        code = f"import socket; socket.socket(fileno={door.fileno()}).listen()"
        await trio.run_process([sys.executable, "-c", code], pass_fds=[door.fileno()])
        door.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_handover, [door], old.listening.sockets, lambda _: None)
            await trio.testing.wait_all_tasks_blocked()
            predecessor = await old.ask()
            assert predecessor is not None
            assert predecessor.pid == os.getpid()
            predecessor.close()
            nursery.cancel_scope.cancel()


async def test_one_after_another() -> None:
    """The door changes hands too: who has taken over can be taken over from."""
    async with open_old() as old:
        first = await old.ask()
        assert first is not None
        first.notify_ready()
        async with trio.open_nursery() as nursery:
            pids: list[int] = []
            nursery.start_soon(serve_handover, first.handover, first.listening, pids.append)
            while not old.succeeded:  # noqa: ASYNC110 - it is a list
                await trio.sleep(0.01)
            second = await old.ask()
            assert second is not None
            second.notify_ready()
            second.close()
        assert pids == [os.getpid()]
        first.close()
        assert await old.ask() is None


async def test_one_that_ends_meanwhile() -> None:
    """Who has the sockets needs nothing else of the other one: it serves, and can be taken over from."""
    async with open_old() as old:
        predecessor = await old.ask()
        assert predecessor is not None
        assert not any(sock.get_inheritable() for sock in (*predecessor.listening, *predecessor.handover))
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        predecessor.notify_ready()
        assert old.succeeded == []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_handover, predecessor.handover, predecessor.listening, lambda _: None)
            second = await old.ask()
            assert second is not None
            second.close()
            nursery.cancel_scope.cancel()
        predecessor.close()


async def test_two_at_once(logs: Any) -> None:
    """The second is told that there is a first one; when that has failed, it may."""
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
        assert old.succeeded == []


async def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that speaks another language declines, and says so."""
    async with open_old() as old:

        def ask_in_another() -> None:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with line:
                line.connect(hot_restart._handover_name(f"127.0.0.1:{old.config.port}"))
                line.send(b'{"type":"knock","version":99}')
                assert b"another version" in line.recv(4096)

        await trio.to_thread.run_sync(ask_in_another)
        assert old.succeeded == []


async def test_who_is_not_understood_does_no_harm(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage, silence, and a line that is closed at once leave the door as it was."""
    monkeypatch.setattr(hot_restart, "REQUEST_TIMEOUT_S", 0.05)
    async with open_old() as old:
        name = hot_restart._handover_name(f"127.0.0.1:{old.config.port}")
        for said in (b"garbage", b"", None):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
                line.connect(name)
                if said:
                    line.send(said)
                if said is not None:
                    line.setblocking(False)
                    assert await trio.socket.from_stdlib_socket(line).recv(10) == b""
        predecessor = await old.ask()
        assert predecessor is not None
        predecessor.close()
    assert [entry["successor"] for entry in logs.named("takeover_failed")][:1] == [os.getpid()]


async def test_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newcomer does not wait for ever; and one that has stopped attending is no gateway to be asked."""
    monkeypatch.setattr(hot_restart, "RESPONSE_TIMEOUT_S", 0.05)
    async with open_old() as old:
        [door] = old.listening.handover_sockets
        mute = socket.socket(fileno=os.dup(door.fileno()))
        old.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(HotRestartRefused, match="did not answer"):
            await old.ask()
        mute.close()
        assert await old.ask() is None
        with pytest.raises(ListenError, match="in use by another program"):
            await trio.to_thread.run_sync(open_listening, old.config)


async def test_a_door_that_cannot_be_opened(logs: Any) -> None:
    """It is said in the log, and the gateway serves all the same."""
    async with open_old() as old:
        assert hot_restart.open_handover_sockets(old.listening.sockets) == []
    [line] = logs.named("takeover_unavailable")
    assert line["address"] == f"127.0.0.1:{old.config.port}"


async def test_the_addresses_must_be_the_same() -> None:
    """Who would listen on less than the other one does is refused, since clients wait there; more is added."""
    async with open_old() as old:
        listening = await trio.to_thread.run_sync(open_listening, old.config)
        assert listening.predecessor is not None
        assert [sock.getsockname() for sock in listening.sockets] == [("127.0.0.1", old.config.port)]
        listening.predecessor.close()
        other = socket.create_server(("127.0.0.2", 0))
        with pytest.raises(ListenError, match=r"also listens on 127\.0\.0\.2"):
            listeners.open_sockets(old.config, inherited=[*old.listening.sockets, other])
        other.close()
