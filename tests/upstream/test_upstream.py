"""One upstream: its queue, its replies, and the errors that can happen to them."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import httpx2
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import make_config
from tests.upstream.socket_server import answers, open_pool
from trigate.config import structure as configuration
from trigate.config.sections import Config
from trigate.errors import (
    GatewayError,
    Overloaded,
    ProtocolViolation,
    Rejected,
    Throttled,
    Truncated,
    Unavailable,
    UpstreamTimeout,
)
from trigate.routing.routes import Known
from trigate.upstream.connect import NoDescriptor
from trigate.upstream.error_body import rejection
from trigate.upstream.local_model.process import LocalModel, LocalModelUnavailable
from trigate.upstream.reply import Httpx2Source, Reply
from trigate.upstream.response_parser import NotHttp
from trigate.upstream.upstream import Upstream

KEY = "sk-very-secret-0123456789"

Step = bytes | BaseException | None
Act = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


class Body(httpx2.AsyncByteStream):
    """A body in steps: bytes are received, exceptions are raised, and None never ends."""

    def __init__(self, *steps: Step, close_takes_s: float = 0.0) -> None:
        self.steps = list(steps)
        self.close_takes_s = close_takes_s
        self.given = False
        self.closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        if step is None:
            await trio.sleep_forever()
        assert step is not None
        return step

    async def aclose(self) -> None:
        await trio.sleep(self.close_takes_s)
        self.closed = True


class Script(httpx2.AsyncBaseTransport):
    """A transport that runs a script, and keeps the requests."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.requests: list[httpx2.Request] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return await self.act(request)


def _answering(
    *steps: Step, status: int = 200, headers: dict[str, str] | None = None, close_takes_s: float = 0.0
) -> tuple[Script, Body]:
    body = Body(*steps, close_takes_s=close_takes_s)

    async def act(request: httpx2.Request) -> httpx2.Response:
        await trio.lowlevel.checkpoint()
        body.given = True
        return httpx2.Response(status, headers=headers, stream=body)

    return Script(act), body


def _raising(error: Exception) -> Script:
    async def act(request: httpx2.Request) -> httpx2.Response:
        await trio.lowlevel.checkpoint()
        raise error

    return Script(act)


async def _hang(request: httpx2.Request) -> httpx2.Response:
    await trio.sleep_forever()
    raise AssertionError


def _config(*, limits: dict[str, float] | None = None, **settings: object) -> Config:
    table = {"base_url": "http://127.0.0.1:9100/v1", **settings}
    return configuration.structure({"upstreams": {"mock": table}, "limits": limits or {}}, env={}, source="test")


def _upstream(transport: httpx2.AsyncBaseTransport, **settings: Any) -> Upstream:
    return Upstream("mock", _config(**settings), transport)


async def _error_of(
    body: bytes, *, status: int, headers: dict[str, str] | None = None, **settings: Any
) -> GatewayError:
    upstream = _upstream(_answering(body, status=status, headers=headers)[0], **settings)
    async with upstream.open("POST", "/chat/completions") as reply:
        return await upstream.error_of(reply)


# -- a request and its reply ------------------------------------------------------------------------------------------


async def test_a_request_and_its_reply() -> None:
    """The request goes to the base URL with the secrets, and asks for identity; the reply comes piece by piece."""
    script, body = _answering(b"a", b"", b"bc", headers={"Content-Type": "Text/Event-Stream; charset=utf-8", "x": "y"})
    upstream = _upstream(script, api_key=KEY, headers={"X-Team": "blue"})
    phases: list[str] = []
    async with upstream.open(
        "POST", "/chat/completions", b"{}", headers={"content-type": "application/json"}, on_phase=phases.append
    ) as reply:
        assert (reply.status, reply.content_type, reply.headers["x"]) == (200, "text/event-stream", "y")
        assert upstream.in_flight == 1
        assert [await reply.receive() for _ in range(4)] == [b"a", b"bc", None, None]
    [request] = script.requests
    assert (request.method, str(request.url)) == ("POST", "http://127.0.0.1:9100/v1/chat/completions")
    assert await request.aread() == b"{}"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-team"] == "blue"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == "2"
    assert phases == ["queued", "connecting"]
    assert body.closed
    assert upstream.in_flight == 0


