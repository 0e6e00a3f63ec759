"""A Telegram bot against a fake Bot API over sockets: with a whole gateway, and the adapter alone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import trio

from tests.channels.services import open_services
from tests.support.gateway import Served, make_config
from tests.support.gateway import open_app as _open_app
from tests.support.logs import Logs
from tests.support.processes import SERVE, Gateway, run_gateway
from tests.support.provider import Pause, Provider, Script, Stall, answers, says
from tests.support.telegram_server import TOKEN, Refusal, TelegramServer, open_telegram
from trigate.channels import service
from trigate.channels.adapter import Channel
from trigate.channels.telegram import adapter as telegram
from trigate.channels.telegram import api, polling
from trigate.channels.telegram.adapter import TelegramAdapter
from trigate.config.secrets import Secret
from trigate.config.sections import ChannelConfig, Config, Seconds
from trigate.errors import StoreUnavailable
from trigate.runs.request import RunRequest
from trigate.store.records import Delivery, Run
from trigate.store.sqlite import open_sqlite_store
from trigate.upstream.transport import SocketTransport

SECRET = "secret-token-of-a-test-0123456789"
PATIENCE_S = 20.0
THROTTLED = Refusal(429, "Too Many Requests: retry after 0.1", retry_after=0.1)  # Telegram says whole seconds


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that failed is started again at once, so that tests do not wait for the clock."""
    monkeypatch.setattr(service, "PAUSE_S", 0.001)
    monkeypatch.setattr(polling, "HOLD_S", 0.01)


def settings(url: str, **more: Any) -> dict[str, Any]:
    """The configuration of a channel without sessions."""
    return {"type": "telegram", "token": TOKEN, "base_url": url, "model": "up/m", "session": "none", **more}


@contextlib.asynccontextmanager
async def open_bot(
    *scripts: Script,
    server: TelegramServer | None = None,
    store: str = ":memory:",
    config: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> AsyncIterator[tuple[TelegramServer, Served]]:
    """Opens a gateway with one bot, ``bot``, and the fake Bot API."""
    async with open_telegram(server) as (telegram_server, url):
        own = make_config(channels={"bot": settings(url, **(config or {}))}, store={"path": store}, **(more or {}))
        async with _open_app(own, Provider(*scripts)) as served:
            with trio.fail_after(PATIENCE_S):
                yield telegram_server, served


async def row_of(served: Served, name: str = "bot") -> dict[str, Any]:
    """A channel's row in ``/status``."""
    status = (await served.client.ask("GET", "/status")).json
    return next(row for row in status["channels"] if row["name"] == name)


async def wait_for_row(served: Served, **wanted: object) -> dict[str, Any]:
    """Waits until a channel's row has these values."""
    while True:
        row = await row_of(served)
        if all(row[name] == value for name, value in wanted.items()):
            return row
        await trio.sleep(0.01)


# -- with a gateway ---------------------------------------------------------------------------------------------------


async def test_answer() -> None:
    """A message is answered and counted, its update is confirmed, and the bot is shown to be typing."""
    async with open_bot(says("Good ", "day")) as (server, served):
        update = server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["Good day"])
        await server.wait_until(lambda server: server.waiting == 0)
        assert served.providers["up"].calls[0].json["messages"] == [{"role": "user", "content": "Hello"}]
        assert server.called("sendChatAction")[0] == {"chat_id": 1, "action": "typing"}
        assert server.called("getUpdates")[-1]["offset"] == update["update_id"] + 1
        assert server.called("getUpdates")[0]["allowed_updates"] == ["message"]
        row = await wait_for_row(served, status="connected", replied=1)
        assert (row["received"], row["queued"], row["last_error"]) == (1, 0, None)


def command(text: str) -> tuple[dict[str, Any], ...]:
    """The entities of a command."""
    return ({"type": "bot_command", "offset": 0, "length": len(text)},)


