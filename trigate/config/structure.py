"""The configuration: one frozen tree, structured from TOML, with every fault reported at once.

``read(path)`` gives a `Config` or raises `ConfigError`, whose ``problems`` name each offending value by its path
(``upstreams.qwen.base_url: …``). Strictness is deliberate: an unknown key is a mistake, a string is not a number, and
``yes`` is not a bool. A *missing secret* is not a fault of the file: it disables that upstream, with the reason, and
the rest starts.

Units stand in the names: ``_s`` seconds, ``_bytes`` bytes. The types `Seconds`, `Size`, `Count`, `Port`, `Url` and
`ProxyUrl` say which check a value gets (`config_checks`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from trigate.config import checks
from trigate.config.reveal import _NEEDS_NO_SECRET, _gateway_keys, _reveal, _revealed, _secret
from trigate.config.secrets import Secret
from trigate.config.sections import (
    MIN_RUN_RETENTION_S,
    BreakerConfig,
    ChannelConfig,
    Config,
    ConfigError,
    Count,
    Expression,
    HookConfig,
    HostName,
    LedgerConfig,
    Limit,
    LimitsConfig,
    ModelConfig,
    Origin,
    Port,
    ProxyUrl,
    Rate,
    RetriesConfig,
    Seconds,
    ServerConfig,
    SessionsConfig,
    Share,
    Size,
    StoreConfig,
    UpstreamConfig,
    Url,
)

_SUBSCRIPT = re.compile(r"""\[['"]?([^'"\]]*)['"]?\]""")


# -- structuring ------------------------------------------------------------------------------------------------------


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    converter.register_structure_hook(str, checks.exactly(str, "a string"))
    converter.register_structure_hook(bool, checks.exactly(bool, "true or false"))
    converter.register_structure_hook(Seconds, checks.not_negative)
    converter.register_structure_hook(Rate, checks.not_negative)
    converter.register_structure_hook(Size, checks.whole(1, 2**40))
    converter.register_structure_hook(Count, checks.whole(1, 10**6))
    converter.register_structure_hook(Limit, checks.whole(0, 10**6))
    converter.register_structure_hook(Share, checks.share)
    converter.register_structure_hook(Port, checks.whole(0, 65535))
    converter.register_structure_hook(Url, checks.url)
    converter.register_structure_hook(HostName, checks.host_name)
    converter.register_structure_hook(Origin, checks.origin)
    converter.register_structure_hook(ProxyUrl, checks.proxy)
    converter.register_structure_hook(Secret, _secret)
    converter.register_structure_hook_func(lambda kind: getattr(kind, "__origin__", None) is Literal, checks.literal)
    converter.register_structure_hook(
        UpstreamConfig,
        make_dict_structure_fn(
            UpstreamConfig,
            converter,
            _cattrs_forbid_extra_keys=True,
            models=cattrs.override(struct_hook=checks.model_list),
        ),
    )

    converter.register_structure_hook(Expression, checks.expression)
    for kind in (HookConfig, ChannelConfig):
        converter.register_structure_hook(
            kind,
            make_dict_structure_fn(
                kind,
                converter,
                _cattrs_forbid_extra_keys=True,
                parameters=cattrs.override(struct_hook=checks.parameters),
            ),
        )

    def strings(value: Any, _: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError("expected an array of strings")
        return tuple(value)

    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], strings)

    def each(value: Any, kind: Any) -> tuple[Any, ...]:
        strings(value, kind)
        return tuple(converter.structure(item, kind.__args__[0]) for item in value)

    def numbers(value: Any, _: Any) -> tuple[float, ...]:
        if not isinstance(value, list):
            raise ValueError(f"expected an array of numbers, got {checks.kind_of(value)}")
        return tuple(checks.not_negative(item, Rate) for item in value)

    converter.register_structure_hook_func(lambda kind: kind == tuple[Rate, ...], numbers)
    converter.register_structure_hook_func(lambda kind: kind in (tuple[HostName, ...], tuple[Origin, ...]), each)
    return converter


_converter = _make_converter()


def _explain(error: BaseException, kind: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return "unknown key " + ", ".join(sorted(error.extra_fields))
    if isinstance(error, KeyError):
        return "required, but missing"
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, TypeError | AttributeError):
        return "expected a table"
    return format_exception(error, kind)


def _problems(error: BaseException, path: str) -> list[str]:
    found = cattrs.transform_error(error, path=path, format_exception=_explain)
    lines = []
    for line in found:
        what, _, where = line.rpartition(" @ ")
        dotted = _SUBSCRIPT.sub(r".\1", where)
        lines.append(f"{dotted}: {what}")
    return lines


def _table(data: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        problems.append(f"{name}: expected a table, got {checks.kind_of(value)}")
        return {}
    return value


def structure(data: Mapping[str, Any], *, env: Mapping[str, str], source: str) -> Config:
    """Makes a `Config` of a parsed TOML document.

    Args:
        data: What `tomllib` gives.
        env: Where ``{env = "NAME"}`` and ``TRIGATE_API_KEY`` are looked up.
        source: What the configuration is called in messages.

    Raises:
        ConfigError: Something in it is wrong; all of it is named.
    """
    problems: list[str] = []
    sections = (
        *("server", "upstreams", "models", "limits", "retries", "breaker", "keys", "store", "ledger"),
        *("sessions", "hooks", "channels"),
    )
    for name in data:
        if name not in sections:
            problems.append(f"{name}: unknown section; there are {', '.join(sections)}")

    def take(kind: Any, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            problems.append(f"{path}: expected a table, got {checks.kind_of(value)}")
            return None
        try:
            return _converter.structure(value, kind)
        except (cattrs.BaseValidationError, cattrs.ForbiddenExtraKeysError) as error:
            problems.extend(_problems(error, path))
            return None

    server = take(ServerConfig, data.get("server", {}), "server") or ServerConfig()
    limits = take(LimitsConfig, data.get("limits", {}), "limits") or LimitsConfig()
    upstream_tables = _table(data, "upstreams", problems)
    upstreams: dict[str, UpstreamConfig] = {}
    for name, value in upstream_tables.items():
        if not checks.NAME.match(name):
            problems.append(f"upstreams.{name}: a name has letters, digits, '.', '_' and '-' only")
        upstream = take(UpstreamConfig, value, f"upstreams.{name}")
        if upstream is not None:
            upstreams[name] = upstream
        if isinstance(value, dict):
            problems.extend(f"upstreams.{name}.{problem}" for problem in checks.kind_problems(value))
    models: dict[str, ModelConfig] = {}
    for alias, value in _table(data, "models", problems).items():
        model = take(ModelConfig, value, f"models.{alias}")
        if model is not None:
            models[alias] = model
        targets = value.get("targets") if isinstance(value, dict) else None
        if isinstance(targets, list):
            problems.extend(checks.target_problems(alias, targets, upstream_tables))
        if model is not None:
            problems.extend(f"models.{alias}.{problem}" for problem in _model_problems(model))
    keys, key_problems = _gateway_keys(_table(data, "keys", problems), env)
    problems.extend(key_problems)
    store = take(StoreConfig, data.get("store", {}), "store") or StoreConfig()
    if 0 < store.run_retention_s < MIN_RUN_RETENTION_S:
        problems.append("store.run_retention_s: at least four days (345600), so that what is sent again is recognised")
    retries = take(RetriesConfig, data.get("retries", {}), "retries") or RetriesConfig()
    breaker = take(BreakerConfig, data.get("breaker", {}), "breaker") or BreakerConfig()
    ledger = take(LedgerConfig, data.get("ledger", {}), "ledger") or LedgerConfig()
    sessions = take(SessionsConfig, data.get("sessions", {}), "sessions") or SessionsConfig()
    hooks: dict[str, HookConfig] = {}
    for name, value in _table(data, "hooks", problems).items():
        hook = take(HookConfig, value, f"hooks.{name}")
        if hook is not None:
            hooks[name], found = _checked_hook(name, hook, keys, env)
            problems.extend(f"hooks.{name}.{problem}" for problem in found)
    channels: dict[str, ChannelConfig] = {}
    silent: dict[str, str] = {}
    for name, value in _table(data, "channels", problems).items():
        channel = take(ChannelConfig, value, f"channels.{name}")
        if channel is not None:
            if name in hooks:
                problems.append(f"channels.{name}: a hook has that name, and both answer at /hooks/{name}")
            channels[name], found, why = _checked_channel(name, channel, env)
            problems.extend(f"channels.{name}.{problem}" for problem in found)
            if why is not None:
                silent[f"channels.{name}"] = why
    if (server.certfile is None) != (server.keyfile is None):
        problems.append("server.certfile: certfile and keyfile go together")
    if problems:
        raise ConfigError(source, tuple(problems))
    secrets, disabled = _reveal(upstreams, env)
    return Config(
        source=source,
        server=server,
        upstreams=upstreams,
        models=models,
        limits=limits,
        keys=keys,
        disabled={**disabled, **silent},
        secrets=secrets,
        store=store,
        sessions=sessions,
        hooks=hooks if "hooks" in data else None,
        channels=channels,
        retries=retries,
        breaker=breaker,
        ledger=ledger,
    )


def _model_problems(model: ModelConfig) -> list[str]:
    """What does not go together in a model's table."""
    problems = []
    if model.weights and model.strategy != "balance":
        problems.append(f"weights: not used by strategy {model.strategy!r}")
    if model.weights and (len(model.weights) != len(model.targets) or not all(model.weights)):
        problems.append("weights: expected one number above 0 for each target")
    return problems


