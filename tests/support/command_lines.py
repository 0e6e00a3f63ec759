"""The command lines of agents, installed in ``tests/node-cli``, as users run them: without settings of this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

ROOM = Path(__file__).parents[1] / "node-cli"
MODULES = ROOM / "node_modules"
NODE = shutil.which("node")


@attrs.frozen
class Ended:
    """How a command line ended."""

    code: int
    output: str


def run(script: Path, arguments: Sequence[str], *, home: Path, timeout_s: float, **variables: str) -> Ended:
    """Runs a command line with a home directory of its own, and no environment variables but these.

    Args:
        script: The JavaScript file of the command.
        variables: Further environment variables.
    """
    assert NODE is not None
    work = home / "work"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [NODE, script, *arguments],
        env={"HOME": str(home), "PATH": f"{Path(NODE).parent}:/usr/bin:/bin", **variables},
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout_s,
        check=False,
    )
    return Ended(done.returncode, done.stdout + done.stderr)
