"""``GET /v1/limits`` and ``GET /status/config``: what a key may see of itself, and the admin of everything."""

from __future__ import annotations

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, answers, completion
from trigate.status.warnings import warnings

ADMIN, ADA, BOB = "the-key-of-the-admin", "the-key-of-ada", "the-key-of-bob"
KEYS = make_config(
    {"up": {}, "off": {"api_key": {"env": "NOT_SET"}}},
    admin={"key": ADMIN},
    groups={"team": {"budget_usd": 3}},
    keys={"ada": {"secret": ADA, "rpm": 10, "max_exchanges": 2, "budgets": {"day": 1}, "group": "team"}, "bob": BOB},
    prices={"up/m": {"input_usd": 1_000, "output_usd": 0}},
    allowance={"tpm": 100_000},
)


async def _limits(served: Served, key: str, query: str = "") -> dict[tuple[str, str], tuple[int, int]]:
    call = await served.client.ask("GET", f"/v1/limits{query}", headers={"authorization": f"Bearer {key}"})
    assert call.status == 200, call.json
    return {(row["scope"], row["setting"]): (row["limit"], row["left"]) for row in call.json["data"]}


async def test_what_is_left(open_app: OpenApp) -> None:
    """Of the key, its group and all calls: what the call has used is gone."""
    providers = {"up": Provider(answers(completion("Hi"))), "off": Provider()}
    async with open_app(KEYS, providers) as served:
        before = await _limits(served, ADA)
        assert before == {
            ("key:ada", "rpm"): (10, 10),
            ("key:ada", "max_exchanges"): (2, 2),
            ("key:ada", "budgets.day"): (1_000_000, 1_000_000),
            ("group:team", "budgets.month"): (3_000_000, 3_000_000),
            ("all", "tpm"): (100_000, 100_000),
        }
        call = await served.client.ask(
            "POST", "/v1/chat/completions", chat(stream=False), headers={"authorization": f"Bearer {ADA}"}
        )
        assert call.status == 200
        after = await _limits(served, ADMIN, "?key=ada")
        assert after["key:ada", "rpm"] == (10, 9)
        assert after["key:ada", "max_exchanges"] == (2, 2)
        assert after["key:ada", "budgets.day"][1] < 1_000_000
        spent = 1_000_000 - after["key:ada", "budgets.day"][1]
        assert after["group:team", "budgets.month"] == (3_000_000, 3_000_000 - spent)


async def test_who_may_see_them(open_app: OpenApp) -> None:
    """A key sees its own limits, and no configuration; the admin's key sees those of all."""
    async with open_app(KEYS, {"up": Provider(), "off": Provider()}) as served:

        async def status(path: str, key: str) -> int:
            return (await served.client.ask("GET", path, headers={"authorization": f"Bearer {key}"})).status

        assert await status("/v1/limits?key=ada", ADA) == 200
        assert await status("/v1/limits?key=ada", BOB) == 403
        assert await status("/v1/limits?key=nobody", ADMIN) == 404
        assert await status("/status/config", BOB) == 403
        shown = await served.client.ask("GET", "/status/config", headers={"authorization": f"Bearer {ADMIN}"})
        assert shown.status == 200
        assert shown.json["warnings"][0].startswith("upstreams.off is disabled")
        for secret in (ADMIN, ADA, BOB):
            assert secret.encode() not in shown.body


async def test_without_keys(open_app: OpenApp) -> None:
    """Anybody of this machine sees the configuration."""
    async with open_app() as served:
        shown = await served.client.ask("GET", "/status/config")
        assert (shown.status, shown.json["source"]) == (200, "test")
        assert (await served.client.ask("GET", "/v1/limits")).json == {"object": "list", "key": "", "data": []}


async def test_warnings(open_app: OpenApp) -> None:
    """A sentence for what does not work."""
    config = make_config(server={"insecure": True})
    async with open_app(config) as served:
        status = await served.gateway.status.status()
        found = list(warnings(config, status))
        assert any("anybody" in each for each in found)
        assert all(each.endswith(".") and not each.endswith("..") for each in found)
