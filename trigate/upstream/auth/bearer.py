"""A bearer token that expires."""

from __future__ import annotations

from trigate.upstream.auth.credentials import Credentials


class BearerToken:
    """Sends a token in ``authorization``. A `credentials.RequestAuth`."""

    def __init__(self, credentials: Credentials[str]) -> None:
        self._credentials = credentials
        self.run = credentials.run
        self.note_refused = credentials.note_refused

    def __repr__(self) -> str:
        return f"<BearerToken, {self._credentials!r}>"

    @property
    def secrets(self) -> tuple[str, ...]:
        """As `RequestAuth.secrets`."""
        return self._credentials.secrets

    async def headers(self, method: str, host: str, path: str, body: bytes) -> dict[str, str]:
        """As `RequestAuth.headers`."""
        return {"authorization": f"Bearer {await self._credentials.get()}"}
