"""Every command of the how-to page on sessions, run in order as written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import environment, run_gateway

PAGE = Path(__file__).parents[2] / "docs/how-to/sessions.md"
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
HERE = "http://127.0.0.1:18888"


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    """The page makes two turns, then lists the session, its messages, a reset, the archive and the end. Nothing is
    left."""
    expected = (
        '"content"',
        "data: [DONE]",
        '"has_more"',
        '"turns":2',
        "My name is Ada.",
        '"resets":1',
        "Ada",
        "deleted",
    )
    with run_gateway('[upstreams.echo]\nkind = "echo"\n', tmp_path) as gateway:

        def run(command: str) -> str:
            done = subprocess.run(
                ["sh", "-c", command.replace(HERE, gateway.url)],
                env=environment(), capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.replace('": ', '":')

        for command, part in zip(COMMANDS, expected, strict=True):
            assert HERE in command
            answer = run(command)
            assert part.replace('": ', '":') in answer, command
            assert '"error"' not in answer, command
        assert '"data":[]' in run(f"curl {HERE}/v1/sessions")
