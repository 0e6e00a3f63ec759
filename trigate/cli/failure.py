"""How a command fails."""

from __future__ import annotations

from typing import IO, Any

import click


class CommandFailed(click.ClickException):
    """A command failed. click writes each message as a line of its own to standard error and exits with code 1."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages

    def show(self, file: IO[Any] | None = None) -> None:
        """Writes the messages, as click asks for."""
        for message in self.messages:
            click.echo(f"trigate: {message}", file=file, err=True)
