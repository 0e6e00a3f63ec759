"""The gateways under test: their files ``peers/*.toml``, and how one is started, called and stopped.

A peer's file::

    title = "LiteLLM"                       # its name in tables
    install = "pip install 'litellm[proxy]'"    # shown if `program` is not found
    program = "litellm"                     # looked for on PATH
    command = ["litellm", "--config", "{config}", "--port", "{port}"]
    ready = "/health/liveliness"            # answers 200 when it serves
    model = "mock-model"                    # the id to call it by
    path = "/v1/chat/completions"           # the default
    streams = true                          # the default; false: only plain calls are made
    start_s = 60                            # the limit for its start; 30 is the default
    version = ["litellm", "--version"]      # prints it in its first lines
    [formats]                               # by workload of --formats: the model id of its calls
    [headers]                               # sent with each call
    [env]                                   # for its process
    [files]                                 # written into its directory before it starts; the first one is {config}
    "config.yaml" = "…"

In ``command``, ``version``, ``headers``, ``env`` and ``files`` these are replaced: ``{upstream}`` (the mock's URL,
without ``/v1``), ``{upstream_port}``, ``{port}``, ``{port2}`` (another free one), ``{config}``, ``{python}`` (the
bench's own) and ``{peers}`` (this directory).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import cattrs
import httpx2
import trio

from bench.load import Job, Report
from bench.process import Generator, Upstream, cpu_s, environment, memory, open_process, tree

PEERS = Path(__file__).parent / "peers"
DIRECT = "direct"
"""The name of the mock upstream when it is measured like a gateway."""


@attrs.frozen(kw_only=True)
class Peer:
    """How a gateway is installed, started and called. The module's docstring explains the fields."""

    name: str = ""
    title: str
    install: str
    program: str
    command: tuple[str, ...]
    ready: str = "/health"
    model: str = "mock-model"
    path: str = "/v1/chat/completions"
    streams: bool = True
    start_s: float = 30
    version: tuple[str, ...] = ()
    formats: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    env: Mapping[str, str] = {}
    files: Mapping[str, str] = {}

    def is_installed(self) -> bool:
        """Whether its program is on PATH."""
        return self.program == "{python}" or shutil.which(self.program) is not None


_converter = cattrs.Converter(forbid_extra_keys=True)


def read_peer(file: Path) -> Peer:
    """Reads a peer's file.

    Raises:
        cattrs.BaseValidationError: The file has an unknown field or lacks a required one.
    """
    given = tomllib.loads(file.read_text(encoding="utf-8"))
    return attrs.evolve(_converter.structure(given, Peer), name=file.stem)


