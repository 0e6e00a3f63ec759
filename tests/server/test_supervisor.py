"""`trigate.server.supervisor`: workers are replaced and stopped, and failures end it; with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.support.processes import environment
from tests.support.shortage import ERRORS, os_error
from trigate.config.sections import Count, Port, Seconds, ServerConfig
from trigate.server import supervisor
from trigate.server.listeners import ListenError, open_sockets
from trigate.server.supervisor import WorkersFailed, sockets_from_fds, supervise, wait_parent_gone

CONFIG = ServerConfig(port=Port(0), workers=Count(2), drain_timeout_s=Seconds(5.0))
REQUEST = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"

WORKER = """
import os, signal, sys, trio
from trigate import logs
from trigate.server import server
from trigate.config.sections import ServerConfig
from trigate.server.supervisor import sockets_from_fds

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    if scope["path"] == "/stream":
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"%d\\n" % os.getpid(), "more_body": True})
            await trio.sleep(0.02)
    await send({"type": "http.response.body", "body": b"%d\\n" % os.getpid()})

def hang_up(*_):
    os.write(1, b"hung up %d\\n" % os.getpid())

logs.configure({})
signal.signal(signal.SIGHUP, hang_up)
fds = [int(sys.argv[i + 1]) for i, text in enumerate(sys.argv) if text == "--fd"]
parent_fd = int(sys.argv[sys.argv.index("--parent-fd") + 1])
config = ServerConfig(drain_timeout_s=float(sys.argv[1]))
sys.exit(0 if trio.run(server.run, app, config, sockets_from_fds(fds), parent_fd) else 1)
"""

SUPERVISOR = """
import sys, trio
from trigate import logs
from trigate.config.sections import ServerConfig
from trigate.server.listeners import ListenError, open_sockets
from trigate.server.supervisor import supervise

logs.configure({})
config = ServerConfig(port=0, workers=2, drain_timeout_s=float(sys.argv[2]))
sockets = open_sockets(config)
print(sockets[0].getsockname()[1], flush=True)
sys.exit(0 if trio.run(supervise, [sys.executable, *sys.argv[1:]], sockets, config) else 1)
"""


@attrs.define(eq=False)
class Pool:
    """A supervisor in a process of its own."""

    process: trio.Process
    port: int
    output: bytearray = attrs.field(factory=bytearray)

    async def ask(self) -> int:
        """Returns the process id of the worker that responds; waits until one does."""
        with trio.fail_after(20):
            async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
                await stream.send_all(REQUEST % b"")
                data = b"".join([bytes(piece) async for piece in stream])
        return int(data.partition(b"\r\n\r\n")[2].split(b"\r\n")[1])

    async def ask_all(self) -> set[int]:
        """Returns the process ids of both workers."""
        found: set[int] = set()
        with trio.fail_after(20):
            while len(found) < 2:
                found.add(await self.ask())
        return found

    async def wait_output(self, *texts: bytes) -> None:
        """Waits until the output contains these texts."""
        with trio.move_on_after(20):
            while not all(text in self.output for text in texts):  # noqa: ASYNC110 - the output of another process
                await trio.sleep(0.01)
            return
        raise AssertionError(f"it did not say {texts}: {self.output.decode()}")


@contextlib.asynccontextmanager
async def open_pool(room: Path, *, drain_timeout_s: float = 0.3) -> AsyncIterator[Pool]:
    """Runs a supervisor. Kills it at the end if it is still running, and its workers then end by themselves."""
    (room / "worker.py").write_text(WORKER)
    (room / "supervisor.py").write_text(SUPERVISOR)
    command = [sys.executable, str(room / "supervisor.py"), str(room / "worker.py"), str(drain_timeout_s)]
    read_end, write_end = os.pipe()
    run = partial(trio.run_process, command, capture_stdout=False, check=False, env=environment())
    async with trio.lowlevel.FdStream(read_end) as output, trio.open_nursery() as nursery:
        process = await nursery.start(partial(run, stdout=write_end, stderr=write_end))
        os.close(write_end)
        pool = Pool(process, 0)

        async def collect() -> None:
            async for data in output:
                pool.output += data

        nursery.start_soon(collect)
        await pool.wait_output(b"\n")
        pool.port = int(pool.output.partition(b"\n")[0])
        yield pool
        nursery.cancel_scope.cancel()


async def stream_from(port: int) -> tuple[trio.SocketStream, int]:
    """Opens a stream, and returns it with the id of the process that serves it."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(REQUEST % b"stream")
    data = b""
    while data.count(b"\n") < 8:
        data += await stream.receive_some()
    return stream, int(data.partition(b"\r\n\r\n")[2].split(b"\r\n")[1])