async def test_conversation() -> None:
    """A chat is remembered until it is reset; another chat has a memory of its own."""
    async with open_bot(says("First"), says("Second"), says("Third"), config={"session": "chat"}) as (server, served):
        calls = served.providers["up"].calls

        async def ask(text: str, *, chat: int = 1, count: int) -> list[str]:
            server.say(text, chat=chat, entities=command(text) if text.startswith("/") else ())
            await wait_for_row(served, replied=count)
            return [message["content"] for message in calls[-1].json["messages"]]

        assert await ask("One", count=1) == ["One"]
        assert await ask("Two", count=2) == ["One", "First", "Two"]
        assert await ask("Else", chat=2, count=3) == ["Else"]
        await ask("/reset", count=4)
        assert server.texts() == ["First", "Second", "This conversation begins anew."]
        assert await ask("Three", count=5) == ["Three"]


async def test_stop() -> None:
    """A stopped run ends at once, with its upstream request, and the text so far stays."""
    half = (*says("Half")[:-1], Stall())
    async with open_bot(half, config={"session": "chat"}) as (server, served):
        server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["Half"])
        server.say("/stop", entities=command("/stop"))
        await server.wait_until(lambda server: server.texts() == ["Half", "Stopped."])
        assert served.providers["up"].calls[0].ended == "closed"
        server.say("/stop", entities=command("/stop"))
        await server.wait_until(lambda server: server.texts() == ["Half", "Stopped.", "There was nothing to stop."])


async def test_failure() -> None:
    """If there is no answer, one line says so, with the id of the run that has the error."""
    async with open_bot(answers(b'{"error": {"message": "secret words"}}', status=500)) as (server, served):
        server.say("Hello")
        await server.wait_until(lambda server: len(server.texts()) == 1)
        [text] = server.texts()
        assert text.startswith("No answer: the model could not be reached.")
        path = f"/hooks/bot/runs/{text.rpartition('(')[2].rstrip(')')}"
        while True:
            run = (await served.client.ask("GET", path)).json
            if run["deliveries"][-1]["state"] == "delivered":
                break
            await trio.sleep(0.01)
        assert (run["state"], run["status"]) == ("failed", 502)
        assert (await served.client.ask("GET", path.replace("bot", "other"))).status == 404


async def test_not_allowed() -> None:
    """Users who are not allowed get no answer, but their messages are counted; allowed users are answered."""
    async with open_bot(config={"allow": ["@ann", "77"]}) as (server, served):
        server.say("Hello", chat=5, name="bob")
        server.say("Hello", chat=6, name="Ann")
        server.say("Hello", chat=77)
        await server.wait_until(lambda server: bool(server.texts(6) and server.texts(77)))
        assert server.texts(5) == []
        assert len(served.providers["up"].calls) == 2
        assert (await wait_for_row(served, replied=2))["received"] == 3


async def test_group() -> None:
    """In a group, a message that mentions the bot is answered, as a reply to it."""
    async with open_bot() as (server, _):
        server.say("Hello all", chat=-5)
        update = server.say("@trigate_bot hello", chat=-5, entities=({"type": "mention", "offset": 0, "length": 12},))
        await server.wait_until(lambda server: bool(server.texts(-5)))
        [sent] = server.called("sendMessage")
        assert sent["reply_parameters"]["message_id"] == update["message"]["message_id"]


async def test_unreadable_update(logs: Logs) -> None:
    """An update that does not match the Bot API is skipped, and the next one is answered."""
    async with open_bot() as (server, _):
        server.update(message={"message_id": "one"})
        server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["Hello!"] and not server.waiting)
    assert len(logs.named("telegram_update_unreadable")) == 1


# -- exactly one answer -----------------------------------------------------------------------------------------------


async def test_between_run_and_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """If storing the offset fails after the run was stored, the update comes again, and is not answered again."""
    async with open_bot(says("Once")) as (server, served):
        store = served.gateway.store
        advance = store.channels.advance
        failures = [StoreUnavailable("the disk is full")]

        def fail_first(name: str, cursor: str) -> Any:
            if failures:
                raise failures.pop()
            return advance(name, cursor)

        monkeypatch.setattr(store.channels, "advance", fail_first)
        server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["Once"] and not server.waiting)
        assert not failures
        assert len(served.providers["up"].calls) == 1
        assert (await wait_for_row(served, status="connected"))["last_error"] == "the disk is full"


