"""``/v1/realtime`` over real sockets: a WebSocket through the gateway, under its own server and under hypercorn."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from tests.support.gateway import OpenServer, make_config
from tests.support.logs import Logs
from tests.support.processes import configuration, run_gateway
from trigate.asgi.application import GatewayApp
from trigate.config.sections import Config
from trigate.errors import CancelledByOperator

SESSION = json.dumps({"type": "session.created", "session": {"id": "sess_1"}})
DONE = json.dumps({"type": "response.done", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}})


class Peer:
    """One end of a WebSocket."""

    def __init__(self, stream: trio.SocketStream, kind: ConnectionType) -> None:
        self.stream = stream
        self.protocol = WSConnection(kind)
        self._events: list[Event] = []

    async def send(self, *events: Event) -> None:
        await self.stream.send_all(b"".join([self.protocol.send(event) for event in events]))

    async def next(self) -> Event | None:
        """The next event; None = the connection has ended."""
        with trio.fail_after(5):
            while not self._events:
                data = await self.stream.receive_some(65536)
                if not data:
                    return None
                self.protocol.receive_data(data)
                self._events += self.protocol.events()
            return self._events.pop(0)


@attrs.define(eq=False)
class Upstream:
    """An upstream with a script for each WebSocket.

    Attributes:
        asked: The handshakes.
        closed: How each ended: the code of the close frame, or None = without one.
    """

    script: Callable[[Peer, Request], Awaitable[None]]
    port: int = 0
    asked: list[Request] = attrs.field(factory=list)
    closed: list[int | None] = attrs.field(factory=list)
    news: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        peer = Peer(stream, ConnectionType.SERVER)
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                asked = await peer.next()
                assert isinstance(asked, Request)
                self.asked.append(asked)
                await self.script(peer, asked)
                while (event := await self._next(peer)) is not None:
                    if isinstance(event, CloseConnection):
                        self.closed.append(event.code)
                        with contextlib.suppress(Exception):
                            await peer.send(event.response())
                        break
                else:
                    self.closed.append(None)
        self.news.set()

    async def _next(self, peer: Peer) -> Event | None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            return await peer.next()
        return None


async def echo(peer: Peer, asked: Request) -> None:
    """Greets, and sends back what it gets until it gets ``end``."""
    await peer.send(AcceptConnection(subprotocol=asked.subprotocols[0] if asked.subprotocols else None))
    await peer.send(TextMessage(data=SESSION), Ping(payload=b"p"))
    while isinstance(event := await peer.next(), TextMessage | BytesMessage) or not isinstance(event, CloseConnection):
        if isinstance(event, TextMessage) and event.data == "end":
            await peer.send(TextMessage(data=DONE), TextMessage(data=DONE), CloseConnection(code=4001, reason="over"))
            return
        if isinstance(event, TextMessage | BytesMessage):
            await peer.send(event)
        if event is None:
            return
    await peer.send(event.response())
    PEERS_CLOSED.append(event.code)


PEERS_CLOSED: list[int] = []


@contextlib.asynccontextmanager
async def open_upstream(script: Callable[[Peer, Request], Awaitable[None]]) -> AsyncIterator[Upstream]:
    """Runs an upstream."""
    upstream = Upstream(script)
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        upstream.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, upstream.serve, [listener])
        yield upstream
        nursery.cancel_scope.cancel()


def _config(*ports: int, **sections: Any) -> Config:
    upstreams = {
        f"u{at}": {"base_url": f"http://127.0.0.1:{port}/v1", "models": ["rt"], "api_key": "the upstream's own key"}
        for at, port in enumerate(ports)
    }
    models = {"talk": {"targets": [f"u{at}/rt" for at in range(len(ports))]}}
    return make_config(upstreams, models=models, **sections)


@contextlib.asynccontextmanager
async def open_client(
    port: int | None,
    *,
    target: str = "/v1/realtime?model=talk",
    subprotocols: list[str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Peer, Event | None]]:
    """Shakes hands with a gateway; yields the client and the answer."""
    async with await trio.open_tcp_stream("127.0.0.1", port or 0) as stream:
        client = Peer(stream, ConnectionType.CLIENT)
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await client.send(
            Request(host=f"127.0.0.1:{port}", target=target, subprotocols=subprotocols or [], extra_headers=extra)
        )
        yield client, await client.next()


async def _assert_clean(app: GatewayApp) -> None:
    with trio.fail_after(5):
        await app.gateway.live.wait_none_left()
    for upstream in app.gateway.generations.current.upstreams.values():
        assert upstream.in_flight == 0
        assert upstream.transport.statistics().open == 0  # type: ignore[attr-defined]


async def test_a_conversation(open_server: OpenServer, logs: Logs) -> None:
    """Texts and bytes in both directions, with the upstream's model, key and subprotocol; the upstream closes."""
    async with open_upstream(echo) as upstream, open_server(_config(upstream.port)) as (http, app):
        offered = ["realtime", "openai-insecure-api-key.whatever"]
        async with open_client(http.base_url.port, subprotocols=offered) as (client, accepted):
            assert isinstance(accepted, AcceptConnection)
            assert accepted.subprotocol == "realtime"
            assert dict(accepted.extra_headers)[b"x-trigate-upstream"] == b"u0"
            assert (await client.next()).data == SESSION  # type: ignore[union-attr]
            await client.send(
                TextMessage(data="hällo"), BytesMessage(data=b"\x00\xff"), TextMessage(data="x" * 100_000)
            )
            got = [await client.next() for _ in range(2)]
            assert [each.data for each in got] == ["hällo", b"\x00\xff"]  # type: ignore[union-attr]
            text = ""
            while len(text) < 100_000:
                text += (await client.next()).data  # type: ignore[union-attr]
            await client.send(TextMessage(data="end"))
            assert [(await client.next()).data for _ in range(2)] == [DONE, DONE]  # type: ignore[union-attr]
            closed = await client.next()
            assert isinstance(closed, CloseConnection)
            assert (closed.code, closed.reason) == (4001, "over")
        [asked] = upstream.asked
        assert asked.target == "/v1/realtime?model=rt"
        assert asked.subprotocols == ["realtime"]
        headers = dict(asked.extra_headers)
        assert headers[b"authorization"] == b"Bearer the upstream's own key"
        await _assert_clean(app)
        [line] = logs.named("exchange")
        assert (line["outcome"], line["target"], line["model"]) == ("complete", "u0/rt", "talk")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (6, 8)


