"""`trigate doctor`: looks for what keeps a gateway from working, and says each finding in one sentence.

Each check yields `Finding`s. None of them changes anything: the gateway that makes the calls listens on a port of
loopback for the time of the calls, keeps its store in memory, and has no channels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from trigate.cli.configuration import (
    check_authorities,
    check_certificate,
    config_option,
    gateway_environment,
    read_configuration,
    refuse_open_gateway,
)
from trigate.cli.failure import CommandFailed

if TYPE_CHECKING:
    import httpx2

    from trigate.config.sections import Config

LEAST_KEY_CHARS = 16
"""A shorter key of the gateway can be guessed."""
LEAST_FREE_BYTES = 256 * 1024 * 1024
CERTIFICATE_DAYS = 14
"""How long before its end a certificate is reported."""
CLOCK_S = 60.0
"""How far the clock may be from that of a provider: signatures of webhooks are refused after five minutes."""
LIST_S = 10.0
"""How long upstreams may take to list their models."""
CALL_S = 60.0
_NO_CHAT = ("embed", "whisper", "tts", "dall-e", "moderation", "image", "audio", "realtime", "rerank", "transcribe")
"""Parts of the ids of models that do not chat."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: ``problem``: the gateway does not work with it; ``warning``: it works, but look at it.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


@click.command()
@config_option
@click.option("--offline", is_flag=True, help="Make no calls: they reach the providers, and cost a token or two each.")
@click.pass_context
def doctor(context: click.Context, config_path: str | None, offline: bool) -> None:
    """Check the configuration, keys, TLS, file limits, store, port, clock, and each upstream with one tiny call.

    Prints a sentence for each finding. The exit code is 1 if there is a problem.
    """
    env = gateway_environment(config_path)
    config = read_configuration(env)
    is_well = True
    for finding in findings(config, env, offline=offline):
        is_well &= finding.level != "problem"
        click.echo(f"{finding.level + ':':<9} {finding.text}")
    context.exit(0 if is_well else 1)


def findings(config: Config, env: Mapping[str, str], *, offline: bool) -> Iterator[Finding]:
    """Makes all checks, one after the other."""
    yield Finding("ok", f"The configuration is valid ({config.source}).")
    yield from _keys(config)
    yield from _tls(config)
    yield from _descriptors(config)
    yield from _store(config, env)
    yield from _port(config)
    for name, reason in config.disabled.items():
        yield Finding("warning", f"{name} is disabled: {reason}.")
    if offline:
        yield Finding("ok", "The upstreams and the clock were not checked (--offline).")
        return
    import trio

    yield from _clock(config)
    yield from trio.run(_upstreams, config, env)


def _keys(config: Config) -> Iterator[Finding]:
    try:
        refuse_open_gateway(config)
    except CommandFailed as failed:
        yield Finding("problem", f"`trigate serve` is {failed.messages[0]}")
        return
    if not config.keys:
        who = "everybody, since server.insecure is set" if config.server.insecure else "this machine only"
        yield Finding("warning" if config.server.insecure else "ok", f"No key is configured: the gateway serves {who}.")
    for name, key in config.keys.items():
        if len(str(key.secret.literal)) < LEAST_KEY_CHARS:
            yield Finding("warning", f"The key {name} has fewer than {LEAST_KEY_CHARS} characters: it can be guessed.")
    if config.keys:
        yield Finding("ok", f"Keys: {', '.join(config.keys)}.")


def _tls(config: Config) -> Iterator[Finding]:
    try:
        check_certificate(config.server)
        check_authorities(config)
    except CommandFailed as failed:
        yield Finding("problem", f"TLS: {failed.messages[0]}")
        return
    if config.server.certfile is None:
        return
    left_days = certificate_days(config.server.certfile, str(config.server.keyfile))
    if left_days < 0:
        yield Finding("problem", f"The certificate {config.server.certfile} has expired, or is not valid yet.")
    elif left_days < CERTIFICATE_DAYS:
        yield Finding("warning", f"The certificate {config.server.certfile} expires in {left_days:.0f} days.")
    else:
        yield Finding("ok", f"The certificate is valid for {left_days:.0f} more days.")


def certificate_days(certfile: str, keyfile: str) -> float:
    """Returns for how many days a certificate is still valid; negative = it is not.

    Python's ``ssl`` only shows a certificate that it has verified, so a client in memory verifies it, with itself as
    the authority.
    """
    import ssl
    import time

    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certfile, keyfile)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certfile)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:  # also the server's, once the client has refused
                return -1.0
    certificate: Any = ends[0].getpeercert()  # Any: its values are of several types
    return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400


def _descriptors(config: Config) -> Iterator[Finding]:
    from trigate.concurrency import descriptors

    pairs, wanted = descriptors.max_pairs(), config.limits.max_exchanges
    if pairs < wanted:
        yield Finding(
            "warning",
            f"The limit of open files (ulimit -n) leaves room for {pairs} streams, and limits.max_exchanges is "
            f"{wanted}: raise the limit, or lower the setting.",
        )
    else:
        yield Finding("ok", f"The limit of open files leaves room for {pairs} streams.")


def _store(config: Config, env: Mapping[str, str]) -> Iterator[Finding]:
    import shutil
    from pathlib import Path

    from trigate.store import opening

    where = opening.location(config.store, env)
    if where == opening.MEMORY:
        yield Finding("ok", "The store is in memory: sessions and records end with the process.")
        return
    path = Path(where)
    place = path if path.exists() else next(each for each in path.parents if each.exists())
    if not os.access(place, os.W_OK) or (place.is_dir() and place == path):
        yield Finding("problem", f"The store {where} cannot be written.")
        return
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        yield Finding("warning", f"The disk of the store {where} has only {free // 2**20} MiB left.")
        return
    yield Finding("ok", f"The store {where} can be written{'' if path.exists() else ', and is not there yet'}.")