async def test_restart(tmp_path: Path) -> None:
    """After a restart, messages that came meanwhile are answered, and earlier ones are not answered again."""
    server, store = TelegramServer(), str(tmp_path / "trigate.db")
    async with open_bot(says("1"), server=server, store=store) as (_, served):
        first = server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["1"] and not server.waiting)
        await wait_for_row(served, replied=1)
    server.say("Again")
    server.calls.clear()
    async with open_bot(says("2"), server=server, store=store) as (_, served):
        await server.wait_until(lambda server: server.texts() == ["1", "2"])
        assert server.called("getUpdates")[0]["offset"] == first["update_id"] + 1
        assert len(served.providers["up"].calls) == 1


async def test_run_started_again(tmp_path: Path) -> None:
    """A run that ended with its process is executed again after the restart, in the message that showed it."""
    server, store = TelegramServer(), str(tmp_path / "trigate.db")
    async with open_bot((*says("Half")[:-1], Stall()), server=server, store=store) as (_, served):
        server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["Half"] and not server.waiting)
        run_id = served.providers["up"].calls[0].headers["x-request-id"]
        while True:
            await trio.sleep(0.01)
            if await served.gateway.store.deliveries.of_run(run_id):  # the id of the message
                break
    async with open_bot(says("Whole"), server=server, store=store) as (_, served):
        await server.wait_until(lambda server: server.texts() == ["Whole"])
        await wait_for_row(served, replied=1)
    assert len(server.called("sendMessage")) == 1


async def test_other_bot(tmp_path: Path) -> None:
    """The stored offset of another bot is ignored."""
    server, store = TelegramServer(), str(tmp_path / "trigate.db")
    async with open_bot(says("1"), server=server, store=store) as (_, served):
        await served.gateway.store.channels.advance("bot", "999:900000000")
    async with open_bot(says("1"), server=server, store=store):
        server.say("Hello")
        await server.wait_until(lambda server: server.texts() == ["1"])


