"""Every command of the README, run as written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
SHELL = [text.strip() for language, text in BLOCKS if language == "sh"]
SERVERS = [text for text in SHELL if "/serve" in text or " serve" in text or "trigate:app" in text]
PORT = 18888

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv/bin/trigate").exists(), reason="needs the .venv that ./scripts/test makes"),
]


def _environment() -> dict[str, str]:
    # The tests call no real provider of the person who runs them.
    keep = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    keep["TRIGATE_STORE"] = ":memory:"  # and leave nothing in their home directory
    return {**keep, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _listening() -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


@contextmanager
def _served(command: str) -> Iterator[None]:
    if _listening():
        pytest.skip(f"something else listens on port {PORT}")
    process = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=ROOT, env=_environment())
    try:
        deadline = time.monotonic() + 120
        while not _listening():
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command} does not listen"
            time.sleep(0.05)
        yield
        process.send_signal(signal.SIGTERM)
        # uvicorn shuts down cleanly, then raises the signal again for its parent process
        well = -signal.SIGTERM if "uvicorn" in command else 0
        assert process.wait(20) == well, f"{command} did not exit cleanly on SIGTERM"
    finally:
        process.kill()
        process.wait()


def _run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _only(part: str) -> str:
    [found] = [text for text in SHELL if part in text]
    return str(found)


@pytest.mark.parametrize("command", [text for text in SERVERS if text != "./scripts/serve"])
def test_other_servers(command: str) -> None:
    """Every other command that serves the gateway works and exits cleanly."""
    with _served(command):
        assert _run("sh", "-c", _only("curl -N")).rstrip().endswith("data: [DONE]")


def test_uvicorn_can_be_installed() -> None:
    """The command is right. The tests need uvicorn themselves, so it is there, and nothing is fetched."""
    assert "uvicorn" in _run("sh", "-c", _only("pip install uvicorn"))


# The remaining tests share one gateway, so they come after the tests that need the port.


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """The gateway, served by the README's first command."""
    with _served("./scripts/serve"):
        yield


def test_every_command_is_known_here() -> None:
    """A command that is added to the README must be added to these tests."""
    tested = {*SERVERS, "./scripts/test"}
    tested |= {_only(part) for part in ("curl -N", "/v1/models", "18888/status", "trigate chat", "trigate status")}
    tested |= {_only(part) for part in ("x-session-key", "/v1/sessions", "/hooks/", "pip install uvicorn")}
    assert set(SHELL) == tested | {_only("trigate check")}


def test_curl_streams(served: None) -> None:
    """`curl -N` gets events that end in [DONE]."""
    answer = _run("sh", "-c", _only("curl -N"))
    assert answer.startswith("data: {")
    assert answer.rstrip().endswith("data: [DONE]")


def test_curl_lists_models(served: None) -> None:
    """The model list has `default`."""
    assert '"default"' in _run("sh", "-c", _only("/v1/models"))


def test_curl_status(served: None) -> None:
    """The status has the fields of the contract."""
    answer = _run("sh", "-c", _only("18888/status"))
    assert all(f'"{name}"' in answer for name in ("uptime", "channels", "sessions"))


def test_curl_makes_a_session(served: None) -> None:
    """A call with the session header makes a session, which is listed."""
    assert '"choices"' in _run("sh", "-c", _only("x-session-key"))
    assert '"ada"' in _run("sh", "-c", _only("/v1/sessions"))


def test_curl_calls_a_webhook(served: None) -> None:
    """A webhook gets its reply."""
    assert '"reply":"' in _run("sh", "-c", _only("/hooks/"))


def test_python_snippet(served: None) -> None:
    """The Python example prints an answer."""
    [snippet] = [text for language, text in BLOCKS if language == "python"]
    assert _run(sys.executable, "-c", snippet).strip()


def test_typescript_snippet(served: None) -> None:
    """The TypeScript example prints an answer."""
    node = shutil.which("node")
    if node is None or not (ROOT / "tests/node/node_modules/openai").exists():
        pytest.skip("needs Node and the packages of tests/node (./scripts/test installs them where Node is)")
    [snippet] = [text for language, text in BLOCKS if language == "typescript"]
    assert _run(node, "--input-type=module", "-e", snippet, cwd=ROOT / "tests/node").strip()


def test_terminal(served: None) -> None:
    """`trigate chat` and `trigate status` talk to it."""
    assert _run("sh", "-c", _only("trigate chat")).strip()
    assert _run("sh", "-c", _only("trigate status")).startswith("Trigate ")


def test_check() -> None:
    """`trigate check` prints a summary of the configuration."""
    assert "upstreams:" in _run("sh", "-c", _only("trigate check"))
