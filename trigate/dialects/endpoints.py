"""The paths of the data plane in all formats."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.openai import endpoints
from trigate.openai.endpoints import Endpoint, make_endpoint

CHAT = endpoints.ENDPOINTS["/v1/chat/completions"]
MESSAGES = make_endpoint(
    "/messages", "message_stop", required=("max_tokens", "messages"), results="content", format="anthropic"
)
COUNT_TOKENS = make_endpoint(
    "/messages/count_tokens", "message_stop", required=("messages",), results="input_tokens", format="anthropic"
)

ENDPOINTS: Mapping[str, Endpoint] = {
    **endpoints.ENDPOINTS,
    **{f"/v1{endpoint.path}": endpoint for endpoint in (MESSAGES, COUNT_TOKENS)},
}
"""The endpoints of the data plane by their paths."""
