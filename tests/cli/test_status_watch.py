"""`trigate status` on a terminal: the drawing, and `--watch` in a real terminal with a real gateway."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from rich.console import Console
from trio.testing import MockClock

from tests.cli.test_status_view import HOSTILE, ROW, made
from tests.support.processes import SERVE, Gateway, configuration, environment, run_gateway
from tests.support.scripted_upstream import seen, wait_closed
from trigate.cli import status_watch
from trigate.cli.client import RequestFailed
from trigate.cli.status_view import Overview

KEY = "key-of-the-gateway"
STATUS = (sys.executable, "-m", "trigate", "status")


# -- drawing ----------------------------------------------------------------------------------------------------------


def lines(drawing: Any, width: int = 200) -> list[str]:
    """A drawing as text, on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, height=50)
    with console.capture() as captured:
        console.print(drawing)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_everything_is_drawn() -> None:
    """The drawing has the same text as the plain lines."""
    text = "\n".join(lines(status_watch.draw_all(made(), 200)))
    for expected in (
        "admission: 2 of 5000 running, 1 waiting",
        "telegram bot: disconnected (401)",
        "open 1, closed 1",
        "2 of 3   hedge",
        "upstream_timeout 504",
    ):
        assert expected in text


@pytest.mark.parametrize("height", [1, 4, 8, 12, 16, 40])
@pytest.mark.parametrize("width", [20, 80, 200])
@pytest.mark.parametrize("problem", [None, "it is gone " * 30])
def test_it_fits(height: int, width: int, problem: str | None) -> None:
    """Each line fits on one line of the terminal, however narrow. Rows that do not fit are left out and counted."""
    rows = [ROW | {"id": f"req_{n}", "model": HOSTILE, "attempts": []} for n in range(60)]
    targets = [{"target": f"up/{n}", "breaker": "closed"} for n in range(60)]
    shown = made({"targets": targets}, data=rows, count=60)
    drawn = lines(status_watch.draw_fitted(shown, width, height, problem), width)
    least = len(shown.head) + (problem is not None) + 6  # titles and headings
    assert len(drawn) <= max(height, least)
    assert all(len(line) <= width for line in drawn)
    assert drawn[0].startswith("it is gone" if problem else "Trigate 0.1.0")
    if width == 200 and height == 40:
        titles = [line for line in drawn if "more than fit" in line]
        counts = [int(re.findall(r"\((\d+) lines", title)[0]) for title in titles]
        assert counts[0] == 60 - sum(line.startswith("up/") for line in drawn)
        assert counts[1] == 60 - sum(line.startswith("req_") for line in drawn)
        assert len(drawn) == 40


def test_what_fits_is_whole() -> None:
    """Nothing is truncated on a terminal that is large enough."""
    drawn = lines(status_watch.draw_fitted(made(), 200, 40))
    assert not any("more than fit" in line or "…" in line for line in drawn)
    assert len(drawn) == drawn.index("streams: 3") + 2 + 5  # headings, and a line for each stream and attempt


def test_a_narrow_terminal() -> None:
    """It shows what each call waits for, and why; numbers are whole or left out."""
    drawn = lines(status_watch.draw_fitted(made(), 80, 40), 80)
    headings, *rows = drawn[drawn.index("streams: 3") + 1 :]
    assert headings.split() == ["id", "model", "phase", "target", "attempt", "why", "age", "left", "queue", "tokens"]
    assert rows[0].endswith("1:15                 12/34")
    assert [row.split()[0] for row in rows if "b/m" in row and "of 3" in row] == ["req3", "req1"]


# -- the live view ----------------------------------------------------------------------------------------------------


@attrs.define
class FakeDisplay:
    """Stands in for a terminal.

    Attributes:
        drawn: Each overview, with the problem above it.
    """

    drawn: list[tuple[Overview, str | None]] = attrs.field(factory=list)

    def draw(self, shown: Overview, problem: str | None = None) -> None:
        """Records it."""
        self.drawn.append((shown, problem))


async def test_a_gateway_that_is_unreachable(autojump_clock: MockClock) -> None:
    """The last overview stays, with its age and the reason, until the gateway answers again."""
    first, later = made(), made(count=9)
    answers: Iterator[Any] = iter([first, RequestFailed("cannot reach it."), None, later])
    display = FakeDisplay()

    async def fetch() -> Overview:
        await trio.lowlevel.checkpoint()
        answer = next(answers)
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, RequestFailed):
            raise answer
        assert isinstance(answer, Overview)
        return answer

    with pytest.raises(RuntimeError), trio.fail_after(100):  # PEP 479: the iterator is exhausted
        await status_watch._refresh(fetch, display, 2.0)  # type: ignore[arg-type]
    assert display.drawn == [
        (first, None),
        (first, "This is 2.0 s old, and the gateway is asked again: cannot reach it."),
        (first, "This is 14.0 s old, and the gateway is asked again: no answer within 10 s."),
        (later, None),
    ]
    assert trio.current_time() == pytest.approx(autojump_clock.current_time())


