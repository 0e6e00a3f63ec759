"""The command line: the group of commands, and all of them but `serve`, which is in `trigate.cli.serve`.

The modules of the command line import only click and the standard library at their top; each command imports the rest
when it runs. So `trigate --help` is quick, and a supervisor does not hold the gateway, which it never runs, in memory.

Exit codes: 0 = success; 1 = failure (`CommandFailed`), and standard error has the reason; 2 = the command line is
invalid; 130 = Ctrl-C; 129 and 143 = SIGHUP and SIGTERM ended `status --watch`. Only `main` exits the process.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from trigate.cli.configuration import (
    check_authorities,
    check_certificate,
    config_option,
    gateway_environment,
    read_configuration,
    refuse_open_gateway,
)
from trigate.cli.doctor import doctor
from trigate.cli.failure import CommandFailed
from trigate.cli.init import completion, init, schema
from trigate.cli.keys import keys
from trigate.cli.reports import exchanges, usage
from trigate.cli.running_gateway import ask, failures_reported, not_a_gateway, url_option
from trigate.cli.serve import serve
from trigate.version import __version__

if TYPE_CHECKING:
    import httpx2

    from trigate.config.sections import Config, UpstreamConfig


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)  # click would exit with 1
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click exits without a message, because the reader has
            raise CommandFailed(error.strerror or str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trigate")
def cli() -> None:
    """Trigate: an OpenAI-compatible gateway in which a request is one Trio nursery."""


cli.add_command(serve)
cli.add_command(init)
cli.add_command(doctor)
cli.add_command(schema)
cli.add_command(completion)
cli.add_command(keys)
cli.add_command(exchanges)
cli.add_command(usage)


def main(args: Sequence[str] | None = None, prog_name: str = "trigate") -> NoReturn:
    """Runs a command and exits the process."""
    cli.main(args=args, prog_name=prog_name)
    raise AssertionError("click exits")


# -- check ------------------------------------------------------------------------------------------------------------


@cli.command()
@config_option
def check(config_path: str | None) -> None:
    """Validate the configuration, and print its upstreams, models and routes.

    Sends no request to a provider (without a file it probes for model servers on this machine).
    If `trigate serve` would refuse it, prints each problem on a line of its own and exits with code 1.
    """
    from trigate.store import opening

    config = read_configuration(gateway_environment(config_path))
    refuse_open_gateway(config)
    check_certificate(config.server)
    check_authorities(config)
    click.echo(f"{config.source}: ok")
    click.echo(f"listens on {config.server.host}:{config.server.port}, {config.server.workers} worker(s)")
    without_keys = "none (open to everybody: insecure)" if config.server.insecure else "none (this machine only)"
    if config.admin.key is not None:
        without_keys = "none in the configuration"
    click.echo(f"keys: {', '.join(config.keys) or without_keys}")
    if config.admin.key is not None:
        click.echo("admin: has a key, and makes others with `trigate keys`")
    click.echo(f"store: {opening.describe_location(opening.location(config.store, os.environ))}")
    click.echo("upstreams:")
    for name, upstream in config.upstreams.items():
        for line in _upstream_lines(name, upstream, config.disabled.get(name)):
            click.echo(line)
    for line in _route_lines(config):
        click.echo(line)


def _upstream_lines(name: str, upstream: UpstreamConfig, reason: str | None) -> Iterator[str]:
    """Describes an upstream, and its models.

    Args:
        reason: Why the configuration disables it.
    """
    from trigate.upstream import echo
    from trigate.upstream.local_model import process

    if upstream.kind == "local":
        reason = process.why_unavailable(upstream.gguf)
    address = f" {upstream.base_url}" if upstream.base_url else ""
    yield f"  {name}: {upstream.kind}{address}" + _disabled(reason)
    if upstream.models != "discover":
        for model in upstream.models:
            yield f"    {name}/{model}"
    elif upstream.kind == "local":
        yield f"    {name}/{process.model_id(upstream.gguf)}"
    elif upstream.kind == "echo":
        yield f"    {name}/{echo.MODEL_ID}"
    elif upstream.kind == "openai":
        yield f"    {name}/… (asked for its models while serving)"


def _route_lines(config: Config) -> Iterator[str]:
    """Describes the routes, the hooks and the channels."""
    yield "routes:"
    for alias, model in config.models.items():
        yield f"  {alias} -> {', then '.join(model.targets)}"
    if "default" not in config.models:
        yield "  default -> the first upstream that can serve"
    for name, hook in (config.hooks or {}).items():
        reason = None if hook.enabled else "switched off in the configuration"
        yield f"hook /hooks/{name}: {hook.model}, verified by {hook.verification}" + _disabled(reason)
    for name, channel in config.channels.items():
        reason = config.disabled.get(f"channels.{name}")
        yield f"channel {name}: {channel.type}, {channel.model}" + _disabled(reason)


def _disabled(reason: str | None) -> str:
    return f" -- disabled: {reason}" if reason else ""


# -- requests to a running gateway ------------------------------------------------------------------------------------


def _gateway_options(command: Any) -> Any:
    key = click.option("--key", envvar="TRIGATE_API_KEY", help="Its key, if it needs one.  [env: TRIGATE_API_KEY]")
    return key(url_option(command))


@cli.command()
@_gateway_options
def models(url: str, key: str | None) -> None:
    """List the models of a running gateway, one id per line."""
    [body] = ask(url, key, "/v1/models")
    if body.get("object") != "list":
        raise not_a_gateway(url)
    for model in body["data"]:
        click.echo(model["id"])


@cli.command()
@_gateway_options
@click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer, as JSON.")
@click.option("--watch", is_flag=True, help="Keep updating until Ctrl-C; needs `pip install 'trigate[terminal]'`.")
@click.option(
    "--interval", "interval_s", type=float, default=1.0, show_default=True, help="Seconds between updates of --watch."
)
@click.option("--cancel", "cancelled", metavar="ID", help="End the stream with this id; its client gets an error.")
@click.pass_context
def status(
    context: click.Context,
    url: str,
    key: str | None,
    as_json: bool,
    watch: bool,
    interval_s: float,
    cancelled: str | None,
) -> None:
    """Show the state of a running gateway and all its workers: targets, and streams in flight with their attempts."""
    from trigate.cli import status_view

    if watch and (as_json or cancelled is not None):
        raise click.UsageError("--watch cannot be combined with --json or --cancel.")
    if not 0.1 <= interval_s <= 3600:
        raise click.UsageError("--interval must be from 0.1 to 3600 seconds.")
    if watch:
        context.exit(_watch(url, key, interval_s))
    if cancelled is not None:
        _cancel(url, key, cancelled, as_json)
        return
    status, streams = ask(url, key, *status_view.PATHS)
    if "totals" not in status or not isinstance(status.get("streams"), dict):
        raise not_a_gateway(url)
    if as_json:
        click.echo(json.dumps({**status, "streams": {**status["streams"], **streams}}, indent=2, ensure_ascii=False))
        return
    try:
        shown = status_view.overview(*status_view.read(status, streams))
    except ValueError as error:
        raise not_a_gateway(url, str(error)) from None
    _replace_unencodable()
    if sys.stdout.isatty() and _has_rich():
        from trigate.cli import status_watch

        status_watch.show(shown)
        return
    for line in status_view.plain_lines(shown):
        click.echo(line)


def _replace_unencodable() -> None:
    """Makes a character that the terminal's encoding lacks a question mark, and not an error."""
    import io

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _has_rich() -> bool:
    import importlib.util

    return importlib.util.find_spec("rich") is not None


