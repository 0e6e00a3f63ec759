"""Gateways as people start them: a real process that serves real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

import trigate

START_S = 20.0
STOP_S = 15.0

SERVE = (sys.executable, "-m", "trigate", "serve", "--port", "0")
"""The command that serves on a port of the system's choice."""


def configuration(upstream: str, *, more: str = "") -> str:
    """A configuration in TOML with the scripted upstream as ``mock`` and a ``default``."""
    return f"""
[retries]
budget = 0

[breaker]
failures = 0
failure_rate = 0

[upstreams.mock]
kind = "openai"
base_url = "{upstream}/v1"
[models.default]
targets = ["mock/hello"]
{more}
"""


@attrs.frozen
class Gateway:
    """A running gateway.

    Attributes:
        url: Its base URL, without ``/v1``.
        process: The started process: the gateway, or the parent of its workers.
        log: Returns what the process has written so far.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Callable[[], str]

    def stop(self) -> tuple[int, float]:
        """Sends SIGTERM and returns the exit code (-N = signal N) and the seconds until the exit.

        Raises:
            subprocess.TimeoutExpired: The process still runs after `STOP_S`.
        """
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S), time.monotonic() - began


def environment(config: Path | None = None, **more: str) -> dict[str, str]:
    """This process's environment without keys and settings that a gateway would use, and without the size of the
    terminal, which pytest-xdist sets. The store is in memory."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.endswith("_API_KEY")
        and not name.startswith("TRIGATE_")
        and not name.lower().endswith("_proxy")
        and name not in ("COLUMNS", "LINES")
    }
    root = str(Path(trigate.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    env["PYTHONUNBUFFERED"] = "1"
    env["TRIGATE_STORE"] = ":memory:"
    env["TRIGATE_LOG_FORMAT"] = "text"
    if config is not None:
        env["TRIGATE_CONFIG"] = str(config)
    return env | more


@contextlib.contextmanager
def run_gateway(
    config_toml: str, directory: Path, *, command: Sequence[str] = SERVE, env: dict[str, str] | None = None
) -> Iterator[Gateway]:
    """Runs a gateway until the end of the block.

    Args:
        config_toml: Its configuration.
        directory: A directory for its files, and its working directory.
        command: The command to run; its output names a free port.
        env: Further variables.

    Raises:
        AssertionError: The gateway did not start within `START_S`; the message holds its output.
    """
    config = directory / "trigate.toml"
    config.write_text(config_toml, encoding="utf-8")
    log_path = directory / "gateway.log"

    def log() -> str:
        return log_path.read_text(encoding="utf-8", errors="replace")

    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment(config, **(env or {})),
            start_new_session=True,
        )
    try:
        yield Gateway(_wait_up(process, log), process, log)
    finally:
        # Kill the whole group: killing the parent alone leaves its workers running.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_up(process: subprocess.Popen[bytes], log: Callable[[], str]) -> str:
    give_up_at = time.monotonic() + START_S
    while time.monotonic() < give_up_at and process.poll() is None:
        found = re.search(r"(?i)(?:listening|running) on (https?://127\.0\.0\.1:[1-9]\d*)", log())
        if found is not None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{found[1]}/health", timeout=5):
                return found[1]
        time.sleep(0.02)
    how = "it is mute" if process.poll() is None else f"it exited with {process.returncode}"
    raise AssertionError(f"no gateway: {how}\n{log()}")
