"""Runs every scenario with this interpreter's SDK, of whichever version, and prints the results.

``python -m tests.support.sdk_legacy FLAVOUR BASE_URL KEY UPSTREAM_URL``, where the flavour is ``sync`` or ``asyncio``,
prints one line of JSON: ``{"version": …, "faults": {SCENARIO: null or a traceback}}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback

import openai

from tests.support.sdk_scenarios import SCENARIOS, Case


async def run_all(flavour: str, base_url: str, key: str, upstream: str) -> dict[str, str | None]:
    """Runs the scenarios one after the other and returns the traceback of each, or None."""
    faults: dict[str, str | None] = {}
    client = (openai.OpenAI if flavour == "sync" else openai.AsyncOpenAI)(base_url=base_url, api_key=key)
    for name, scenario in SCENARIOS.items():
        try:
            await scenario(Case(client, upstream, f"{name}-legacy-{flavour}"))
        except Exception:
            faults[name] = traceback.format_exc()
        else:
            faults[name] = None
    return faults


if __name__ == "__main__":
    print(json.dumps({"version": openai.__version__, "faults": asyncio.run(run_all(*sys.argv[1:]))}))
