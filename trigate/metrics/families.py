"""The families of metrics: the name, kind, labels and help of each.

The names of generative AI are those of OpenTelemetry's semantic conventions, as its rules for Prometheus write them:
dots become underscores, the unit is a suffix. Names that begin with ``process_`` are those of Prometheus' client
libraries. All others are Trigate's own.

The rules for a new family:

* No label has a value that a client sends. A label's values are names of the configuration, names that an upstream
  lists, ids of workers, or words of a closed set.
* It has a row in ``docs/reference/metrics.md``, in the same order.

**Source:** `the conventions <https://github.com/open-telemetry/semantic-conventions-genai>`_, 2026: "Generative AI
metrics" and "Generative AI inference token metrics", with the bucket boundaries that they name.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(float(4**power) for power in range(14))
SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Kind = Literal["counter", "gauge", "histogram"]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A family of metrics.

    Attributes:
        name: Without the suffix of its samples (``_total``, ``_bucket``).
        labels: The names of its labels, besides that of the worker.
        bounds: The buckets of a histogram.
        is_shared: It is the same for all workers, and has no label ``worker``.
        is_old: An older name, exposed only if the environment asks for it (`OPT_IN`).
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    is_shared: bool = False
    is_old: bool = False

    @property
    def unit(self) -> str:
        """Its unit, if its name ends in one."""
        unit = self.name.rpartition("_")[2]
        return unit if unit in ("seconds", "bytes", "tokens", "usd") else ""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A value of a family. It travels from worker to worker.

    Attributes:
        labels: The values of the family's labels.
        value: Of a histogram, the sum.
        counts: Of a histogram, how many values each bucket has.
    """

    family: str
    labels: tuple[str, ...]
    value: float
    counts: tuple[int, ...] = ()


OPT_IN = "OTEL_SEMCONV_STABILITY_OPT_IN"
"""The environment variable of OpenTelemetry for the names of its conventions, separated by commas."""
OLD_NAMES = "gen_ai/dup"
"""Its value with which older names are exposed beside the current ones."""

_CALL = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "upstream")


