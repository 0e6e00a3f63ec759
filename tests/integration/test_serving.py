"""Every way to serve the app, as real processes: each passes the same end-to-end test, and shuts down properly."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.server.test_hypercorn_firewall import KILLERS, UPGRADE
from tests.support.processes import SERVE, Gateway, configuration, environment, run_gateway
from tests.support.scripted_upstream import MODELS, TEXT, open_upstream, wait_closed
from tests.support.sdk_scenarios import CLOSES_WITHIN_S, HELLO, TRIES
from trigate.upstream.local_model.process import MODEL_ID, why_unavailable

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).with_name("trigate")
WITH_HYPERCORN = (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0")
WITH_UVICORN = (sys.executable, "-m", "uvicorn", "--port", "0", "trigate:app")

WAYS = {
    "trigate serve": (str(SCRIPT), "serve", "--port", "0"),
    "python -m trigate": SERVE,
    "hypercorn": (*WITH_HYPERCORN, "trigate:app"),
    "hypercorn -k trio": (*WITH_HYPERCORN, "-k", "trio", "trigate:app"),
    "uvicorn": WITH_UVICORN,
}
EXITS = {way: {0} for way in WAYS} | {
    "uvicorn": {0, -signal.SIGTERM}  # it raises the signal again after its shutdown
}
ENDS_WITHIN_S = 3.0

# How long running streams may continue after SIGTERM: a setting of Trigate, a command line option of the others.
GRACE_S = 1
GRACE = {
    "hypercorn": ("--graceful-timeout", str(GRACE_S)),
    "hypercorn -k trio": ("--graceful-timeout", str(GRACE_S)),
    "uvicorn": ("--timeout-graceful-shutdown", str(GRACE_S)),
}

QUESTION = "Name three colors."
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "violet", "black", "white", "pink", "brown")


def _command(way: str, workers: int) -> tuple[str, ...]:
    if way == "trigate serve" and not SCRIPT.exists():
        pytest.skip("the package is not installed here, so there is no `trigate` command")
    if way == "uvicorn" and importlib.util.find_spec("uvicorn") is None:
        pytest.skip("there is no uvicorn here")
    return WAYS[way] if workers == 1 else (*WAYS[way], "--workers", str(workers))


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


def _text(stream: Iterable[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def _read_for(at_most_s: float, stream: Iterable[Any]) -> None:
    give_up_at = time.monotonic() + at_most_s
    for _ in stream:
        assert time.monotonic() < give_up_at, f"the stream still runs after {at_most_s} s"


def _closing_times(gateway: Gateway, upstream: str) -> list[float]:
    # One client for each: with several workers, another connection may reach another process.
    late = []
    for attempt in range(TRIES):
        model = f"endless.{attempt}"
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            stream = client.chat.completions.create(model=f"mock/{model}", messages=HELLO, stream=True)
            for _ in range(3):
                assert next(stream).choices
            left_at = time.time()
            stream.close()
        late.append(wait_closed(upstream, model) - left_at)
    return late


@pytest.mark.parametrize(
    ("way", "workers"),
    # `python -m trigate` is `trigate`: testing one of them is enough
    [(way, workers) for way in WAYS for workers in (1, 2) if (way, workers) != ("python -m trigate", 2)],
)
def test_serves(way: str, workers: int, tmp_path: Path) -> None:
    """Health, models, an answer and a stream work. A disconnect ends the upstream call. SIGTERM makes the process exit
    with 0."""
    command = _command(way, workers)
    with open_upstream() as upstream, run_gateway(configuration(upstream), tmp_path, command=command) as gateway:
        assert _get(f"{gateway.url}/health") == {"status": "ok"}
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            assert {f"mock/{model}" for model in MODELS} <= {model.id for model in client.models.list()}
            answer = client.chat.completions.create(model="default", messages=HELLO)
            assert (answer.model, answer.choices[0].message.content) == ("default", TEXT)
            assert _text(client.chat.completions.create(model="default", messages=HELLO, stream=True)) == TEXT
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("nobody/has-this")
        late = _closing_times(gateway, upstream)
        assert min(late) < CLOSES_WITHIN_S, f"closed {late} s after the client disconnected"
        assert max(late) < 1
        code, took_s = gateway.stop()
        assert code in EXITS[way], gateway.log()
        assert took_s < ENDS_WITHIN_S
        log = gateway.log()
        assert "Traceback" not in log
        assert "[error" not in log
        for found in ("configured by", "Upstreams: mock", "Models: "):  # the lines at start-up
            assert found in log


@pytest.mark.parametrize(
    "way",
    [
        "python -m trigate",
        pytest.param(
            "hypercorn",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12),
                reason="there, hypercorn's asyncio worker waits for a stream without end (`Server.wait_closed`)",
            ),
        ),
        "hypercorn -k trio",
        "uvicorn",
    ],
)
def test_stream_at_sigterm(way: str, tmp_path: Path) -> None:
    """A stream that is still running after the drain timeout ends with an error at the client, never with a clean end.

    Trigate's server sends the reason. The others close the connection.
    """
    command = (*_command(way, 1), *GRACE.get(way, ()))
    config = f"[server]\ndrain_timeout_s = {GRACE_S}"
    with (
        open_upstream() as upstream,
        run_gateway(configuration(upstream, more=config), tmp_path, command=command) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client,
    ):
        stream = client.chat.completions.create(model="mock/endless", messages=HELLO, stream=True)
        assert next(stream).choices
        gateway.process.terminate()
        with pytest.raises(openai.APIError) as raised:
            _read_for(GRACE_S + ENDS_WITHIN_S, stream)
        if way == "python -m trigate":
            assert raised.value.code == "draining"
        wait_closed(upstream, "endless")
        assert gateway.process.wait(ENDS_WITHIN_S) in EXITS[way], gateway.log()
        if way == "python -m trigate":  # the report names the ended exchanges
            assert f"cut_exchanges=['{stream.response.headers['x-request-id']}']" in gateway.log()


@pytest.mark.parametrize("way", ["python -m trigate", "hypercorn", "hypercorn -k trio", "uvicorn"])
def test_packets_that_end_servers(way: str, tmp_path: Path) -> None:
    """Each ends its own connection at most: a stream that runs meanwhile goes on, and calls are served."""
    command = _command(way, 1)
    with (
        open_upstream() as upstream,
        run_gateway(configuration(upstream), tmp_path, command=command) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client,
    ):
        port = httpx2.URL(gateway.url).port
        stream = client.chat.completions.create(model="mock/endless", messages=HELLO, stream=True)
        assert next(stream).choices
        for pieces in KILLERS.values():
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock, contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
                    sock.settimeout(0.3)
                    with contextlib.suppress(TimeoutError):
                        while sock.recv(65536):
                            pass
        assert next(stream).choices
        answer = client.chat.completions.create(model="default", messages=HELLO)
        assert answer.choices[0].message.content == TEXT
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(UPGRADE)
            assert sock.recv(65536).startswith(b"HTTP/1.1 426 ")
        stream.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_readiness_at_sigterm(workers: int, tmp_path: Path) -> None:
    """The readiness check fails on new connections, while calls are still answered."""
    command = _command("trigate serve", workers)
    # A slow machine must have asked three times before the notice is over.
    config = '[server]\ndrain_notice_s = 6\n[upstreams.parrot]\nkind = "echo"\n'
    # Certificate authorities are not loaded, which takes a while, and each request has a connection of its own.
    limits = httpx2.Limits(max_keepalive_connections=0)
    with (
        run_gateway(config, tmp_path, command=command) as gateway,
        httpx2.Client(base_url=gateway.url, verify=False, limits=limits) as client,
    ):
        call = {"model": "parrot/echo", "messages": HELLO}
        assert client.get("/ready").status_code == 200
        while gateway.log().count("Listening on ") < workers:  # a worker that still starts would end at the signal
            time.sleep(0.01)
        gateway.process.terminate()
        while client.get("/ready").status_code == 200:
            time.sleep(0.01)
        assert client.get("/ready").json()["reasons"] == ["draining"]
        assert client.post("/v1/chat/completions", json=call).status_code == 200
        assert gateway.process.wait(6 + ENDS_WITHIN_S) == 0, gateway.log()
        with pytest.raises(httpx2.ConnectError):
            client.get("/ready")


@pytest.fixture
def modelled(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway with the embedded model as ``default``."""
    why = why_unavailable(None)
    if why is not None:
        pytest.skip(why)
    config = f"""
[upstreams.trigate]
kind = "local"
start = "startup"
[models.default]
targets = ["trigate/{MODEL_ID}"]
"""
    with run_gateway(config, tmp_path) as gateway:
        yield gateway


