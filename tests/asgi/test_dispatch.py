"""Authentication, the request head and body, and, over sockets, how soon a disconnect takes effect."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import httpx2
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import AsgiClient, ClientCall, chat
from tests.support.gateway import OpenApp, OpenServer, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Say,
    Script,
    Stall,
    answers,
    completion,
    content,
    open_socket_provider,
    role,
    says,
)

CHAT = "/v1/chat/completions"
KEYED = make_config(keys={"one": "key-number-one", "two": "key-number-two"})


def assert_refused(served: Served, call: ClientCall, status: int, code: str) -> None:
    """The client got an OpenAI error, and no upstream was called."""
    assert (call.status, call.error["code"]) == (status, code)
    assert set(call.error) == {"message", "type", "param", "code"}
    assert call.header("content-type") == "application/json"
    assert call.header("x-request-id")
    assert call.ended
    assert served.providers["up"].opened == 0
    assert not served.settled


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer key-number-on",
        "Bearer key-number-one1",
        "Basic key-number-one",
        "key-number-one",
        "Bearer key-number-one, Bearer key-number-two",
        "Bearer kéy",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/status"), ("GET", "/x")])
async def test_without_the_key_nothing_is_served(open_app: OpenApp, given: str | None, method: str, path: str) -> None:
    """Every path answers 401 in OpenAI's shape, without a hint about the key."""
    async with open_app(KEYED) as served:
        headers = {} if given is None else {"authorization": given}
        call = await served.client.ask(method, path, chat() if method == "POST" else b"", headers=headers)
        assert_refused(served, call, 401, "invalid_api_key")
        assert call.header("www-authenticate") == "Bearer"
        assert b"key-number" not in call.body


@pytest.mark.parametrize("given", ["Bearer key-number-one", "bearer key-number-two", "Bearer  key-number-one "])
async def test_any_configured_key_is_accepted(open_app: OpenApp, given: str) -> None:
    """Each configured key is accepted. With a key the client may come from any address under any host name."""
    async with open_app(KEYED) as served:
        served.client.client, served.client.server = ("203.0.113.9", 1), ("203.0.113.1", 80)
        headers = {"authorization": given, "host": "gateway.example", "origin": "https://app.example"}
        call = await served.client.ask("POST", CHAT, chat(), headers=headers)
        assert call.status == 200
        sent = served.providers["up"].calls[0].headers
        assert "key-number" not in repr(sent), "the gateway's key stays in the gateway"


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": "key-number-two"},
        {"api-key": "key-number-two"},
        {"Api-Key": " key-number-two "},
        {"authorization": "BEARER key-number-two"},
        {"authorization": "Basic dTpw", "x-api-key": "key-number-two"},
        {"authorization": "Bearer key-number-two", "x-api-key": "key-number-two", "api-key": "key-number-two"},
        {"authorization": "Bearer key-number-two", "x-api-key": ""},
    ],
    ids=str,
)
async def test_a_key_in_another_header_is_accepted(open_app: OpenApp, headers: dict[str, str]) -> None:
    """Clients of Anthropic and Azure have headers of their own. None of them goes upstream."""
    async with open_app(KEYED) as served:
        assert (await served.client.ask("POST", CHAT, chat(), headers=headers)).status == 200
        assert "key-number" not in str(served.providers["up"].calls[0].headers)
        assert served.settled[0].owner == "two"


@pytest.mark.parametrize("name", ["x-api-key", "api-key"])
async def test_a_wrong_key_in_another_header_is_a_401(open_app: OpenApp, name: str) -> None:
    """The answer does not tell the key."""
    async with open_app(KEYED) as served:
        call = await served.client.ask("POST", CHAT, chat(), headers={name: "Bearer key-number-one"})
        assert_refused(served, call, 401, "invalid_api_key")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer key-number-one", "x-api-key": "key-number-two"},
        {"authorization": "Bearer key-number-one", "api-key": "wrong"},
        {"x-api-key": "wrong", "api-key": "key-number-two"},
    ],
    ids=str,
)
async def test_two_keys_are_a_400(open_app: OpenApp, headers: dict[str, str]) -> None:
    """The gateway does not choose whose call it is."""
    async with open_app(KEYED) as served:
        call = await served.client.ask("POST", CHAT, chat(), headers=headers)
        assert_refused(served, call, 400, "invalid_request")
        assert "key-number" not in call.error["message"]


