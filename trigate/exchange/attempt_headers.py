"""The headers that the request of an attempt has, besides those of the client and of the upstream."""

from __future__ import annotations

import math
from collections.abc import Mapping

from trigate.exchange.attempt import Attempt
from trigate.exchange.request import ExchangeRequest
from trigate.tracing.tracer import new_span_id


def attempt_headers(
    request: ExchangeRequest, attempt: Attempt, headers: Mapping[str, str], *, over_at: float
) -> Mapping[str, str]:
    """Returns the headers of an attempt's request: how long its answer may take, and its span.

    Args:
        headers: Those of the client that go upstream.
        over_at: When the answer has to be complete (Trio time); infinite = there is no limit.
    """
    if over_at < math.inf:
        headers = {**headers, "x-request-timeout": f"{max(0.001, over_at - attempt.started_at):.3f}"}
    if request.trace is not None:
        attempt.span_id = new_span_id()
        headers = request.trace.headers(headers, attempt.span_id)
    return headers
