"""Makes a configuration where there is no file: from API keys in the environment, servers on loopback, the embedded
language model, and the echo.

**Source:** the OpenAI-compatible base URL that each provider documents (their own, for Anthropic and Google); the
default ports in the documentation of Ollama, LM Studio, llama.cpp and vLLM; the variables that the SDKs of the clouds
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import httpx2
import trio

from trigate.config import checks
from trigate.config import structure as configuration
from trigate.config.regions import base_url_of
from trigate.config.secrets import Secret
from trigate.config.sections import Config, ConfigError, UpstreamConfig, Url
from trigate.errors import GatewayError
from trigate.upstream import echo
from trigate.upstream.local_model import process
from trigate.upstream.model_list import MAX_MODEL_LIST_BYTES, decode_model_list
from trigate.upstream.reply import Httpx2Source, Reply

PROBE_TIMEOUT_S = 0.3
"""How long all local servers together may take to answer."""


@attrs.frozen
class Provider:
    """A provider.

    Attributes:
        env: The environment variable with its API key.
        name: The name of the upstream.
        default_model: The model that ``default`` selects while this is the first upstream; empty = the first model that
            the provider lists.
        kind: The API that it speaks.
        env_before: Another variable for the key, which counts if both are set.
    """

    env: str
    name: str
    base_url: str
    default_model: str
    kind: Literal["openai", "anthropic", "gemini"] = "openai"
    env_before: str | None = None


_GOOGLE = "https://generativelanguage.googleapis.com/v1beta"
PROVIDERS = (
    Provider("OPENAI_API_KEY", "openai", "https://api.openai.com/v1", "gpt-4o-mini"),
    Provider("DASHSCOPE_API_KEY", "qwen", "https://dashscope.aliyuncs.com/compatible-mode/v1", "qwen-turbo"),
    Provider("OPENROUTER_API_KEY", "openrouter", "https://openrouter.ai/api/v1", "openrouter/auto"),
    Provider("GROQ_API_KEY", "groq", "https://api.groq.com/openai/v1", "llama-3.3-70b-versatile"),
    Provider("DEEPSEEK_API_KEY", "deepseek", "https://api.deepseek.com/v1", "deepseek-chat"),
    Provider("MISTRAL_API_KEY", "mistral", "https://api.mistral.ai/v1", "mistral-small-latest"),
    Provider("MOONSHOT_API_KEY", "moonshot", "https://api.moonshot.cn/v1", "moonshot-v1-8k"),
    Provider("XAI_API_KEY", "xai", "https://api.x.ai/v1", "grok-3-mini"),
    Provider("TOGETHER_API_KEY", "together", "https://api.together.xyz/v1", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
    Provider("ZHIPU_API_KEY", "zhipu", "https://open.bigmodel.cn/api/paas/v4", "glm-4-flash"),
    Provider("SILICONFLOW_API_KEY", "siliconflow", "https://api.siliconflow.cn/v1", "Qwen/Qwen2.5-7B-Instruct"),
    Provider("GEMINI_API_KEY", "gemini", _GOOGLE, "gemini-2.5-flash", kind="gemini", env_before="GOOGLE_API_KEY"),
    Provider("FIREWORKS_API_KEY", "fireworks", "https://api.fireworks.ai/inference/v1", ""),
    Provider("CEREBRAS_API_KEY", "cerebras", "https://api.cerebras.ai/v1", ""),
    Provider("ANTHROPIC_API_KEY", "anthropic", "https://api.anthropic.com/v1", "", kind="anthropic"),
)

_REGION = "us-east-1"
"""The region of Bedrock where the environment names none, as of Anthropic's SDK."""

LOCAL_SERVERS: Mapping[str, int] = {"ollama": 11434, "lmstudio": 1234, "llamacpp": 8080, "vllm": 8000}
"""Model servers that run on the same machine, each with its default port on 127.0.0.1."""


