"""Which providers serve the Responses API themselves. Pure.

**Source:** the API references of the providers in `_PROVIDERS`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from trigate.config.sections import ResponsesMode

_PROVIDERS = (
    "api.openai.com",
    "openai.azure.com",
    "services.ai.azure.com",
    "openrouter.ai",
    "api.x.ai",
    "api.groq.com",
    "api.fireworks.ai",
)


def responses_mode_of(kind: str, base_url: str | None) -> ResponsesMode:
    """Returns how response calls go to the provider at a base URL; None = one that the gateway runs itself.

    >>> responses_mode_of("openai", "https://api.openai.com/v1"), responses_mode_of("azure", "https://ai.example")
    ('native', 'native')
    >>> responses_mode_of("openai", "https://api.deepseek.com"), responses_mode_of("echo", None)
    ('translate', 'translate')
    """
    if kind == "azure":
        return "native"
    host = (urlsplit(base_url).hostname or "") if base_url else ""
    known = any(host == name or host.endswith(f".{name}") for name in _PROVIDERS)
    return "native" if known else "translate"