async def test_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers one polls; the other takes over when that one has exited without letting go of the channel."""
    server, store = TelegramServer(), str(tmp_path / "trigate.db")
    async with open_bot(says("2"), server=server, store=store) as (_, second):
        async with open_bot(says("1"), server=server, store=store) as (_, first):
            await server.wait_until(lambda server: server.polling == 1)
            records = {record.name: record.holder for record in await second.gateway.store.channels.all()}
            holder, other = first, second
            if records["bot"] == second.gateway.workers.id:
                holder, other = second, first
            server.say("Hello")
            await server.wait_until(lambda server: len(server.texts()) == 1)
            assert (len(holder.providers["up"].calls), len(other.providers["up"].calls)) == (1, 0)
            if holder is first:
                monkeypatch.setattr(first.gateway.store.channels, "let_go", lambda name, worker: None)
        server.say("Hello")
        await server.wait_until(lambda server: len(server.texts()) == 2)
        assert all(error.code != 409 for error in server.refused)


@pytest.mark.slow
async def test_handover(tmp_path: Path) -> None:
    """A worker that hands over stops polling at once, and another one polls, while it finishes its answers."""
    server, store = TelegramServer(), str(tmp_path / "trigate.db")
    begun, *rest = says("fir", "st")[1:]
    async with open_bot((begun, Pause(1.0), *rest), server=server, store=store) as (_, first):
        await server.wait_until(lambda server: server.polling == 1)
        async with open_bot(says("second"), server=server, store=store) as (_, second):
            server.say("Hello")
            await server.wait_until(lambda server: len(first.providers["up"].calls) == 1 and server.polling == 1)
            first.gateway.drain.step_aside()
            await server.wait_until(lambda server: server.polling == 0)
            server.say("Hello")
            await server.wait_until(lambda server: "second" in server.texts())
            assert first.gateway.live
            await server.wait_until(lambda server: sorted(server.texts()) == ["first", "second"])
        assert (len(first.providers["up"].calls), len(second.providers["up"].calls)) == (1, 1)
        assert all(error.code != 409 for error in server.refused)


# -- errors of Telegram -----------------------------------------------------------------------------------------------


async def test_revoked_token(logs: Logs) -> None:
    """A revoked token disconnects only its channel, is logged once, and appears neither in logs nor in the status."""
    async with open_telegram() as (other, other_url):
        more: dict[str, Any] = {"hooks": {}}
        async with open_telegram() as (server, url):
            own = make_config(
                channels={"bot": settings(url), "other": settings(other_url)}, store={"path": ":memory:"}, **more
            )
            async with _open_app(own, Provider()) as served:
                with trio.fail_after(PATIENCE_S):
                    await wait_for_row(served, status="connected")
                    server.token = "123456:another"
                    server.update(poll={})  # ends the request that waits
                    row = await wait_for_row(served, status="disconnected")
                    assert row["last_error"] == "Telegram does not take the token. getUpdates: 401 Unauthorized"
                    other.say("Hello")
                    await other.wait_until(lambda server: server.texts() == ["Hello!"])
                    assert (await row_of(served, "other"))["status"] == "connected"
                    status = (await served.client.ask("GET", "/status")).body
    assert len(logs.named("channel_disconnected")) == 1
    assert TOKEN not in status.decode()
    assert TOKEN not in repr(logs.entries)


async def test_outage() -> None:
    """After an outage the channel is connected again, and its last error stays in the status."""
    async with open_bot() as (server, served):
        server.refuse("getUpdates", *[Refusal(502, "Bad Gateway")] * 3)
        await server.wait_until(lambda server: len(server.called("getUpdates")) == 4)
        row = await wait_for_row(served, status="connected")
        assert row["last_error"] == "getUpdates: 502 Bad Gateway"


async def test_answer_fails() -> None:
    """The state of the channel follows the last call, also if that was no poll. A chat that has blocked the bot is no
    error of the channel."""
    async with open_bot(says("Hello"), says("Hello"), config={"edit_interval_s": 0}) as (server, served):
        await server.wait_until(lambda server: server.polling == 1)
        server.blocked.add(2)
        server.say("Hello", chat=2)
        await server.wait_until(lambda server: len(server.refused) == 2)  # that it types, and the answer
        assert (await row_of(served))["last_error"] is None
        server.refuse("sendMessage", Refusal(500, "Internal Server Error"))
        server.say("Hello")
        await wait_for_row(served, last_error="sendMessage: 500 Internal Server Error")
        server.update(poll={})  # ends the request that waits
        await wait_for_row(served, status="connected")


async def test_throttled_poll() -> None:
    """After a 429, the next poll waits for the pause that Telegram asked for."""
    async with open_bot() as (server, _served):
        server.refuse("getUpdates", THROTTLED)
        await server.wait_until(lambda server: len(server.called("getUpdates")) == 2)
        first, second = [call.at for call in server.calls if call.method == "getUpdates"]
        assert second - first >= 0.1


async def test_webhook_is_removed(logs: Logs) -> None:
    """A webhook that is set for a bot that polls is removed, and that is logged."""
    server = TelegramServer()
    server.webhook = {"url": "https://elsewhere.example/"}
    server.say("Hello")
    async with open_bot(server=server):
        await server.wait_until(lambda server: server.texts() == ["Hello!"])
    assert server.called("deleteWebhook") == [{"drop_pending_updates": False}]
    assert len(logs.named("telegram_webhook_removed")) == 1


async def test_reload() -> None:
    """A reload that adds a bot starts it; one that removes it stops it."""
    async with open_telegram() as (server, url), _open_app(make_config(), Provider(says("Hello"))) as served:
        gateway = served.gateway

        def reload(**sections: Any) -> None:
            async def load() -> Config:
                await trio.lowlevel.checkpoint()
                return make_config(**sections)

            gateway.reloader._read = load
            gateway.reloader.request()

        with trio.fail_after(PATIENCE_S):
            reload(channels={"bot": settings(url)})
            server.say("Hello")
            await server.wait_until(lambda server: server.texts() == ["Hello"] and server.polling == 1)
            reload()
            await server.wait_until(lambda server: server.polling == 0)
            status = (await served.client.ask("GET", "/status")).json
            assert status["channels"] == []


async def test_drain() -> None:
    """A drain waits for an answer in progress and its delivery; messages that come meanwhile are left for the next
    start."""
    first, *rest = says("Hel", "lo")[1:]
    async with open_bot((first, Pause(0.05), *rest), config={"edit_interval_s": 0.001}) as (server, served):
        server.say("Hello")
        await server.wait_until(lambda server: bool(server.texts()))
        served.gateway.drain.begin()
        server.say("Too late")
        await served.gateway.drain.wait_quiet()
        assert server.texts() == ["Hello"]
        assert (server.waiting, len(served.providers["up"].calls)) == (1, 1)


# -- webhook mode -----------------------------------------------------------------------------------------------------


async def test_webhook() -> None:
    """With the right secret an update is taken once, however often it comes; with another, or none, it is rejected."""
    server = TelegramServer()
    server.webhook = {"url": "https://gateway.example/hooks/bot"}
    async with open_bot(server=server, config={"mode": "webhook", "secrets": [SECRET]}) as (_, served):
        body = json.dumps(server.say("Hello")).encode()

        async def post(**headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            call = await served.client.ask(
                "POST", "/hooks/bot", body, headers={"content-type": "application/json", **named}
            )
            return call.status

        assert await post() == 401
        assert await post(x_telegram_bot_api_secret_token=SECRET[:-1] + "8") == 401
        assert await post(x_telegram_bot_api_secret_token=SECRET) == 200
        assert await post(x_telegram_bot_api_secret_token=SECRET) == 200
        body = b"{}"
        assert await post(x_telegram_bot_api_secret_token=SECRET) == 400
        await server.wait_until(lambda server: server.texts() == ["Hello!"])
        assert len(served.providers["up"].calls) == 1
        assert server.called("getUpdates") == []
        assert (await row_of(served))["status"] == "connected"


async def test_webhook_unset() -> None:
    """If no webhook is set, Telegram cannot call, and the channel is disconnected."""
    async with open_bot(config={"mode": "webhook", "secrets": [SECRET]}) as (server, served):
        row = await wait_for_row(served, status="disconnected")
        assert "setWebhook" in row["last_error"]
        server.webhook = {"url": "https://gateway.example/hooks/bot"}
        await wait_for_row(served, status="connected")


async def test_webhook_checked_after_an_error() -> None:
    """A reply that cannot be sent disconnects the channel, and the webhook is checked again at once."""
    server = TelegramServer()
    server.webhook = {"url": "https://gateway.example/hooks/bot"}
    server.refuse("getWebhookInfo", None, Refusal(502, "Bad Gateway"))
    server.refuse("sendMessage", Refusal(500, "Internal Server Error"))
    own = {"mode": "webhook", "secrets": [SECRET], "edit_interval_s": 0}
    async with open_bot(server=server, config=own) as (_, served):
        await wait_for_row(served, status="connected")
        body = json.dumps(server.say("Hello")).encode()
        headers = {"content-type": "application/json", "x-telegram-bot-api-secret-token": SECRET}
        assert (await served.client.ask("POST", "/hooks/bot", body, headers=headers)).status == 200
        await server.wait_until(lambda server: len(server.refused) == 2)  # the message, and the check after it
        row = await wait_for_row(served, status="connected")
        assert row["last_error"] == "getWebhookInfo: 502 Bad Gateway"


# -- the adapter alone ------------------------------------------------------------------------------------------------

CHAT = {"chat": 1, "thread": None, "message": 7, "is_group": False, "target": "1"}


@contextlib.asynccontextmanager
async def open_adapter(
    *, transport: type[httpx2.AsyncBaseTransport] = SocketTransport, **config: Any
) -> AsyncIterator[tuple[TelegramServer, TelegramAdapter]]:
    """Opens an adapter without a gateway."""
    async with open_telegram() as (server, url), transport() as connection:
        own = ChannelConfig(
            type="telegram", token=Secret(literal=TOKEN), **{"edit_interval_s": Seconds(0.01), **config}
        )
        async with open_services() as services:
            channel = Channel("bot", own, services, connection, base_url=url)
            with trio.fail_after(PATIENCE_S):
                yield server, TelegramAdapter(channel)


def delivery(
    reply: str | None,
    *,
    live: Mapping[str, Any] | None = None,
    kind: str = "completed",
    action: str = "chat",
    status: int = 200,
    **result: Any,
) -> Delivery:
    """The delivery of a run that has ended."""
    body = {
        "type": f"run.{kind}",
        "data": {"id": "run_1", "action": action, "status": status, "result": {"reply": reply, **result}},
        "reply_to": CHAT,
        "live": live or {},
    }
    return Delivery(
        id="msg_1",
        run_id="run_1",
        channel="bot",
        target="",
        body=msgspec.json.encode(body),
        created_at=0.0,
        due_at=0.0,
        repeatable=False,
    )


def running(**chat: Any) -> tuple[Run, RunRequest]:
    """A run in progress, and its request."""
    request = RunRequest(
        channel="bot",
        owner="channel:bot",
        session=None,
        action="chat",
        text="Hello",
        sender="1",
        model="m",
        reply_to={**CHAT, **chat},
    )
    run = Run(
        id="run_1",
        channel="bot",
        owner="channel:bot",
        session=None,
        action="chat",
        request=b"",
        state="running",
        acknowledged=True,
        worker="w",
        created_at=0.0,
    )
    return run, request


async def test_grows() -> None:
    """A reply is written at its first text, edited as it grows, and complete at the end, in one message."""
    async with open_adapter() as (server, adapter):
        async with adapter.watch(*running()) as live:
            live.show("Good")
            await server.wait_until(lambda server: server.texts() == ["Good"])
            live.show("Good day")
            await server.wait_until(lambda server: server.texts() == ["Good day"])
            shown = await live.end()
        assert (await adapter.deliver(delivery("Good day to you.", live=shown))).delivered
        assert server.texts() == ["Good day to you."]
        assert len(server.called("sendMessage")) == 1


async def test_grows_beyond_a_message() -> None:
    """A reply that is too long for a message continues in the next one."""
    text = "word " * 1500
    async with open_adapter() as (server, adapter):
        async with adapter.watch(*running()) as live:
            live.show(text[:4000])
            await server.wait_until(lambda server: len(server.texts()) == 1)
            live.show(text)
            await server.wait_until(lambda server: len(server.texts()) == 2)
            shown = await live.end()
        assert (await adapter.deliver(delivery(text + "end", live=shown))).delivered
        assert " ".join(server.texts()) == text + "end"
        assert len(server.called("sendMessage")) == 2


async def test_not_shown() -> None:
    """With an interval of 0, only typing is shown until the reply is complete."""
    async with open_adapter(edit_interval_s=Seconds(0.0)) as (server, adapter):
        async with adapter.watch(*running()) as live:
            live.show("Good")
            await server.wait_until(lambda server: bool(server.called("sendChatAction")))
            shown = await live.end()
        assert (await adapter.deliver(delivery("Good day", live=shown))).delivered
        assert len(server.called("sendMessage")) == 1
        assert server.called("editMessageText") == []


async def test_throttled_edits() -> None:
    """After a 429, edits are dropped during the pause; the next edit shows the newest text."""
    async with open_adapter() as (server, adapter):
        server.refuse("editMessageText", THROTTLED)
        async with adapter.watch(*running()) as live:
            live.show("1")
            await server.wait_until(lambda server: server.texts() == ["1"])
            live.show("12")
            await server.wait_until(lambda server: len(server.called("editMessageText")) == 1)
            live.show("123")
            live.show("1234")
            await server.wait_until(lambda server: server.texts() == ["1234"])
        first, second = [call.at for call in server.calls if call.method == "editMessageText"]
        assert second - first >= 0.1


async def test_pace_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group, edits are at least `GROUP_INTERVAL_S` apart, and all runs of a chat share the limit."""
    monkeypatch.setattr(telegram, "GROUP_INTERVAL_S", 1000.0)
    async with open_adapter() as (server, adapter):
        run, request = running(chat=-5, is_group=True)
        async with adapter.watch(run, request) as one, adapter.watch(run, request) as other:
            one.show("1")
            await server.wait_until(lambda server: server.texts(-5) == ["1"])
            one.show("12")
            other.show("2")
            await trio.testing.wait_all_tasks_blocked(0.01)
            await one.end()
            await other.end()
        assert server.texts(-5) == ["1"]


