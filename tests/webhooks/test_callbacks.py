"""Callbacks to receivers on loopback sockets: the request, the meaning of responses, and the refused addresses."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import make_config
from trigate.asgi.application import GatewayApp
from trigate.config.sections import Config, HookConfig
from trigate.errors import Unverified
from trigate.runs.outbox import Receipt, open_outbox
from trigate.runs.request import callback_body
from trigate.signatures import Verifier
from trigate.store.interface import Store
from trigate.store.memory import open_memory_store
from trigate.store.records import Delivery
from trigate.upstream import connect as dialing
from trigate.upstream.connect import Origin, Refused, dial
from trigate.upstream.public_addresses import why_not_public
from trigate.webhooks.callbacks import Callbacks, open_callbacks, seconds_of
from trigate.workers.membership import open_workers

NOW = 1_700_000_000.5
KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
BODY = callback_body(state="completed", at=NOW, data=b'{"id":"run_1","reply":"caf\xc3\xa9"}')
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Answer = bytes | Callable[[trio.abc.Stream], Awaitable[None]]


@attrs.define(eq=False)
class Receiver:
    """A receiver of callbacks that gives each request the same answer.

    Attributes:
        answer: The bytes of a response, or a function that drives the connection.
        heads: The header fields of each request, in order; the request line is under ``""``.
        bodies: The body of each request.
        opened: How many connections have been accepted.
    """

    answer: Answer
    url: str = ""
    heads: list[dict[str, str]] = attrs.field(factory=list)
    bodies: list[bytes] = attrs.field(factory=list)
    opened: int = 0

    async def serve(self, context: ssl.SSLContext | None, plain: trio.SocketStream) -> None:
        """Serves one connection."""
        self.opened += 1
        stream = plain if context is None else trio.SSLStream(plain, context, server_side=True)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._receive(stream):
                if isinstance(self.answer, bytes):
                    await stream.send_all(self.answer)
                else:
                    await self.answer(stream)

    async def _receive(self, stream: trio.abc.ReceiveStream) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await stream.receive_some()
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        first, *fields = head.decode().split("\r\n")
        named = {"": first, **{name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}}
        while len(body) < int(named["content-length"]):
            body += await stream.receive_some()
        self.heads.append(named)
        self.bodies.append(body)
        return True


@contextlib.asynccontextmanager
async def receiving(answer: Answer = OK, *, context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Serves a receiver on loopback."""
    receiver = Receiver(answer)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, partial(receiver.serve, context), 0, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        port = listener.socket.getsockname()[1]
        receiver.url = f"{'http' if context is None else 'https'}://127.0.0.1:{port}/callbacks?to=a"
        try:
            yield receiver
        finally:
            nursery.cancel_scope.cancel()


def hook(**settings: object) -> HookConfig:
    """A hook whose callbacks may go to any address."""
    return config(**settings).hooks["h"]  # type: ignore[index]


def config(**settings: object) -> Config:
    """A configuration with that hook, and a store in memory."""
    own = {"callback_secret": SECRET, "callback_hosts": ["127.0.0.1"], "callback_private": True, **settings}
    return make_config({"up": {"kind": "echo"}}, hooks={"h": own}, store={"path": ":memory:"})


def delivery(target: str) -> Delivery:
    """A result to deliver."""
    return Delivery(id="msg_1", run_id="run_1", channel="h", target=target, body=BODY, created_at=NOW, due_at=NOW)


@contextlib.asynccontextmanager
async def opened(
    settings: HookConfig | None = None,
    *,
    trust: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    now: Callable[[], float] = lambda: NOW,
) -> AsyncIterator[Callbacks]:
    """Opens callbacks for one hook, ``h``."""
    async with (
        open_memory_store() as store,
        open_workers(store) as workers,
        open_callbacks(trust=trust, now=now) as callbacks,
        open_outbox(store, workers) as outbox,
    ):
        callbacks.apply({"h": settings or hook()}, outbox)
        yield callbacks


