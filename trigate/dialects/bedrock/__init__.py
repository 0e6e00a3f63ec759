"""Amazon Bedrock's Converse API, as an upstream's format: encodes requests, decodes answers and events. And `invoke`,
by which Anthropic's models get calls in Anthropic's own format.

One format serves the models of all vendors; `models` has in what they differ. Streams come in AWS's event-stream
framing (`framing`), which becomes server-sent events, so that everything else is as in the other formats.

**Source:** "Amazon Bedrock API Reference" (``Converse``, ``ConverseStream``) and the service's model in botocore;
"Amazon Bedrock User Guide" for what single models take.
"""

from __future__ import annotations

from trigate.dialects.bedrock.invoke import BETAS, InvokeReader, invoke_body, is_claude
from trigate.dialects.bedrock.upstream import BedrockUpstream, path_of

__all__ = ["BETAS", "BedrockUpstream", "InvokeReader", "invoke_body", "is_claude", "path_of"]