async def test_delivery_is_throttled() -> None:
    """A reply waits for the pause that Telegram asks for. If that is long, the rest of the reply becomes another
    delivery, so that no process sends anything twice."""
    text = "word " * 1500
    long = Refusal(429, "Too Many Requests: retry after 90", retry_after=90)
    async with open_adapter() as (server, adapter):
        server.refuse("sendMessage", long)
        receipt = await adapter.deliver(delivery(text))
        assert (receipt.delivered, receipt.again, receipt.after_s, receipt.unsure) == (False, True, 90.0, False)
        server.refuse("sendMessage", None, long)
        assert (await adapter.deliver(delivery(text))).delivered
        assert len(server.texts()) == 1
        [rest] = await adapter._channel.services.store.deliveries.of_run("run_1")
        assert 80 < rest.due_at - time.time() <= 90
        server.refuse("sendMessage", THROTTLED)
        assert (await adapter.deliver(rest)).delivered
        assert " ".join(server.texts()) == text.strip()


@pytest.mark.parametrize("live", [{}, {"shown": [["999", 4]]}, {"shown": [["999", 8]]}])
async def test_message_is_gone(live: dict[str, Any]) -> None:
    """A message that a user has deleted is written anew."""
    async with open_adapter() as (server, adapter):
        assert (await adapter.deliver(delivery("Good day.", live=live))).delivered
        assert server.texts() == ["Good day."]


