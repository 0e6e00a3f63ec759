"""The sections about what the gateway reports by itself."""

from __future__ import annotations

from typing import Literal

import attrs

from trigate.config.secrets import Secret
from trigate.config.values import Count, Seconds, Share, Url

AlertKind = Literal["soft_budget", "budget", "error_rate", "breaker"]


@attrs.frozen(kw_only=True)
class AlertsConfig:
    """``[alerts]``: a signed webhook when a budget is used up, when calls fail, or when a target gets no calls."""

    url: Url | None = None
    """Where alerts are sent. None = there are none."""
    secret: Secret | None = None
    """``whsec_…``: signs them by the Standard Webhooks scheme."""
    events: tuple[AlertKind, ...] = ("soft_budget", "budget", "error_rate", "breaker")
    error_rate: Share = Share(0.2)
    """Which share of calls that failed by the fault of a provider or of the gateway is alerted; 0 = none is."""
    window_s: Seconds = Seconds(300.0)
    """In which time that share is counted."""
    min_calls: Count = Count(20)
    """The fewest calls in that time for the share to count."""
