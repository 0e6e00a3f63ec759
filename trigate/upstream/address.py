"""Where an upstream is, and which header fields each of its requests has."""

from __future__ import annotations

import attrs
import httpx2

from trigate.config.sections import UpstreamConfig
from trigate.upstream import azure, google
from trigate.upstream.connect import Origin

_ANTHROPIC_VERSION = "2023-06-01"
"""Of Anthropic's format, where the client names none."""


@attrs.frozen
class Address:
    """The parts of a base URL, parsed once."""

    base_url: str
    origin: Origin
    path: str
    netloc: str

    @classmethod
    def of(cls, base_url: str) -> Address:
        """Parses a base URL. Raises as `Origin.of`."""
        url = httpx2.URL(base_url)
        path = url.raw_path.decode("ascii")
        return cls(base_url, Origin.of(url), "" if path == "/" else path, url.netloc.decode("ascii"))


def url_of(config: UpstreamConfig) -> str:
    """Returns what precedes the path of a request."""
    match config.kind:
        case "azure":
            return azure.url_of(str(config.base_url), config.api_version)
        case "gemini" | "vertex":
            return google.url_of(config)
        case _:
            return config.base_url or "http://echo.invalid/v1"


def constant_headers(config: UpstreamConfig) -> dict[str, str]:
    """Returns the header fields of every request, besides those of the configuration."""
    headers = {"accept-encoding": "identity", "user-agent": "trigate"}
    if config.kind == "anthropic":
        headers["anthropic-version"] = _ANTHROPIC_VERSION
    if config.guardrail is not None:  # for Bedrock's InvokeModel; Converse has it in the body
        identifier, _, version = config.guardrail.rpartition(":")
        headers["x-amzn-bedrock-guardrailidentifier"] = identifier
        headers["x-amzn-bedrock-guardrailversion"] = version
    return headers
