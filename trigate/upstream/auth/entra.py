"""Tokens of Microsoft's Entra ID, by the library ``azure-identity``, which is optional.

Its chain finds a service principal in the environment (``AZURE_CLIENT_ID`` and so on), the identity of a workload or of
a machine, and the login of ``az``.
"""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from trigate.upstream.auth.credentials import CredentialsError, Fetched

logging.getLogger("azure").addHandler(logging.NullHandler())  # the gateway logs what the library raises

_SCOPE = "https://cognitiveservices.azure.com/.default"
_SCOPES = {
    ".azure.us": "https://cognitiveservices.azure.us/.default",
    ".azure.cn": "https://cognitiveservices.azure.cn/.default",
}


def scope_of(base_url: str) -> str:
    """Returns what a token has to be valid for: the service in the cloud that a resource is in.

    >>> scope_of("https://name.openai.azure.com"), scope_of("https://name.openai.azure.us")
    ('https://cognitiveservices.azure.com/.default', 'https://cognitiveservices.azure.us/.default')
    """
    host = urlsplit(base_url).hostname or ""
    return next((scope for end, scope in _SCOPES.items() if host.endswith(end)), _SCOPE)


def fetch_token(scope: str) -> Fetched[str]:
    """Fetches a token. Blocks; raises what the library raises, or `CredentialsError` if it is not installed."""
    try:
        from azure.identity import DefaultAzureCredential  # slow, and only this kind of upstream needs it
    except ImportError as error:
        raise CredentialsError(f"set api_key, or install trigate[azure] for a token of Entra ID ({error})") from None
    # a new one each time: what it keeps would give a refused token again
    with DefaultAzureCredential() as credential:
        token = credential.get_token(scope)
    return Fetched(token.token, float(token.expires_on), (token.token,))