def peers(directory: Path = PEERS) -> dict[str, Peer]:
    """All peers that have a file, by name."""
    return {file.stem: read_peer(file) for file in sorted(directory.glob("*.toml"))}


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replaces ``{name}`` only where the name is known, since JSON and YAML are full of braces.

    >>> fill("{port} {x} {}", {"port": "80"})
    '80 {x} {}'
    """
    return re.sub(r"\{([a-z_0-9]+)\}", lambda match: values.get(match[1], match[0]), text)


class GatewayFailed(Exception):
    """A gateway did not start. The message holds the end of its output."""


@attrs.frozen(kw_only=True)
class Gateway:
    """A running gateway, or the mock upstream itself.

    Attributes:
        pid: None where its CPU time and memory cannot be read.
        start_s: From its start to its first answer; None where it was already running.
    """

    name: str
    title: str
    port: int
    model: str
    path: str = "/v1/chat/completions"
    headers: Mapping[str, str] = {}
    ready: str = "/health"
    streams: bool = True
    pid: int | None = None
    version: str = ""
    command: str = ""
    start_s: float | None = None

    def pids(self) -> list[int]:
        """The process ids, at this moment."""
        return [] if self.pid is None else tree(self.pid)

    def cpu_s(self) -> float | None:
        """The CPU time of its processes so far."""
        return None if self.pid is None else cpu_s(self.pids())

    def resident_bytes(self) -> int | None:
        """The memory of its processes now."""
        return None if self.pid is None else memory(self.pids()).resident_bytes


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def open_gateway(peer: Peer, *, upstream_port: int, directory: Path, watch: bool) -> AsyncIterator[Gateway]:
    """Runs a gateway in front of the mock upstream.

    Args:
        directory: The gateway's own directory for its files and its log.
        watch: Whether its CPU time and memory can be read here.

    Raises:
        GatewayFailed: It did not start.
    """
    port = free_port()
    config = directory / next(iter(peer.files), "none")
    values = {
        "upstream": f"http://127.0.0.1:{upstream_port}",
        "upstream_port": str(upstream_port),
        "port": str(port),
        "port2": str(free_port()),
        "config": str(config),
        "python": sys.executable,
        "peers": str(PEERS),
    }
    for name, text in peer.files.items():
        (directory / name).write_text(fill(text, values), encoding="utf-8")
    command = [fill(part, values) for part in peer.command]
    env = environment() | {name: fill(value, values) for name, value in peer.env.items()}
    env["TRIGATE_STORE"] = str(directory / "trigate.db")  # not the configuration of the person who runs the bench
    log = directory / "log"
    version = await trio.to_thread.run_sync(_version, peer, values)
    # created before the clock starts, since a TLS context alone takes some ten milliseconds
    asked = httpx2.AsyncClient(timeout=5, trust_env=False, verify=False)
    began = time.monotonic()
    async with asked, open_process(command, cwd=directory, env=env, log=log) as process:
        gateway = Gateway(
            name=peer.name,
            title=peer.title,
            port=port,
            model=peer.model,
            path=peer.path,
            headers={name: fill(value, values) for name, value in peer.headers.items()},
            ready=peer.ready,
            streams=peer.streams,
            pid=process.pid if watch else None,
            version=version,
            command=" ".join(peer.command),
        )
        with trio.move_on_after(peer.start_s):
            while process.poll() is None and not await _answers(asked, gateway):  # noqa: ASYNC110 - there is no event for it
                await trio.sleep(0.01)
        took_s = time.monotonic() - began
        if process.poll() is not None or not await _answers(asked, gateway):
            how = "takes too long to start" if process.poll() is None else f"exited with {process.returncode}"
            end = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise GatewayFailed(f"{peer.title} {how}:\n{end}")
        yield attrs.evolve(gateway, start_s=took_s)


def running(url: str, *, model: str, path: str, headers: Mapping[str, str], pid: int | None) -> Gateway:
    """A gateway that is already running, on this machine and in front of the mock upstream.

    Raises:
        ValueError: The URL is not on this machine's loopback interface. The mock upstream is there, events are timed by
            one clock, and the bench must not put load on other machines.
    """
    parsed = httpx2.URL(url)
    if parsed.host not in ("127.0.0.1", "localhost") or parsed.scheme != "http":
        raise ValueError("--url takes http://127.0.0.1:PORT: the mock upstream and the clocks are this machine's")
    return Gateway(
        name="url",
        title=f"port {parsed.port or 80}",
        port=parsed.port or 80,
        model=model,
        path=parsed.path.rstrip("/").removesuffix("/v1") + path,
        headers=headers,
        pid=pid,
    )


async def _answers(client: httpx2.AsyncClient, gateway: Gateway) -> bool:
    """Whether the gateway is ready and serves a call."""
    call = {"model": gateway.model, "messages": [{"role": "user", "content": "Are you there?"}]}
    base = f"http://127.0.0.1:{gateway.port}"
    try:
        if gateway.ready and (await client.get(base + gateway.ready)).status_code != 200:
            return False
        answer = await client.post(base + gateway.path, json=call, headers=dict(gateway.headers))
    except httpx2.HTTPError:
        return False
    return answer.status_code == 200


def _version(peer: Peer, values: Mapping[str, str]) -> str:
    if not peer.version:
        return ""
    command = [fill(part, values) for part in peer.version]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        found = re.search(r"\d+\.\d+(?:\.\w+)*", done.stdout + done.stderr)
        return found[0] if found else ""
    return ""


def summary(gateway: Gateway) -> dict[str, Any]:  # Any: JSON
    """The part of a gateway that a result stores."""
    return {
        "title": gateway.title,
        "version": gateway.version,
        "command": gateway.command,
        "model": gateway.model,
        "start_s": None if gateway.start_s is None else round(gateway.start_s, 3),
    }


async def cpu_spent(upstream: Upstream, generator: Generator, gateway: Gateway, job: Job) -> tuple[float, Report]:
    """Runs a job; returns the CPU time of the gateway while it ran, in seconds.

    Raises:
        RuntimeError: A call failed, none was answered, or the time cannot be read.
    """
    await upstream.wait_active(0, at_most_s=5)
    before_s = gateway.cpu_s()
    report = await generator.report(await generator.start(job))
    await trio.sleep(0.05)
    after_s = gateway.cpu_s()
    if before_s is None or after_s is None:
        raise RuntimeError("the CPU time of a process cannot be read on this system")
    if report.errors:
        raise RuntimeError(f"{gateway.title}: {report.errors}: {report.error}")
    if not report.latency.count:
        raise RuntimeError(f"{gateway.title}: no call was answered")
    return after_s - before_s, report