def _watch(url: str, key: str | None, interval_s: float) -> int:
    """Shows the state until a signal; returns the exit code for that signal."""
    import trio

    if not _has_rich():
        raise CommandFailed("--watch needs the package rich: pip install 'trigate[terminal]'")
    from trigate.cli import status_watch

    if not status_watch.can_watch():
        raise CommandFailed("--watch needs a terminal as its output. Without --watch, the state is shown once.")
    _replace_unencodable()
    with failures_reported():
        return 128 + trio.run(status_watch.watch, url, key, interval_s)


def _cancel(url: str, key: str | None, stream: str, as_json: bool) -> None:
    from urllib.parse import quote

    [body] = ask(url, key, f"/status/streams/{quote(stream, safe='')}", method="DELETE")
    if as_json:
        click.echo(json.dumps(body, indent=2, ensure_ascii=False))
    else:
        click.echo(f"{stream}: ended" if body.get("cancelled") else f"{stream}: was already ending")


@cli.command()
@_gateway_options
@click.argument("question")
@click.option("--model", default="default", show_default=True)
@click.option("--system", help="A system message.")
def chat(url: str, key: str | None, question: str, model: str, system: str | None) -> None:
    """Send QUESTION to a running gateway (- reads standard input), and stream the answer to the terminal."""
    import httpx2

    from trigate.cli.client import RequestFailed, client_settings, message_of, translated_errors

    try:
        text = sys.stdin.read() if question == "-" else question
        text.encode()
    except UnicodeError:
        raise CommandFailed("the question is not UTF-8.") from None
    messages = [{"role": "system", "content": system}] if system else []
    payload = {"model": model, "stream": True, "messages": [*messages, {"role": "user", "content": text}]}
    with (
        failures_reported(),
        httpx2.Client(**client_settings(url, key)) as client,
        translated_errors(url),
        client.stream("POST", "/v1/chat/completions", json=payload) as response,
    ):
        if response.status_code != 200:
            response.read()
            raise RequestFailed(message_of(response))
        is_complete = False
        for delta in _deltas(response):
            is_complete = delta is None
            click.echo(delta or "", nl=is_complete)  # also flushes
    if not is_complete:
        raise CommandFailed("the answer was truncated.")


def _deltas(response: httpx2.Response) -> Iterator[str | None]:
    """Yields the pieces of the answer's text, and None at the end of a complete answer.

    Raises:
        CommandFailed: The stream has an error event.
    """
    from trigate.openai import sse

    splitter = sse.EventSplitter(max_event_bytes=64 * 1024 * 1024)
    for piece in response.iter_bytes():
        for event in splitter.feed(piece):
            data = sse.data_of(event)
            if data is None:
                continue
            if data.strip() == b"[DONE]":
                yield None
                return
            value = json.loads(data)
            if value.get("error"):
                click.echo()
                error = value["error"]
                raise CommandFailed(str(error.get("message", error) if isinstance(error, dict) else error))
            for choice in value.get("choices", []):
                if (choice.get("delta") or {}).get("content"):
                    yield choice["delta"]["content"]