async def attempt(answer: Answer, **settings: object) -> Receipt:
    """The receipt of an attempt whose receiver gives this answer."""
    async with receiving(answer) as receiver, opened(hook(**settings)) as callbacks:
        return await callbacks.deliver(delivery(receiver.url))


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a response."""
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


# -- what is sent -----------------------------------------------------------------------------------------------------


async def test_a_callback_is_signed() -> None:
    """The signature is HMAC-SHA256 over id, time and body; the headers carry id and time."""
    async with receiving() as receiver, opened() as callbacks:
        receipt = await callbacks.deliver(delivery(receiver.url))
    assert receipt == Receipt(delivered=True, status=200)
    [head], [body] = receiver.heads, receiver.bodies
    assert body == BODY
    assert head[""] == "POST /callbacks?to=a HTTP/1.1"
    assert head["content-type"] == "application/json"
    assert head["user-agent"].startswith("trigate/")
    assert (head["webhook-id"], head["webhook-timestamp"]) == ("msg_1", "1700000000")
    digest = hmac.new(KEY, b"msg_1.1700000000." + body, hashlib.sha256).digest()
    assert head["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


async def test_another_hook_accepts_a_callback() -> None:
    """A hook with ``verification = "standard-webhooks"`` accepts it, and refuses a changed body."""
    async with receiving() as receiver, opened() as callbacks:
        await callbacks.deliver(delivery(receiver.url))
    headers = {name.encode(): value.encode() for name, value in receiver.heads[0].items()}
    verifier = Verifier("standard-webhooks", (SECRET,))
    assert verifier.verify(headers, receiver.bodies[0], now=NOW).event_id == "msg_1"
    with pytest.raises(Unverified):
        verifier.verify(headers, receiver.bodies[0] + b" ", now=NOW)


@contextlib.asynccontextmanager
async def received() -> AsyncIterator[tuple[dict[str, str], bytes]]:
    """A callback with the current time, as its receiver gets it: header fields and body."""
    async with receiving() as receiver, opened(now=time.time) as callbacks:
        await callbacks.deliver(delivery(receiver.url))
    yield receiver.heads[0], receiver.bodies[0]


async def test_the_standard_webhooks_library_accepts_a_callback() -> None:
    """The library is that of the scheme's authors; it refuses a changed body."""
    library = pytest.importorskip("standardwebhooks")
    async with received() as (head, body):
        assert library.Webhook(SECRET).verify(body, head) == json.loads(BODY)
        with pytest.raises(library.WebhookVerificationError):
            library.Webhook(SECRET).verify(body + b" ", head)


