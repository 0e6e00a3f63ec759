"""Makes a `Config` of a parsed TOML document, and reports every problem at once.

Each problem is one line that begins with the path of the invalid value (``upstreams.qwen.base_url: …``). A table is
first converted (`trigate.config.converter`), then its values are checked against each other; values that concern
several sections are checked where both are known.

A *missing secret* of an upstream or a bot is no problem of the file: it disables that upstream or channel, with the
reason, and the rest starts. A missing secret that protects the gateway (a key, a hook's secret) is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from trigate.config import checks
from trigate.config.converter import convert
from trigate.config.key_sections import (
    MIN_PRICE_INTERVAL_S,
    AdminConfig,
    Allowance,
    GroupConfig,
    KeyConfig,
    PriceConfig,
    PriceTableConfig,
)
from trigate.config.regions import base_url_of
from trigate.config.report_sections import AlertsConfig, ContentLogConfig, LogConfig
from trigate.config.reveal import (
    SCHEMES_WITHOUT_SECRET,
    admin_key,
    parse_secret,
    reveal_keys,
    reveal_secret,
    reveal_secrets,
    upstream_secrets,
)
from trigate.config.secrets import Secret
from trigate.config.sections import (
    MIN_RUN_RETENTION_S,
    BreakerConfig,
    ChannelConfig,
    Config,
    ConfigError,
    HookConfig,
    LedgerConfig,
    LimitsConfig,
    ModelConfig,
    ReasoningMemoryConfig,
    RetriesConfig,
    ServerConfig,
    SessionsConfig,
    StoreConfig,
    UpstreamConfig,
    Url,
)

SECTIONS = (
    *("server", "upstreams", "models", "limits", "retries", "breaker"),
    *("keys", "groups", "admin", "allowance", "prices", "price_table", "store", "ledger", "alerts"),
    *("log", "content_log"),
    "reasoning_memory",
    *("sessions", "hooks", "channels"),
)
"""The names of all sections, in the order of the documentation."""

_Section = TypeVar("_Section")


def structure(data: Mapping[str, Any], *, env: Mapping[str, str], source: str) -> Config:
    """Makes a `Config` of a parsed TOML document.

    Args:
        data: The document, as `tomllib` gives it.
        env: The environment, for ``{env = "NAME"}`` and ``TRIGATE_API_KEY``.
        source: The name of the configuration in messages.

    Raises:
        ConfigError: The document has problems; it names all of them.
    """
    document = _Document(data)
    server = document.section(ServerConfig, "server")
    if (server.certfile is None) != (server.keyfile is None):
        document.problems.append("server.certfile: certfile and keyfile go together")
    store = document.section(StoreConfig, "store")
    if 0 < store.run_retention_s < MIN_RUN_RETENTION_S:
        document.problems.append(
            "store.run_retention_s: at least four days (345600), so that repeated messages are recognised"
        )
    upstream_tables = document.tables("upstreams")
    upstreams = _upstreams(document, upstream_tables)
    models = _models(document, upstream_tables)
    groups = {
        name: group
        for name, value in document.tables("groups").items()
        if (group := document.convert(GroupConfig, value, f"groups.{name}")) is not None
    }
    keys = _keys(document, groups, env)
    admin = document.section(AdminConfig, "admin")
    admin, problems = admin_key(admin, keys, env)
    document.problems += problems
    allowance = document.section(Allowance, "allowance")
    prices = {
        model: price
        for model, value in document.tables("prices").items()
        if (price := document.convert(PriceConfig, value, f"prices.{model}")) is not None
    }
    price_table = document.section(PriceTableConfig, "price_table")
    if price_table.url is not None and price_table.file is not None:
        document.problems.append("price_table.file: not used with url")
    if 0 < price_table.interval_s < MIN_PRICE_INTERVAL_S:
        document.problems.append(f"price_table.interval_s: at least {MIN_PRICE_INTERVAL_S}, or 0")
    hooks = _hooks(document, keys, env)
    channels, disabled_channels = _channels(document, hooks, env)
    limits = document.section(LimitsConfig, "limits")
    retries = document.section(RetriesConfig, "retries")
    breaker = document.section(BreakerConfig, "breaker")
    ledger = document.section(LedgerConfig, "ledger")
    alerts = _alerts(document, env)
    log = document.section(LogConfig, "log")
    content_log = _content_log(document)
    reasoning_memory = document.section(ReasoningMemoryConfig, "reasoning_memory")
    sessions = document.section(SessionsConfig, "sessions")
    if document.problems:
        raise ConfigError(source, tuple(document.problems))
    secrets, disabled = upstream_secrets(upstreams, env)
    return Config(
        source=source,
        server=server,
        upstreams=upstreams,
        models=models,
        limits=limits,
        keys=keys,
        groups=groups,
        admin=admin,
        allowance=allowance,
        alerts=alerts,
        log=log,
        content_log=content_log,
        prices=prices,
        price_table=price_table,
        disabled={**disabled, **disabled_channels},
        secrets=secrets,
        store=store,
        sessions=sessions,
        hooks=hooks if "hooks" in data else None,
        channels=channels,
        retries=retries,
        breaker=breaker,
        ledger=ledger,
        reasoning_memory=reasoning_memory,
    )


def with_upstreams(config: Config, upstreams: Mapping[str, UpstreamConfig], *, env: Mapping[str, str]) -> Config:
    """Returns the configuration with these upstreams, and their secrets revealed."""
    secrets, disabled = upstream_secrets(upstreams, env)
    return attrs.evolve(config, upstreams=upstreams, secrets=secrets, disabled=disabled)


class _Document:
    """A parsed document, and the problems found in it so far."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self.problems = [
            f"{name}: unknown section; there are {', '.join(SECTIONS)}{checks.did_you_mean(name, SECTIONS)}"
            for name in data
            if name not in SECTIONS
        ]

    def section(self, kind: type[_Section], name: str) -> _Section:
        """A section that is one table; its defaults if it is left out or invalid."""
        return self.convert(kind, self._data.get(name, {}), name) or kind()

    def tables(self, name: str) -> dict[str, Any]:
        """The named tables of a section, not converted yet."""
        value = self._data.get(name, {})
        if not isinstance(value, dict):
            self.problems.append(f"{name}: expected a table, got {checks.kind_of(value)}")
            return {}
        return value

    def convert(self, kind: type[_Section], value: Any, path: str) -> _Section | None:
        """Converts one table; None if it is invalid."""
        if not isinstance(value, dict):
            self.problems.append(f"{path}: expected a table, got {checks.kind_of(value)}")
            return None
        return convert(kind, value, path, self.problems)

    def report(self, path: str, problems: list[str]) -> None:
        """Adds the problems of a table, each with the table's path before it."""
        self.problems += [f"{path}.{problem}" for problem in problems]


