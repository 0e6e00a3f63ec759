"""Requests to AWS, signed with the credentials that its own tools would use.

Keys in the environment need no library. All other places where AWS's tools look (profiles, single sign-on, roles, the
metadata of a container or a machine) are found by ``botocore``, which is optional.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

import trio

from trigate.upstream.auth.credentials import Credentials, CredentialsError, Fetched
from trigate.upstream.auth.sigv4 import Keys, signed_headers

_LIFE_S = 600.0
"""How long keys that the library gave are used: it gives none that expire sooner, and may not say when they do."""
_LARGE_BYTES = 1024 * 1024
_NONE = "no credentials of AWS were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or api_key"


def fetch_keys(profile: str | None) -> Fetched[Keys]:
    """Fetches keys. Blocks; raises what the library raises, or `CredentialsError` if there are none.

    Args:
        profile: The profile in the files of AWS; None = the environment, then the usual places.
    """
    env = os.environ
    if profile is None and env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        secret, token = env["AWS_SECRET_ACCESS_KEY"], env.get("AWS_SESSION_TOKEN") or None
        return Fetched(Keys(env["AWS_ACCESS_KEY_ID"], secret, token), secrets=_secrets(secret, token))
    try:
        from botocore.session import Session  # slow, and only this kind of upstream needs it
    except ImportError as error:
        raise CredentialsError(f"{_NONE}; other places need the library of trigate[bedrock] ({error})") from None
    # a new session each time, since it would not notice that a file has changed
    found = Session(profile=profile).get_credentials()
    if found is None:
        raise CredentialsError(_NONE)
    keys = found.get_frozen_credentials()
    return Fetched(
        Keys(keys.access_key, keys.secret_key, keys.token),
        time.time() + _LIFE_S,
        _secrets(keys.secret_key, keys.token),
    )


def _secrets(*values: str | None) -> tuple[str, ...]:
    return tuple(value for value in values if value)


class SignedRequests:
    """Signs each request. A `credentials.RequestAuth`.

    Args:
        now: The time in seconds since the epoch.
    """

    def __init__(
        self, credentials: Credentials[Keys], *, region: str, service: str, now: Callable[[], float] = time.time
    ) -> None:
        self._credentials = credentials
        self._region = region
        self._service = service
        self._now = now
        self.run = credentials.run
        self.note_refused = credentials.note_refused

    def __repr__(self) -> str:
        return f"<SignedRequests to {self._service} in {self._region}, {self._credentials!r}>"

    @property
    def secrets(self) -> tuple[str, ...]:
        """As `RequestAuth.secrets`."""
        return self._credentials.secrets

    async def headers(self, method: str, host: str, path: str, body: bytes) -> dict[str, str]:
        """As `RequestAuth.headers`."""
        keys = await self._credentials.get()
        digest = hashlib.sha256(body) if len(body) <= _LARGE_BYTES else await _hash_in_thread(body)
        return signed_headers(
            keys,
            method=method,
            path=path,
            headers={"host": host},
            body_hash=digest.hexdigest(),
            region=self._region,
            service=self._service,
            now=datetime.fromtimestamp(self._now(), UTC),
        )


async def _hash_in_thread(body: bytes) -> hashlib._Hash:
    return await trio.to_thread.run_sync(hashlib.sha256, body, abandon_on_cancel=True)