def documented(language: str, first: str) -> str:
    """The code block of the how-to page that contains this text."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "callbacks.md"
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    [block] = [block for block in blocks if first in block]
    return str(block)


async def test_the_documented_receiver_accepts_a_callback() -> None:
    """It refuses a changed body, another secret, another id, and an old callback."""
    names: dict[str, Any] = {}
    exec(documented("python", "def is_genuine"), names)
    is_genuine = names["is_genuine"]
    other = "whsec_" + base64.b64encode(b"f" * 32).decode()
    async with received() as (head, body):
        assert is_genuine(SECRET, head, body)
        assert not is_genuine(SECRET, head, body + b" ")
        assert not is_genuine(other, head, body)
        assert not is_genuine(SECRET, {**head, "webhook-id": "msg_2"}, body)
        assert not is_genuine(SECRET, head, body, tolerance_s=-1.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not there")
async def test_the_documented_command_gives_the_signature(tmp_path: Path) -> None:
    """With openssl and the shell alone."""
    async with received() as (head, body):
        (tmp_path / "body").write_bytes(body)
        values = {"CALLBACK_SECRET": SECRET, "ID": head["webhook-id"], "TIMESTAMP": head["webhook-timestamp"]}
        done = await trio.run_process(
            ["sh", "-c", documented("sh", "hexkey")], cwd=tmp_path, env={**os.environ, **values}, capture_stdout=True
        )
    assert "v1," + done.stdout.decode() == head["webhook-signature"]


async def test_a_repetition_has_the_same_id() -> None:
    """Each attempt has its own time; the connection is reused."""
    times = iter([NOW, NOW, NOW + 60, NOW + 60])
    async with receiving() as receiver, opened(now=lambda: next(times)) as callbacks:
        await callbacks.deliver(delivery(receiver.url))
        await callbacks.deliver(delivery(receiver.url))
    assert [head["webhook-id"] for head in receiver.heads] == ["msg_1", "msg_1"]
    assert [head["webhook-timestamp"] for head in receiver.heads] == ["1700000000", "1700000060"]
    assert receiver.opened == 1


# -- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "202 Accepted", "204 No Content", "299 x"])
async def test_any_2xx_is_delivered(status: str) -> None:
    """The body and the reason phrase do not matter."""
    data = answer(status) if not status.startswith("204") else b"HTTP/1.1 204 No Content\r\n\r\n"
    assert await attempt(data) == Receipt(delivered=True, status=int(status[:3]))


@pytest.mark.parametrize("status", ["400 x", "401 x", "404 x", "408 x", "429 x", "500 x", "502 x", "503 x", "504 x"])
async def test_any_other_status_is_retried(status: str) -> None:
    """As the specification asks."""
    receipt = await attempt(answer(status))
    error = f"the receiver answered {status[:3]}"
    assert receipt == Receipt(delivered=False, again=True, status=int(status[:3]), error=error)


async def test_410_is_not_retried() -> None:
    """The receiver asked for no more deliveries, whatever its ``Retry-After``."""
    receipt = await attempt(answer("410 Gone", "retry-after: 5"))
    assert (receipt.delivered, receipt.again, receipt.status) == (False, False, 410)


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
async def test_redirects_are_not_followed(status: str) -> None:
    """Also where the new location would accept the callback."""
    async with receiving() as elsewhere:
        receipt = await attempt(answer(status, f"location: {elsewhere.url}"))
        assert elsewhere.opened == 0
    assert (receipt.delivered, receipt.again, receipt.status) == (False, True, int(status[:3]))
    assert receipt.error == f"the receiver answered {status[:3]}, and redirects are not followed"


@pytest.mark.parametrize(
    ("value", "after_s"),
    [
        *(("120", 120.0), ("0", 0.0), (" 7 ", 7.0), ("9" * 5000, 9_999_999_999.0)),
        *(("Tue, 14 Nov 2023 22:14:20 GMT", 59.5), ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0)),
        *(("", None), ("-1", None), ("1.5", None), ("soon", None), ("\u00b2", None), ("Tue, 99 Nov 2023", None)),
    ],
)
def test_what_retry_after_says(value: str, after_s: float | None) -> None:
    """It is a number of seconds, or a date; anything else is ignored."""
    assert datetime.datetime.fromtimestamp(NOW, datetime.UTC).strftime("%H:%M:%S") == "22:13:20"
    assert seconds_of(value, at=NOW) == after_s


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=60)
    | st.from_regex(r"\A[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d(:\d\d)? [-+A-Z]{1,3}\d{0,9}\Z")
)
def test_any_text_in_retry_after(value: str) -> None:
    """The pause is not negative and bounded, or there is none."""
    after_s = seconds_of(value, at=NOW)
    assert after_s is None or 0.0 <= after_s < 1e12


@pytest.mark.parametrize("status", ["429 x", "503 x"])
async def test_the_receiver_sets_the_pause(status: str) -> None:
    """The receipt has the value of ``Retry-After``."""
    assert (await attempt(answer(status, "retry-after: 120"))).after_s == 120.0


async def test_a_body_of_any_length_is_bounded() -> None:
    """Only the status counts: a small part of the body is read, then the connection is closed."""
    sent = 0

    async def flood(stream: trio.abc.SendStream) -> None:
        nonlocal sent
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000000\r\n\r\n")
        while True:
            await stream.send_all(bytes(65536))
            sent += 65536

    with trio.fail_after(30.0):
        assert (await attempt(flood)).delivered
    assert sent < 50_000_000  # what socket buffers can hold


@pytest.mark.slow
async def test_a_body_that_never_arrives() -> None:
    """The attempt succeeds after a short wait: only the status counts."""

    async def hang(stream: trio.abc.SendStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n")
        await trio.sleep_forever()

    with trio.fail_after(30.0):
        assert (await attempt(hang)).delivered


async def test_no_response() -> None:
    """The callback may have arrived; it is retried."""

    async def leave(stream: trio.abc.AsyncResource) -> None:
        await trio.aclose_forcefully(stream)

    async def babble(stream: trio.abc.SendStream) -> None:
        await stream.send_all(b"SSH-2.0-x\r\n\r\n")

    for misbehave in (leave, babble):
        receipt = await attempt(misbehave)
        assert (receipt.delivered, receipt.again, receipt.unsure, receipt.status) == (False, True, True, 0)
        assert str(receipt.error).startswith("no answer: ")


async def test_no_connection() -> None:
    """The callback has certainly not arrived; it is retried."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        async with opened() as callbacks:
            receipt = await callbacks.deliver(delivery(f"http://127.0.0.1:{taken.getsockname()[1]}/"))
    assert (receipt.delivered, receipt.again, receipt.unsure, receipt.status) == (False, True, False, 0)
    assert str(receipt.error).startswith("no connection: ")
    assert str(receipt.error).endswith(": Connection refused")


@pytest.mark.parametrize("target", ["ftp://a.example/", "https://", "nonsense", "http://0177.0.0.1/", ""])
async def test_an_invalid_target(target: str) -> None:
    """It is not retried: the target stays invalid."""
    async with opened() as callbacks:
        receipt = await callbacks.deliver(delivery(target))
    assert (receipt.delivered, receipt.again, receipt.status) == (False, False, 0)


