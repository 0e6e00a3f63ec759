"""The fake workspace behaves as Slack's documentation says."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec
import pytest
import trio

from tests.support.slack_server import BOT, EDIT_BYTES, TOKEN, EventSender, Workspace, open_slack

HEADERS = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json; charset=utf-8"}


def _call(workspace: Workspace, method: str, **fields: Any) -> Any:
    answer = workspace.answer(method, HEADERS, msgspec.json.encode(fields))
    assert answer is not None
    return msgspec.json.decode(answer[2])


async def test_messages_are_written_and_edited() -> None:
    """Over a socket, a message can be written and edited, and keeps its last text."""
    workspace = Workspace()
    async with open_slack(workspace) as url, httpx2.AsyncClient(base_url=url, headers=HEADERS) as client:
        me = (await client.post("/auth.test", json={})).json()
        assert (me["ok"], me["user_id"]) == (True, BOT)
        posted = (
            await client.post("/chat.postMessage", json={"channel": "C1", "text": "a", "thread_ts": "1.0"})
        ).json()
        edited = (await client.post("/chat.update", json={"channel": "C1", "ts": posted["ts"], "text": "b"})).json()
        assert edited["text"] == "b"
        assert workspace.texts() == ["b"]
        assert workspace.messages[0].thread_ts == "1.0"
        workspace.lose_answer("chat.postMessage")
        with pytest.raises(httpx2.TransportError):
            await client.post("/chat.postMessage", json={"channel": "C1", "text": "c"})
        assert workspace.texts() == ["b", "c"]


async def test_errors_come_with_status_200() -> None:  # noqa: ASYNC124 - the workspace reads the clock
    """An error is named as in the methods' references, under status 200."""
    workspace = Workspace()
    assert _call(workspace, "chat.postMessage", channel="C9", text="a")["error"] == "channel_not_found"
    assert _call(workspace, "chat.postMessage", channel="C1", text="")["error"] == "no_text"
    assert _call(workspace, "chat.update", channel="C1", ts="1.0", text="a")["error"] == "message_not_found"
    ts = _call(workspace, "chat.postMessage", channel="C1", text="a")["ts"]
    assert _call(workspace, "chat.update", channel="C1", ts=ts, text="ü" * (EDIT_BYTES // 2))["ok"]
    assert _call(workspace, "chat.update", channel="C1", ts=ts, text="x" * (EDIT_BYTES + 1))["error"] == "msg_too_long"
    long = _call(workspace, "chat.postMessage", channel="C1", text="x" * 50_000)
    assert (len(workspace.messages[-1].text), long["response_metadata"]["warnings"]) == (40_000, ["message_truncated"])
    workspace.archived.add("C1")
    assert _call(workspace, "chat.postMessage", channel="C1", text="a")["error"] == "is_archived"
    workspace.token_error = "token_revoked"
    assert _call(workspace, "auth.test")["error"] == "token_revoked"
    assert _call(workspace, "no.such")["error"] == "token_revoked"
    for headers, error in (({}, b"not_authed"), ({"authorization": "Bearer x"}, b"invalid_auth")):
        answer = workspace.answer("auth.test", headers, b"{}")
        assert answer is not None
        assert answer[0] == 200
        assert error in answer[2]


async def test_rates(autojump_clock: object) -> None:
    """Above the limit of one conversation, a call fails with 429 and a whole number of seconds; others succeed."""
    workspace = Workspace(burst=1)
    assert _call(workspace, "chat.postMessage", channel="C1", text="a")["ok"]
    answer = workspace.answer("chat.postMessage", HEADERS, b'{"channel":"C1","text":"b"}')
    assert answer is not None
    assert (answer[0], answer[1]["retry-after"]) == (429, "1")
    assert _call(workspace, "chat.postMessage", channel="C2", text="a")["ok"]
    await trio.sleep(1.0)
    assert _call(workspace, "chat.postMessage", channel="C1", text="b")["ok"]
    assert workspace.called("chat.postMessage") == ["ok", "ratelimited", "ok", "ok"]


async def test_events_are_sent_again(autojump_clock: object) -> None:
    """A failed event is repeated up to three times, with the number and the reason, and the same id. It is not repeated
    once it is acknowledged, or if the app asks for no retry."""
    seen: list[tuple[str | None, str | None, str]] = []

    def app(*statuses: int, headers: dict[str, str] | None = None) -> EventSender:
        left = list(statuses)

        async def answer(request: httpx2.Request) -> httpx2.Response:
            event_id = msgspec.json.decode(await request.aread())["event_id"]
            seen.append(
                (request.headers.get("x-slack-retry-num"), request.headers.get("x-slack-retry-reason"), event_id)
            )
            status = left.pop(0)
            if status == 0:
                await trio.sleep(4)
            return httpx2.Response(status or 200, headers=headers)

        client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://app.example")
        return EventSender(client, "/hooks/work", pauses_s=(0, 60, 300))

    began = trio.current_time()
    await app(500, 0, 500, 500).event({"type": "message"})
    assert trio.current_time() - began == pytest.approx(363)
    assert [each[:2] for each in seen] == [
        (None, None),
        ("1", "http_error"),
        ("2", "http_timeout"),
        ("3", "http_error"),
    ]
    assert len({each[2] for each in seen}) == 1
    assert [each.status for each in await app(500, 200).event({"type": "message"})] == [500, 200]
    assert len(await app(500, headers={"x-slack-no-retry": "1"}).event({"type": "message"})) == 1
