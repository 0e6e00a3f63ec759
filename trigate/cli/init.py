"""`trigate init`, `trigate schema` and `trigate completion`: the files that Trigate writes for its users."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trigate.cli.failure import CommandFailed

if TYPE_CHECKING:
    from trigate.config.sections import Config, UpstreamConfig

SCHEMA_FILE = "trigate.schema.json"
"""What `init` writes beside the configuration, whose first line names it."""


@click.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True),
    default="trigate.toml",
    show_default=True,
    help="The file to write.",
)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
def init(output: str, force: bool) -> None:
    """Write a commented configuration for what is found: API keys in the environment, and local model servers.

    No key is written to the file: it names the variables. Beside it, a JSON Schema lets editors complete and check it.
    """
    import trio

    from trigate.config import json_schema
    from trigate.config.sections import ConfigError
    from trigate.gateway.reload import read_config

    path = Path(output)
    if path.exists() and not force:
        raise CommandFailed(f"{output} exists; --force replaces it.")
    try:
        # without a key of its own: it would be no part of the file
        config = trio.run(read_config, None, {**os.environ})
    except ConfigError as error:
        raise CommandFailed(*error.lines) from None
    path.write_text("".join(f"{line}\n" for line in configuration_lines(config)), encoding="utf-8")
    schema_path = path.parent / SCHEMA_FILE
    schema_path.write_text(json.dumps(json_schema.schema(), indent=2) + "\n", encoding="utf-8")
    click.echo(f"{path}: written, with {', '.join(config.upstreams)}")
    click.echo(f"{schema_path}: written; editors that know JSON Schemas for TOML complete and check the file")
    click.echo("next: trigate check, then trigate serve")


def configuration_lines(config: Config) -> Iterator[str]:
    """Returns the lines of a configuration file with the upstreams of a configuration."""
    yield f"#:schema ./{SCHEMA_FILE}"
    yield "# The configuration of Trigate. `trigate check` says whether it is valid, and where it is not."
    yield "# A running gateway reads it again when it changes."
    yield ""
    yield "[server]"
    yield '# host = "127.0.0.1"  # another address needs a key'
    yield "# port = 18888"
    yield ""
    yield "# The providers. A model is called as UPSTREAM/MODEL; `default` is the first one that can serve."
    for name, upstream in config.upstreams.items():
        yield ""
        yield f"[upstreams.{_key(name)}]"
        yield from _upstream_lines(upstream)
    first = next(iter(config.upstreams), "NAME")
    yield ""
    yield "# An alias, with a second target for when the first one fails:"
    yield "# [models.fast]"
    yield f'# targets = ["{first}/MODEL", "OTHER/MODEL"]'
    yield ""
    yield "# Keys of the gateway. Without one, it serves this machine only."
    yield "# [keys]"
    yield '# ada = { env = "ADA_KEY" }'


def _upstream_lines(upstream: UpstreamConfig) -> Iterator[str]:
    import attrs

    for field in attrs.fields(type(upstream)):
        value = getattr(upstream, field.name)
        default = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]
        if value != default:
            yield f"{field.name} = {_written(value)}"


def _written(value: Any) -> str:  # Any: a setting of any type
    """A setting as TOML has it."""
    from trigate.config.secrets import Secret

    match value:
        case Secret():
            name = "env" if value.env is not None else "file"
            return f"{{ {name} = {_written(getattr(value, name))} }}"
        case tuple():
            return f"[{', '.join(map(_written, value))}]"
        case Mapping():
            return "{ " + ", ".join(f"{_key(key)} = {_written(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # of strings, booleans and numbers, JSON is TOML


def _key(name: str) -> str:
    return name if name.isascii() and name.replace("-", "").replace("_", "").isalnum() else json.dumps(name)


@click.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors.

    A first line `#:schema ./trigate.schema.json` names the file that has it.
    """
    from trigate.config import json_schema

    click.echo(json.dumps(json_schema.schema(), indent=2))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    For bash: trigate completion bash > ~/.local/share/bash-completion/completions/trigate
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows these shells"
    click.echo(kind(context.find_root().command, {}, "trigate", "_TRIGATE_COMPLETE").source())