def _tokens(part: str, what: str) -> Family:
    return Family(
        name=f"gen_ai_client_inference_usage_{part}_tokens",
        kind="counter",
        help=f"{what}, as far as upstreams have reported them.",
        labels=(*_CALL, "gen_ai_token_modality"),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        name="gen_ai_server_request_duration_seconds",
        kind="histogram",
        help="Duration of calls, from their arrival to the last byte.",
        labels=(*_CALL, "error_type"),
        bounds=SECONDS,
    ),
    Family(
        name="gen_ai_server_time_to_first_token_seconds",
        kind="histogram",
        help="Time to the first content of complete answers, from the arrival of the call.",
        labels=_CALL,
        bounds=FIRST_TOKEN_SECONDS,
    ),
    Family(
        name="gen_ai_server_time_per_output_token_seconds",
        kind="histogram",
        help="Time for each token after the first one, of complete streams whose tokens the upstream has reported.",
        labels=_CALL,
        bounds=TOKEN_SECONDS,
    ),
    Family(
        name="gen_ai_client_inference_operation_input_tokens",
        kind="histogram",
        help="Tokens of the prompt of each call, as far as upstreams have reported them.",
        labels=_CALL,
        bounds=TOKENS,
    ),
    Family(
        name="gen_ai_client_inference_operation_output_tokens",
        kind="histogram",
        help="Tokens of the answer of each call, as far as upstreams have reported them.",
        labels=_CALL,
        bounds=TOKENS,
    ),
    _tokens("input", "Tokens of prompts"),
    _tokens("output", "Tokens of answers"),
    _tokens("cache_read_input", "Tokens of prompts that providers have read from their caches"),
    _tokens("cache_write_input", "Tokens of prompts that providers have written into their caches"),
    _tokens("reasoning_output", "Tokens of answers that are reasoning"),
    Family(
        name="gen_ai_client_token_usage",
        kind="histogram",
        help="The older name of the tokens of each call.",
        labels=(*_CALL, "gen_ai_token_type"),
        bounds=TOKENS,
        is_old=True,
    ),
    Family(name="trigate_exchanges", kind="counter", help="Calls that have ended, by outcome.", labels=("outcome",)),
    Family(
        name="trigate_attempts",
        kind="counter",
        help="Attempts that have ended, by upstream and outcome.",
        labels=("upstream", "outcome"),
    ),
    Family(
        name="trigate_attempts_by_reason",
        kind="counter",
        help="Attempts that have ended, by the reason why they were made.",
        labels=("reason",),
    ),
    Family(
        name="trigate_hedges",
        kind="counter",
        help="Hedges (second attempts beside a slow first one) that have ended, by their result.",
        labels=("result",),
    ),
    Family(
        name="trigate_superseded_tokens",
        kind="counter",
        help="Tokens that attempts have reported which lost to another attempt.",
    ),
    Family(
        name="trigate_cost_usd",
        kind="counter",
        help="Cost of calls, in US dollars, as far as prices are known.",
        labels=("upstream", "gen_ai_request_model"),
    ),
    Family(name="trigate_unpriced_exchanges", kind="counter", help="Calls with tokens whose price is not known."),
    Family(
        name="trigate_gateway_overhead_seconds",
        kind="histogram",
        help="The gateway's own share of the time from the arrival of a call to the head of its answer.",
        bounds=SHORT_SECONDS,
    ),
    Family(
        name="trigate_cancel_latency_seconds",
        kind="histogram",
        help="Time from the disconnect of a client to the end of its exchange.",
        bounds=SHORT_SECONDS,
    ),
    Family(
        name="trigate_admission_wait_seconds",
        kind="histogram",
        help="Time in the queue for admission, of calls that have waited.",
        bounds=SECONDS,
    ),
    Family(name="trigate_admission_refused", kind="counter", help="Calls that admission has refused."),
    Family(name="trigate_admission_queued", kind="gauge", help="Calls that wait for admission."),
    Family(name="trigate_admission_in_flight", kind="gauge", help="Calls that hold a slot of admission."),
    Family(name="trigate_admission_limit", kind="gauge", help="The number of slots of admission."),
    Family(name="trigate_live_exchanges", kind="gauge", help="Calls in flight, by phase.", labels=("phase",)),
    Family(name="trigate_relay_bytes", kind="counter", help="Bytes of answers that have been sent to clients."),
    Family(name="trigate_relay_events", kind="counter", help="Events of streams that have been sent to clients."),
    Family(name="trigate_stalled_clients", kind="counter", help="Calls that ended because their client did not read."),
    Family(
        name="trigate_breakers",
        kind="gauge",
        help="Targets by the state of their circuit breaker, counted for each endpoint.",
        labels=("upstream", "state"),
    ),
    Family(
        name="trigate_upstream_up",
        kind="gauge",
        help="1 = the upstream answers, 0 = it is down or disabled; absent = not known.",
        labels=("upstream",),
    ),
    Family(
        name="trigate_upstream_in_flight",
        kind="gauge",
        help="Requests that hold a connection slot of an upstream.",
        labels=("upstream",),
    ),
    Family(
        name="trigate_upstream_queued",
        kind="gauge",
        help="Requests that wait for a connection slot of an upstream.",
        labels=("upstream",),
    ),
    Family(
        name="trigate_upstream_max_connections",
        kind="gauge",
        help="The number of connection slots of an upstream.",
        labels=("upstream",),
    ),
    Family(
        name="trigate_limit",
        kind="gauge",
        help="A limit (rpm, tpm, max_exchanges) of all workers together, once a call has counted for it.",
        labels=("scope", "limit"),
    ),
    Family(
        name="trigate_limit_available",
        kind="gauge",
        help="How much of it the worker may still use now, of its own part.",
        labels=("scope", "limit"),
    ),
    Family(
        name="trigate_budget_usd",
        kind="gauge",
        help="A budget of all workers together, once a call has counted for it.",
        labels=("scope", "period"),
    ),
    Family(
        name="trigate_budget_left_usd",
        kind="gauge",
        help="How much of it is left, as far as the worker knows.",
        labels=("scope", "period"),
    ),
    Family(name="trigate_ledger_begun", kind="counter", help="Records that the ledger has begun."),
    Family(name="trigate_ledger_settled", kind="counter", help="Records that the ledger has completed."),
    Family(
        name="trigate_ledger_lost", kind="counter", help="Exchanges of killed processes that the ledger has recorded."
    ),
    Family(name="trigate_ledger_dropped", kind="counter", help="Records that could not be stored anywhere."),
    Family(name="trigate_ledger_waiting", kind="gauge", help="Records in memory that the store does not have yet."),
    Family(name="trigate_spans_exported", kind="counter", help="Spans of traces that were sent."),
    Family(name="trigate_spans_dropped", kind="counter", help="Spans that found no room, or could not be sent."),
    Family(name="trigate_spans_waiting", kind="gauge", help="Spans that wait to be sent."),
    Family(
        name="trigate_store_writes", kind="counter", help="Groups of writes that the store has done, or failed to do."
    ),
    Family(name="trigate_store_write_seconds", kind="counter", help="Time that the store has spent in these groups."),
    Family(
        name="trigate_event_loop_lag_seconds",
        kind="gauge",
        help="How late the event loop has been lately; 0 where limits.loop_lag_s is not set.",
    ),
    Family(
        name="trigate_slow_steps",
        kind="counter",
        help="Steps of tasks that have held the event loop for more than 50 ms.",
    ),
    Family(name="trigate_draining", kind="gauge", help="1 = the worker drains."),
    Family(name="process_cpu_seconds", kind="counter", help="CPU time of the process, user and system."),
    Family(name="process_resident_memory_bytes", kind="gauge", help="Resident memory of the process."),
    Family(name="process_open_fds", kind="gauge", help="Open file descriptors of the process."),
    Family(name="process_max_fds", kind="gauge", help="The most file descriptors that the process may open."),
    Family(name="process_start_time_seconds", kind="gauge", help="Start of the worker, in seconds since 1970."),
    Family(name="trigate_workers", kind="gauge", help="Workers of the machine that run.", is_shared=True),
    Family(
        name="trigate_scrape_missing_workers",
        kind="gauge",
        help="Workers whose samples are not in this answer, because they did not answer in time.",
        is_shared=True,
    ),
    Family(
        name="trigate_sessions",
        kind="gauge",
        help="Sessions in the store, by state: total, active, busy.",
        labels=("state",),
        is_shared=True,
    ),
    Family(name="trigate_outbox_waiting", kind="gauge", help="Deliveries that wait in the outbox.", is_shared=True),
    Family(
        name="trigate_channel_up",
        kind="gauge",
        help="1 = the hook or channel is connected.",
        labels=("channel",),
        is_shared=True,
    ),
    Family(
        name="trigate_channel_received",
        kind="counter",
        help="Messages that a hook or channel has received.",
        labels=("channel",),
        is_shared=True,
    ),
    Family(
        name="trigate_channel_replied",
        kind="counter",
        help="Messages that a hook or channel has answered.",
        labels=("channel",),
        is_shared=True,
    ),
    Family(
        name="trigate_channel_waiting",
        kind="gauge",
        help="Messages of a hook or channel that have no answer yet.",
        labels=("channel",),
        is_shared=True,
    ),
)
"""In the order of the answer."""