@pytest.mark.parametrize(
    ("base", "path"), [("", "/v1/messages"), ("/", "/v1/messages"), ("/api/v1", "/messages?beta=1")]
)
async def test_no_path_is_assumed(base: str, path: str) -> None:
    """Any path is sent below the path of the base URL, as it is given."""
    async with open_pool(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")) as (server, transport):
        upstream = _upstream(transport, base_url=f"http://{server.origin}{base}", api_key=KEY)
        async with upstream.open("POST", path, b"{}", headers={"x-version": "1"}) as reply:
            assert await reply.read(10) == b"ok"
    head = server.requests[0].decode().split("\r\n")
    assert head[0] == f"POST {base.rstrip('/')}{path} HTTP/1.1"
    assert {f"host: {server.origin}", f"authorization: Bearer {KEY}", "x-version: 1", "content-length: 2"} <= {*head}


async def test_a_reply_without_a_content_type() -> None:
    """The content type of a reply without one is empty."""
    async with _upstream(_answering(b"x")[0]).open("GET", "/models") as reply:
        assert reply.content_type == ""


@pytest.mark.parametrize(("timeout_s", "connect"), [(2, 2.0), (0, None)])
async def test_the_transport_is_told_the_connect_timeout_only(timeout_s: float, connect: float | None) -> None:
    """The connect timeout is the only limit that the transport gets; 0 means none."""
    script, _ = _answering()
    async with _upstream(script, connect_timeout_s=timeout_s).open("GET", "/models"):
        pass
    assert script.requests[0].extensions["timeout"] == {"connect": connect}


async def test_a_compressed_reply_is_decoded() -> None:
    """A reply that is compressed unasked is decoded; a damaged one is an error of the provider."""
    packed = gzip.compress(b"hello" * 100)
    headers = {"content-encoding": "gzip"}
    async with _upstream(_answering(packed[:20], packed[20:], headers=headers)[0]).open("GET", "/") as reply:
        assert await reply.read(10_000) == b"hello" * 100
    for body, other_headers, error in (
        (b"not gzip", headers, ProtocolViolation),
        (packed[:-9], headers, Truncated),
        (b"x", {"content-encoding": "br"}, ProtocolViolation),
    ):
        async with _upstream(_answering(body, headers=other_headers)[0]).open("GET", "/") as reply:
            with pytest.raises(error, match="mock"):
                await reply.read(10_000)


async def test_a_compressed_flood_is_bounded() -> None:
    """A small body that inflates to a large one is refused at the bound."""
    packed = gzip.compress(bytes(20_000_000), compresslevel=1)
    async with _upstream(_answering(packed, headers={"content-encoding": "gzip"})[0]).open("GET", "/") as reply:
        with pytest.raises(ProtocolViolation, match="more than 100000 bytes"):
            await reply.read(100_000)
        assert len(await reply.receive() or b"") <= 1024 * 1024


async def test_read_is_bounded() -> None:
    """A body of exactly the bound is read; one byte more is refused without reading on."""
    async with _upstream(_answering(b"12345", b"67890")[0]).open("GET", "/") as reply:
        assert await reply.read(10) == b"1234567890"
    script, body = _answering(b"12345", b"67890", b"never read")
    async with _upstream(script).open("GET", "/") as reply:
        with pytest.raises(ProtocolViolation, match="more than 9 bytes"):
            await reply.read(9)
    assert body.steps == [b"never read"]
    assert body.closed


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "translated"),
    [
        (httpx2.ConnectTimeout("slow"), UpstreamTimeout),
        (httpx2.ConnectError("refused"), Unavailable),
        (httpx2.ConnectError(""), Unavailable),
        (httpx2.RemoteProtocolError("not HTTP"), ProtocolViolation),
        (httpx2.LocalProtocolError("odd"), Unavailable),
        (httpx2.ReadError(""), Unavailable),
        (httpx2.WriteError(""), Unavailable),
        (httpx2.CloseError(""), Unavailable),
        (httpx2.ReadTimeout(""), Unavailable),
        (httpx2.PoolTimeout(""), Unavailable),
        (httpx2.ProxyError("407"), Unavailable),
        (httpx2.UnsupportedProtocol("x"), Unavailable),
    ],
    ids=repr,
)
async def test_failures_before_the_reply(raised: Exception, translated: type[GatewayError]) -> None:
    """Each exception of a transport before a reply becomes a gateway error that names the upstream and has a cause."""
    upstream = _upstream(_raising(raised))
    with pytest.raises(translated, match="mock") as caught:
        async with upstream.open("POST", "/chat/completions"):
            pytest.fail("there is no reply")
    assert type(caught.value) is translated
    assert caught.value.__cause__ is raised
    assert caught.value.retryable
    assert upstream.in_flight == 0
    if isinstance(caught.value, UpstreamTimeout):
        assert caught.value.phase == "connect"


