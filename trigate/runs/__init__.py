"""Durable jobs that messages ask for, and the deliveries of their results.

Knows sessions, the store, workers and exchanges. Must not know webhooks, channels or the gateway: a hook or channel
calls `Runs.accept` and `Runs.execute_soon`, registers a `LiveView` to display a growing answer, and a `Carrier` to
deliver the result.

Read `service` first: the life of a run and its rules. Then `execution` (one run being executed), `request` (the values
and their JSON) and `outbox` (deliveries).
"""

from trigate.runs.outbox import Carrier, Outbox, Receipt, open_outbox
from trigate.runs.request import Live, LiveView, RunRequest, RunResult
from trigate.runs.service import RunHandle, Runs, open_runs

__all__ = [
    "Carrier",
    "Live",
    "LiveView",
    "Outbox",
    "Receipt",
    "RunHandle",
    "RunRequest",
    "RunResult",
    "Runs",
    "open_outbox",
    "open_runs",
]