async def test_the_client_closes(open_server: OpenServer, logs: Logs) -> None:
    """Its code goes to the upstream, and the exchange is complete."""
    PEERS_CLOSED.clear()
    async with (
        open_upstream(echo) as upstream,
        open_server(_config(upstream.port)) as (http, app),
        open_client(http.base_url.port) as (client, _),
    ):
        await client.next()
        await client.send(CloseConnection(code=4000))
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert closed.code == 4000
        await _assert_clean(app)
    assert PEERS_CLOSED == [4000]
    assert logs.named("exchange")[0]["outcome"] == "complete"


async def test_the_client_leaves(open_server: OpenServer, logs: Logs) -> None:
    """The upstream's connection is closed at once; the exchange is cancelled."""
    async with open_upstream(echo) as upstream, open_server(_config(upstream.port)) as (http, app):
        async with open_client(http.base_url.port) as (client, _):
            await client.next()
        with trio.fail_after(1):
            await upstream.news.wait()
        await _assert_clean(app)
    assert logs.named("exchange")[0]["outcome"] == "cancelled"


async def test_the_upstream_breaks_off(open_server: OpenServer) -> None:
    """The client gets an event of the type error, and the code 1011."""

    async def cut(peer: Peer, asked: Request) -> None:
        await peer.send(AcceptConnection())
        await peer.stream.aclose()

    async with (
        open_upstream(cut) as upstream,
        open_server(_config(upstream.port)) as (http, app),
        open_client(http.base_url.port) as (client, _),
    ):
        event = await client.next()
        assert isinstance(event, TextMessage)
        told = json.loads(event.data)
        assert (told["type"], told["error"]["code"]) == ("error", "upstream_truncated")
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert (closed.code, closed.reason) == (1011, "upstream_truncated")
        await _assert_clean(app)


async def test_an_operator_ends_it(open_server: OpenServer) -> None:
    """As any exchange."""
    async with (
        open_upstream(echo) as upstream,
        open_server(_config(upstream.port)) as (http, app),
        open_client(http.base_url.port) as (client, _),
    ):
        await client.next()
        [exchange] = app.gateway.live
        exchange.cancel(CancelledByOperator("enough"))
        event = await client.next()
        assert isinstance(event, TextMessage)
        assert json.loads(event.data)["error"]["code"] == "stream_cancelled"
        await _assert_clean(app)


async def test_its_key_is_revoked(open_server: OpenServer) -> None:
    """The session ends with an error that says so."""
    async with open_upstream(echo) as upstream:
        config = _config(upstream.port, admin={"key": "the-key-of-the-admin"})
        async with open_server(config) as (http, app):
            _, secret = await app.gateway.virtual_keys.create("eve", {})
            headers = {"authorization": f"Bearer {secret}"}
            async with open_client(http.base_url.port, headers=headers) as (client, _):
                await client.next()
                await app.gateway.virtual_keys.revoke("eve")
                event = await client.next()
                assert isinstance(event, TextMessage)
                assert json.loads(event.data)["error"]["code"] == "key_revoked"
            async with open_client(http.base_url.port, headers=headers) as (_, answer):
                assert isinstance(answer, RejectConnection)
                assert answer.status_code == 401
            await _assert_clean(app)


