"""The Bot API that tests talk to refuses what the real one refuses."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec
import pytest
import trio

from tests.support.telegram_server import TOKEN, Refusal, TelegramServer, open_telegram


async def ask(server: TelegramServer, method: str, token: str = TOKEN, **parameters: Any) -> tuple[int, Any]:
    """The status, and the result or the description of what went wrong."""
    status, body = await server.answer(f"/bot{token}/{method}", msgspec.json.encode(parameters))
    reply = msgspec.json.decode(body)
    assert reply["ok"] == (status == 200)
    assert reply.get("error_code", 200) == status
    return status, reply["result"] if reply["ok"] else reply["description"]


async def test_socket() -> None:
    """It speaks HTTP, one call after another on a connection."""
    async with open_telegram() as (server, url), httpx2.AsyncClient(base_url=url, trust_env=False) as client:
        for _ in range(2):
            reply = await client.post(f"/bot{TOKEN}/getMe")
            assert reply.json()["result"]["username"] == "trigate_bot"
        assert len(server.calls) == 2


@pytest.mark.parametrize(("token", "status"), [("123:wrong", 401), ("none", 404), (TOKEN, 200)])
async def test_token(token: str, status: int) -> None:
    """A wrong token is 401; what cannot be one is 404."""
    assert (await ask(TelegramServer(), "getMe", token))[0] == status


async def test_offset() -> None:
    """Updates come again until an offset behind them confirms them."""
    server = TelegramServer()
    first, second = server.say("1"), server.say("2")
    for offset, found in ((0, [first, second]), (0, [first, second]), (second["update_id"], [second])):
        assert await ask(server, "getUpdates", offset=offset) == (200, found)
    assert await ask(server, "getUpdates", offset=second["update_id"] + 1) == (200, [])
    assert server.waiting == 0


async def test_two_pollers() -> None:
    """A second poller ends the first."""
    server = TelegramServer()
    replies = []
    async with trio.open_nursery() as nursery:

        async def poll() -> None:
            replies.append(await ask(server, "getUpdates", timeout=30))

        nursery.start_soon(poll)
        await server.wait_until(lambda server: server.polling == 1)
        await ask(server, "getUpdates")
    assert replies[0][0] == 409


async def test_webhook_and_poller() -> None:
    """Who has a webhook cannot poll."""
    server = TelegramServer()
    server.webhook = {"url": "https://gateway.example/hooks/bot"}
    assert (await ask(server, "getUpdates"))[0] == 409
    assert await ask(server, "deleteWebhook") == (200, True)
    assert (await ask(server, "getUpdates"))[0] == 200


async def test_messages() -> None:
    """Messages have lengths in UTF-16; an edit has to change something that is there."""
    server = TelegramServer()
    status, message = await ask(server, "sendMessage", chat_id=1, text="😀" * 2048)
    assert status == 200
    assert (await ask(server, "sendMessage", chat_id=1, text="😀" * 2048 + "a"))[0] == 400
    assert (await ask(server, "sendMessage", chat_id=1, text=" "))[0] == 400
    edit = {"chat_id": 1, "message_id": message["message_id"]}
    assert "not modified" in (await ask(server, "editMessageText", **edit, text="😀" * 2048))[1]
    assert (await ask(server, "editMessageText", **edit, text="Hello"))[0] == 200
    assert "not found" in (await ask(server, "editMessageText", chat_id=1, message_id=99, text="Hello"))[1]
    assert server.texts() == ["Hello"]


async def test_refusals() -> None:
    """Limits, people who do not want it, groups that have moved, and what a test asks for."""
    server = TelegramServer()
    server.edits_per_s = 0.001
    server.blocked.add(2)
    server.moved[-3] = -1003
    message: dict[str, Any] = {"chat_id": 1, "text": "Hello"}
    assert [(await ask(server, "sendMessage", **message))[0] for _ in range(2)] == [200, 429]
    assert (await ask(server, "sendMessage", chat_id=2, text="Hello"))[0] == 403
    assert (await ask(server, "sendMessage", chat_id=-3, text="Hello"))[0] == 400
    server.refuse("getMe", None, Refusal(500, "Internal Server Error"))
    assert [(await ask(server, "getMe"))[0] for _ in range(3)] == [200, 500, 200]
