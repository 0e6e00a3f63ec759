"""What OpenTelemetry's conventions for generative AI call the operations and providers of calls. Pure.

**Source:** https://github.com/open-telemetry/semantic-conventions-genai
"""

from __future__ import annotations

from trigate.openai.endpoints import Endpoint

OTHER = "other"

_OPERATIONS = {
    "/chat/completions": "chat",
    "/responses": "chat",
    "/messages": "chat",
    "/api/chat": "chat",
    "/completions": "text_completion",
    "/api/generate": "text_completion",
    "/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
_PROVIDERS = {
    "anthropic": "anthropic",
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "vertex": "gcp.vertex_ai",
    "openai": "openai",
}


def operation_of(endpoint: Endpoint) -> str:
    """Returns ``gen_ai.operation.name``; `OTHER` for those that the conventions do not name."""
    return _OPERATIONS.get(endpoint.path) or ("generate_content" if endpoint.format == "gemini" else OTHER)


def provider_of(kind: str) -> str:
    """Returns ``gen_ai.provider.name`` for the kind of an upstream, which is the API that it speaks. Kinds that the
    conventions do not name are their own names.

    >>> provider_of("vertex"), provider_of("ollama")
    ('gcp.vertex_ai', 'ollama')
    """
    return _PROVIDERS.get(kind, kind)