async def test_tls() -> None:
    """The receiver's certificate is verified."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with receiving(context=context) as receiver:
        async with opened(trust=lambda: trusting) as callbacks:
            assert (await callbacks.deliver(delivery(receiver.url))).delivered
        async with opened() as callbacks:
            receipt = await callbacks.deliver(delivery(receiver.url))
    assert (receipt.delivered, receipt.again) == (False, True)
    assert "certificate verify failed" in str(receipt.error)
    assert len(receiver.heads) == 1


async def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment names one: a proxy would connect without our address check."""
    async with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert (await attempt(OK)).delivered
        assert proxy.opened == 0


# -- refused addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "0.0.0.0", "[::1]", "[::]"),
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1", "172.16.0.1"),
        *("192.168.0.1", "169.254.169.254", "[fd00:ec2::254]", "[fe80::1]", "100.64.0.1", "100.100.100.200"),
        *("224.0.0.1", "[ff02::1]", "240.0.0.1", "255.255.255.255", "192.0.0.192", "198.18.0.1", "168.63.129.16"),
    ],
)
async def test_an_address_that_is_not_public_is_refused(host: str) -> None:
    """In every notation, and before any packet is sent."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        async with opened(hook(callback_private=False)) as callbacks:
            receipt = await callbacks.deliver(delivery(f"http://{host}:{listening.getsockname()[1]}/"))
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert (receipt.delivered, receipt.again, receipt.unsure, receipt.status) == (False, True, False, 0)
    assert "must not be connected to" in str(receipt.error)


@attrs.define
class Names(trio.abc.HostnameResolver):
    """A name service that returns the next list of addresses at each lookup; the last list repeats."""

    answers: list[list[str]]
    asked: int = 0

    async def getaddrinfo(  # type: ignore[override]  # its stub has the types of what it is given
        self, host: bytes | str | None, port: int, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        """Returns the next list."""
        self.asked += 1
        await trio.lowlevel.checkpoint()
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        """Not used."""
        raise NotImplementedError


@pytest.fixture
def names() -> Callable[..., Names]:
    """Sets the name service of this test: ``names(["1.1.1.1"], ["127.0.0.1"])``."""

    def use(*answers: list[str]) -> Names:
        made = Names(list(answers))
        trio.socket.set_custom_hostname_resolver(made)
        return made

    return use


async def test_a_name_that_resolves_to_private_addresses(names: Callable[..., Names]) -> None:
    """It is refused; the error names each address and the reason."""
    names(["10.0.0.1", "127.0.0.1"])
    with pytest.raises(Refused, match=r"10\.0\.0\.1 is private, 127\.0\.0\.1 is loopback"):
        await dial(Origin.of("http://a.example"), ssl.create_default_context, refuse=why_not_public)


async def test_a_name_is_resolved_once(names: Callable[..., Names], monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked: there is no second lookup with another result (DNS
    rebinding)."""
    service = names(["1.1.1.1"], ["127.0.0.1"])
    connected = []

    async def connect(family: int, address: tuple[str, int]) -> socket.socket:
        connected.append(address)
        await trio.lowlevel.checkpoint()
        raise ConnectionRefusedError("as good as any")

    monkeypatch.setattr(dialing, "_connect_to", connect)
    with pytest.raises(httpx2.ConnectError):
        await dial(Origin.of("http://a.example"), ssl.create_default_context, refuse=why_not_public)
    assert (connected, service.asked) == ([("1.1.1.1", 80)], 1)


async def test_only_allowed_addresses_are_connected_to(names: Callable[..., Names]) -> None:
    """Refused addresses are left out; the others are tried until one accepts."""
    async with receiving() as receiver:
        port = int(receiver.url.split(":")[2].partition("/")[0])
        names(["127.0.0.3", "127.0.0.2", "127.0.0.1"])
        asked = []

        def refuse(address: str) -> str | None:
            asked.append(address)
            return "not liked" if address == "127.0.0.3" else None

        connection = await dial(Origin("http", "a.example", port), ssl.create_default_context, refuse=refuse)
        assert connection.socket.getpeername() == ("127.0.0.1", port)  # no process listens at the second one
        connection.close()
    assert asked == ["127.0.0.3", "127.0.0.2", "127.0.0.1"]