async def test_health_needs_no_key(open_app: OpenApp) -> None:
    """A health probe sends none."""
    async with open_app(KEYED) as served:
        call = await served.client.ask("GET", "/health", headers={"host": "anything"})
        assert (call.status, call.json) == (200, {"status": "ok"})
        assert (await served.client.ask("GET", "/ready")).status == 401


# -- no key: this machine only ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "server"),
    [
        ("203.0.113.9", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.1"),
        ("10.0.0.2", "10.0.0.1"),
        ("::ffff:10.0.0.2", "::ffff:10.0.0.1"),
        ("fe80::1%eth0", "fe80::2%eth0"),
    ],
)
async def test_without_a_key_other_machines_are_refused(open_app: OpenApp, client: str, server: str) -> None:
    """The answer is a 403 that says what to do."""
    async with open_app() as served:
        served.client.client, served.client.server = (client, 5000), (server, 80)
        call = await served.client.ask("POST", CHAT, chat())
        assert_refused(served, call, 403, "forbidden")
        assert "TRIGATE_API_KEY" in call.error["message"]
        assert (await served.client.ask("GET", "/v1/models")).status == 403


@pytest.mark.parametrize(
    ("client", "server"),
    [("127.0.0.1", "127.0.0.1"), ("127.9.9.9", "127.0.0.1"), ("::1", "::1"), ("::ffff:127.0.0.1", "::1"), (None, None)],
)
async def test_without_a_key_this_machine_is_served(open_app: OpenApp, client: str | None, server: str | None) -> None:
    """Loopback addresses in all spellings are served, and so are Unix sockets, which have no address."""
    async with open_app() as served:
        served.client.client = (client, 5000) if client else None
        served.client.server = (server, 80) if server else None
        assert (await served.client.ask("GET", "/v1/models")).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:18888"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "192.168.1.5"},
        {"host": "127.0.0.1%2eevil.example"},
        {"host": "evil.example\\@localhost"},
        {"host": "localhost:port"},
        {"origin": "https://evil.example"},
        {"origin": "http://evil.example\\@localhost"},
        {"origin": "http://127.0.0.1%25.evil.example"},
        {"origin": "http://localhost/evil.example"},
        {"origin": ""},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "null"},
        {"x-forwarded-for": "203.0.113.9"},
        {"forwarded": "for=203.0.113.9"},
        {"x-real-ip": "203.0.113.9"},
        {"x-forwarded-for": "127.0.0.1%2e203.0.113.9"},
        {"x-forwarded-for": "unknown"},
    ],
    ids=str,
)
async def test_without_a_key_pages_and_proxies_are_refused(open_app: OpenApp, headers: dict[str, str]) -> None:
    """This covers DNS rebinding, foreign pages, and proxies that make every client look local."""
    async with open_app() as served:
        call = await served.client.ask("POST", CHAT, chat(), headers=headers)
        assert_refused(served, call, 403, "forbidden")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost:18888"},
        {"host": "[::1]:18888"},
        {"host": "app.localhost"},
        {"host": "gateway.lan"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://[::1]:3000"},
        {"origin": "https://app.example"},
        {"x-forwarded-for": "127.0.0.1"},
    ],
    ids=str,
)
async def test_without_a_key_own_names_and_allowed_ones_are_served(open_app: OpenApp, headers: dict[str, str]) -> None:
    """The machine's own names are served, and those that the configuration allows."""
    config = make_config(server={"allowed_hosts": ["gateway.lan"], "cors_origins": ["https://app.example"]})
    async with open_app(config) as served:
        assert (await served.client.ask("POST", CHAT, chat(), headers=headers)).status == 200


