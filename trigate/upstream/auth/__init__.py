"""What proves to a provider who sends a request, where a constant header is not enough.

A `RequestAuth` adds header fields to each request of an upstream: a token that expires (`bearer`), or a signature of
the request. What it holds is renewed by `credentials`. An upstream with a constant key has none, and pays nothing.
"""

from __future__ import annotations

from functools import partial

from trigate.config.sections import UpstreamConfig
from trigate.upstream.auth import aws, entra, google_adc
from trigate.upstream.auth.aws import SignedRequests
from trigate.upstream.auth.bearer import BearerToken
from trigate.upstream.auth.credentials import Credentials, CredentialsError, Fetched, RequestAuth

__all__ = ["BearerToken", "Credentials", "CredentialsError", "Fetched", "RequestAuth", "auth_of"]


_KEYS = {"authorization", "api-key", "x-goog-api-key"}


def auth_of(name: str, config: UpstreamConfig) -> RequestAuth | None:
    """Returns what an upstream needs beside its constant headers; None = nothing.

    Args:
        name: The upstream's name, for messages.
    """
    if config.api_key is not None or _KEYS & {header.lower() for header in config.headers}:
        return None
    match config.kind:
        case "azure":
            fetch = partial(entra.fetch_token, entra.scope_of(str(config.base_url)))
            return BearerToken(Credentials(fetch, upstream=name))
        case "bedrock":
            keys = Credentials(partial(aws.fetch_keys, config.profile), upstream=name)
            return SignedRequests(keys, region=str(config.region), service="bedrock")
        case "vertex":
            return BearerToken(Credentials(google_adc.fetch_token, upstream=name))
        case _:
            return None
