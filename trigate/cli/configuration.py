"""The configuration as `trigate serve` and `trigate check` read it, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from trigate.cli.failure import CommandFailed

if TYPE_CHECKING:
    from trigate.config.sections import Config, ServerConfig

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    help="A TOML file. Without it: $TRIGATE_CONFIG, else ./trigate.toml, else discovery.",
)


def gateway_environment(config_path: str | None) -> dict[str, str]:
    """Returns the environment with which a gateway reads the file that ``--config`` names.

    Args:
        config_path: None = the gateway reads the file that the process's environment names, or finds one.
    """
    given = {"TRIGATE_CONFIG": os.path.abspath(config_path)} if config_path is not None else {}
    return {**os.environ, **given}


def read_configuration(env: Mapping[str, str]) -> Config:
    """Reads the configuration as a gateway with this environment does.

    Raises:
        CommandFailed: The configuration is invalid; each problem has a line of its own.
    """
    from trigate.config import load
    from trigate.config.sections import ConfigError

    path = load.locate(env)
    try:
        if path is not None:  # as `read_config` does, without the gateway: the supervisor of workers has none
            return load.read(path, env=env)

        import trio

        from trigate.gateway.reload import read_config

        return trio.run(read_config, None, env)
    except ConfigError as error:
        raise CommandFailed(*error.lines) from None


def gateway_url() -> str:
    """Returns the URL of the gateway that this directory's configuration file describes, else of the default one. The
    rest of the file does not matter: its secrets may be missing here."""
    import tomllib

    from trigate.config import load
    from trigate.config.converter import convert
    from trigate.config.sections import ServerConfig

    server = None
    path = load.locate(os.environ)
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig")).get("server", {})
            server = convert(ServerConfig, table, "server", []) if isinstance(table, dict) else None
        except (OSError, ValueError, RecursionError):
            pass
    server = server or ServerConfig()
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    scheme = "https" if server.certfile is not None else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port or ServerConfig().port}"


def refuse_open_gateway(config: Config) -> None:
    """Refuses a configuration with which other machines could use the gateway without a key.

    Raises:
        CommandFailed: The gateway would listen on an address that is not loopback, has no key, and is not ``insecure``.
    """
    from trigate.config.checks import is_loopback

    if not (config.keys or config.admin.key) and not config.server.insecure and not is_loopback(config.server.host):
        raise CommandFailed(
            f"refusing to listen on {config.server.host} without a key: anybody who reaches it could spend your "
            "providers' money. Set TRIGATE_API_KEY (or [keys]), or pass --insecure."
        )


def check_certificate(server: ServerConfig) -> None:
    """Loads the certificate, if there is one.

    Raises:
        CommandFailed: The certificate or its key cannot be used.
    """
    if server.certfile is None:
        return
    from trigate.server.lifespan import StartupFailed
    from trigate.server.server import open_tls

    try:
        open_tls(server)
    except StartupFailed as failed:
        raise CommandFailed(str(failed)) from None


def check_authorities(config: Config) -> None:
    """Loads the certificate authorities, if an upstream needs them, as the gateway does at its start.

    Raises:
        CommandFailed: They cannot be used.
    """
    from trigate.config.sections import ConfigError
    from trigate.upstream.factory import TrustStore, http_transport

    trust = TrustStore()
    try:
        for name, upstream in config.upstreams.items():
            if upstream.kind == "openai":
                http_transport(name, upstream, trust=trust)
    except ConfigError as error:
        raise CommandFailed(str(error)) from None