async def test_not_modified() -> None:
    """An edit that changes nothing succeeds."""
    async with open_adapter() as (server, adapter):
        assert (await adapter.deliver(delivery("Good day"))).delivered
        [(_, message_id)] = server.messages
        assert (await adapter.deliver(delivery("Good day", live={"shown": [[str(message_id), -1]]}))).delivered
        assert server.texts() == ["Good day"]


async def test_blocked() -> None:
    """A delivery to a user who has blocked the bot fails for good."""
    async with open_adapter() as (server, adapter):
        server.blocked.add(1)
        receipt = await adapter.deliver(delivery("Good day"))
        assert (receipt.delivered, receipt.again, receipt.status) == (False, False, 403)


async def test_moved() -> None:
    """A group that has become a supergroup is answered there."""
    async with open_adapter() as (server, adapter):
        server.moved[1] = -1001
        assert (await adapter.deliver(delivery("Good day"))).delivered
        assert server.texts(-1001) == ["Good day"]


async def test_unreachable() -> None:
    """If Telegram cannot be reached, the delivery is tried again: the message cannot have arrived."""
    async with open_adapter() as (_server, adapter):
        adapter._channel.base_url = "http://127.0.0.1:1"
        receipt = await adapter.deliver(delivery("Good day"))
        assert (receipt.delivered, receipt.again, receipt.unsure) == (False, True, False)
        assert TOKEN not in str(receipt.error)


