"""The lines that a gateway logs when it starts."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from trio.testing import MockClock

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, Refuse
from trigate import __version__
from trigate.config.sections import Config
from trigate.status.startup import startup_lines
from trigate.upstream.local_model import process


def lines(served: Served) -> list[str]:
    """The lines of this gateway."""
    gateway = served.gateway
    return startup_lines(gateway.generations.current, store_path=gateway.store.statistics().path)


def _insecure(config: Config) -> Config:
    return attrs.evolve(config, server=attrs.evolve(config.server, insecure=True))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (make_config(), "no key: this machine only"),
        (make_config(keys={"alice": "a" * 20, "bob": "b" * 20}), "2 keys (alice, bob)"),
        (_insecure(make_config()), "NO KEY and --insecure: anybody who reaches it can use it"),
        (_insecure(make_config(keys={"alice": "a" * 20})), "1 keys (alice)"),
    ],
    ids=["no key", "keys", "insecure", "insecure with a key"],
)
async def test_the_keys_are_named(open_app: OpenApp, config: Config, first: str) -> None:
    """The first line has version, source and names of the keys; a gateway that is open to all warns in capitals."""
    async with open_app(config) as served:
        assert lines(served) == [
            f"Trigate {__version__}, configured by test; {first}; store in memory",
            "Upstreams: up: 1 models",
            "Models: 3 listed; default is up/m",
        ]


async def test_hooks_and_channels_are_named(open_app: OpenApp) -> None:
    """The fourth line names hooks and channels, and why one is disabled, such as a missing token."""
    hooks = {"ci": {}, "old": {"enabled": False}}
    channels = {"bot": {"type": "telegram", "token": {"env": "NO_SUCH"}}}
    async with open_app(make_config(hooks=hooks, channels=channels)) as served:
        assert lines(served)[3:] == [
            "Hooks and channels: ci; old: disabled; bot: disabled (token: the environment variable NO_SUCH is not set)"
        ]


@pytest.mark.parametrize(
    ("upstreams", "scripts", "found", "default"),
    [
        ({}, {}, "none", "default cannot serve: No upstream can serve now (none is configured)"),
        (
            {"off": {"api_key": {"env": "NOT_SET"}}},
            {},
            "off: disabled (api_key: the environment variable NOT_SET is not set)",
            "default cannot serve: No upstream can serve now (off: api_key: the environment variable NOT_SET",
        ),
        ({"gone": {"models": "discover"}}, {"gone": (Refuse(),)}, "gone: down (", "default cannot serve: "),
        (
            {"gone": {"models": "discover"}, "up": {"models": ["a", "b"]}},
            {"gone": (Refuse(),)},
            "up: 2 models",
            "default is up/a",
        ),
    ],
    ids=["none", "disabled", "down", "down and up"],
)
async def test_upstreams_and_the_default_model(
    open_app: OpenApp,
    autojump_clock: MockClock,
    upstreams: dict[str, Any],
    scripts: dict[str, Any],
    found: str,
    default: str,
) -> None:
    """Each upstream has the number of its models, or why it cannot serve; ``default`` has its present target."""
    providers = {name: Provider(scripts[name]) if name in scripts else Provider() for name in upstreams}
    async with open_app(make_config(upstreams), providers) as served:
        _, second, third = lines(served)
        assert second.startswith("Upstreams: ")
        assert found in second
        assert f"{len(served.gateway.generations.current.public_ids())} listed; {default}" in third


@pytest.mark.parametrize(
    ("upstreams", "says"),
    [
        ({"parrot": {"kind": "echo"}}, "parrot/echo is no language model, and only repeats what it is told"),
        ({"parrot": {"kind": "echo"}, "up": {"models": ["m"]}}, ""),
        ({"local": {"kind": "local"}}, "local/smollm2-135m-instruct is a very small model"),
        ({"local": {"kind": "local", "gguf": "here.gguf"}}, ""),
    ],
    ids=["echo", "echo beside a provider", "embedded", "another file"],
)
async def test_a_demonstration_is_called_one(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch, upstreams: dict[str, Any], says: str
) -> None:
    """Where nothing better than the echo or the embedded model was found, a line says so, and what to do."""
    monkeypatch.setattr(process, "why_unavailable", lambda _: None)
    async with open_app(make_config(upstreams), {name: Provider() for name in upstreams}) as served:
        _, _, models, *more = lines(served)
        if says:
            [line] = more
            assert line.startswith(f"DEMONSTRATION: {says}")
            assert "OPENAI_API_KEY" in line
            assert "default is " in models
        else:
            assert not more
