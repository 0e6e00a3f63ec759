"""What the commands that ask a running gateway have in common: its URL, requests to it, and how they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from trigate.cli.configuration import gateway_url
from trigate.cli.failure import CommandFailed

url_option = click.option(
    "--url",
    envvar="TRIGATE_URL",
    default=gateway_url,
    show_default="$TRIGATE_URL, else as the configuration file says, else http://127.0.0.1:18888",
    help="The gateway.",
)


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """Raises a `CommandFailed` where a request failed."""
    from trigate.cli import client

    try:
        yield
    except client.RequestFailed as failed:
        raise CommandFailed(str(failed)) from None


def ask(url: str, key: str | None, *paths: str, method: str = "GET", body: Any = None) -> list[dict[str, Any]]:
    """Requests each path in turn, and returns the bodies (`client.request`).

    Raises:
        CommandFailed: A request failed.
    """
    from trigate.cli import client

    with failures_reported():
        return client.request(url, key, *paths, method=method, body=body)


def not_a_gateway(url: str, why: str | None = None) -> CommandFailed:
    """Makes the failure of a command that something else has answered; ``why`` = the version differs in this."""
    from trigate.cli import client

    return CommandFailed(str(client.not_a_gateway(url, why)))
