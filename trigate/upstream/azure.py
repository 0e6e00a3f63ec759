"""Where the endpoints of OpenAI's API are at Azure. Pure.

Azure has them twice: under ``/openai/v1``, where the model of a request is the name of a deployment, and in an older
API with a version in the query, where the path names the deployment.

**Source:** "Azure OpenAI in Microsoft Foundry Models v1 API" and "Azure OpenAI REST API reference" of Microsoft; which
endpoints have the deployment in their path: openai-python ``lib/azure.py``.
"""

from __future__ import annotations

from urllib.parse import quote

from trigate.errors import UnknownModel

_OF_DEPLOYMENTS = (
    *("/chat/completions", "/completions", "/embeddings"),
    *("/audio/transcriptions", "/audio/translations", "/audio/speech"),
    *("/images/generations", "/images/edits"),
)


def url_of(base_url: str, api_version: str | None) -> str:
    """Returns what precedes the path of an endpoint.

    Args:
        base_url: The resource; a path of the API behind it is superfluous.
        api_version: That of the older API; None = version 1.

    >>> url_of("https://name.openai.azure.com", None), url_of("https://name.openai.azure.com/openai/v1", "2024-10-21")
    ('https://name.openai.azure.com/openai/v1', 'https://name.openai.azure.com/openai')
    """
    resource = base_url.removesuffix("/v1").removesuffix("/openai")
    return f"{resource}/openai" if api_version is not None else f"{resource}/openai/v1"


def path_in(api_version: str, path: str, model: str) -> str:
    """Returns the path of an endpoint in the older API.

    Raises:
        UnknownModel: The name of the deployment would lead to another path.

    >>> path_in("2024-10-21", "/chat/completions", "gpt 4o")
    '/deployments/gpt%204o/chat/completions?api-version=2024-10-21'
    >>> path_in("2025-04-01-preview", "/responses", "gpt-4o"), path_in("2024-10-21", "/files?limit=2", "")
    ('/responses?api-version=2025-04-01-preview', '/files?limit=2&api-version=2024-10-21')
    """
    if path in _OF_DEPLOYMENTS:
        if model in (".", ".."):
            raise UnknownModel(model)
        path = f"/deployments/{quote(model, safe='')}{path}"
    return f"{path}{'&' if '?' in path else '?'}api-version={api_version}"
