"""The command line, and the only place that exits the process.

Exit codes: 0 = done; 1 = it failed, and standard error says why; 2 = the command line itself is wrong; 130 = Ctrl-C;
129, 143 = another signal ended `status --watch`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from trigate import __version__

if TYPE_CHECKING:
    import httpx2

    from trigate.config.sections import Config, ServerConfig
    from trigate.server.listeners import Listening

_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    help="A TOML file. Left out: $TRIGATE_CONFIG, else ./trigate.toml, else what can be found.",
)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(130)  # click would make it 1
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly, as whoever read has
            _fail(error.strerror or str(error))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trigate")
def cli() -> None:
    """Trigate: an OpenAI-compatible gateway in which a request is one Trio nursery."""


def main(args: Sequence[str] | None = None, prog_name: str = "trigate") -> NoReturn:
    """Runs a command and exits the process."""
    cli.main(args=args, prog_name=prog_name)
    raise AssertionError("click exits")


def _fail(message: str) -> NoReturn:
    click.echo(f"trigate: {message}", err=True)
    sys.exit(1)


def _read(config_path: str | None) -> Config:
    """Reads the configuration as the gateway will."""
    import trio

    from trigate.config.load import locate
    from trigate.config.sections import ConfigError
    from trigate.gateway.reload import read_config

    if config_path is not None:
        os.environ["TRIGATE_CONFIG"] = os.path.abspath(config_path)  # the gateway and its workers read it again
    path = locate(os.environ)
    try:
        return trio.run(read_config, path, os.environ)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"trigate: {error.source}: {problem}", err=True)
        sys.exit(1)


# -- serve ------------------------------------------------------------------------------------------------------------


@cli.command()
@_config_option
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 = any free one.  [default: 18888]")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that share the port.  [default: 1]")
@click.option("--certfile", type=click.Path(exists=True, dir_okay=False), help="A PEM certificate chain: serve TLS.")
@click.option("--keyfile", type=click.Path(exists=True, dir_okay=False), help="Its private key.")
@click.option("--insecure", is_flag=True, help="Serve others than this machine without a key.")
@click.option("--fd", "fds", type=int, multiple=True, hidden=True)
@click.option("--parent-fd", type=int, hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--gate-fd", type=int, hidden=True)
def serve(
    config_path: str | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    certfile: str | None,
    keyfile: str | None,
    insecure: bool,
    fds: tuple[int, ...],
    parent_fd: int | None,
    ready_fd: int | None,
    gate_fd: int | None,
) -> None:
    """Serve the gateway until SIGTERM or Ctrl-C (once: running streams may finish; twice: now).

    Where a gateway of the same user serves the address already, it is taken over from, without a pause.
    """
    import attrs

    from trigate import logs

    if (certfile is None) != (keyfile is None):
        raise click.UsageError("--certfile and --keyfile go together.")
    logs.configure(os.environ)
    said: Any = {
        name: value
        for name, value in (
            ("host", host),
            ("port", port),
            ("workers", workers),
            ("certfile", certfile),
            ("keyfile", keyfile),
            ("insecure", insecure or None),
        )
        if value is not None
    }

    def adjust(config: Config) -> Config:
        return attrs.evolve(config, server=attrs.evolve(config.server, **said))

    config = adjust(_read(config_path))
    settings = config.server
    _refuse_open_door(config)
    if parent_fd is None:
        _try_certificate(settings)  # here, and not in each worker at each of its restarts
    if parent_fd is not None:
        gate = None if ready_fd is None or gate_fd is None else (ready_fd, gate_fd)
        _run_worker(settings, adjust, fds, parent_fd, gate)
    elif settings.workers == 1:
        _run_alone(settings, adjust)
    else:
        _supervise(settings, sys.argv[1:] or ["serve"])


def _refuse_open_door(config: Config) -> None:
    from trigate.asgi.auth import is_loopback

    if not config.keys and not config.server.insecure and not is_loopback(config.server.host):
        _fail(
            f"refusing to listen on {config.server.host} without a key: anybody who reaches it could spend your "
            "providers' money. Set TRIGATE_API_KEY (or [keys]), or say --insecure."
        )


def _try_certificate(settings: ServerConfig) -> None:
    from trigate.server.server import StartupFailed, open_tls

    try:
        open_tls(settings)
    except StartupFailed as failed:
        _fail(str(failed))


def _run_alone(settings: ServerConfig, adjust: Any) -> None:
    import trio

    listening = _listen(settings)
    predecessor = listening.predecessor

    async def take_over() -> None:
        await trio.lowlevel.checkpoint()
        if predecessor is not None:
            predecessor.succeed()

    _run_server(settings, adjust, listening.sockets, None, doors=listening.doors, before_accepting=take_over)


def _run_worker(
    settings: ServerConfig, adjust: Any, fds: Sequence[int], parent_fd: int, gate: tuple[int, int] | None
) -> None:
    from functools import partial

    from trigate.server.supervisor import sockets_from_fds, wait_gate

    before_accepting = partial(wait_gate, *gate) if gate is not None else None
    _run_server(settings, adjust, sockets_from_fds(fds), parent_fd, before_accepting=before_accepting)


def _listen(settings: ServerConfig) -> Listening:
    from trigate.server.listeners import ListenError, open_listening

    try:
        return open_listening(settings)
    except ListenError as error:
        _fail(str(error))


def _run_server(settings: ServerConfig, adjust: Any, sockets: Any, parent_fd: int | None, **more: Any) -> None:
    import resource
    from functools import partial

    import trio

    from trigate.asgi.application import calm_collector, create_app
    from trigate.errors import words_of
    from trigate.gateway.gateway import open_gateway
    from trigate.server.server import StartupFailed, run

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each stream takes two file descriptors
    app: Any = create_app(opener=lambda: open_gateway(adjust=adjust))  # Any: Quart types ASGI messages more narrowly
    calm_collector()
    try:
        finished = trio.run(partial(run, app, settings, sockets, parent_fd, **more))
    except* StartupFailed as failed:
        _fail(words_of(failed))
    sys.exit(0 if finished else 1)


def _supervise(settings: ServerConfig, arguments: Sequence[str]) -> None:
    from functools import partial

    import trio

    from trigate.errors import words_of
    from trigate.server.supervisor import WorkersFailed, supervise

    listening = _listen(settings)
    command = [sys.executable, "-m", "trigate", *arguments]
    run = partial(
        supervise,
        command,
        listening.sockets,
        settings,
        doors=listening.doors,
        predecessor=listening.predecessor,
    )
    try:
        finished = trio.run(run)
    except* WorkersFailed as failed:
        _fail(words_of(failed))
    sys.exit(0 if finished else 1)


# -- check ------------------------------------------------------------------------------------------------------------


@cli.command()
@_config_option
def check(config_path: str | None) -> None:
    """Validate the configuration, and print the upstreams, models and routes that it makes.

    Asks no provider anything (without a file it looks for model servers on this machine).
    Exit code 1 if something is wrong, with every problem on a line of its own.
    """
    from trigate.store import opening
    from trigate.upstream import echo
    from trigate.upstream.local_model import process

    config = _read(config_path)
    _try_certificate(config.server)
    click.echo(f"{config.source}: ok")
    click.echo(f"listens on {config.server.host}:{config.server.port}, {config.server.workers} worker(s)")
    nobody = "none (anybody may come: insecure)" if config.server.insecure else "none (this machine only)"
    click.echo(f"keys: {', '.join(config.keys) or nobody}")
    click.echo(f"store: {opening.describe_location(opening.location(config.store, os.environ))}")
    click.echo("upstreams:")
    for name, upstream in config.upstreams.items():
        where = f" {upstream.base_url}" if upstream.base_url else ""
        reason = config.disabled.get(name)
        if upstream.kind == "local":
            reason = process.why_unavailable(upstream.gguf)
        click.echo(f"  {name}: {upstream.kind}{where}" + (f" -- disabled: {reason}" if reason else ""))
        if upstream.models != "discover":
            for model in upstream.models:
                click.echo(f"    {name}/{model}")
        elif upstream.kind == "local":
            click.echo(f"    {name}/{process.model_id(upstream.gguf)}")
        elif upstream.kind == "echo":
            click.echo(f"    {name}/{echo.MODEL_ID}")
        elif upstream.kind == "openai":
            click.echo(f"    {name}/… (asked for its models while serving)")
    click.echo("routes:")
    for alias, model_config in config.models.items():
        click.echo(f"  {alias} -> {', then '.join(model_config.targets)}")
    if "default" not in config.models:
        click.echo("  default -> the first upstream that can serve")
    for name, hook in (config.hooks or {}).items():
        off = "" if hook.enabled else " -- disabled: switched off in the configuration"
        click.echo(f"hook /hooks/{name}: {hook.model}, verified by {hook.verification}{off}")
    for name, channel in config.channels.items():
        reason = config.disabled.get(f"channels.{name}")
        click.echo(f"channel {name}: {channel.type}, {channel.model}" + (f" -- disabled: {reason}" if reason else ""))
    _refuse_open_door(config)


# -- talking to a running gateway -------------------------------------------------------------------------------------


def _gateway_options(command: Any) -> Any:
    command = click.option(
        "--url", envvar="TRIGATE_URL", default="http://127.0.0.1:18888", show_default=True, help="The gateway."
    )(command)
    return click.option("--key", envvar="TRIGATE_API_KEY", help="Its key, if it wants one.  [env: TRIGATE_API_KEY]")(
        command
    )


def _ask(url: str, key: str | None, *paths: str, method: str = "GET") -> list[dict[str, Any]]:
    from trigate.cli.client import AskFailed, ask

    try:
        return ask(url, key, *paths, method=method)
    except AskFailed as failed:
        _fail(str(failed))


@cli.command()
@_gateway_options
def models(url: str, key: str | None) -> None:
    """List the models of a running gateway, one id a line."""
    from trigate.cli.client import no_gateway

    [body] = _ask(url, key, "/v1/models")
    if body.get("object") != "list":
        _fail(str(no_gateway(url)))
    for row in body["data"]:
        click.echo(row["id"])


@cli.command()
@_gateway_options
@click.option("--json", "as_json", is_flag=True, help="As the gateway says it, in JSON.")
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C; needs `pip install 'trigate[terminal]'`.")
@click.option("--interval", "interval_s", type=float, default=1.0, show_default=True, help="Of --watch, in seconds.")
@click.option("--cancel", "ended", metavar="ID", help="End the stream with this id; its client is told.")
def status(url: str, key: str | None, as_json: bool, watch: bool, interval_s: float, ended: str | None) -> None:
    """Show what a running gateway is doing: targets, streams in flight and their attempts, of all its workers."""
    from trigate.cli import client, status_view

    if watch and (as_json or ended is not None):
        raise click.UsageError("--watch goes neither with --json nor with --cancel.")
    if not 0.1 <= interval_s <= 3600:
        raise click.UsageError("--interval must be from 0.1 to 3600 seconds.")
    if watch:
        _watch(url, key, interval_s)
    if ended is not None:
        _end(url, key, ended, as_json)
        return
    status, streams = _ask(url, key, *status_view.PATHS)
    if "totals" not in status or not isinstance(status.get("streams"), dict):
        _fail(str(client.no_gateway(url)))
    if as_json:
        click.echo(json.dumps({**status, "streams": {**status["streams"], **streams}}, indent=2, ensure_ascii=False))
        return
    try:
        shown = status_view.overview(*status_view.read(status, streams))
    except ValueError as error:
        _fail(str(client.no_gateway(url, str(error))))
    _spare_encoding()
    if sys.stdout.isatty() and _has_rich():
        from trigate.cli import status_watch as watching

        watching.show(shown)
        return
    for line in status_view.written(shown):
        click.echo(line)


def _spare_encoding() -> None:
    """What the terminal has no letter for is a question mark there, and no failure."""
    import io

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _has_rich() -> bool:
    import importlib.util

    return importlib.util.find_spec("rich") is not None


def _watch(url: str, key: str | None, interval_s: float) -> NoReturn:
    import trio

    from trigate.cli.client import AskFailed

    if not _has_rich():
        _fail("--watch needs the package rich: pip install 'trigate[terminal]'")
    from trigate.cli import status_watch as watching

    if not watching.can_watch():
        _fail("--watch needs a terminal to show it on. Without --watch, it is shown once.")
    try:
        _spare_encoding()
        number = trio.run(watching.watch, url, key, interval_s)
    except AskFailed as failed:
        _fail(str(failed))
    sys.exit(128 + number)


def _end(url: str, key: str | None, stream: str, as_json: bool) -> None:
    from urllib.parse import quote

    [body] = _ask(url, key, f"/status/streams/{quote(stream, safe='')}", method="DELETE")
    if as_json:
        click.echo(json.dumps(body, indent=2, ensure_ascii=False))
    else:
        click.echo(f"{stream}: ended" if body.get("cancelled") else f"{stream}: was ending already")


@cli.command()
@_gateway_options
@click.argument("question")
@click.option("--model", default="default", show_default=True)
@click.option("--system", help="A system message.")
def chat(url: str, key: str | None, question: str, model: str, system: str | None) -> None:
    """Ask a running gateway QUESTION (- reads standard input); the answer streams to the terminal."""
    import httpx2

    from trigate.cli.client import AskFailed, message_of, settings, translated

    try:
        text = sys.stdin.read() if question == "-" else question
        text.encode()
    except UnicodeError:
        _fail("the question is not UTF-8.")
    messages = [{"role": "system", "content": system}] if system else []
    payload = {"model": model, "stream": True, "messages": [*messages, {"role": "user", "content": text}]}
    try:
        with (
            httpx2.Client(**settings(url, key)) as client,
            translated(url),
            client.stream("POST", "/v1/chat/completions", json=payload) as response,
        ):
            if response.status_code != 200:
                response.read()
                _fail(message_of(response))
            complete = False
            for said in _deltas(response):
                complete = said is None
                click.echo(said or "", nl=complete)  # which flushes
    except AskFailed as failed:
        _fail(str(failed))
    if not complete:
        _fail("the answer was cut off.")


def _deltas(response: httpx2.Response) -> Iterator[str | None]:
    """Yields the pieces of the answer's text, and None at its proper end."""
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
                _fail(str(error.get("message", error) if isinstance(error, dict) else error))
            for choice in value.get("choices", []):
                if (choice.get("delta") or {}).get("content"):
                    yield choice["delta"]["content"]