async def test_each_forwarding_header_counts(open_app: OpenApp) -> None:
    """A proxy may add a field of its own before or behind that of its client."""
    hops = [("x-forwarded-for", "203.0.113.9"), ("X-Forwarded-For", "127.0.0.1")]
    async with open_app() as served:
        for headers in (hops, hops[::-1]):
            assert_refused(served, await served.client.ask("POST", CHAT, chat(), headers=headers), 403, "forbidden")


async def test_insecure_serves_every_client(open_app: OpenApp) -> None:
    """With ``insecure`` set, clients without a key are served from anywhere."""
    async with open_app(make_config(server={"insecure": True})) as served:
        served.client.client, served.client.server = ("203.0.113.9", 1), ("203.0.113.1", 80)
        call = await served.client.ask(
            "POST", CHAT, chat(), headers={"host": "x.example", "origin": "https://y.example"}
        )
        assert call.status == 200


# -- CORS -------------------------------------------------------------------------------------------------------------

CORS = make_config(server={"cors_origins": ["https://app.example"]})
PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


async def test_cors_is_off_by_default(open_app: OpenApp) -> None:
    """No CORS header is sent, and a preflight gets no special treatment."""
    async with open_app() as served:
        call = await served.client.ask("GET", "/v1/models", headers={"origin": "http://localhost:3000"})
        assert call.status == 200
        assert not [name for name, _ in call.headers if name.startswith(b"access-control")]
        assert (await served.client.ask("OPTIONS", CHAT, headers=PREFLIGHT)).status == 403


async def test_cors_for_an_allowed_origin(open_app: OpenApp) -> None:
    """The allowed page can read answers, streams and errors. Other pages cannot."""
    async with open_app(CORS) as served:
        origin = {"origin": "https://app.example"}
        preflight = await served.client.ask("OPTIONS", CHAT, headers=PREFLIGHT)
        assert (preflight.status, preflight.body) == (204, b"")
        assert "POST" in preflight.header("access-control-allow-methods")
        assert preflight.header("access-control-allow-headers") == "authorization, content-type"
        for call in (
            preflight,
            await served.client.ask("POST", CHAT, chat(), headers=origin),
            await served.client.ask("POST", CHAT, b"{", headers={**origin, "content-type": "application/json"}),
            await served.client.ask("GET", "/v1/models", headers=origin),
            await served.client.ask("GET", "/nothing", headers=origin),
        ):
            assert call.header("access-control-allow-origin") == "https://app.example"
            assert call.header("vary").lower() == "origin"
            assert "x-trigate-attempts" in call.header("access-control-expose-headers")
        other = await served.client.ask("GET", "/v1/models", headers={"origin": "http://localhost:3000"})
        assert other.header("access-control-allow-origin") == ""
        assert other.header("vary").lower() == "origin"


async def test_any_origin_is_any_valid_one(open_app: OpenApp) -> None:
    """``*`` allows the pages of files and of applications, and repeats nothing that is no origin."""
    async with open_app(make_config(server={"cors_origins": ["*"]})) as served:
        for origin in ("null", "file://", "app://obsidian.md", "https://a.example"):
            call = await served.client.ask("POST", CHAT, chat(), headers={"origin": origin})
            assert (call.status, call.header("access-control-allow-origin")) == (200, origin)
        call = await served.client.ask("POST", CHAT, chat(), headers={"origin": "https://a.example\\@b"})
        assert (call.status, call.header("access-control-allow-origin")) == (403, "")


