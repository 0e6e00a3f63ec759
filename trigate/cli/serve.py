"""`trigate serve`: in one process, or as a supervisor and its workers.

With one worker, the command serves by itself. With more, it becomes a supervisor, which starts its own command line
again for each worker and adds the hidden options: descriptors of the listening sockets (``--fd``), of the pipe that
ends with the supervisor (``--parent-fd``), and of the gate at which workers wait until a hot restart may proceed
(``--ready-fd``, ``--gate-fd``).

The configuration is read here for ``[server]``, and again by the gateway of each process, also at each reload. Each
time, ``override`` applies the options of the command line to it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from trigate.cli.configuration import (
    check_certificate,
    config_option,
    gateway_environment,
    read_configuration,
    refuse_open_gateway,
)
from trigate.cli.failure import CommandFailed

if TYPE_CHECKING:
    import socket

    from trigate.config.sections import Config, ServerConfig
    from trigate.server.listeners import Listening

    Override = Callable[[Config], Config]


@click.command()
@config_option
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 = any free port.  [default: 18888]")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that share the port.  [default: 1]")
@click.option("--certfile", type=click.Path(exists=True, dir_okay=False), help="A PEM certificate chain; enables TLS.")
@click.option("--keyfile", type=click.Path(exists=True, dir_okay=False), help="The certificate's private key.")
@click.option("--insecure", is_flag=True, help="Serve other machines without a key.")
@click.option("--fd", "fds", type=int, multiple=True, hidden=True)
@click.option("--parent-fd", type=int, hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--gate-fd", type=int, hidden=True)
@click.pass_context
def serve(
    context: click.Context,
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
    """Serve the gateway until SIGTERM or Ctrl-C (once: running streams may finish; twice: at once).

    If a gateway of the same user already serves the address, this one replaces it without a pause.
    """
    import attrs

    from trigate import logs

    if (certfile is None) != (keyfile is None):
        raise click.UsageError("--certfile and --keyfile must be given together.")
    logs.configure(os.environ)
    options: dict[str, Any] = {  # Any: attrs checks the names, cattrs has checked the types of the others
        "host": host,
        "port": port,
        "workers": workers,
        "certfile": certfile,
        "keyfile": keyfile,
        "insecure": insecure or None,
    }
    given = {name: value for name, value in options.items() if value is not None}

    def override(config: Config) -> Config:
        return attrs.evolve(config, server=attrs.evolve(config.server, **given))

    env = gateway_environment(config_path)
    config = override(read_configuration(env))
    refuse_open_gateway(config)
    if parent_fd is not None:
        finished = _serve_as_worker(config.server, override, env, fds, parent_fd, ready_fd, gate_fd)
    else:
        check_certificate(config.server)  # once, and not in each worker at each restart
        if config.server.workers == 1:
            finished = _serve_alone(config.server, override, env)
        else:
            finished = _supervise(config.server, sys.argv[1:] or ["serve"])
    context.exit(0 if finished else 1)


def _serve_alone(server: ServerConfig, override: Override, env: Mapping[str, str]) -> bool:
    """Serves in this process.

    Returns:
        False if a second signal shortened the shutdown; so do the two functions below.
    """
    import trio

    listening = _listen(server)
    predecessor = listening.predecessor

    async def replace_predecessor() -> None:
        await trio.lowlevel.checkpoint()
        if predecessor is not None:
            predecessor.notify_ready()

    return _run_server(
        server,
        override,
        env,
        listening.sockets,
        handover_sockets=listening.handover_sockets,
        before_accepting=replace_predecessor,
    )


def _serve_as_worker(
    server: ServerConfig,
    override: Override,
    env: Mapping[str, str],
    fds: Sequence[int],
    parent_fd: int,
    ready_fd: int | None,
    gate_fd: int | None,
) -> bool:
    """Serves as one worker of a supervisor.

    Args:
        fds: Descriptors of the listening sockets.
        parent_fd: A descriptor that reaches its end of file when the supervisor exits.
        ready_fd: Where the worker reports that it is ready; None = nowhere.
        gate_fd: Where it waits then; None = it need not wait.
    """
    from functools import partial

    from trigate.server.supervisor import sockets_from_fds, wait_gate

    before_accepting = partial(wait_gate, ready_fd, gate_fd) if ready_fd is not None else None
    return _run_server(
        server, override, env, sockets_from_fds(fds), parent_fd=parent_fd, before_accepting=before_accepting
    )


def _supervise(server: ServerConfig, arguments: Sequence[str]) -> bool:
    """Starts workers and keeps them running.

    Args:
        arguments: The command line of a worker, without the hidden options. It has ``--config``, if it was given.
    """
    from functools import partial

    import trio

    from trigate.logs import message_of
    from trigate.server.supervisor import WorkersFailed, supervise

    listening = _listen(server)
    run = partial(
        supervise,
        [sys.executable, "-m", "trigate", *arguments],
        listening.sockets,
        server,
        handover_sockets=listening.handover_sockets,
        predecessor=listening.predecessor,
    )
    failure = ""
    try:
        return trio.run(run)
    except* WorkersFailed as failed:
        failure = message_of(failed)
    raise CommandFailed(failure)


def _listen(server: ServerConfig) -> Listening:
    from trigate.server.listeners import ListenError, open_listening

    try:
        return open_listening(server)
    except ListenError as error:
        raise CommandFailed(str(error)) from None


def _run_server(
    server: ServerConfig,
    override: Override,
    env: Mapping[str, str],
    sockets: Sequence[socket.socket],
    *,
    parent_fd: int | None = None,
    handover_sockets: Sequence[socket.socket] = (),
    before_accepting: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    from functools import partial

    import trio

    from trigate.asgi.application import create_app, tune_memory
    from trigate.gateway.gateway import open_gateway
    from trigate.logs import message_of
    from trigate.server.lifespan import StartupFailed
    from trigate.server.server import run

    _raise_file_limit()
    # Any: hypercorn's ASGI types are not those of the server
    app: Any = create_app(opener=lambda: open_gateway(env=env, adjust=override))
    tune_memory()
    failure = ""
    try:
        return trio.run(
            partial(
                run,
                app,
                server,
                sockets,
                parent_fd,
                handover_sockets=handover_sockets,
                before_accepting=before_accepting,
            )
        )
    except* StartupFailed as failed:
        failure = message_of(failed)
    raise CommandFailed(failure)


def _raise_file_limit() -> None:
    """Raises the soft limit of open files as far as the system allows: each stream takes two descriptors. Systems keep
    the soft limit low for programs that use ``select``, which Trigate does not."""
    import contextlib
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The hard limit may be infinite, which macOS does not grant, and its next bound is 10240.
    for wanted in (hard, 2**20, 2**16, 10240):
        if soft == resource.RLIM_INFINITY or (wanted != resource.RLIM_INFINITY and wanted <= soft):
            return
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