def _upstreams(document: _Document, tables: Mapping[str, Any]) -> dict[str, UpstreamConfig]:
    upstreams = {}
    for name, value in tables.items():
        if not checks.NAME.match(name):
            document.problems.append(f"upstreams.{name}: a name has letters, digits, '.', '_' and '-' only")
        upstream = document.convert(UpstreamConfig, value, f"upstreams.{name}")
        if upstream is not None:
            upstreams[name] = _with_base_url(upstream)
            document.report(f"upstreams.{name}", checks.edit_problems(upstream))
        if isinstance(value, dict):
            document.report(f"upstreams.{name}", checks.kind_problems(value))
    return upstreams


def _with_base_url(upstream: UpstreamConfig) -> UpstreamConfig:
    """Returns an upstream of AWS with the address of its region, if it has no other one."""
    if upstream.kind != "bedrock" or upstream.base_url is not None:
        return upstream
    return attrs.evolve(upstream, base_url=Url(base_url_of(str(upstream.region))))


def _models(document: _Document, upstreams: Mapping[str, Any]) -> dict[str, ModelConfig]:
    models = {}
    for alias, value in document.tables("models").items():
        if isinstance(value, str | list):
            document.problems.append(
                f'models.{alias}: expected a table: write {alias} = {{ targets = ["upstream/model"] }}'
            )
            continue
        document.problems += checks.alias_problems(alias, upstreams)
        model = document.convert(ModelConfig, value, f"models.{alias}")
        targets = value.get("targets") if isinstance(value, dict) else None
        if isinstance(targets, list):
            document.problems += checks.target_problems(alias, targets, upstreams)
        if model is not None:
            models[alias] = model
            document.report(f"models.{alias}", checks.strategy_problems(model))
    return models


def _keys(document: _Document, groups: Mapping[str, GroupConfig], env: Mapping[str, str]) -> dict[str, KeyConfig]:
    keys = {}
    for name, value in document.tables("keys").items():
        path = f"keys.{name}"
        if not isinstance(value, dict) or "env" in value or "file" in value:  # a secret alone
            try:
                keys[name] = KeyConfig(secret=parse_secret(value, None))
            except ValueError as error:
                document.problems.append(f"{path}: {error}")
            continue
        key = document.convert(KeyConfig, value, path)
        if key is not None:
            keys[name] = key
            if key.group is not None and key.group not in document.tables("groups"):
                hint = checks.did_you_mean(key.group, list(groups))
                document.problems.append(f"{path}.group: there is no group {key.group}{hint}")
    revealed, problems = reveal_keys(keys, env)
    document.problems += problems
    return revealed