@pytest.mark.parametrize("origin", ["app://obsidian.md", "vscode-webview://0123abcd", "file://"])
async def test_embedded_browsers(open_app: OpenApp, origin: str) -> None:
    """Applications that embed Chromium have origins of their own, ask for many headers, and for a private network."""
    asked = "authorization,content-type,dangerously-allow-browser,x-stainless-helper-method,x-title"
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": asked,
        "access-control-request-private-network": "true",
    }
    async with open_app(make_config(server={"cors_origins": [origin]})) as served:
        call = await served.client.ask("OPTIONS", CHAT, headers=preflight)
        assert (call.status, call.header("access-control-allow-origin")) == (204, origin)
        assert call.header("access-control-allow-headers") == asked
        assert call.header("access-control-allow-private-network") == "true"
        assert (await served.client.ask("POST", CHAT, chat(), headers={"origin": origin})).status == 200
        del preflight["access-control-request-private-network"]
        call = await served.client.ask("OPTIONS", CHAT, headers=preflight)
        assert call.header("access-control-allow-private-network") == ""
        preflight = {**preflight, "origin": "https://evil.example", "access-control-request-private-network": "true"}
        call = await served.client.ask("OPTIONS", CHAT, headers=preflight)
        assert (call.status, call.header("access-control-allow-private-network")) == (403, "")


async def test_a_preflight_needs_no_key(open_app: OpenApp) -> None:
    """Browsers send no key with it. The call itself needs one, and the page can read its 401."""
    config = make_config(server={"cors_origins": ["*"]}, keys={"one": "key-number-one"})
    async with open_app(config) as served:
        assert (await served.client.ask("OPTIONS", CHAT, headers=PREFLIGHT)).status == 204
        call = await served.client.ask("POST", CHAT, chat(), headers={"origin": "https://app.example"})
        assert call.status == 401
        assert call.header("access-control-allow-origin") == "https://app.example"


