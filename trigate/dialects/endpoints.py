"""The paths of the data plane in all formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from trigate.openai import endpoints
from trigate.openai.endpoints import Endpoint, make_endpoint
from trigate.openai.request import NOTHING, InPath

CHAT = endpoints.ENDPOINTS["/v1/chat/completions"]
RESPONSES = endpoints.ENDPOINTS["/v1/responses"]
MESSAGES = make_endpoint(
    "/messages",
    "message_stop",
    required=("max_tokens", "messages"),
    results="content",
    format="anthropic",
    keep_alive="ping",
)
COUNT_TOKENS = make_endpoint(
    "/messages/count_tokens", "message_stop", required=("messages",), results="input_tokens", format="anthropic"
)

ENDPOINTS: Mapping[str, Endpoint] = {
    **endpoints.ENDPOINTS,
    **{f"/v1{endpoint.path}": endpoint for endpoint in (MESSAGES, COUNT_TOKENS)},
}
"""The endpoints of the data plane by their paths."""


@attrs.frozen
class Found:
    """The endpoint of a path, and what the path says of the call."""

    endpoint: Endpoint
    in_path: InPath = NOTHING


def find_endpoint(path: str, query: bytes) -> Found | None:
    """Finds the endpoint of a path that is not one of `ENDPOINTS`, since it has the model in it; None = there is none.

    Args:
        path: Decoded from its percent encoding.
        query: The query, as it was received.
    """
    for find in _FINDERS:
        if (found := find(path, query)) is not None:
            return found
    return None


_FINDERS: tuple[Callable[[str, bytes], Found | None], ...] = ()
"""Each finds the endpoints of one format."""
