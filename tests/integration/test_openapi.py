"""The running gateway does what the description of its API says, as schemathesis finds by thousands of requests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import run_gateway
from tests.support.slow import FULL

ROOT = Path(__file__).parents[2]
SCHEMATHESIS = Path(os.environ.get("TRIGATE_SCHEMATHESIS") or ROOT / ".venv-schemathesis/bin/st")
KEY = "key-of-the-gateway"
CONFIG = f"""
[upstreams.parrot]
kind = "echo"
[keys]
ada = "{KEY}"
[hooks.h]
verify_token = "a-token-of-the-platform-0123456789"
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed"),
]


def _run(directory: Path, url: str, *options: str) -> None:
    found = subprocess.run(
        [
            *(SCHEMATHESIS, "--config-file", ROOT / "tests/schemathesis.toml", "run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}", "--seed", "1", "--no-color"),
            *("--wait-for-schema", "20", "--request-timeout", "30", *options),
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:]


@pytest.mark.skipif(not FULL, reason="takes a minute: TRIGATE_TEST_FULL=1 runs it")
def test_the_gateway_does_what_its_description_says(tmp_path: Path) -> None:
    """All checks pass for every operation: statuses, bodies, what is refused and accepted, methods, keys."""
    with run_gateway(CONFIG, tmp_path) as gateway:
        _run(tmp_path, gateway.url, *("--phases", "examples,coverage,fuzzing", "--max-examples", "5"))
        log = (tmp_path / "gateway.log").read_text(encoding="utf-8", errors="replace")
    assert "[error" not in log


def test_a_key_is_required(tmp_path: Path) -> None:
    """So it is where the description says so: without one, or with a wrong one, the answer is a 401."""
    names = [f"--include-name={name}" for name in ("GET /status", "GET /v1/models")]
    with run_gateway(CONFIG, tmp_path) as gateway:
        options = ("--checks", "ignored_auth,missing_required_header", "--phases", "coverage,fuzzing")
        _run(tmp_path, gateway.url, *options, "--max-examples", "1", *names)
