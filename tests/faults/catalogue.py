"""The catalogue of faults: what a provider does wrong or unusually, and what the client gets.

The fault suite checks it, and `page` makes ``docs/reference/faults.md`` from it. The expectations follow from these
rules, not from what the program does:

- Before COMMIT (the first content; with JSON, the whole answer) every failure is a status and an error object, and the
  next target is tried first, unless the call itself was refused.
- After COMMIT a failure is an error event after exactly the events that had arrived, without ``[DONE]``. No other
  target is tried.
- An answer is complete only if it says so: a stream by ``finish_reason`` and ``[DONE]``, JSON by its framing.
- An unusual but harmless answer is passed on.
"""

from __future__ import annotations

from tests.faults.answer_faults import CONTENTS, ENDINGS, RETRY_AFTER, STATUSES
from tests.faults.fault import Fault, Fin, Rst
from tests.faults.transport_faults import CONNECTING, FRAMING, HANGS, HEADS, ends_by

LIMITS = {
    "connect_timeout_s": 0.3,
    "response_head_timeout_s": 0.4,
    "first_token_timeout_s": 0.5,
    "idle_timeout_s": 0.4,
    "total_timeout_s": 1.2,
    "event_bytes": 32 * 1024,
    "response_bytes": 128 * 1024,
}
"""``[limits]`` of the gateway. Each timeout is much shorter than the total timeout, so that a second target has
time."""

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "Connecting": CONNECTING,
    "Closing the connection early (FIN)": ends_by("closes", Fin()),
    "Resetting the connection early (RST)": ends_by("resets", Rst()),
    "Silent and slow providers": HANGS,
    "The head of the answer": HEADS,
    "Framing and codings": FRAMING,
    "Statuses": STATUSES,
    "`Retry-After`": RETRY_AFTER,
    "JSON and events": CONTENTS,
    "The end of a stream, and errors within it": ENDINGS,
}
"""All faults, by section of the page."""