def _assert_sensible(answer: str) -> None:
    assert any(color in answer.lower() for color in COLORS), answer


@pytest.mark.model
def test_embedded_model_answers(modelled: Gateway) -> None:
    """The embedded model answers a question through the Python SDK, whole and streamed, and counts its tokens."""
    call: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 48,
    }
    with openai.OpenAI(base_url=f"{modelled.url}/v1", api_key="not-needed") as client:
        answer = client.chat.completions.create(**call)
        _assert_sensible(answer.choices[0].message.content or "")
        assert answer.model == "default"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 3
        assert answer.usage.completion_tokens > 3
        chunks = list(client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
        _assert_sensible(_text(chunks))
        assert len(chunks) > 5
        assert {chunk.model for chunk in chunks} == {"default"}
        assert chunks[-1].usage is not None


@pytest.mark.model
def test_embedded_model_answers_typescript(modelled: Gateway) -> None:
    """The embedded model answers the same question through the TypeScript SDK, whole and streamed."""
    room = Path(__file__).parents[1] / "node"
    node = shutil.which("node")
    if node is None or not (room / "node_modules/openai").exists():
        pytest.skip("there is no Node, or no tests/node/node_modules (./scripts/test makes it)")
    done = subprocess.run(
        [node, room / "ask.mjs"],
        env=environment(BASE_URL=f"{modelled.url}/v1", MODEL="default", QUESTION=QUESTION),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert said["model"] == "default"
    _assert_sensible(said["whole"])
    _assert_sensible(said["streamed"])


# -- several workers --------------------------------------------------------------------------------------------------


@pytest.fixture
def database() -> Iterator[Path]:
    """The store that the workers share."""
    with tempfile.TemporaryDirectory(prefix="tri") as room:  # pytest's own paths are too long for the name of a socket
        yield Path(room) / "trigate.db"


def _status(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:  # a new connection each time, to any worker
        return json.load(answer)


def _agreed(url: str, holds: Callable[[Any], bool]) -> Any:
    """Waits until both workers return the same status in one round of requests, and a condition holds; returns it.

    A round is many requests at once: where workers share a socket, an idle worker accepts the next connection.
    """
    give_up_at = time.monotonic() + 20
    with ThreadPoolExecutor(16) as threads:
        while time.monotonic() < give_up_at:
            statuses = list(threads.map(_status, [url] * 16))
            reporters = {row["id"] for status in statuses for row in status["workers"] if row["report_age_s"] == 0}
            first = _lasting(statuses[0])
            if len(reporters) == 2 and holds(statuses[0]) and all(_lasting(status) == first for status in statuses):
                return statuses[0]
            time.sleep(0.05)
    pytest.fail(f"they do not agree: {statuses}")


def _lasting(status: Any) -> Any:
    names = ("status", "sessions", "outbox", "store", "channels", "upstreams", "totals")
    workers = [(row["id"], row["pid"], row["status"], row["live"]) for row in status["workers"]]
    return {name: status[name] for name in names} | {"workers": workers}


def test_a_replaced_worker_is_in_the_status(tmp_path: Path, database: Path) -> None:
    """Within a second after it has begun to serve, every worker lists the new one, and none the killed one."""
    config = f'[store]\npath = "{database}"\n[upstreams.echo]\nkind = "echo"\n'
    command = _command("trigate serve", 2)
    with run_gateway(config, tmp_path, command=command, env={"TRIGATE_STORE": str(database)}) as gateway:
        while gateway.log().count("Listening on ") < 2:
            time.sleep(0.02)
        before = _agreed(gateway.url, lambda body: len(body["workers"]) == 2)
        killed = before["workers"][0]["pid"]
        os.kill(killed, signal.SIGKILL)
        while gateway.log().count("Listening on ") < 3:
            time.sleep(0.02)
        give_up_at = time.monotonic() + 1.0
        pids: list[int] = []
        while time.monotonic() < give_up_at and not (len(pids) == 2 and killed not in pids):
            pids = [row["pid"] for row in _status(gateway.url)["workers"]]
        for _ in range(16):
            pids = [row["pid"] for row in _status(gateway.url)["workers"]]
            assert len(pids) == 2
            assert killed not in pids
        gateway.stop()


@pytest.mark.parametrize("way", ["trigate serve", "hypercorn -k trio"])
def test_status_of_worker_processes(way: str, tmp_path: Path, database: Path) -> None:
    """Each worker returns the same status: the workers, all exchanges, the store. No socket is left at the end."""
    with (
        open_upstream() as upstream,
        run_gateway(
            configuration(upstream), tmp_path, command=_command(way, 2), env={"TRIGATE_STORE": str(database)}
        ) as gateway,
    ):
        for _ in range(6):
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x")  # a connection of its own
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}])
            client.close()
        status = _agreed(gateway.url, lambda status: len(status["workers"]) == 2 and status["totals"]["exchanges"] == 6)
        assert status["totals"]["complete"] == 6
        assert status["sessions"] == {"total": 0, "active": 0, "busy": 0}
        assert status["store"] == {"kind": "sqlite", "path": str(database), "state": "open", "error": None}
        assert gateway.stop()[0] in EXITS[way]
        if way == "trigate serve":  # hypercorn may end a worker before it has shut down; the next start removes it
            assert not [path.name for path in database.parent.iterdir() if "-w_" in path.name]


def test_status_forgets_a_killed_worker(tmp_path: Path, database: Path) -> None:
    """A killed worker disappears at once, and its replacement appears."""
    command = _command("trigate serve", 2)
    env = {"TRIGATE_STORE": str(database)}
    with run_gateway('[upstreams.parrot]\nkind = "echo"\n', tmp_path, command=command, env=env) as gateway:
        both = _agreed(gateway.url, lambda status: len(status["workers"]) == 2)["workers"]
        killed = both[0]
        os.kill(killed["pid"], signal.SIGKILL)
        status = _agreed(
            gateway.url,
            lambda status: len(status["workers"]) == 2 and killed["id"] not in [row["id"] for row in status["workers"]],
        )
        assert both[1]["id"] in [row["id"] for row in status["workers"]]
        assert "workers_adopted" in gateway.log()
        assert not [path.name for path in database.parent.iterdir() if killed["id"] in path.name]