def from_environment(env: Mapping[str, str]) -> dict[str, UpstreamConfig]:
    """Returns an upstream for each provider whose key is set and not empty, in the order of `PROVIDERS`; then those of
    the clouds.

    Raises:
        ConfigError: A variable of a cloud is set, but unusable.
    """
    found = {}
    for provider in PROVIDERS:
        variable = next((each for each in (provider.env_before, provider.env) if each and env.get(each)), None)
        if variable is not None:
            found[provider.name] = UpstreamConfig(
                kind=provider.kind,
                base_url=Url(provider.base_url),
                api_key=Secret(env=variable),
                default_model=provider.default_model or None,
            )
    return found | _clouds(env)


def _clouds(env: Mapping[str, str]) -> dict[str, UpstreamConfig]:
    """Returns the upstreams that the variables of the clouds' own SDKs describe.

    Raises:
        ConfigError: A variable is set, but unusable.
    """
    found = {}
    if env.get("AZURE_OPENAI_API_KEY") and (endpoint := env.get("AZURE_OPENAI_ENDPOINT")):
        deployment = env.get("AZURE_OPENAI_DEPLOYMENT_NAME") or env.get("AZURE_OPENAI_DEPLOYMENT")
        found["azure"] = UpstreamConfig(
            kind="azure",
            base_url=Url(_checked("AZURE_OPENAI_ENDPOINT", endpoint.strip(), checks.url)),
            api_key=Secret(env="AZURE_OPENAI_API_KEY"),
            api_version=_checked("OPENAI_API_VERSION", env.get("OPENAI_API_VERSION"), checks.word),
            models=(deployment,) if deployment else "discover",
        )
    if env.get("AWS_BEARER_TOKEN_BEDROCK"):
        variable = next((name for name in ("AWS_REGION", "AWS_DEFAULT_REGION") if env.get(name)), "AWS_REGION")
        region = _checked(variable, env.get(variable) or _REGION, checks.word)
        found["bedrock"] = UpstreamConfig(
            kind="bedrock",
            base_url=Url(base_url_of(region)),
            region=region,
            api_key=Secret(env="AWS_BEARER_TOKEN_BEDROCK"),
        )
    return found


def _checked(variable: str, value: str | None, check: Callable[[Any, Any], str]) -> Any:  # Any: a string, or None
    """Returns the value of a variable, checked as a setting is; None if it is not set."""
    if not value:
        return None
    try:
        return check(value, None)
    except ValueError as error:
        raise ConfigError(variable, (str(error),)) from None


async def probe(transport: httpx2.AsyncBaseTransport, servers: Mapping[str, int]) -> dict[str, UpstreamConfig]:
    """Asks all local servers for their models at the same time, and returns those that listed at least one.

    Takes at most `PROBE_TIMEOUT_S` seconds. Any other answer than a well-formed model list is ignored, since another
    program may listen on the port.
    """
    found: dict[str, UpstreamConfig] = {}

    async def ask(name: str, port: int) -> None:
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            request = httpx2.Request("GET", f"{base_url}/models")
            reply = Reply(name, Httpx2Source(await transport.handle_async_request(request)))
            try:
                models = decode_model_list(await reply.read(MAX_MODEL_LIST_BYTES)) if reply.status == 200 else {}
            finally:
                await reply.aclose()
        except (httpx2.HTTPError, GatewayError, ValueError):
            return
        if models:
            found[name] = UpstreamConfig(base_url=Url(base_url))

    with trio.move_on_after(PROBE_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for name, port in servers.items():
                nursery.start_soon(ask, name, port)
    return {name: found[name] for name in servers if name in found}


async def discover(
    env: Mapping[str, str],
    *,
    transport: httpx2.AsyncBaseTransport,
    servers: Mapping[str, int] = LOCAL_SERVERS,
) -> Config:
    """Makes the configuration of a gateway that has no configuration file.

    Args:
        transport: How the local servers are asked.
        servers: The local servers to ask, by name, each with its port.

    Raises:
        ConfigError: ``TRIGATE_API_KEY`` or a variable of a cloud is set, but unusable.
    """
    base = configuration.structure({}, env=env, source="discovery")
    upstreams = from_environment(env) | await probe(transport, servers)
    if process.why_unavailable(None) is None:
        upstreams["local"] = UpstreamConfig(kind="local")
    upstreams["trigate"] = UpstreamConfig(kind="echo", models=(echo.MODEL_ID,))
    return configuration.with_upstreams(base, upstreams, env=env)