async def test_a_slow_address_does_not_delay_the_next_one(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The next address is tried in parallel after a quarter of a second. If two accept at the same time, one is
    closed."""
    pairs = {f"1.0.0.{number}": socket.socketpair() for number in (1, 2, 3)}
    begun = []
    both = trio.Event()

    async def connect(family: int, address: tuple[str, int]) -> socket.socket:
        host, _ = address
        begun.append((trio.current_time(), host))
        await (both if host != "1.0.0.3" else trio.Event()).wait()
        return pairs[host][0]

    monkeypatch.setattr(dialing, "_connect_to", connect)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def accept() -> None:
            await trio.sleep(0.6)
            both.set()

        found = await dialing._connect_to_first([(socket.AF_INET, (host, 80)) for host in pairs])
    assert begun == [(0.0, "1.0.0.1"), (0.25, "1.0.0.2"), (0.5, "1.0.0.3")]
    assert sorted(pairs[host][0].fileno() == -1 for host in ("1.0.0.1", "1.0.0.2")) == [False, True]
    assert found.fileno() != -1
    for each in pairs.values():
        for end in each:
            end.close()


async def test_a_cancelled_connect_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an address has accepted at the moment of the cancellation."""
    one, other = socket.socketpair()
    accepted = trio.Event()

    async def connect(family: int, address: tuple[str, int]) -> socket.socket:
        await accepted.wait()
        scope.cancel()
        return one

    monkeypatch.setattr(dialing, "_connect_to", connect)
    with trio.CancelScope() as scope:
        accepted.set()
        await dialing._connect_to_first([(socket.AF_INET, ("1.0.0.1", 80))])
    assert scope.cancelled_caught
    assert one.fileno() == -1
    other.close()


# -- in the gateway ---------------------------------------------------------------------------------------------------


async def delivered(store: Store) -> Delivery:
    """Waits until the result of the run has been delivered, and returns the row."""
    with trio.fail_after(30.0):
        while True:
            [row] = await store.deliveries.of_run("run_1")
            if row.state == "delivered":
                return row
            await trio.sleep(0.01)


async def test_a_gateway_delivers_the_results_of_its_hooks(
    open_server: Callable[..., contextlib.AbstractAsyncContextManager[tuple[httpx2.AsyncClient, GatewayApp]]],
) -> None:
    """A stored delivery of the hook reaches its receiver."""
    async with receiving() as receiver, open_server(config()) as (_, app):
        await app.gateway.workers.join()
        await app.gateway.store.deliveries.add(delivery(receiver.url))
        app.gateway.drain._outbox.wake()
        assert (await delivered(app.gateway.store)).last_status == 200
    assert receiver.bodies == [BODY]


async def test_from_a_message_to_its_callback(
    open_server: Callable[..., contextlib.AbstractAsyncContextManager[tuple[httpx2.AsyncClient, GatewayApp]]],
) -> None:
    """The answer is 202 at once; then the callback arrives, and the run shows it as delivered."""
    async with receiving() as receiver, open_server(config(reply="callback", session="none")) as (client, _):
        message = {"text": "Hello there", "from": "ada", "callback_url": receiver.url}
        accepted = await client.post("/hooks/h", json=message)
        assert accepted.status_code == 202
        with trio.fail_after(30.0):
            while True:
                run = (await client.get(accepted.headers["location"])).json()
                if [each["state"] for each in run["deliveries"]] == ["delivered"]:
                    break
                await trio.sleep(0.01)
    del run["deliveries"]
    body = json.loads(receiver.bodies[0])
    assert body["type"] == "run.completed"
    assert body["data"] == run
    assert run["result"]["reply"] == "Hello there"


async def test_a_removed_hook_keeps_its_deliveries() -> None:
    """They stay pending, and are made with the new settings once the hook is configured again."""
    other = "whsec_" + base64.b64encode(b"f" * 32).decode()
    async with (
        receiving() as receiver,
        open_memory_store() as store,
        open_workers(store) as workers,
        open_callbacks(trust=ssl.create_default_context) as callbacks,
        open_outbox(store, workers) as outbox,
    ):
        outbox.carriers["channel"] = callbacks  # not set by `apply`, which must leave it
        callbacks.apply({"h": hook(), "off": hook(enabled=False), "g": HookConfig()}, outbox)
        assert set(outbox.carriers) == {"channel", "h"}
        callbacks.apply({}, outbox)
        assert set(outbox.carriers) == {"channel"}
        await workers.join()
        await store.deliveries.add(delivery(receiver.url))
        outbox.wake()
        await wait_all_tasks_blocked()
        assert (await store.deliveries.of_run("run_1"))[0] == delivery(receiver.url)
        callbacks.apply({"h": hook(callback_secret=other)}, outbox)
        await delivered(store)
    headers: Mapping[bytes, bytes] = {name.encode(): value.encode() for name, value in receiver.heads[0].items()}
    verifier = Verifier("standard-webhooks", (other,), tolerance_s=1e9)
    assert verifier.verify(headers, receiver.bodies[0], now=NOW).event_id == "msg_1"