def _alerts(document: _Document, env: Mapping[str, str]) -> AlertsConfig:
    alerts = document.section(AlertsConfig, "alerts")
    if alerts.secret is not None:
        secret, problems = reveal_secret("secret", alerts.secret, env, "standard-webhooks")
        document.report("alerts", problems)
        return attrs.evolve(alerts, secret=secret)
    if alerts.url is not None:
        document.problems.append("alerts.secret: required for alerts, which are signed with it")
    return alerts


def _content_log(document: _Document) -> ContentLogConfig:
    settings = document.section(ContentLogConfig, "content_log")
    for pattern in settings.redact:
        try:
            re.compile(pattern)
        except re.error as error:
            document.problems.append(f"content_log.redact: {pattern!r} is no regular expression: {error}")
    return settings


def _hooks(document: _Document, keys: Mapping[str, KeyConfig], env: Mapping[str, str]) -> dict[str, HookConfig]:
    hooks = {}
    for name, value in document.tables("hooks").items():
        hook = document.convert(HookConfig, value, f"hooks.{name}")
        if hook is not None:
            hooks[name], problems = _reveal_hook(name, hook, keys, env)
            document.report(f"hooks.{name}", problems)
    return hooks


def _channels(
    document: _Document, hooks: Mapping[str, HookConfig], env: Mapping[str, str]
) -> tuple[dict[str, ChannelConfig], dict[str, str]]:
    channels = {}
    disabled = {}
    for name, value in document.tables("channels").items():
        channel = document.convert(ChannelConfig, value, f"channels.{name}")
        if channel is not None:
            if name in hooks:
                document.problems.append(f"channels.{name}: a hook has that name, and both answer at /hooks/{name}")
            channels[name], problems, reason = _reveal_channel(name, channel, env)
            document.report(f"channels.{name}", problems)
            if reason is not None:
                disabled[f"channels.{name}"] = reason
    return channels, disabled


def _reveal_hook(
    name: str, hook: HookConfig, keys: Mapping[str, KeyConfig], env: Mapping[str, str]
) -> tuple[HookConfig, list[str]]:
    """Returns the hook with its secrets revealed, and its problems."""
    problems = checks.name_problems(name)
    secrets, found = reveal_secrets(
        "secrets", hook.secrets, env, "bearer" if hook.verification == "key" else hook.verification
    )
    problems += found
    if hook.verification not in SCHEMES_WITHOUT_SECRET and not hook.secrets:
        problems.append(f"secrets: required for verification {hook.verification!r}")
    if hook.verification in SCHEMES_WITHOUT_SECRET and hook.secrets:
        problems.append(f"secrets: not used by verification {hook.verification!r}")
    if {secret.literal for secret in secrets} & {key.secret.literal for key in keys.values()}:
        problems.append("secrets: one is a key of the gateway, and would give access to all of it")
    if hook.template is not None:
        problems += [f"template: {problem}" for problem in checks.template_problems(hook.template, hook.expressions)]
    elif hook.expressions and "text" not in hook.expressions:
        problems.append("expressions.text: required, if there is no template")
    if not hook.actions:
        problems.append("actions: expected at least one")
    callback_secret = hook.callback_secret
    if callback_secret is not None:
        callback_secret, found = reveal_secret("callback_secret", callback_secret, env, "standard-webhooks")
        problems += found
    elif hook.callback_url is not None or hook.callback_hosts:
        problems.append("callback_secret: required for callbacks, which are signed with it")
    if hook.reply == "callback" and hook.callback_url is None and not hook.callback_hosts:
        problems.append("callback_url: required for reply = 'callback' (or callback_hosts)")
    verify_token = hook.verify_token
    if verify_token is not None:
        verify_token, found = reveal_secret("verify_token", verify_token, env, "bearer")
        problems += found
        if verify_token in secrets:
            problems.append("verify_token: is one of the secrets, but is sent in URLs, which are logged on the way")
    return attrs.evolve(hook, secrets=secrets, callback_secret=callback_secret, verify_token=verify_token), problems


def _reveal_channel(
    name: str, channel: ChannelConfig, env: Mapping[str, str]
) -> tuple[ChannelConfig, list[str], str | None]:
    """Returns the channel with its secrets revealed, its problems, and why it is disabled."""
    problems = checks.name_problems(name)
    secrets, found = reveal_secrets("secrets", channel.secrets, env, channel.type)
    problems += found
    by_hook = channel.type == "slack" or channel.mode == "webhook"
    if by_hook and not channel.secrets:
        problems.append("secrets: required, since anybody can call /hooks/" + name)
    if not by_hook and channel.secrets:
        problems.append("secrets: not used with mode = 'polling'")
    reason = None if channel.enabled else "switched off in the configuration"
    token = channel.token
    try:
        token = Secret(literal=channel.token.reveal(env))
    except LookupError as error:
        reason = reason or f"token: {error}"
    return attrs.evolve(channel, secrets=secrets, token=token), problems, reason
