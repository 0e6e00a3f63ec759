"""What providers do wrong, or oddly, and what a client gets: the truth that the fault suite checks, and that
``docs/reference/faults.md`` shows.

What is expected follows from a few rules, not from what the program does:

- Before COMMIT (the first content; of a JSON answer, all of it) every failure is a status and an error object, and the
  next target is tried first, unless the call itself was refused.
- After COMMIT it is an error event behind exactly what had come, and no ``[DONE]``; no other target is tried.
- An answer is complete only if it says so: a stream by ``finish_reason`` and ``[DONE]``, JSON by its framing.
- What is merely odd, and harmless, goes through.
"""

from __future__ import annotations

from tests.faults.answer_faults import CONTENTS, ENDINGS, RETRY_AFTER, STATUSES
from tests.faults.steps import Fault, Fin, Rst
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
"""``[limits]`` of the gateway. Each limit in time is much shorter than the deadline: a second target has its time."""

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "Connecting": CONNECTING,
    "Ending early, in order (FIN)": ends_by("closes", Fin()),
    "Ending early, by a reset (RST)": ends_by("resets", Rst()),
    "Silence and slowness": HANGS,
    "The head of the answer": HEADS,
    "Framing and codings": FRAMING,
    "Statuses": STATUSES,
    "`Retry-After`": RETRY_AFTER,
    "JSON and events": CONTENTS,
    "The end of a stream, and errors in it": ENDINGS,
}
"""All faults, by what they are about."""
