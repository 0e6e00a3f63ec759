"""What proves to a provider who sends a request, where a constant header is not enough.

A `RequestAuth` adds header fields to each request of an upstream: a token that expires (`bearer`), or a signature of
the request. What it holds is renewed by `credentials`. An upstream with a constant key has none, and pays nothing.
"""

from __future__ import annotations

from trigate.upstream.auth.bearer import BearerToken
from trigate.upstream.auth.credentials import Credentials, CredentialsError, Fetched, RequestAuth

__all__ = ["BearerToken", "Credentials", "CredentialsError", "Fetched", "RequestAuth"]