def is_there(pid: int) -> bool:
    """Whether a process is running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def wait_gone(*pids: int) -> None:
    """Waits until processes have exited that are not children of this one."""
    with trio.fail_after(10):
        while any(is_there(pid) for pid in pids):  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.01)


@pytest.mark.slow
async def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    """A killed worker is replaced, and the streams of the other workers continue."""
    async with open_pool(tmp_path) as pool:
        first = await pool.ask_all()
        stream, streaming = await stream_from(pool.port)
        [other] = first - {streaming}
        os.kill(other, signal.SIGKILL)
        await pool.wait_output(b"worker_died", b"SIGKILL", b"worker_replaced")
        second = await pool.ask_all()
        assert streaming in second
        assert other not in second
        async with stream:
            assert b"%d\n" % streaming in await stream.receive_some()
        assert pool.output.count(b"worker_died") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_signal_stops_all_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """At the first signal the workers drain: streams finish, or end after the drain timeout; the exit status is 0."""
    async with open_pool(tmp_path) as pool:
        pids = await pool.ask_all()
        stream, _ = await stream_from(pool.port)
        async with stream:
            began = trio.current_time()
            pool.process.send_signal(number)
            with trio.fail_after(10):
                assert await pool.process.wait() == 0
            assert 0.3 <= trio.current_time() - began < 5.0
        assert not any(is_there(pid) for pid in pids)
        assert pool.output.count(b"worker_stopped") == 2
        assert b"worker_died" not in pool.output


@pytest.mark.slow
async def test_a_second_signal_ends_it_now(tmp_path: Path) -> None:
    """A second signal ends everything at once, and the exit status is 1."""
    async with open_pool(tmp_path, drain_timeout_s=60.0) as pool:
        pids = await pool.ask_all()
        stream, _ = await stream_from(pool.port)
        async with stream:
            pool.process.terminate()
            await pool.wait_output(b"signal_received", b"draining")
            pool.process.terminate()
            with trio.fail_after(5):
                assert await pool.process.wait() == 1
        assert not any(is_there(pid) for pid in pids)


@pytest.mark.slow
async def test_workers_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    """If the supervisor is killed, its workers exit and release the port."""
    async with open_pool(tmp_path) as pool:
        pids = await pool.ask_all()
        pool.process.kill()
        await pool.process.wait()
        await wait_gone(*pids)
        await pool.wait_output(b"supervisor_gone")
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", pool.port)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not spread them")
async def test_connections_are_spread_evenly(tmp_path: Path) -> None:
    """Each of two workers gets at least a quarter of a hundred connections."""
    async with open_pool(tmp_path) as pool:
        await pool.ask_all()
        served = [await pool.ask() for _ in range(100)]
        assert min(served.count(pid) for pid in set(served)) >= 25
        assert len(set(served)) == 2


def test_only_workers_of_one_gateway_share_a_port() -> None:
    """A second gateway finds the port in use, also if each worker of the first one has a socket of its own."""
    config = ServerConfig(port=Port(0), workers=Count(2))
    sockets = open_sockets(config)
    try:
        port = sockets[0].getsockname()[1]
        with pytest.raises(ListenError, match=f"{port} is in use"):
            open_sockets(attrs.evolve(config, port=Port(port)))
    finally:
        for sock in sockets:
            sock.close()


@pytest.mark.slow
async def test_a_worker_that_exits_during_a_stop(tmp_path: Path) -> None:
    """While the others serve on for the time of notice, no connection waits for a worker that was still starting."""
    hang = (
        "import os, signal, sys, time\n"
        "try:\n"
        "    os.close(os.open(sys.argv[0] + '.first', os.O_CREAT | os.O_EXCL))\n"
        "except FileExistsError:\n"
        "    os.write(1, b'starts\\n')\n"
        "    time.sleep(60)\n"
    )
    notice = "drain_notice_s=2.0, drain_timeout_s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WORKER", hang + WORKER.replace("drain_timeout_s", notice))
        patch.setitem(globals(), "SUPERVISOR", SUPERVISOR.replace("drain_timeout_s", notice))
        async with open_pool(tmp_path) as pool:
            with trio.fail_after(20):
                while True:  # until it comes to the worker that serves
                    with trio.move_on_after(0.3):
                        await pool.ask()
                        break
            await pool.wait_output(b"starts")
            pool.process.terminate()
            await pool.wait_output(b"worker_stopped")
            for _ in range(20):
                with trio.fail_after(1):
                    await pool.ask()
            with trio.fail_after(10):
                assert await pool.process.wait() == 0


@pytest.mark.slow
async def test_sighup_is_passed_on(tmp_path: Path) -> None:
    """SIGHUP reaches each worker, and stops none."""
    async with open_pool(tmp_path) as pool:
        pids = await pool.ask_all()
        pool.process.send_signal(signal.SIGHUP)
        await pool.wait_output(*(b"hung up %d" % pid for pid in pids))
        assert await pool.ask_all() == pids


@pytest.mark.slow
async def test_workers_that_never_start_end_the_supervisor(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When every worker keeps exiting at its start, the error says how."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.RaisesGroup(pytest.RaisesExc(WorkersFailed, match="exit status 3"), flatten_subgroups=True):
        await supervise(command, open_sockets(CONFIG), CONFIG)
    assert {entry["worker"] for entry in logs.named("worker_died")} == {1, 2}
    assert len(logs.named("worker_replaced")) >= 2


@pytest.mark.slow
async def test_workers_that_take_long_to_fail(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that exits before it is ready has not started, however long it took."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "SETTLED_S", 0.05)
    command = [sys.executable, "-c", "import time; time.sleep(0.2); raise SystemExit(3)"]
    with trio.fail_after(20), pytest.RaisesGroup(WorkersFailed, flatten_subgroups=True):
        await supervise(command, open_sockets(CONFIG), CONFIG)


@pytest.mark.slow
async def test_a_worker_that_was_ready(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has been ready for long enough is replaced, however often it exits."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "SETTLED_S", 0.05)
    code = "import os, sys, time; fd = int(sys.argv[sys.argv.index('--ready-fd') + 1]);"
    code += "os.write(fd, b'%d\\n' % os.getpid()); time.sleep(0.3)"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, [sys.executable, "-c", code], open_sockets(CONFIG), CONFIG)
        with trio.fail_after(40):
            while len(logs.named("worker_died")) <= 2 * supervisor.EARLY_EXITS:  # noqa: ASYNC110 - the log has no event
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("error", [*map(os_error, ERRORS), RuntimeError("can't start new thread")], ids=str)
async def test_a_process_that_cannot_be_started(error: Exception, logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again after a pause, and the other worker goes on."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    open_process, calls = trio.lowlevel.open_process, 0
    started = trio.Event()

    async def refuse(*arguments: Any, **named: Any) -> trio.Process:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 4, 5):
            raise error
        process = await open_process(*arguments, **named)
        if calls > 5:
            started.set()
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", refuse)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, command, open_sockets(CONFIG), CONFIG)
        with trio.fail_after(10):
            await started.wait()
        nursery.cancel_scope.cancel()
    assert [line["reason"] for line in logs.named("worker_not_started")] == [str(error)] * 4
    assert not logs.named("worker_died")


@pytest.mark.slow
async def test_one_running_worker_keeps_the_others_restarting(
    tmp_path: Path, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that keeps exiting is restarted as long as another one runs."""
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.001)
    monkeypatch.setattr(supervisor, "BACKOFF_MAX_S", 0.01)
    first = tmp_path / "first"
    script = textwrap.dedent(
        f"""
        import os, time
        try:
            os.mkdir({str(first)!r})
        except FileExistsError:
            raise SystemExit(3)
        time.sleep(60)
        """
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, [sys.executable, "-c", script], open_sockets(CONFIG), CONFIG)
        with trio.fail_after(20):
            while len(logs.named("worker_died")) <= supervisor.EARLY_EXITS + 1:  # noqa: ASYNC110 - the log has no event
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    pids = {entry["pid"] for entry in (*logs.named("worker_started"), *logs.named("worker_replaced"))}
    assert not any(is_there(pid) for pid in pids)
    assert len({entry["worker"] for entry in logs.named("worker_died")}) == 1


def test_sockets_are_inherited() -> None:
    """A descriptor from the supervisor becomes a listening socket, which children of the worker do not inherit."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = os.dup(listening.fileno())
        os.set_inheritable(fd, True)
        [taken] = sockets_from_fds([fd])
        with taken:
            assert taken.getsockname() == listening.getsockname()
            assert not taken.get_inheritable()


async def test_the_lifeline() -> None:
    """`wait_parent_gone` returns when the other end of the pipe is closed."""
    read_end, write_end = os.pipe()
    try:
        with trio.move_on_after(0.01) as waiting:
            await wait_parent_gone(read_end)
        assert waiting.cancelled_caught
        os.close(write_end)
        with trio.fail_after(1):
            await wait_parent_gone(read_end)
    finally:
        os.close(read_end)
