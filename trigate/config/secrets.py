"""Secrets: literal, from the environment or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class Secret:
    """A secret as the configuration gives it: a literal, the name of an environment variable, or the path of a file."""

    literal: str | None = attrs.field(default=None, repr=False)
    env: str | None = None
    file: str | None = None

    def reveal(self, env: Mapping[str, str]) -> str:
        """Returns the value.

        Raises:
            LookupError: The value is missing, empty or invalid; the message names its place.
        """
        if self.literal is not None:
            value, where = self.literal, "the value is empty"
        elif self.env is not None:
            value, where = env.get(self.env, ""), f"the environment variable {self.env} is not set"
        else:
            where = f"the file {self.file} is empty"
            try:
                value = Path(str(self.file)).expanduser().read_text(encoding="utf-8")
            except (OSError, ValueError, RuntimeError) as error:  # also NUL in the path, or an unknown ~user
                raise LookupError(f"the file {self.file} cannot be read: {error}") from None
        # a key with white space around it would never match, and no header can carry it
        value = value.strip()
        if not value:
            raise LookupError(where)
        if not value.isascii() or not value.isprintable():
            raise LookupError("the value has characters that an HTTP header cannot carry")
        return value
