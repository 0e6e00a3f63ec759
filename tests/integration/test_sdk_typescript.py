"""The official TypeScript SDKs of OpenAI and Anthropic against a real gateway.

The tests themselves are in ``node/sdk.test.mjs``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import configuration, environment, run_gateway
from tests.support.scripted_messages import configuration as native
from tests.support.scripted_messages import open_messages
from tests.support.scripted_upstream import TEXT, open_upstream

KEY = "a key of the gateway"
ROOM = Path(__file__).parents[1] / "node"
FILE = ROOM / "sdk.test.mjs"
NAMES = re.findall(r'^test\("(.+)",', FILE.read_text(encoding="utf-8"), re.M)
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="there is no Node here"),
    pytest.mark.skipif(
        not (ROOM / "node_modules/@anthropic-ai").exists(),
        reason="there is no tests/node/node_modules: ./scripts/test (or `npm ci` in tests/node) makes it",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The TAP report of Node's test runner on the file."""
    assert NODE is not None
    with open_upstream() as upstream, open_messages() as messages:
        config = configuration(upstream, more=f'{native(messages)}\n[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            done = subprocess.run(
                [NODE, "--test", "--test-reporter=tap", FILE],
                env=environment(BASE_URL=f"{gateway.url}/v1", KEY=KEY, UPSTREAM=upstream, TEXT=TEXT),
                capture_output=True,
                encoding="utf-8",
                timeout=60,
                check=False,
            )
            yield done.stdout + done.stderr
            assert gateway.process.poll() is None, gateway.log()


def test_file_has_tests() -> None:
    """The list of names here is the list of tests in the file."""
    assert len(NAMES) == len(set(NAMES)) == FILE.read_text(encoding="utf-8").count("\ntest(") > 10


@pytest.mark.parametrize("name", NAMES)
def test_typescript(name: str, report: str) -> None:
    """The SDK's test of that name passes."""
    assert re.search(rf"^\s*ok \d+ - {re.escape(name)}$", report, re.M), report
