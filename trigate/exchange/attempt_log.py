"""The log of attempts: a line for each one that failed, and for a circuit breaker that one has opened or closed."""

from __future__ import annotations

from trigate.exchange.attempt import Attempt
from trigate.exchange.request import ExchangeRequest
from trigate.logs import log
from trigate.routing.circuit_breaker import Change


def log_end(request: ExchangeRequest, attempt: Attempt, change: Change | None, *, opens_in_s: float) -> None:
    """Logs how an attempt ended, if it failed or has changed the state of its target's breaker.

    Args:
        change: What the end has changed; None = nothing.
        opens_in_s: Seconds until the breaker lets a call pass.
    """
    target, endpoint, error = str(attempt.target), request.call.endpoint.path, attempt.error
    if error is not None:
        log.warning(
            "attempt_failed",
            request_id=request.id,
            target=target,
            endpoint=endpoint,
            why=attempt.step.why,
            outcome=attempt.outcome,
            error=error.message,
        )
    if change == "opened":
        reason = error.message if error is not None else ""
        log.warning("breaker_opened", target=target, endpoint=endpoint, opens_in_s=round(opens_in_s, 3), reason=reason)
    elif change == "closed":
        reason = error.message if error is not None else "a call succeeded"
        log.warning("breaker_closed", target=target, endpoint=endpoint, reason=reason)