def _checked_hook(
    name: str, hook: HookConfig, keys: Mapping[str, str], env: Mapping[str, str]
) -> tuple[HookConfig, list[str]]:
    """The hook with its secrets, and what does not go together in it."""
    problems = checks.name_problems(name)
    secrets, found = _revealed(
        "secrets", hook.secrets, env, "bearer" if hook.verification == "key" else hook.verification
    )
    problems += found
    if hook.verification not in _NEEDS_NO_SECRET and not hook.secrets:
        problems.append(f"secrets: required for verification {hook.verification!r}")
    if hook.verification in _NEEDS_NO_SECRET and hook.secrets:
        problems.append(f"secrets: not used by verification {hook.verification!r}")
    if {secret.literal for secret in secrets} & set(keys.values()):
        problems.append("secrets: one is a key of the gateway, and so would open all of it")
    if hook.template is not None:
        problems += [f"template: {problem}" for problem in checks.template_problems(hook.template, hook.expressions)]
    elif hook.expressions and "text" not in hook.expressions:
        problems.append("expressions.text: required, where there is no template")
    if not hook.actions:
        problems.append("actions: expected at least one")
    callback_secret = hook.callback_secret
    if callback_secret is not None:
        revealed, found = _revealed("callback_secret", (callback_secret,), env, "standard-webhooks")
        problems += [problem.replace("callback_secret.0", "callback_secret") for problem in found]
        callback_secret = revealed[0] if revealed else None
    elif hook.callback_url is not None or hook.callback_hosts:
        problems.append("callback_secret: required for callbacks, which are signed with it")
    if hook.reply == "callback" and hook.callback_url is None and not hook.callback_hosts:
        problems.append("callback_url: required for reply = 'callback' (or callback_hosts)")
    verify_token = hook.verify_token
    if verify_token is not None:
        revealed, found = _revealed("verify_token", (verify_token,), env, "bearer")
        problems += [problem.replace("verify_token.0", "verify_token") for problem in found]
        verify_token = revealed[0] if revealed else None
        if verify_token in secrets:
            problems.append("verify_token: is one of the secrets, and stands in URLs, which are logged on their way")
    return attrs.evolve(hook, secrets=secrets, callback_secret=callback_secret, verify_token=verify_token), problems


def _checked_channel(
    name: str, channel: ChannelConfig, env: Mapping[str, str]
) -> tuple[ChannelConfig, list[str], str | None]:
    """The channel with its secrets, what does not go together in it, and why it is off."""
    problems = checks.name_problems(name)
    secrets, found = _revealed("secrets", channel.secrets, env, channel.type)
    problems += found
    by_hook = channel.type == "slack" or channel.mode == "webhook"
    if by_hook and not channel.secrets:
        problems.append("secrets: required, since anybody can call /hooks/" + name)
    if not by_hook and channel.secrets:
        problems.append("secrets: not used with mode = 'polling'")
    why = None if channel.enabled else "switched off in the configuration"
    token = channel.token
    try:
        token = Secret(literal=channel.token.reveal(env))
    except LookupError as error:
        why = why or f"token: {error}"
    return attrs.evolve(channel, secrets=secrets, token=token), problems, why


def with_upstreams(config: Config, upstreams: Mapping[str, UpstreamConfig], *, env: Mapping[str, str]) -> Config:
    """Returns the configuration with these upstreams, their secrets looked up."""
    secrets, disabled = _reveal(upstreams, env)
    return attrs.evolve(config, upstreams=upstreams, secrets=secrets, disabled=disabled)