@pytest.mark.parametrize("transport", [SocketTransport, httpx2.AsyncHTTPTransport])
async def test_token_is_not_logged(
    transport: type[httpx2.AsyncBaseTransport], caplog: pytest.LogCaptureFixture, logs: Logs
) -> None:
    """The token is in the path of requests, and no library logs it, even at debug level."""
    caplog.set_level(logging.DEBUG)
    async with open_adapter(transport=transport) as (server, adapter):
        assert (await adapter.deliver(delivery("Good day"))).delivered
        server.token = "123456:another"
        receipt = await adapter.deliver(delivery("Good day"))
        assert not receipt.delivered
    assert TOKEN not in caplog.text + repr(logs.entries) + repr(receipt)


async def test_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that was sent and not answered may have arrived."""
    monkeypatch.setattr(api, "ANSWER_S", 0.02)
    async with open_adapter() as (server, adapter):

        async def sleep(path: str, body: bytes) -> tuple[int, bytes]:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(server, "answer", sleep)
        assert (await adapter.deliver(delivery("Good day"))).unsure


@pytest.mark.parametrize(
    ("ended", "texts"),
    [
        (delivery("", kind="completed"), ["The model answered with nothing."]),
        (delivery(None, action="reset"), ["This conversation begins anew."]),
        (delivery(None, action="stop", stopped=[{"id": "run_2"}]), ["Stopped."]),
        (delivery(None, action="stop", stopped=[]), ["There was nothing to stop."]),
        (delivery("", kind="cancelled"), []),
        (delivery("Good", kind="cancelled"), ["Good"]),
        (delivery(None, kind="failed", status=400), ["No answer: the model does not take this message. (run_1)"]),
    ],
)
async def test_texts(ended: Delivery, texts: list[str]) -> None:
    """Each result of a run has its text."""
    async with open_adapter() as (server, adapter):
        assert (await adapter.deliver(ended)).delivered
        assert server.texts() == texts


async def test_failure_after_text() -> None:
    """The shown part of an answer that failed stays, and a further message says that it is incomplete."""
    async with open_adapter() as (server, adapter):
        async with adapter.watch(*running()) as live:
            live.show("Good")
            await server.wait_until(lambda server: server.texts() == ["Good"])
            shown = await live.end()
        assert (await adapter.deliver(delivery(None, kind="failed", status=502, live=shown))).delivered
        assert server.texts()[0] == "Good"
        assert server.texts()[1].startswith("The answer above is incomplete: ")


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_killed_worker(tmp_path: Path) -> None:
    """Of two worker processes one polls; when it is killed, the other one, or its replacement, takes over."""
    async with open_telegram() as (server, url):
        config = f"""
            store.path = "{tmp_path / "trigate.db"}"
            upstreams.echo.kind = "echo"
            [channels.bot]
            type = "telegram"
            token = "{TOKEN}"
            base_url = "{url}"
            session = "none"
            """
        with contextlib.ExitStack() as stack:
            running = run_gateway(config, tmp_path, command=(*SERVE, "--workers", "2"))
            gateway = await trio.to_thread.run_sync(stack.enter_context, running)
            with trio.fail_after(60):
                for number in (1, 2, 3):
                    server.say(f"Message {number}")
                    await server.wait_until(lambda server, number=number: len(server.texts()) == number)  # type: ignore[misc]
                    os.kill(await holder_when_done(tmp_path / "trigate.db"), signal.SIGKILL)
            assert len(server.texts()) == 3
            assert TOKEN not in gateway.log()


@pytest.mark.slow
async def test_hot_restart(tmp_path: Path) -> None:
    """During hot restarts in a row, each message gets one answer, and one gateway polls in the end."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    async with open_telegram() as (server, url):
        config = f"""
            store.path = "{tmp_path / "trigate.db"}"
            [upstreams.echo]
            kind = "echo"
            words_per_s = 10
            [channels.bot]
            type = "telegram"
            token = "{TOKEN}"
            base_url = "{url}"
            model = "echo/echo"
            session = "none"
            """
        wanted = []
        with contextlib.ExitStack() as stack:
            gateways: list[Gateway] = []
            for number in range(4):
                directory = tmp_path / str(number)
                directory.mkdir()
                running = run_gateway(config, directory, command=(*SERVE[:-1], str(port)))
                gateways.append(await trio.to_thread.run_sync(stack.enter_context, running))
                for chat in range(1, 4):
                    wanted.append(f"To number {number} in chat {chat}")
                    server.say(wanted[-1], chat=chat)
                count = len(wanted)
                with trio.fail_after(60):  # so the next hot restart finds answers in progress
                    await server.wait_until(lambda server, count=count: len(server.messages) > count - 3)  # type: ignore[misc]
            with trio.fail_after(60):
                await server.wait_until(lambda server: set(wanted) <= set(server.messages.values()))
                await server.wait_until(lambda server: server.polling == 1)
            for gateway in gateways[:-1]:
                assert await trio.to_thread.run_sync(gateway.process.wait, 20) == 0
                assert "taken_over" in gateway.log()
        assert sorted(server.messages.values()) == sorted(wanted)
        assert [error for error in server.refused if error.code == 409] == []


async def holder_when_done(store: Path) -> int:
    """The process that polls, once no work is left. (A process that is killed between writing a message and storing its
    id leaves a part of an answer behind.)"""
    async with open_sqlite_store(str(store)) as opened:
        while True:
            [record] = await opened.channels.all()
            pids = {worker.id: worker.pid for worker in await opened.workers.all()}
            if (
                record.holder in pids
                and not await opened.runs.unfinished("bot")
                and not await opened.deliveries.depth()
            ):
                return pids[record.holder]
            await trio.sleep(0.05)