# -- the request head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_a_wrong_method_is_a_405_with_allow(open_app: OpenApp, method: str) -> None:
    """On the data plane; `tests/asgi/test_routes.py` has the control plane."""
    async with open_app() as served:
        call = await served.client.ask(method, CHAT)
        assert call.status == 405
        assert "POST" in call.header("allow")
        assert served.providers["up"].opened == 0


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/json"]
)
async def test_a_body_that_is_not_declared_as_json_is_a_415(open_app: OpenApp, content_type: str | None) -> None:
    """This also keeps a page from sending a body without a preflight."""
    async with open_app() as served:
        headers = {} if content_type is None else {"content-type": content_type}
        call = await served.client.ask("POST", CHAT, b'{"model":"up/m","messages":[]}', headers=headers)
        assert_refused(served, call, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
async def test_json_has_several_spellings(open_app: OpenApp, content_type: str) -> None:
    """Parameters and case are ignored."""
    async with open_app() as served:
        assert (await served.client.ask("POST", CHAT, chat(), headers={"content-type": content_type})).status == 200


@pytest.mark.parametrize(
    "extra",
    [
        [("content-length", "7")],
        [("Content-Length", "5"), ("content-length", "5")],
        [("transfer-encoding", "chunked")],
        [("host", "localhost")],
        [("authorization", "Bearer a"), ("Authorization", "Bearer b")],
        [("x-api-key", "a"), ("X-Api-Key", "a")],
        [("origin", "http://localhost"), ("Origin", "https://evil.example")],
    ],
    ids=str,
)
async def test_an_ambiguous_head_is_refused_and_the_connection_closed(
    open_app: OpenApp, extra: list[tuple[str, str]]
) -> None:
    """A head that a proxy in front may have read differently is not processed."""
    async with open_app() as served:
        call = await served.client.ask("POST", CHAT, chat(), headers=[*extra])
        assert_refused(served, call, 400, "ambiguous_request")
        assert call.header("connection") == "close"


@pytest.mark.parametrize("given", ["abc", "a-b_c.d:1", "x" * 128, "0198f0c2-5d0a-7000-8000-000000000000"])
async def test_a_valid_request_id_is_kept(open_app: OpenApp, logs: Logs, given: str) -> None:
    """It is used in the answer, upstream and in the log."""
    async with open_app() as served:
        call = await served.client.ask("POST", CHAT, chat(), headers={"x-request-id": given})
        assert call.header("x-request-id") == given
        assert served.providers["up"].calls[0].headers["x-request-id"] == given
        assert logs.named("exchange")[0]["request_id"] == given


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", "a\tb", "é", "<script>", "a;b"])
async def test_an_invalid_request_id_is_replaced(open_app: OpenApp, given: str) -> None:
    """The gateway makes a new id. Every answer has one, refusals too."""
    async with open_app() as served:
        for call in (
            await served.client.ask("POST", CHAT, chat(), headers={"x-request-id": given}),
            await served.client.ask("GET", "/health", headers={"x-request-id": given}),
            await served.client.ask("GET", "/nothing", headers={"x-request-id": given}),
        ):
            assert call.header("x-request-id").startswith("req_")


# -- the request body -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"   ", None),
        (b"{", None),
        (b"nonsense", None),
        (b"[]", None),
        (b'"x"', None),
        (b"null", None),
        (b"{}", "model"),
        (b'{"model":""}', "model"),
        (b'{"model":5}', "model"),
        (b'{"model":"up/m"}', "messages"),
        (b'{"model":"up/m","messages":[]}', "messages"),
        (b'{"model":"up/m","messages":"x"}', "messages"),
        (b'{"model":"up/m","messages":[5]}', "messages[0]"),
        (b'{"model":"up/m","messages":[{"role":"user"}],"stream":"yes"}', "stream"),
        (b'{"model":"up/m","messages":[{"role":"user","content":NaN}]}', None),
        (b'{"model":"\xff"}', None),
        (b'{"model":"up/m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b"[" * 100_000, None),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_bad_body_is_a_400(
    open_app: OpenApp, autojump_clock: MockClock, body: bytes, param: str | None
) -> None:
    """The error comes at once and names the field. The connection stays open, since the body has been read."""
    async with open_app() as served:
        begun = trio.current_time()
        call = await served.client.ask("POST", CHAT, body, headers={"content-type": "application/json"})
        assert_refused(served, call, 400, "invalid_request")
        if param is not None:
            assert call.error["param"] == param
        assert call.ended_at == begun
        assert call.header("connection") == ""


async def test_an_unknown_model_is_a_404(open_app: OpenApp) -> None:
    """The error suggests the closest ids."""
    async with open_app() as served:
        call = await served.client.chat(model="up2/m").wait()
        assert (call.status, call.error["code"], call.error["param"]) == (404, "model_not_found", "model")
        assert "up/m" in call.error["message"]
        assert served.providers["up"].opened == 0


async def test_a_body_in_pieces_is_put_together(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Neither the segmentation nor the speed of the body matters."""
    body = b'{"model":"up/m","messages":[{"role":"user","content":"Hi"}]}'
    async with open_app(providers=Provider(answers(completion("x")))) as served:
        raw = [piece for i in range(len(body)) for piece in (body[i : i + 1], Pause(0.25))]
        call = await served.client.ask("POST", CHAT, raw=raw, headers={"content-type": "application/json"})
        assert call.status == 200


async def test_a_body_declared_too_large_is_refused_unread(open_app: OpenApp) -> None:
    """A 413 is sent before any of it is read. The rest is discarded and the connection closed."""
    async with open_app(make_config(limits={"body_bytes": 1000})) as served:
        headers = {"content-type": "application/json", "content-length": "1001"}
        call = served.client.start("POST", CHAT, headers=headers, raw=[Stall()])
        await call.wait_committed()
        await call.wait_for(b"body_too_large")
        assert call.header("connection") == "close"
        call.disconnect()
        await call.wait()
        assert_refused(served, call, 413, "body_too_large")


async def test_an_endless_body_is_refused_at_the_limit(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A chunked body without a declared length is counted, refused at the limit, and the rest is discarded."""
    async with open_app(make_config(limits={"body_bytes": 1000})) as served:
        raw = [b"x" * 600] * 2 + [b"x" * 600, Pause(0.1)] * 100
        call = await served.client.ask("POST", CHAT, raw=raw, headers={"content-type": "application/json"})
        assert_refused(served, call, 413, "body_too_large")
        assert call.header("connection") == "close"
        assert trio.current_time() < 5


async def test_a_body_of_exactly_the_limit_is_served(open_app: OpenApp) -> None:
    """The limit is the largest size that is served, declared or not."""
    body = b'{"model":"up/m","messages":[{"role":"user","content":"Hi"}]}'
    headers = {"content-type": "application/json"}
    for size, status in ((len(body), 200), (len(body) - 1, 413)):
        async with open_app(make_config(limits={"body_bytes": size}), Provider(answers(completion("x")))) as served:
            assert (await served.client.ask("POST", CHAT, body, headers=headers)).status == status
            assert (await served.client.ask("POST", CHAT, raw=[body], headers=headers)).status == status


async def test_a_body_that_does_not_end_is_a_408(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The body timeout applies even while bytes keep trickling in."""
    for raw in ([b'{"model"', Stall()], [b" ", Pause(1)] * 100):
        async with open_app(make_config(limits={"body_timeout_s": 10})) as served:
            begun = trio.current_time()
            call = await served.client.ask("POST", CHAT, raw=raw, headers={"content-type": "application/json"})
            assert_refused(served, call, 408, "body_timeout")
            assert call.committed_at - begun == pytest.approx(10)
            assert call.header("connection") == "close"


async def test_a_disconnect_during_the_body_makes_no_exchange(open_app: OpenApp) -> None:
    """No answer is sent, no upstream is called, and nothing is counted."""
    async with open_app() as served:
        call = served.client.start("POST", CHAT, raw=[b"{", Stall()], headers={"content-type": "application/json"})
        await wait_all_tasks_blocked()
        call.disconnect()
        await call.wait()
        assert call.status == 0
        assert not served.settled
        served.assert_clean()


async def test_a_refusal_reads_the_rest_of_the_body_first(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The error is sent at once, but the response ends only after the body, so that no reset can erase it."""
    async with open_app(KEYED) as served:
        call = await served.client.ask(
            "POST", CHAT, raw=[b"x" * 100, Pause(1), b"x"], headers={"content-type": "application/json"}
        )
        assert call.status == 401
        assert call.error["code"] == "invalid_api_key"
        assert call.ended_at - call.committed_at == pytest.approx(1)


async def test_an_internal_error_before_the_exchange_is_a_500(
    open_app: OpenApp, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets an OpenAI error, and the log gets the traceback."""
    logs.expect_error("request_crashed")
    async with open_app() as served:
        monkeypatch.setattr("trigate.asgi.data_plane.decode_call", None)
        call = await served.client.ask("POST", CHAT, chat())
        assert_refused(served, call, 500, "internal_error")
        assert call.header("x-request-id") in call.error["message"]


# -- over real sockets ------------------------------------------------------------------------------------------------

SOCKET_PHASES: dict[str, tuple[Script, bool, bytes]] = {
    "waiting for headers": ((Stall(),), True, b""),
    "waiting for the first token": ((Head(), Say(role()), Stall()), True, b""),
    "streaming": ((Say(content("a")), Stall()), True, b"data: "),
    "headers of a JSON answer": ((Stall(),), False, b""),
    "reading a JSON answer": ((Head(200, "application/json"), Say(b'{"a'), Stall()), False, b""),
}


def _post(port: int, body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def _dial(client: httpx2.AsyncClient, *, stream: bool) -> trio.SocketStream:
    port = client.base_url.port
    assert port is not None
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    await connection.send_all(_post(port, AsgiClient.encode(chat(stream=stream))))
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("phase", SOCKET_PHASES)
async def test_a_killed_client_closes_the_upstream_within_50_ms(open_server: OpenServer, phase: str, how: str) -> None:
    """This holds for FIN and RST in every phase, measured from socket to socket."""
    script, stream, first = SOCKET_PHASES[phase]
    async with (
        open_socket_provider(script) as (provider, url),
        open_server(make_config({"up": {"base_url": url}})) as (client, app),
    ):
        connection = await _dial(client, stream=stream)
        pieces_read = sum(isinstance(step, Say) for step in script)
        await provider.wait_until(
            lambda provider: provider.opened == 1 and provider.calls[0].pieces_read == pieces_read
        )
        received = b""
        while first not in received:
            received += await connection.receive_some()
        await trio.sleep(0.02)
        assert provider.open_now == 1
        if how == "rst":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        left = time.perf_counter()
        connection.socket.close()
        await provider.wait_until(lambda provider: provider.open_now == 0)
        assert time.perf_counter() - left < 0.05
        assert provider.calls[0].ended == "closed"
        await wait_all_tasks_blocked(0.01)
        assert not app.gateway.live
        assert app.gateway.live.totals.cancelled == 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half_close", ["cancel", "serve"])
async def test_a_client_that_closes_its_sending_side(open_server: OpenServer, half_close: str, stream: bool) -> None:
    """By default it has disconnected, and the upstream call is cancelled. With ``serve`` it gets its whole answer."""
    script = (Pause(0.05), *says("x")) if stream else (Pause(0.05), *answers(completion("y")))
    async with (
        open_socket_provider(script) as (provider, url),
        open_server(make_config({"up": {"base_url": url}}, limits={"half_close": half_close})) as (client, app),
    ):
        async with await _dial(client, stream=stream) as connection:
            await connection.send_eof()
            received = b"".join([bytes(data) async for data in connection])
        await provider.wait_until(lambda provider: provider.open_now == 0 or half_close == "serve")
        await wait_all_tasks_blocked(0.01)
        assert not app.gateway.live
        totals = app.gateway.live.totals
        if half_close == "serve":
            assert received.startswith(b"HTTP/1.1 200 ")
            assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}")
            assert (totals.complete, totals.cancelled) == (1, 0)
        else:
            assert received == b""
            assert (totals.complete, totals.cancelled) == (0, 1)


async def test_a_half_closed_client_that_is_reset(open_server: OpenServer) -> None:
    """With ``serve``, too, a reset cancels the upstream call at once."""
    async with (
        open_socket_provider((Say(content("a")), Stall())) as (provider, url),
        open_server(make_config({"up": {"base_url": url}}, limits={"half_close": "serve"})) as (client, app),
    ):
        connection = await _dial(client, stream=True)
        await connection.send_eof()
        received = b""
        while b"a" not in received.partition(b"content")[2]:
            received += await connection.receive_some()
        await trio.sleep(0.02)
        assert provider.open_now == 1
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await connection.aclose()
        await provider.wait_until(lambda provider: provider.open_now == 0)
        await wait_all_tasks_blocked(0.01)
        assert app.gateway.live.totals.cancelled == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    "rest",
    [(), (Say(content("half")[:12]),), (Say(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'),)],
    ids=["between events", "mid-event", "no DONE"],
)
async def test_a_killed_upstream_is_an_error_event(open_server: OpenServer, how: Any, rest: Script) -> None:
    """The response ends properly: the chunked framing is complete and the connection can be reused."""
    async with (
        open_socket_provider((Say(content("a")), Pause(0.02), *rest, Break(how)), says("x")) as (_, url),
        open_server(make_config({"up": {"base_url": url}})) as (client, _app),
    ):
        response = await client.post(CHAT, json=chat())
        assert response.status_code == 200
        assert response.text.startswith("data: ")
        assert "upstream_truncated" in response.text.rstrip().rpartition("\n")[2]
        assert "[DONE]" not in response.text
        assert (await client.post(CHAT, json=chat())).text.endswith(DONE.decode())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_an_upstream_killed_before_its_head_is_a_502(open_server: OpenServer, how: Any) -> None:
    """A refused connection is a 502 too."""
    async with (
        open_socket_provider((Break(how),)) as (_, url),
        open_server(make_config({"up": {"base_url": url}})) as (client, _app),
    ):
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unavailable")
    async with open_server(make_config({"up": {"base_url": url}})) as (client, _app):
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unavailable")


@pytest.mark.slow
async def test_an_upstream_connection_serves_many_calls(open_server: OpenServer) -> None:
    """A complete answer, streamed or not, leaves its connection open for the next call. So does an error."""
    connections = set()
    scripts = (says("x"), answers(completion("y")), answers(b'{"error":{"message":"m"}}', status=400), says("z"))
    async with (
        open_socket_provider(*scripts) as (provider, url),
        open_server(make_config({"up": {"base_url": url}})) as (client, _app),
    ):
        for stream in (True, False, False, True):
            await client.post(CHAT, json=chat(stream=stream))
        connections = {call.connection for call in provider.calls}
        assert len(provider.calls) == 4
        assert len(connections) == 1


# httpx2 leaves a generator behind when a reply is closed between two reads. The connection itself is closed.
@pytest.mark.filterwarnings("ignore:.*PoolByteStream:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
async def test_a_stalled_reader_over_sockets(open_server: OpenServer) -> None:
    """When the client reads nothing, the gateway reads no more than its buffers hold, closes the upstream in time, and
    frees the slot while the client still holds its socket."""
    piece = content("x" * 100_000)
    script = (*(Say(piece) for _ in range(2000)), Say(DONE))
    async with open_socket_provider(script) as (provider, url):
        config = make_config({"up": {"base_url": url}}, limits={"stall_timeout_s": 0.5})
        async with open_server(config) as (client, app):
            connection = await _dial(client, stream=True)
            await provider.wait_until(lambda provider: provider.opened == 1 and provider.calls[0].pieces_read > 0)
            begun = time.perf_counter()
            with trio.fail_after(5):
                await provider.wait_until(lambda provider: provider.open_now == 0)
            assert provider.calls[0].ended == "closed"
            assert time.perf_counter() - begun < 2
            assert provider.calls[0].pieces_read < 500, "200 MB were offered"
            with trio.fail_after(2):
                while app.gateway.live:  # noqa: ASYNC110 - nothing notifies
                    await trio.sleep(0.01)
            assert app.gateway.generations.current.upstreams["up"].in_flight == 0
            connection.socket.close()


@pytest.mark.slow
async def test_a_slow_reader_over_sockets_is_not_stalled(open_server: OpenServer) -> None:
    """A client that reads slowly keeps its stream beyond the stall limit. A client that stops reading does not."""
    piece = content("x" * 100_000)
    async with open_socket_provider((*(Say(piece) for _ in range(2000)), Say(DONE))) as (provider, url):
        config = make_config({"up": {"base_url": url}}, limits={"stall_timeout_s": 0.4})
        async with open_server(config) as (client, app):
            connection = await _dial(client, stream=True)
            begun = time.perf_counter()
            while time.perf_counter() - begun < 2:
                assert await connection.receive_some(200_000)
                await trio.sleep(0.02)
            assert provider.open_now == 1
            with trio.fail_after(5):
                await provider.wait_until(lambda provider: provider.open_now == 0)
            with trio.fail_after(2):
                while app.gateway.live:  # noqa: ASYNC110 - nothing notifies
                    await trio.sleep(0.01)
            connection.socket.close()


@pytest.mark.slow
async def test_a_pipelined_stream_of_refusals_keeps_its_connection(open_server: OpenServer) -> None:
    """A 400 whose body was read keeps the connection open: ten of them on one connection take well under a second."""
    async with open_server(make_config()) as (client, _app):
        begun = time.perf_counter()
        for _ in range(10):
            response = await client.post(CHAT, json={"model": "up/m"})
            assert response.status_code == 400
            assert "connection" not in response.headers
        assert time.perf_counter() - begun < 1
