"""The sections about what the gateway reports by itself."""

from __future__ import annotations

from typing import Literal

import attrs

from trigate.config.secrets import Secret
from trigate.config.values import Count, Seconds, Share, Size, Url

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


@attrs.frozen(kw_only=True)
class LogConfig:
    """``[log]``: what the log has."""

    level: Literal["debug", "info", "warning", "error"] | None = None
    """The lowest level that is written. None = that of ``TRIGATE_LOG_LEVEL``."""


@attrs.frozen(kw_only=True)
class ContentLogConfig:
    """``[content_log]``: the requests and answers of the keys with ``content_log = true``, in files of JSON lines. A
    gateway without keys logs those of everybody. 0 disables the age."""

    directory: str | None = None
    """Where the files are. None = there are none."""
    redact: tuple[str, ...] = ()
    """Regular expressions of Python: what matches in a text becomes ``[redacted]``."""
    entry_bytes: Size = Size(64 * 1024)
    """The most of a request, and of an answer; of a longer one, the beginning is kept."""
    max_bytes: Size = Size(1024 * 1024 * 1024)
    """The most of all files; the oldest are deleted first."""
    retention_s: Seconds = Seconds(604_800.0)
    """How long a file is kept after it was last written to."""