async def test_no_descriptor_for_a_connection() -> None:
    """It is a failure of the gateway, which says when to try again, and nothing that another target could avoid."""
    upstream = _upstream(_raising(NoDescriptor("the process can open no other connection")))
    with pytest.raises(Overloaded, match="mock") as caught:
        async with upstream.open("POST", "/chat/completions"):
            pytest.fail("there is no reply")
    assert (caught.value.blame, caught.value.retryable, caught.value.retry_after_s) == ("gateway", False, 1.0)
    assert upstream.in_flight == 0


@pytest.mark.parametrize(
    ("raised", "translated"),
    [
        (httpx2.RemoteProtocolError("peer closed connection without sending complete message body"), Truncated),
        (NotHttp("Invalid character in chunk size"), ProtocolViolation),
        (httpx2.ReadError(""), Truncated),
        (httpx2.ReadTimeout(""), Truncated),
    ],
    ids=repr,
)
async def test_failures_in_the_reply(raised: Exception, translated: type[GatewayError]) -> None:
    """After the head of a reply, a broken connection is a truncated answer, and other bytes than HTTP are a violation;
    what came before was received."""
    script, body = _answering(b"a", raised)
    upstream = _upstream(script)
    async with upstream.open("POST", "/chat/completions") as reply:
        assert await reply.receive() == b"a"
        with pytest.raises(translated, match="mock") as caught:
            await reply.receive()
    assert type(caught.value) is translated
    assert caught.value.__cause__ is raised
    assert body.closed
    assert upstream.in_flight == 0


async def test_a_defect_is_not_the_provider_s() -> None:
    """Any other exception than a transport's is a defect, and is not translated."""
    with pytest.raises(ZeroDivisionError):
        async with _upstream(_raising(ZeroDivisionError())).open("GET", "/"):
            pytest.fail("there is no reply")
    script, body = _answering(b"a")
    with pytest.raises(ZeroDivisionError):
        async with _upstream(script).open("GET", "/"):
            raise ZeroDivisionError
    assert body.closed


OPENAI_ERROR = (
    b'{"error": {"message": "no such tool", "type": "invalid_request_error", "param": "tools", "code": null}}'
)


@pytest.mark.parametrize(
    ("status", "body", "kind", "answered", "says"),
    [
        (400, OPENAI_ERROR, Rejected, 400, "no such tool"),
        (401, OPENAI_ERROR, Rejected, 401, "no such tool"),
        (404, b"<html>Not found</html>", Rejected, 404, "The upstream mock answered 404 with a page: Not found"),
        (422, b'{"detail": "bad"}', Rejected, 422, "bad"),
        (429, OPENAI_ERROR, Throttled, 429, "no such tool"),
        (429, b"", Throttled, 429, "The upstream mock answered 429."),
        (500, OPENAI_ERROR, Unavailable, 502, "failed (500): no such tool"),
        (502, b"<html>Bad gateway</html>", Unavailable, 502, "The upstream mock failed (502)"),
        (503, OPENAI_ERROR, Unavailable, 503, "down (503): no such tool"),
        (504, b"", Unavailable, 502, "failed (504)"),
        (529, b'{"message": "overloaded"}', Unavailable, 503, "down (529): overloaded"),
        (302, b"", ProtocolViolation, 502, "status 302"),
        (101, b"", ProtocolViolation, 502, "status 101"),
        (999, b"", ProtocolViolation, 502, "status 999"),
    ],
)
async def test_error_replies(status: int, body: bytes, kind: type[GatewayError], answered: int, says: str) -> None:
    """An error reply becomes an error of its kind, with the status for the client and the provider's message; a 4xx
    body in OpenAI's shape goes to the client unchanged."""
    error = await _error_of(body, status=status)
    assert type(error) is kind
    assert error.status == answered
    assert says in error.message
    assert (error.to_response()[2] == body) == (body == OPENAI_ERROR and status < 500)


