"""The pool by the interface of `httpx2`: requests, timeouts, and closing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.upstream.socket_server import (
    OK,
    STREAM,
    Server,
    answers,
    counts,
    open_pool,
)


def _url(server: Server) -> str:
    return f"http://{server.origin}/a%20b?c=d"


async def test_a_client_of_httpx2() -> None:
    """A client of httpx2 gets the answers to GET, POST and a streamed POST, all over one connection."""
    async with open_pool(answers(OK)) as (server, transport), httpx2.AsyncClient(transport=transport) as client:
        url = _url(server)
        assert (await client.get(url)).text == "ok"
        response = await client.post(url, json={"a": 1}, headers={"accept-encoding": "gzip"})
        assert (response.status_code, response.headers["content-length"], response.http_version) == (
            200,
            "2",
            "HTTP/1.1",
        )
        async with client.stream("POST", url, content=_pieces(b"ab", b"cd")) as streamed:
            assert [piece async for piece in streamed.aiter_raw()] == [b"ok"]
        assert server.opened == 1
        get, post, stream = server.requests
        assert get.startswith(b"GET /a%20b?c=d HTTP/1.1\r\n")
        assert b"content-length" not in get
        assert b"\r\naccept-encoding: gzip\r\n" in post.lower()
        assert post.endswith(b'\r\n\r\n{"a":1}')
        assert b"content-length: 4\r\n" in stream.lower()
        assert b"transfer-encoding" not in stream.lower()
        assert stream.endswith(b"\r\n\r\nabcd")


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:  # noqa: ASYNC124, ASYNC900 - no scope in it
    for piece in pieces:
        yield piece


async def test_identity_is_asked_for() -> None:
    """Identity encoding is requested by default, since a compressed body cannot be relayed as it comes."""
    async with open_pool(answers(OK)) as (server, transport):
        response = await transport.handle_async_request(httpx2.Request("GET", _url(server), headers={}))
        await response.aread()
        assert b"\r\naccept-encoding: identity\r\n" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", [(b"x", b"a\r\nevil: b")]),
        ("GET", [(b"x\r\ny", b"a")]),
        ("GET", [(b"x", b"a\x00")]),
        ("POST", [(b"content-length", b"7")]),
        ("CONNECT", []),
    ],
)
async def test_requests_that_say_something_else(method: str, headers: list[tuple[bytes, bytes]]) -> None:
    """A head with a line break, or with another length than that of its body, is not sent."""
    async with open_pool(answers(OK)) as (server, transport):
        request = httpx2.Request(method, _url(server), content=b"ab")
        request.headers = httpx2.Headers([(b"host", b"x"), *headers])
        with pytest.raises(httpx2.LocalProtocolError):
            await transport.handle_async_request(request)
        assert (server.requests, counts(transport)) == ([], (0, 0, 0))


async def test_the_timeouts_of_httpx2() -> None:
    """The timeouts for the queue, the head and a piece of the body hold; each releases the connection."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        if server.opened > 1:
            await stream.send_all(STREAM)
        await trio.sleep_forever()

    async with (
        open_pool(play, max_connections=1) as (server, transport),
        httpx2.AsyncClient(transport=transport, timeout=0.05) as client,
    ):
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(_url(server))
        async with client.stream("GET", _url(server)) as response:
            assert response.status_code == 200
            with pytest.raises(httpx2.PoolTimeout):
                await client.get(_url(server))
            with pytest.raises(httpx2.ReadTimeout):
                await response.aread()
        assert counts(transport) == (0, 0, 0)


async def test_a_response_closed_by_another_task() -> None:
    """If another task closes the response, the reader of its body gets an error."""
    async with open_pool(answers(STREAM)) as (server, transport), trio.open_nursery() as nursery:
        response = await transport.handle_async_request(httpx2.Request("GET", _url(server)))

        async def read() -> None:
            with pytest.raises(httpx2.ReadError):
                await response.aread()

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        await response.stream.aclose()
        await response.stream.aclose()
        assert counts(transport) == (0, 0, 0)
