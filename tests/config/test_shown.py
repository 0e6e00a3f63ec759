"""The configuration as it is shown: complete, and without its secrets."""

from __future__ import annotations

import json
from typing import Any

from trigate.config import structure
from trigate.config.shown import HIDDEN, changed, shown

SECRETS = {
    "UP_KEY": "sk-the-secret-of-the-upstream",
    "HOOK": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz",
    "TRIGATE_API_KEY": "the-key-of-the-environment",
}
TABLES: dict[str, Any] = {
    "upstreams": {
        "up": {
            "base_url": "http://up.invalid/v1",
            "api_key": {"env": "UP_KEY"},
            "headers": {"x-other": "another-secret-header"},
            "proxy": "http://user:the-password@proxy.invalid:3128",
            "set": {"metadata": {"api_token": "a-token-of-free-form"}, "max_tokens": 5},
            "budget_usd": 2.5,
        }
    },
    "keys": {"ada": {"secret": "the-secret-of-ada", "budgets": {"day": 1}}},
    "admin": {"key": "the-secret-of-the-admin"},
    "hooks": {"ci": {"verification": "standard-webhooks", "secrets": [{"env": "HOOK"}]}},
    "alerts": {"url": "https://alerts.invalid/in", "secret": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI0"},
}


def test_no_secret_is_shown() -> None:
    """Neither those that are written in the file, nor those that were read from elsewhere."""
    config = structure.structure(TABLES, env=SECRETS, source="test")
    text = json.dumps(shown(config))
    for secret in (
        *SECRETS.values(),
        *("another-secret-header", "the-password", "user:", "a-token-of-free-form", "the-secret-of-ada"),
        *("the-secret-of-the-admin", TABLES["alerts"]["secret"]),
    ):
        assert secret not in text
    up = shown(config)["upstreams"]["up"]
    assert up["api_key"] == {"env": "UP_KEY"}
    assert up["headers"] == {"x-other": HIDDEN}
    assert up["proxy"] == f"http://{HIDDEN}@proxy.invalid:3128"
    assert up["set"] == {"metadata": {"api_token": HIDDEN}, "max_tokens": 5}


def test_a_secret_within_a_text() -> None:
    """A secret that stands in another setting is hidden there, too."""
    tables = {"upstreams": {"up": {"base_url": "http://up.invalid/v1", "api_key": {"env": "UP_KEY"}, "models": ["m"],
              "set": {"note": f"it is {SECRETS['UP_KEY']}"}}}}  # fmt: skip
    config = structure.structure(tables, env=SECRETS, source="test")
    assert shown(config)["upstreams"]["up"]["set"] == {"note": f"it is {HIDDEN}"}


def test_money_is_in_dollars() -> None:
    """As the file has it."""
    config = structure.structure(TABLES, env=SECRETS, source="test")
    assert shown(config)["upstreams"]["up"]["budget_usd"] == 2.5
    assert shown(config)["keys"]["ada"]["budgets"] == {"day": 1.0}


def test_what_differs_from_the_defaults() -> None:
    """By its path."""
    config = structure.structure(TABLES, env=SECRETS, source="test")
    found = changed(config)
    assert {"upstreams.up.api_key", "upstreams.up.budget_usd", "keys.ada.secret", "admin.key", "alerts.url"} <= set(
        found
    )
    assert not [path for path in found if path.startswith(("server.", "limits."))]