@pytest.mark.parametrize("mute", [False, True])
async def test_the_first_request_must_succeed(autojump_clock: MockClock, mute: bool) -> None:
    """A wrong address is an error, and not waited for."""

    async def fetch() -> Overview:
        if mute:
            await trio.sleep_forever()
        raise RequestFailed("cannot reach it.")

    display = FakeDisplay()
    with pytest.raises(RequestFailed, match=r"no answer within 10 s\." if mute else r"cannot reach it\."):
        await status_watch._refresh(fetch, display, 2.0)  # type: ignore[arg-type]
    assert display.drawn == []


# -- a terminal, and a gateway ----------------------------------------------------------------------------------------

ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@attrs.define(eq=False)
class Terminal:
    """A command that runs in a terminal.

    Attributes:
        output: What it has written.
    """

    process: subprocess.Popen[bytes]
    master: int
    output: str = ""

    def read(self, timeout_s: float) -> bool:
        """Reads what the command has written; returns False if there is nothing."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        try:
            self.output += os.read(self.master, 65536).decode()
        except OSError:  # no process has its other end open
            return False
        return True

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Reads until the command has written this text; returns the index behind it."""
        give_up_at = time.monotonic() + 20.0
        while (found := self.output.find(text, after)) < 0:
            assert self.read(0.05) or (time.monotonic() < give_up_at and self.process.poll() is None), self.output[
                -3000:
            ]
        return found + len(text)

    def end(self, number: int) -> int:
        """Sends a signal, reads until the command exits, and returns the exit code."""
        self.process.send_signal(number)
        give_up_at = time.monotonic() + 15.0
        while self.process.poll() is None:
            assert time.monotonic() < give_up_at, "the command does not exit"
            self.read(0.05)
        while self.read(0.0):
            pass
        return self.process.returncode


@contextlib.contextmanager
def run_in_terminal(
    *command: str, size: tuple[int, int] = (40, 200), stderr: int | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Runs a command in a terminal of this size (lines, columns)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    before = termios.tcgetattr(slave)
    whole = environment(None, TERM="xterm-256color", **(env or {}))
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=stderr or slave, env=whole, start_new_session=True
    )
    try:
        yield Terminal(process, master)
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.communicate()
        os.close(slave)
        with contextlib.suppress(OSError):  # a test has closed it
            os.close(master)


@pytest.fixture(scope="module")
def gateway(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of two workers with keys, and a model that fails over to a stream without an end."""
    more = f"""
[upstreams.away]
base_url = "http://127.0.0.1:1/v1"
models = ["m"]
[models.both]
targets = ["away/m", "mock/endless.both"]
[keys]
ada = "{KEY}"
bob = "key-of-bob"
"""
    directory = tmp_path_factory.mktemp("gateway")
    env = {"TRIGATE_STORE": str(directory / "s.db")}
    with run_gateway(
        configuration(upstream, more=more), directory, command=(*SERVE, "--workers", "2"), env=env
    ) as running:
        yield running


@contextlib.contextmanager
def streaming(url: str, name: str, model: str = "both", key: str = KEY) -> Iterator[Any]:
    """A stream in flight, with this request id."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}", "x-request-id": name}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.readline().startswith(b"data: ")
        yield response


def address(gateway: Gateway, **more: str) -> dict[str, str]:
    """The environment variables with which a command finds the gateway."""
    return {"TRIGATE_URL": gateway.url, "TRIGATE_API_KEY": KEY, **more}


def run(gateway: Gateway, *args: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """Runs `trigate status`, not in a terminal."""
    env = environment(TRIGATE_URL=gateway.url, TRIGATE_API_KEY=key)
    return subprocess.run([*STATUS, *args], env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.slow
def test_once(gateway: Gateway) -> None:
    """Without a terminal, plain text shows the stream with its attempts, the targets and admission."""
    give_up_at = time.monotonic() + 15.0
    with streaming(gateway.url, "once"):
        done = run(gateway)
        while "admission: 1 of " not in done.stdout:  # the report of the other worker is up to a second old
            assert time.monotonic() < give_up_at, done
            done = run(gateway)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert re.search(r"^  away/m +/chat/completions +closed ", done.stdout, re.M)
    assert re.search(
        r"^  once +both +streaming +mock/endless\.both +2 of 3 +failover +[\d.]+ s +[\d:]+ +\d+ +\S+( k)? +\d+$",
        done.stdout,
        re.M,
    )
    assert re.search(r"^ +upstream_unavailable 502 +away/m +1 +first +[\d.]+ s$", done.stdout, re.M)


@pytest.mark.slow
def test_as_json(gateway: Gateway) -> None:
    """The bodies of both paths are merged into one object."""
    with streaming(gateway.url, "json"):
        body = json.loads(run(gateway, "--json").stdout)
    assert "live" in body["streams"]
    assert body["streams"]["count"] == len(body["streams"]["data"])
    [row] = [row for row in body["streams"]["data"] if row["id"] == "json"]
    assert row["attempts"][1]["why"] == "failover"


@pytest.mark.slow
def test_once_in_a_terminal(gateway: Gateway) -> None:
    """On a terminal it has colours, and stays on the normal screen."""
    with (
        streaming(gateway.url, "coloured"),
        run_in_terminal(*STATUS, env=address(gateway)) as terminal,
    ):
        terminal.wait_for("coloured")
        terminal.wait_for("\x1b[32mstreaming")
        assert terminal.process.wait(15) == 0
    assert ENTER not in terminal.output


@pytest.fixture
def without_rich(tmp_path: Path) -> str:
    """A ``PYTHONPATH`` with which a process cannot import rich."""
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["rich"] = None\n')
    return os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])