async def test_retry_headers_go_along() -> None:
    """The provider's retry headers are passed on; its other headers are not."""
    headers = {"retry-after": "7", "retry-after-ms": "6500", "x-ratelimit-reset-tokens": "6s", "set-cookie": "a=b"}
    for status in (429, 408):
        sent = dict((await _error_of(b"", status=status, headers=headers)).headers)
        assert sent == {
            b"retry-after": b"7",
            b"retry-after-ms": b"6500",
            b"x-ratelimit-reset-tokens": b"6s",
            b"x-should-retry": b"false",
        }


async def test_a_time_to_come_back_that_is_none_stays_here() -> None:
    """A retry header that cannot be parsed is not passed on."""
    headers = {"retry-after": "soon", "x-ratelimit-reset-tokens": "6s"}
    sent = dict((await _error_of(b"", status=429, headers=headers)).headers)
    assert sent == {b"x-ratelimit-reset-tokens": b"6s", b"x-should-retry": b"false"}


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_secrets_are_redacted(status: int) -> None:
    """If a provider quotes a secret, the client gets it redacted."""
    body = json.dumps({"error": {"message": f"Incorrect key: {KEY} and {KEY}-2"}}).encode()
    error = await _error_of(body, status=status, api_key=KEY, headers={"x-org": f"{KEY}-2"})
    for shown in (error.message, repr(error), error.to_response()[2].decode(), error.to_frame().decode()):
        assert KEY not in shown
        assert "[redacted]" in shown


async def test_a_secret_of_another_upstream_is_redacted() -> None:
    """Also where one provider's message quotes it."""
    body = json.dumps({"error": {"message": f"Incorrect key: {KEY}"}}).encode()
    config = make_config({"up": {"api_key": "another-key-of-its-own"}, "other": {"api_key": KEY}})
    upstream = Upstream("up", config, _answering(body, status=400)[0])
    async with upstream.open("POST", "/chat/completions") as reply:
        error = await upstream.error_of(reply)
    assert KEY not in error.to_response()[2].decode()


@pytest.mark.parametrize("key", ["e", "error", "none"])
async def test_a_short_key_redacts_nothing(key: str) -> None:
    """A short key, as is common for local servers, is not redacted: it may be an ordinary word of the message."""
    body = b'{"error": {"message": "error: none of these"}}'
    error = await _error_of(body, status=400, api_key=key)
    assert error.to_response()[2] == body


@pytest.mark.parametrize(
    "steps", [(b'{"error"', httpx2.ReadError("")), (b"x" * 600_000, b"x" * 600_000)], ids=["cut", "too long"]
)
async def test_an_error_reply_that_cannot_be_read(steps: tuple[Step, ...]) -> None:
    """If the body of an error reply is truncated or larger than 1 MiB, the status alone decides."""
    upstream = _upstream(_answering(*steps, status=404)[0])
    async with upstream.open("GET", "/") as reply:
        error = await upstream.error_of(reply)
    assert (type(error), error.status, error.message) == (
        Rejected,
        404,
        "The upstream mock answered 404.",
    )


@pytest.mark.parametrize(("status", "state"), [(401, "down"), (403, "up"), (404, "up"), (429, "up"), (500, "up")])
async def test_a_refused_key_makes_it_down(status: int, state: str) -> None:
    """A call that gets 401 shows that no call can be served, so ``default`` goes elsewhere; other answers do not."""
    upstream = _upstream(_answering(status=200)[0])
    upstream.note_up()
    await trio.lowlevel.checkpoint()
    upstream.note_failure(rejection("mock", status, b"") if status < 500 else Unavailable("it broke", reachable=True))
    assert upstream.state == state


# -- the queue --------------------------------------------------------------------------------------------------------


