"""How the gateway logs: one line an event, to standard error.

For people by default; ``TRIGATE_LOG_FORMAT=json`` for machines; ``TRIGATE_LOG_LEVEL`` = debug, info, warning or error.
A traceback is logged without the values of local variables: they hold messages and keys.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import structlog


def configure(env: Mapping[str, str]) -> None:
    """Sets structlog up, unless somebody (an application around this one, a test) already has."""
    if structlog.is_configured():
        return
    level = logging.getLevelNamesMapping().get(env.get("TRIGATE_LOG_LEVEL", "info").upper(), logging.INFO)
    renderer: structlog.typing.Processor
    if env.get("TRIGATE_LOG_FORMAT") == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if env.get("TRIGATE_LOG_FORMAT") == "json" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
