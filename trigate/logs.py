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
    shape: list[structlog.typing.Processor] = [_on_one_line]
    if env.get("TRIGATE_LOG_FORMAT") == "json":
        shape = [structlog.processors.format_exc_info]
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *shape,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _on_one_line(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escapes what would steer a terminal: paths and model ids are whatever a client sent."""
    return {
        name: value.encode("unicode_escape").decode() if isinstance(value, str) and not value.isprintable() else value
        for name, value in event.items()
    }