def _port(config: Config) -> Iterator[Finding]:
    from trigate.server import listeners

    address = f"{config.server.host}:{config.server.port}"
    try:
        for each in listeners.open_sockets(config.server):
            each.close()
    except (OSError, listeners.ListenError) as error:
        if _answers(config):
            yield Finding("ok", f"A gateway already serves {address}; `trigate serve` would take over from it.")
        else:
            yield Finding("problem", f"{error}.")
        return
    yield Finding("ok", f"{address} is free.")


def _answers(config: Config) -> bool:
    """Whether a gateway serves the configured address."""
    import httpx2

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)
    scheme = "https" if config.server.certfile is not None else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}/health"
    try:
        answer = httpx2.get(url, timeout=2.0, trust_env=False, verify=False)
    except (httpx2.HTTPError, OSError):
        return False
    return answer.status_code == 200 and "x-request-id" in answer.headers


def _clock(config: Config) -> Iterator[Finding]:
    """Compares the clock with the ``Date`` of the first provider on the network."""
    import time
    from email.utils import parsedate_to_datetime
    from urllib.parse import urlsplit

    import httpx2

    from trigate.config.checks import is_loopback

    urls = [str(each.base_url) for each in config.upstreams.values() if each.base_url is not None]
    for url in urls:
        if is_loopback(urlsplit(url).hostname):
            continue
        with contextlib.suppress(httpx2.HTTPError, OSError, ValueError, KeyError):
            date = httpx2.head(url, timeout=5.0).headers["date"]  # any status has one
            off_s = time.time() - parsedate_to_datetime(date).timestamp()
            is_right = abs(off_s) <= CLOCK_S
            what = f"The clock is {abs(off_s):.0f} s {'behind' if off_s < 0 else 'ahead of'} that of {url}."
            yield Finding("ok" if is_right else "problem", what)
            return


# -- the calls --------------------------------------------------------------------------------------------------------


async def _upstreams(config: Config, env: Mapping[str, str]) -> list[Finding]:
    """Calls each upstream once, through a gateway of its own."""
    import trio

    names = [name for name in config.upstreams if name not in config.disabled]
    found: dict[str, Finding] = {}
    async with _serving(config, env) as client:
        listed = await _listed(client, names)

        async def call(name: str) -> None:
            upstream = config.upstreams[name]
            own = upstream.models if upstream.models != "discover" else listed.get(name, ())
            usable = [model for model in own if not any(part in model.lower() for part in _NO_CHAT)]
            model = upstream.default_model or next(iter(usable), None)
            found[name] = await _call(client, name, model)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(call, name)
    return [found[name] for name in names]


@contextlib.asynccontextmanager
async def _serving(config: Config, env: Mapping[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
    """Serves the configuration's upstreams on a port of loopback, and yields a client of it."""
    import functools

    import attrs
    import httpx2
    import trio

    from trigate.asgi.application import create_app
    from trigate.config.key_sections import AdminConfig
    from trigate.config.sections import ServerConfig, StoreConfig
    from trigate.config.values import Port
    from trigate.gateway.gateway import open_gateway
    from trigate.logs import log
    from trigate.server import listeners, server
    from trigate.store.opening import MEMORY

    own = ServerConfig(port=Port(0))
    without_keys = attrs.evolve(config, keys={}, admin=AdminConfig())
    quiet = attrs.evolve(without_keys, server=own, store=StoreConfig(path=MEMORY), models={}, channels={}, hooks={})
    log.sink = log.sink or (lambda level, event, values: None)  # the findings say it
    app: Any = create_app(opener=lambda: open_gateway(quiet, env=env))
    sockets = listeners.open_sockets(own)
    async with trio.open_nursery() as nursery:
        [url] = await nursery.start(functools.partial(server.serve, app, own, sockets=sockets))
        # without TLS verification: it would load the certificate authorities for nothing
        async with httpx2.AsyncClient(base_url=url, timeout=CALL_S, trust_env=False, verify=False) as client:
            yield client
        nursery.cancel_scope.cancel()


async def _listed(client: httpx2.AsyncClient, names: list[str]) -> dict[str, list[str]]:
    """The models of each upstream, once all have listed some, or after `LIST_S`."""
    import trio

    await trio.lowlevel.checkpoint()
    found: dict[str, list[str]] = {}
    with trio.move_on_after(LIST_S):
        while set(found) < set(names):
            for row in (await client.get("/v1/models")).json()["data"]:
                name, slash, model = row["id"].partition("/")
                if slash and name in names and model not in found.setdefault(name, []):
                    found[name].append(model)
            await trio.sleep(0.1)
    return found


async def _call(client: httpx2.AsyncClient, name: str, model: str | None) -> Finding:
    import httpx2
    import trio

    await trio.lowlevel.checkpoint()
    if model is None:
        return Finding("warning", f"{name} lists no model, so it was not called: set its default_model.")
    body = {"model": f"{name}/{model}", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    began_at = trio.current_time()
    try:
        answer = await client.post("/v1/chat/completions", json=body)
        message = "" if answer.status_code == 200 else str(answer.json()["error"]["message"])
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        return Finding("problem", f"{name} could not be called: {str(error) or type(error).__name__}.")
    took_s = trio.current_time() - began_at
    match answer.status_code:
        case 200:
            return Finding("ok", f"{name} answered in {took_s:.1f} s ({model}).")
        case 429:
            return Finding("warning", f"{name} refuses calls for now (429): {message}")
        case 401 | 403:
            return Finding("problem", f"{name} refuses the key ({answer.status_code}): {message}")
        case status:
            return Finding("problem", f"{name} failed ({status}, {model}): {message}")
