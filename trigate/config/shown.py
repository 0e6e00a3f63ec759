"""A configuration as it may be shown to an administrator: every setting as it is in force, and no secret. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import attrs

from trigate.config.secrets import Secret
from trigate.config.sections import Config

HIDDEN = "•••"
"""Stands for a secret."""
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|authorization", re.I)
"""Of fields of free form whose texts are not shown."""
_IS_MONEY = re.compile(r"_usd$|^budgets$")
"""Of fields with micro-dollars."""
_OWN = ("source", "secrets", "disabled")
"""Fields of `Config` that are no sections."""


def shown(config: Config) -> dict[str, Any]:
    """Returns all sections with their settings, as JSON has them. A secret has only the place that it is read from, or
    `HIDDEN`; a URL has neither its user nor its query.

    >>> shown(Config())["server"]["port"], shown(Config())["admin"]
    (18888, {'key': None})
    """
    secrets = [each for each in _secrets(config) if len(each) >= 8]
    tables = {each.name: getattr(config, each.name) for each in attrs.fields(Config) if each.name not in _OWN}
    return {name: _shown(value, secrets) for name, value in tables.items()}


def changed(config: Config) -> list[str]:
    """Returns the settings that differ from their defaults, as ``section.setting``; of tables by name, each entry.

    >>> changed(Config()), changed(Config(disabled={"up": "no key"}))
    ([], [])
    """
    found = []
    for section in attrs.fields(Config):
        value = getattr(config, section.name)
        if section.name in _OWN or value is None:
            continue
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, entry in entries:
            path = section.name if name is None else f"{section.name}.{name}"
            if not attrs.has(type(entry)):
                found.append(path)
                continue
            for each in attrs.fields(type(entry)):
                default: Any = each.default  # Any: a setting, or what makes one
                if getattr(entry, each.name) != getattr(default, "factory", lambda value=default: value)():
                    found.append(f"{path}.{each.name}")
    return found


def _secrets(value: Any) -> Iterator[str]:  # Any: a setting
    """All secrets whose values are known."""
    if isinstance(value, Config):
        for headers in value.secrets.values():
            for text in headers.values():
                yield text
                yield text.partition(" ")[2]  # of "Bearer …"
    if isinstance(value, Secret):
        if value.literal is not None:
            yield value.literal
    elif attrs.has(type(value)):
        for each in attrs.fields(type(value)):
            yield from _secrets(getattr(value, each.name))
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _secrets(entry)
    elif isinstance(value, tuple):
        for entry in value:
            yield from _secrets(entry)


def _shown(value: Any, secrets: list[str]) -> Any:  # Any: a setting, and JSON
    if isinstance(value, Secret):
        for name in ("env", "file"):
            if (place := getattr(value, name)) is not None:
                return {name: place}
        return HIDDEN
    if attrs.has(type(value)):
        return {
            each.name: _dollars(given) if _IS_MONEY.search(each.name) else _shown(given, secrets)
            for each in attrs.fields(type(value))
            for given in [getattr(value, each.name)]
        }
    if isinstance(value, Mapping):
        return {
            str(name): HIDDEN if isinstance(entry, str) and _SECRET_NAME.search(str(name)) else _shown(entry, secrets)
            for name, entry in value.items()
        }
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_shown(entry, secrets) for entry in value]
    if isinstance(value, str):
        text = _without_user(value) if "://" in value else value
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _dollars(value: Any) -> Any:  # Any: micro-dollars, or a table of them
    """Money as the file has it.

    >>> _dollars(2_500_000), _dollars({"day": 1_000_000}), _dollars(None)
    (2.5, {'day': 1.0}, None)
    """
    if isinstance(value, Mapping):
        return {name: _dollars(entry) for name, entry in value.items()}
    return value / 1e6 if isinstance(value, int) else value


def _without_user(url: str) -> str:
    """A URL without its user and query.

    >>> _without_user("http://u:p@h:1/p?token=x"), _without_user("https://h/p")
    ('http://•••@h:1/p?•••', 'https://h/p')
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    user, _, host = parts.netloc.rpartition("@")
    query = f"?{HIDDEN}" if parts.query else ""
    return f"{parts.scheme}://{f'{HIDDEN}@' if user else ''}{host}{parts.path}{query}"
