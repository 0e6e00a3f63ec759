"""Reveals secrets: looks up their values in the environment and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from trigate.config import checks
from trigate.config.key_sections import AdminConfig, KeyConfig
from trigate.config.secrets import Secret
from trigate.config.sections import UpstreamConfig
from trigate.signatures import Scheme, secret_problem

_KEY_HEADERS = {
    "anthropic": "x-api-key",
    "azure": "api-key",
    "gemini": "x-goog-api-key",
    "vertex": "x-goog-api-key",
}
"""The header with the API key, by the kind of the upstream; of all others, it is a bearer token."""
SCHEMES_WITHOUT_SECRET = ("key",)
"""Verifications of a hook that use no secret of its own."""


def reveal_secrets(
    path: str, secrets: tuple[Secret, ...], env: Mapping[str, str], scheme: Scheme
) -> tuple[tuple[Secret, ...], list[str]]:
    """Returns secrets with their values, and their problems: a missing or short secret would let anyone in."""
    revealed = []
    problems = []
    for index, secret in enumerate(secrets):
        known, found = reveal_secret(f"{path}.{index}", secret, env, scheme)
        if known is not None:
            revealed.append(known)
        problems += found
    return tuple(revealed), problems


def reveal_secret(path: str, secret: Secret, env: Mapping[str, str], scheme: Scheme) -> tuple[Secret | None, list[str]]:
    """As `reveal_secrets`, for one secret; None = its value cannot be read."""
    try:
        value = secret.reveal(env)
    except LookupError as error:
        return None, [f"{path}: {error}"]
    problem = secret_problem(scheme, value)
    return Secret(literal=value), [f"{path}: {problem}"] if problem else []


def reveal_keys(keys: Mapping[str, KeyConfig], env: Mapping[str, str]) -> tuple[dict[str, KeyConfig], list[str]]:
    """Returns the gateway's keys with their secrets revealed, and with that of the environment; and their problems.

    A key that cannot be read is a problem, unlike an upstream's: starting without it would open the gateway.
    """
    revealed: dict[str, KeyConfig] = {}
    problems: list[str] = []
    for name, key in keys.items():
        try:
            revealed[name] = attrs.evolve(key, secret=Secret(literal=key.secret.reveal(env)))
        except LookupError as error:
            problems.append(f"keys.{name}: {error}")
    if "TRIGATE_API_KEY" in env:
        try:
            own = KeyConfig(secret=Secret(literal=Secret(env="TRIGATE_API_KEY").reveal(env)))
            revealed.setdefault("TRIGATE_API_KEY", own)
        except LookupError as error:
            empty = not env["TRIGATE_API_KEY"].strip()
            problems.append(
                f"TRIGATE_API_KEY: {'set, but empty (unset it to serve without a key)' if empty else error}"
            )
    return revealed, problems


def admin_key(
    admin: AdminConfig, keys: Mapping[str, KeyConfig], env: Mapping[str, str]
) -> tuple[AdminConfig, list[str]]:
    """Returns the section with its key revealed, or with that of the environment; and its problems."""
    secret = admin.key
    if secret is None and "TRIGATE_ADMIN_KEY" in env:
        secret = Secret(env="TRIGATE_ADMIN_KEY")
    if secret is None:
        return admin, []
    try:
        value = secret.reveal(env)
    except LookupError as error:
        return admin, [f"admin.key: {error}"]
    problems = [
        f"admin.key: is that of the key {name} as well; its users would administer the gateway"
        for name, key in keys.items()
        if key.secret.literal == value
    ]
    if "admin" in keys:
        problems.append("keys.admin: is the name of the admin's key; choose another one")
    return attrs.evolve(admin, key=Secret(literal=value)), problems


def upstream_secrets(
    upstreams: Mapping[str, UpstreamConfig], env: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Returns the header values of each upstream, and why upstreams are disabled, both by the upstream's name."""
    secrets: dict[str, dict[str, str]] = {}
    disabled: dict[str, str] = {}
    for name, upstream in upstreams.items():
        headers: dict[str, str] = {}
        missing = []
        wanted = {f"headers.{header}": (header, secret) for header, secret in upstream.headers.items()}
        if upstream.api_key is not None:
            wanted["api_key"] = (_KEY_HEADERS.get(upstream.kind, "authorization"), upstream.api_key)
        for path, (header, secret) in wanted.items():
            try:
                value = secret.reveal(env)
            except LookupError as error:
                missing.append(f"{path}: {error}")
            else:
                headers[header.lower()] = f"Bearer {value}" if (path, header) == ("api_key", "authorization") else value
        if missing:
            disabled[name] = "; ".join(missing)
        secrets[name] = headers
    return secrets, disabled


def parse_secret(value: Any, _: Any) -> Secret:
    """Parses a secret: a literal, ``{env = "NAME"}`` or ``{file = "path"}``. A cattrs hook; raises ValueError."""
    if isinstance(value, str):
        return Secret(literal=checks.secret_literal(value))
    if isinstance(value, dict) and len(value) == 1:
        [(key, name)] = value.items()
        if key in ("env", "file") and isinstance(name, str) and name:
            return Secret(**{key: name})
    raise ValueError('expected a string, {env = "NAME"} or {file = "path"}')