@pytest.mark.slow
def test_once_without_rich(gateway: Gateway, without_rich: str) -> None:
    """Without rich, it is plain text on a terminal too."""
    env = address(gateway, PYTHONPATH=without_rich)
    with streaming(gateway.url, "plain"), run_in_terminal(*STATUS, env=env) as terminal:
        terminal.wait_for("\r\n  plain ", after=terminal.wait_for("streams: "))
        assert terminal.process.wait(15) == 0
    assert "\x1b" not in terminal.output


@pytest.mark.slow
def test_watch_without_rich(gateway: Gateway, without_rich: str) -> None:
    """The error says how to install rich."""
    with run_in_terminal(*STATUS, "--watch", env=address(gateway, PYTHONPATH=without_rich)) as terminal:
        terminal.wait_for("trigate: --watch needs the package rich: pip install 'trigate[terminal]'\r\n")
        assert terminal.process.wait(15) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_watch(gateway: Gateway, number: signal.Signals) -> None:
    """Streams appear and disappear; a signal ends the view and restores the terminal."""
    watch = (*STATUS, "--watch", "--interval", "0.1")
    with run_in_terminal(*watch, env=address(gateway)) as terminal:
        at = terminal.wait_for("streams: 0", after=terminal.wait_for(ENTER))
        with streaming(gateway.url, "watched"):
            at = terminal.wait_for("watched", after=at)
            for words in ("2 of 3", "failover", "upstream_unavailable 502", "away/m"):
                at = terminal.wait_for(words, after=at)
        terminal.wait_for("streams: 0", after=at)
        assert LEAVE not in terminal.output
        assert terminal.end(number) == 128 + number
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex("streams: 0")
    assert terminal.output.endswith(LEAVE)
    assert terminal.output.count(ENTER) == terminal.output.count(LEAVE) == 1
    assert "Traceback" not in terminal.output


@pytest.mark.slow
def test_watch_is_suspended_and_continued(gateway: Gateway) -> None:
    """Ctrl-Z restores the terminal until the shell continues the command."""
    watch = (*STATUS, "--watch", "--interval", "0.1")
    with run_in_terminal(*watch, env=address(gateway)) as terminal:
        terminal.wait_for("streams: ")
        terminal.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        at = terminal.wait_for(LEAVE, after=terminal.wait_for(SHOW_CURSOR))
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for("streams: ", after=terminal.wait_for(ENTER, after=at))
        assert terminal.end(signal.SIGINT) == 130


@pytest.mark.slow
def test_watch_in_another_size(gateway: Gateway) -> None:
    """It is drawn again at once, and not only after the next answer."""
    watch = (*STATUS, "--watch", "--interval", "3600")
    with run_in_terminal(*watch, env=address(gateway)) as terminal:
        at = terminal.wait_for("streams: ")
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 50, 0, 0))
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.wait_for("…", after=at)  # the first line does not fit any more
        assert terminal.end(signal.SIGINT) == 130


@pytest.mark.slow
@pytest.mark.parametrize("args", [(), ("--watch",)], ids=["once", "watch"])
def test_a_terminal_without_the_letters(gateway: Gateway, args: tuple[str, ...]) -> None:
    """Characters that its encoding lacks become question marks."""
    env = address(gateway, PYTHONIOENCODING="ascii")
    with (
        streaming(gateway.url, "a-long-name-of-a-request"),
        run_in_terminal(*STATUS, *args, size=(40, 60), env=env) as terminal,
    ):
        terminal.wait_for("streams: ")
        if args:
            assert terminal.end(signal.SIGINT) == 130
        else:
            assert terminal.process.wait(15) == 0
    assert re.search(r"a-long?-?[a-z]*\?", terminal.output)