async def test_a_refusal_of_the_upstream(open_server: OpenServer) -> None:
    """Its status and its error; with a second upstream that accepts, that one is used."""

    async def refuse(peer: Peer, asked: Request) -> None:
        body = b'{"error":{"message":"no such model","code":"x"}}'
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        status = 404 if "rt" in asked.target else 503
        await peer.send(RejectConnection(status_code=status, headers=headers, has_body=True), RejectData(data=body))

    async with open_upstream(refuse) as first, open_upstream(echo) as second:
        async with (
            open_server(_config(first.port)) as (http, app),
            open_client(http.base_url.port) as (client, answer),
        ):
            assert isinstance(answer, RejectConnection)
            assert answer.status_code == 404
            body = await client.next()
            assert isinstance(body, RejectData)
            assert json.loads(bytes(body.data))["error"]["message"] == "no such model"
            await _assert_clean(app)
        async with (
            open_server(_config(9, second.port)) as (http, app),  # nothing listens on the first port
            open_client(http.base_url.port) as (client, answer),
        ):
            assert isinstance(answer, AcceptConnection)
            assert dict(answer.extra_headers)[b"x-trigate-attempts"] == b"2"


@pytest.mark.parametrize(
    ("target", "headers", "status", "code"),
    [
        ("/v1/responses", {}, 426, "websocket_refused"),
        ("/v1/realtime?model=talk", {}, 401, "invalid_api_key"),
        ("/v1/realtime?model=nope", {"authorization": "Bearer key-number-one"}, 404, "model_not_found"),
        ("/v1/realtime", {"authorization": "Bearer key-number-one", "x-trigate-upstream": "v"}, 404, "not_found"),
    ],
)
async def test_refusals(open_server: OpenServer, target: str, headers: dict[str, str], status: int, code: str) -> None:
    """Each is a status with an error in the body."""
    config = _config(9, keys={"one": "key-number-one"})
    async with (
        open_server(config) as (http, app),
        open_client(http.base_url.port, target=target, headers=headers) as (client, answer),
    ):
        assert isinstance(answer, RejectConnection)
        assert answer.status_code == status
        body = await client.next()
        assert isinstance(body, RejectData)
        assert json.loads(bytes(body.data))["error"]["code"] == code
        await _assert_clean(app)


async def test_the_key_of_a_browser(open_server: OpenServer) -> None:
    """A page cannot set a header: it sends the key as a subprotocol."""
    async with open_upstream(echo) as upstream:
        config = _config(upstream.port, keys={"one": "key-number-one"})
        async with open_server(config) as (http, app):
            for key, kind in (("key-number-one", AcceptConnection), ("key-number-two", RejectConnection)):
                offered = ["realtime", f"openai-insecure-api-key.{key}"]
                async with open_client(http.base_url.port, subprotocols=offered) as (_, answer):
                    assert isinstance(answer, kind)
            await _assert_clean(app)


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["trio", "asyncio"])
async def test_under_hypercorn(tmp_path: Path, worker: str) -> None:
    """The same conversation under a foreign server, and the same end."""
    command = (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "-k", worker, "trigate:app")
    async with open_upstream(echo) as upstream:
        config = configuration(f"http://127.0.0.1:{upstream.port}", more='[models.talk]\ntargets = ["mock/rt"]')
        manager = run_gateway(
            config.replace('kind = "openai"', 'kind = "openai"\nmodels = ["hello"]'), tmp_path, command=command
        )
        gateway = await trio.to_thread.run_sync(manager.__enter__)
        try:
            port = int(gateway.url.rpartition(":")[2])
            for last in ("end", "leave"):
                async with open_client(port, subprotocols=["realtime"]) as (client, accepted):
                    assert isinstance(accepted, AcceptConnection)
                    assert (await client.next()).data == SESSION  # type: ignore[union-attr]
                    await client.send(TextMessage(data="hi"), BytesMessage(data=b"\x00"))
                    got = [await client.next() for _ in range(2)]
                    assert [each.data for each in got] == ["hi", b"\x00"]  # type: ignore[union-attr]
                    if last == "end":
                        await client.send(TextMessage(data="end"))
                        events = [await client.next() for _ in range(3)]
                        assert isinstance(events[-1], CloseConnection)
                        assert events[-1].code == 4001
            with trio.fail_after(2):
                while len(upstream.closed) < 2:
                    await upstream.news.wait()
                    await trio.lowlevel.checkpoint()
            async with open_client(port, target="/v1/realtime?model=nope") as (_, answer):
                assert isinstance(answer, RejectConnection)
                assert answer.status_code == 404
            assert "Traceback" not in gateway.log()
        finally:
            manager.__exit__(None, None, None)