async def test_the_queue_is_first_come_first_served() -> None:
    """Beyond ``max_connections`` calls wait, and each free slot goes to the call that has waited longest."""
    upstream = _upstream(_answering()[0], max_connections=2)
    order: list[int] = []
    leave = [trio.Event() for _ in range(5)]

    async def call(number: int) -> None:
        async with upstream.open("GET", "/"):
            order.append(number)
            await leave[number].wait()

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(call, number)
            await wait_all_tasks_blocked()
        assert order == [0, 1]
        statistics = upstream.statistics()
        assert (statistics.in_flight, statistics.queued, statistics.max_connections) == (2, 3, 2)
        for number, expected in ((1, [0, 1, 2]), (0, [0, 1, 2, 3]), (2, [0, 1, 2, 3, 4])):
            leave[number].set()
            await wait_all_tasks_blocked()
            assert order == expected
        nursery.cancel_scope.cancel()
    assert (upstream.in_flight, upstream.statistics().queued) == (0, 0)


async def test_the_queue_timeout(autojump_clock: MockClock) -> None:
    """A call without a slot in time fails in the phase ``queue``, and does not get the next slot."""
    script, _ = _answering()
    upstream = _upstream(script, max_connections=1, queue_timeout_s=3)
    phases: list[str] = []
    async with upstream.open("GET", "/"):
        started = trio.current_time()
        with pytest.raises(UpstreamTimeout, match="no slot became free within 3 s") as caught:
            async with upstream.open("GET", "/", on_phase=phases.append):
                pytest.fail("there is no slot")
        assert trio.current_time() - started == pytest.approx(3)
    assert caught.value.phase == "queue"
    assert phases == ["queued"]
    assert len(script.requests) == 1
    async with upstream.open("GET", "/"):
        assert upstream.in_flight == 1


async def test_no_queue_timeout(autojump_clock: MockClock) -> None:
    """A queue timeout of 0 is none."""
    upstream = _upstream(_answering()[0], max_connections=1, queue_timeout_s=0)

    async def hold() -> None:
        async with upstream.open("GET", "/"):
            await trio.sleep(50_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold)
        await wait_all_tasks_blocked()
        async with upstream.open("GET", "/"):
            assert trio.current_time() >= 50_000


# -- cancellation -----------------------------------------------------------------------------------------------------


def _is_free(upstream: Upstream) -> bool:
    return upstream.in_flight == 0 and upstream.statistics().queued == 0


@pytest.mark.parametrize("phase", ["queued", "connecting", "reading"])
async def test_cancelled_in_each_phase(phase: str) -> None:
    """A call that is cancelled in the queue, before the head or in the body releases slot and stream at once."""
    script, body = _answering(b"a", None)
    if phase == "connecting":
        script.act = _hang
    upstream = _upstream(script, max_connections=1)

    async def call(scope: trio.CancelScope) -> None:
        with scope:
            async with upstream.open("GET", "/") as reply:
                assert await reply.receive() == b"a"
                await reply.receive()

    scopes = [trio.CancelScope(), trio.CancelScope()]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(call, scope)
            await wait_all_tasks_blocked()
        assert (upstream.in_flight, upstream.statistics().queued) == (1, 1)
        if phase == "queued":
            scopes[1].cancel()
            await wait_all_tasks_blocked()
            assert (upstream.in_flight, upstream.statistics().queued) == (1, 0)
            assert len(script.requests) == 1
        scopes[1].cancel()
        scopes[0].cancel()
    assert all(scope.cancelled_caught for scope in scopes)
    assert body.closed == (phase != "connecting")
    assert _is_free(upstream)


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before task step number ``steps``."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self.scope = scope
        self.steps = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps -= 1
        if self.steps == 0:
            self.scope.cancel()


