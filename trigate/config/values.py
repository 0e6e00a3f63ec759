"""The types of single values in the configuration. Each has a check of its own (`trigate.config.converter`)."""

from __future__ import annotations

from typing import Literal, NewType

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
Reason = Literal["context_length", "content_filter", "rate_limit", "timeout", "error"]
"""Why an attempt failed, as far as it decides whether the next target is tried."""
ResponsesMode = Literal["native", "translate", "discover"]
TimeoutPhase = Literal["connect", "response_head", "first_token", "idle", "total", "queue"]
