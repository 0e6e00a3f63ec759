"""The official Python SDK against a real gateway: the newest one in all its flavours, and an old one on httpx."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import openai
import pytest

from tests.support.processes import configuration, environment, run_gateway
from tests.support.scripted_upstream import open_upstream
from tests.support.sdk_scenarios import SCENARIOS, Case

pytestmark = pytest.mark.slow

KEY = "a key of the gateway"
ROOT = Path(__file__).parents[2]
LEGACY = Path(os.environ.get("TRIGATE_LEGACY_PYTHON") or ROOT / ".venv-openai-legacy/bin/python")


@attrs.frozen
class Endpoints:
    """The URLs of the gateway and of this module's scripted upstream."""

    base_url: str
    upstream: str


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A gateway with a key, in front of the scripted upstream."""
    with open_upstream() as upstream:
        config = configuration(upstream, more=f'[keys]\ntests = "{KEY}"')
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield Endpoints(f"{gateway.url}/v1", upstream)
            assert gateway.process.poll() is None, gateway.log()
            errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert errors == [], gateway.log()


@pytest.mark.parametrize("name", SCENARIOS)
def test_sync(name: str, endpoints: Endpoints) -> None:
    """Runs the scenario with the newest SDK, synchronous."""

    async def run() -> None:
        with openai.OpenAI(base_url=endpoints.base_url, api_key=KEY) as client:
            await SCENARIOS[name](Case(client, endpoints.upstream, f"{name}-sync"))

    asyncio.run(run())


async def _run_async(name: str, endpoints: Endpoints, flavour: str) -> None:
    async with openai.AsyncOpenAI(base_url=endpoints.base_url, api_key=KEY) as client:
        await SCENARIOS[name](Case(client, endpoints.upstream, f"{name}-{flavour}"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_asyncio(name: str, endpoints: Endpoints) -> None:
    """Runs the scenario with the newest SDK, asynchronous under asyncio."""
    asyncio.run(_run_async(name, endpoints, "asyncio"))


@pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")  # the SDK's own
@pytest.mark.parametrize("name", SCENARIOS)
async def test_trio(name: str, endpoints: Endpoints) -> None:
    """Runs the scenario with the newest SDK, asynchronous under Trio."""
    await _run_async(name, endpoints, "trio")


@pytest.fixture(scope="module", params=["sync", "asyncio"])
def legacy_faults(request: pytest.FixtureRequest, endpoints: Endpoints) -> dict[str, str | None]:
    """The results of all scenarios with the SDK of the legacy environment."""
    if not LEGACY.exists():
        pytest.skip(f"there is no {LEGACY}: ./scripts/test makes it, TRIGATE_LEGACY_PYTHON names another one")
    done = subprocess.run(
        [LEGACY, "-m", "tests.support.sdk_legacy", request.param, endpoints.base_url, KEY, endpoints.upstream],
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["version"].startswith(("1.", "2.")), result["version"]
    faults: dict[str, str | None] = result["faults"]
    return faults


@pytest.mark.parametrize("name", SCENARIOS)
def test_legacy(name: str, legacy_faults: dict[str, str | None]) -> None:
    """Runs the scenario with an SDK older than version 3, on httpx."""
    assert legacy_faults[name] is None, legacy_faults[name]