async def test_cancelled_at_every_checkpoint() -> None:
    """Whichever checkpoint a cancellation hits, the slot is free and the stream closed afterwards."""
    for step in range(1, 50):
        script, body = _answering(b"a", b"b")
        upstream = _upstream(script, max_connections=1)
        with trio.CancelScope() as scope:
            instrument = CancelAtStep(scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with upstream.open("GET", "/") as reply:
                    await reply.read(100)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        assert body.closed == body.given
        assert _is_free(upstream)
        with trio.fail_after(1):
            async with upstream.open("GET", "/"):
                pass
        if not scope.cancel_called:
            break
    assert 5 < step < 49  # it hit every checkpoint, and the last call completed


async def test_a_close_that_hangs_is_bounded(autojump_clock: MockClock) -> None:
    """A stream that hangs while it is closed costs one second, also in a cancelled call; then the slot is free."""
    script, _ = _answering(b"a", None, close_takes_s=1e6)
    upstream = _upstream(script)
    started = trio.current_time()
    with trio.move_on_after(5):
        async with upstream.open("GET", "/") as reply:
            while True:
                await reply.receive()
    assert trio.current_time() - started == pytest.approx(6)
    assert _is_free(upstream)


async def test_closing_twice_is_harmless() -> None:
    """A reply can be closed twice."""
    script, body = _answering(b"a")
    async with _upstream(script).open("GET", "/") as reply:
        await reply.aclose()
        assert body.closed
        await reply.aclose()


async def test_a_close_that_fails_is_not_the_answer_s_failure() -> None:
    """An error of the transport while a reply is closed is ignored."""

    class Broken(Body):
        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()
            raise httpx2.CloseError("gone")

    reply = Reply("mock", Httpx2Source(httpx2.Response(200, stream=Broken(b"a"))))
    assert await reply.read(10) == b"a"
    await reply.aclose()


# -- the local model --------------------------------------------------------------------------------------------------


async def test_the_local_model_is_waited_for() -> None:
    """Kind ``local`` calls the port of its process; if the process cannot start, the call fails with 503."""

    class Process:
        async def wait_listening(self) -> str:
            await trio.lowlevel.checkpoint()
            if not listening:
                raise LocalModelUnavailable("no such file: m.gguf")
            return "http://127.0.0.1:4321/v1"

    config = configuration.structure({"upstreams": {"local": {"kind": "local"}}}, env={}, source="test")
    script, _ = _answering(b"x")
    upstream = Upstream("local", config, script, local_model=cast(LocalModel, Process()))
    listening = True
    async with upstream.open("POST", "/chat/completions"):
        assert str(script.requests[0].url) == "http://127.0.0.1:4321/v1/chat/completions"
    listening = False
    with pytest.raises(Unavailable, match="no such file") as caught:
        async with upstream.open("POST", "/chat/completions"):
            pytest.fail("there is no model")
    assert caught.value.status == 503
    assert _is_free(upstream)


# -- its state --------------------------------------------------------------------------------------------------------


async def test_states() -> None:  # noqa: ASYNC124 - it needs a clock
    """The state is unknown at first, down after a failure, and up after a success; the last error stays."""
    upstream = _upstream(_answering()[0], models=["m", "n"])
    assert upstream.known() == Known(models=("m", "n"), default_model="m")
    assert (upstream.statistics().state, upstream.statistics().models) == ("unknown", 2)
    upstream.note_error(ProtocolViolation("odd"))
    assert upstream.statistics().state == "unknown"
    upstream.note_down(Unavailable("refused"))
    assert (upstream.known().down, upstream.statistics().reason) == ("refused", "refused")
    upstream.note_up()
    statistics = upstream.statistics()
    assert (statistics.state, statistics.reason, statistics.last_error) == ("up", None, "refused")
    assert statistics.last_error_at is not None
    assert upstream.known().down is None
    assert repr(upstream) == "<Upstream mock up, 0 in flight>"


async def test_down_is_not_for_ever(autojump_clock: MockClock) -> None:
    """A failure is forgotten after 10 s, unless the upstream is polled."""
    upstream = _upstream(_answering()[0], models=["m"])
    upstream.note_down(Unavailable("refused"))
    await trio.sleep(9)
    assert upstream.known().down == "refused"
    await trio.sleep(2)
    assert upstream.known().down is None
    assert upstream.statistics().state == "unknown"
    upstream.polled = True
    upstream.note_down(Unavailable("refused"))
    await trio.sleep(100)
    assert upstream.known().down == "refused"


def test_an_upstream_without_its_secret_is_disabled() -> None:
    """An upstream without its secret is disabled, for the reason that the configuration gives."""
    upstream = _upstream(_answering()[0], api_key={"env": "NO_SUCH"}, default_model="d")
    assert upstream.known().default_model == "d"
    assert "NO_SUCH is not set" in (upstream.known().unusable or "")
    assert upstream.statistics().state == "disabled"
    assert "NO_SUCH" in (upstream.statistics().reason or "")