@pytest.mark.slow
def test_watch_while_the_gateway_restarts(upstream: str, tmp_path: Path) -> None:
    """The view shows the problem and its own age, and continues when the gateway is back."""
    config = configuration(upstream)
    with run_gateway(config, tmp_path) as first:
        watch = (*STATUS, "--watch", "--interval", "0.1")
        with run_in_terminal(*watch, env={"TRIGATE_URL": first.url}) as terminal:
            at = terminal.wait_for("streams: 0")
            first.stop()
            at = terminal.wait_for(" old, and the gateway is asked again: cannot reach ", after=at)
            port = first.url.rpartition(":")[2]
            with run_gateway(config, tmp_path, command=(*SERVE[:-1], port)) as second:
                assert second.url == first.url
                with streaming(second.url, "after", "mock/endless.after"):
                    at = terminal.wait_for("streams: 1", after=at)
                    at = terminal.wait_for("after", after=at)
                last = terminal.output.rindex("Trigate 0.")
                assert " old, and the gateway is asked" not in terminal.output[last - 50 :]
                assert terminal.end(signal.SIGINT) == 130


@pytest.mark.slow
def test_the_terminal_is_closed(gateway: Gateway) -> None:
    """The command exits with the reason on standard error, and without a traceback."""
    watch = (*STATUS, "--watch", "--interval", "0.1", "--url", gateway.url, "--key", KEY)
    with contextlib.suppress(termios.error), run_in_terminal(*watch, stderr=subprocess.PIPE) as terminal:
        terminal.wait_for("streams: ")
        os.close(terminal.master)
        _, stderr = terminal.process.communicate(timeout=15)
        assert (terminal.process.returncode, stderr) == (1, b"trigate: Input/output error\n")


@pytest.mark.slow
def test_ctrl_c_while_the_gateway_is_mute() -> None:
    """Before the first answer, the exit code is 130 and nothing was written."""
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        run_in_terminal(*STATUS, "--watch", "--url", f"http://127.0.0.1:{mute.getsockname()[1]}") as terminal,
    ):
        connection, _ = mute.accept()
        with connection:
            assert connection.recv(4) == b"GET "
            assert terminal.end(signal.SIGINT) == 130
    assert terminal.output == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--key", "no-such-key"), "trigate: 401: Incorrect API key provided."),
        (("--url", "http://127.0.0.1:1"), "trigate: cannot reach http://127.0.0.1:1: "),
        (("--url", "nonsense"), "trigate: 'nonsense' is not a URL"),
        (("--url", "UPSTREAM"), "trigate: 404: said the upstream"),
    ],
)
def test_watch_cannot_begin(gateway: Gateway, upstream: str, args: tuple[str, ...], words: str) -> None:
    """The exit code is 1, and one line has the reason; the screen was not switched."""
    args = tuple(upstream if each == "UPSTREAM" else each for each in args)
    env = address(gateway)
    with run_in_terminal(*STATUS, "--watch", *args, env=env) as terminal:
        terminal.wait_for("\n")
        assert terminal.process.wait(15) == 1
        while terminal.read(0.0):
            pass
    assert terminal.output.startswith(words)
    assert terminal.output.count("\n") == 1
    assert "\x1b" not in terminal.output


@pytest.mark.slow
def test_watch_without_a_terminal(gateway: Gateway) -> None:
    """The live view is refused if the output is a file or a pipe."""
    done = run(gateway, "--watch")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "trigate: --watch needs a terminal as its output. Without --watch, the state is shown once.\n"
    )


@pytest.mark.slow
def test_cancel(gateway: Gateway, upstream: str) -> None:
    """The client gets an error and the upstream is closed; a stream of another key does not exist."""
    with streaming(gateway.url, "unwanted", "mock/endless.unwanted") as response:
        foreign = run(gateway, "--cancel", "unwanted", key="key-of-bob")
        assert (foreign.returncode, foreign.stderr) == (1, "trigate: 404: There is no such stream.\n")
        assert seen(upstream, "endless.unwanted")["open"]
        done = run(gateway, "--cancel", "unwanted")
        assert (done.returncode, done.stdout, done.stderr) == (0, "unwanted: ended\n", "")
        rest = response.read()
    assert b'"code":"stream_cancelled"' in rest
    assert b"[DONE]" not in rest
    wait_closed(upstream, "endless.unwanted")
    assert run(gateway, "--cancel", "unwanted").returncode == 1


@pytest.mark.slow
def test_cancel_as_json(gateway: Gateway) -> None:
    """The output is the gateway's answer."""
    with streaming(gateway.url, "unwanted.json"):
        done = run(gateway, "--cancel", "unwanted.json", "--json")
    assert json.loads(done.stdout) == {"id": "unwanted.json", "object": "stream.cancelled", "cancelled": 1}
