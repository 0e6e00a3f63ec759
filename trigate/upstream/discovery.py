"""What can be found without a configuration file: provider keys in the environment, servers on loopback, a model in a
wheel, and the echo.

Source: the OpenAI-compatible base URL that each provider documents; the usual ports are those in the documentation of
Ollama, LM Studio, llama.cpp and vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import httpx2
import msgspec
import trio

from trigate.config import structure as configuration
from trigate.config.secrets import Secret
from trigate.config.sections import Config, UpstreamConfig, Url
from trigate.errors import GatewayError
from trigate.upstream import echo
from trigate.upstream.local_model import process
from trigate.upstream.upstream import Httpx2Source, Reply

PROBE_TIMEOUT_S = 0.3
MAX_MODEL_LIST_BYTES = 16 * 1024 * 1024


@attrs.frozen
class Provider:
    """A provider that speaks OpenAI's dialect.

    Attributes:
        env: The environment variable with its API key.
        default_model: What ``default`` means while this is the first upstream.
    """

    env: str
    name: str
    base_url: str
    default_model: str


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
    Provider("GEMINI_API_KEY", "gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.0-flash"),
    Provider("FIREWORKS_API_KEY", "fireworks", "https://api.fireworks.ai/inference/v1", ""),
    Provider("CEREBRAS_API_KEY", "cerebras", "https://api.cerebras.ai/v1", ""),
)

LOCAL_SERVERS: Mapping[str, int] = {"ollama": 11434, "lmstudio": 1234, "llamacpp": 8080, "vllm": 8000}
"""Servers that people run beside the gateway, and the port on 127.0.0.1 where each usually listens."""


class _ModelItem(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelItem]


_model_list = msgspec.json.Decoder(_ModelList)


def decode_model_list(body: bytes) -> tuple[str, ...]:
    """Reads the answer to ``GET /models``.

    Raises:
        ValueError: It is not a model list.
    """
    try:
        return tuple(dict.fromkeys(item.id for item in _model_list.decode(body).data))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_environment(env: Mapping[str, str]) -> dict[str, UpstreamConfig]:
    """The providers whose key is set, in the table's order."""
    return {
        provider.name: UpstreamConfig(
            base_url=Url(provider.base_url),
            api_key=Secret(env=provider.env),
            default_model=provider.default_model or None,
        )
        for provider in PROVIDERS
        if env.get(provider.env)
    }


async def probe(transport: httpx2.AsyncBaseTransport, servers: Mapping[str, int]) -> dict[str, UpstreamConfig]:
    """Asks the local servers for their models, all at once, and returns those that answered with at least one.

    Takes at most `PROBE_TIMEOUT_S` seconds. Only a well-formed model list counts: whatever else listens on such a port
    is left alone.
    """
    found: dict[str, UpstreamConfig] = {}

    async def ask(name: str, port: int) -> None:
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            request = httpx2.Request("GET", f"{base_url}/models")
            reply = Reply(name, Httpx2Source(await transport.handle_async_request(request)))
            try:
                models = decode_model_list(await reply.read(MAX_MODEL_LIST_BYTES)) if reply.status == 200 else ()
            finally:
                await reply.aclose()
        except (httpx2.HTTPError, GatewayError, ValueError):
            return  # noqa: ASYNC910 - it was refused, by a socket
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
    """Makes the configuration of a gateway that was not given one.

    Raises:
        ConfigError: ``TRIGATE_API_KEY`` is set, but unusable.
    """
    base = configuration.structure({}, env=env, source="discovery")
    upstreams = from_environment(env) | await probe(transport, servers)
    if process.why_unavailable(None) is None:
        upstreams["local"] = UpstreamConfig(kind="local")
    upstreams["trigate"] = UpstreamConfig(kind="echo", models=(echo.MODEL_ID,))
    return configuration.with_upstreams(base, upstreams, env=env)
