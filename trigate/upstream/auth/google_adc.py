"""Tokens of Google Cloud, by the library ``google-auth``, which is optional.

Its application default credentials find the file of a service account (``GOOGLE_APPLICATION_CREDENTIALS``), the login
of ``gcloud``, the identity of a workload, or that of the machine.
"""

from __future__ import annotations

import calendar
from typing import Any

from trigate.upstream.auth.credentials import CredentialsError, Fetched

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def fetch_token() -> Fetched[str]:
    """Fetches a token. Blocks; raises what the library raises, or `CredentialsError` if it is not installed."""
    try:
        import google.auth  # slow, and only this kind of upstream needs it
        import google.auth.transport.requests
    except ImportError as error:
        raise CredentialsError(
            f"set api_key, or install trigate[vertex] for a token of Google Cloud ({error})"
        ) from None
    # new ones each time: what they keep would give a refused token again
    credentials: Any = google.auth.default(scopes=[_SCOPE])[0]  # Any: the library has types in parts only
    credentials.refresh(google.auth.transport.requests.Request())
    expires_at = calendar.timegm(credentials.expiry.utctimetuple())  # without a zone, it is UTC
    return Fetched(str(credentials.token), float(expires_at), (str(credentials.token),))
