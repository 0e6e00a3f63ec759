"""SIGKILL at random moments: what was acknowledged is stored once, and accepted runs complete after a restart."""

from __future__ import annotations

import json
import random
import signal
import socket
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio

from tests.support.processes import SERVE, Gateway, run_gateway
from tests.support.slow import FULL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KILLS = 20 if FULL else 6
SENDERS = 6
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SETTLES_S = 60.0
SEED = 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _toml(directory: Path, receiver: int) -> str:
    return f"""
[store]
path = "{directory / "trigate.db"}"
[upstreams.echo]
kind = "echo"
words_per_s = 200
[hooks.plain]
rate_per_s = 0
[hooks.callback]
rate_per_s = 0
reply = "callback"
callback_url = "http://127.0.0.1:{receiver}/"
callback_secret = "{SECRET}"
callback_private = true
"""


@attrs.define(eq=False)
class Receiver:
    """Receives callbacks, and records the run of each id."""

    received: dict[str, set[str]] = attrs.field(factory=dict)

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Serves until it is cancelled."""
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, stream: trio.SocketStream) -> None:
        data = b""
        async with stream:
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        piece = await stream.receive_some()
                        if not piece:
                            return
                        data += piece
                    head, _, data = data.partition(b"\r\n\r\n")
                    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
                    length = int(fields[b"content-length"])
                    while len(data) < length:
                        data += await stream.receive_some()
                    body, data = json.loads(data[:length]), data[length:]
                    self.received.setdefault(body["data"]["id"], set()).add(fields[b"webhook-id"].decode())
                    await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the gateway was killed meanwhile


@attrs.define(eq=False)
class Book:
    """The acknowledgements that the senders got."""

    runs: dict[str, tuple[str, str]] = attrs.field(factory=dict)  # run id → (hook, text)
    turns: list[tuple[str, str]] = attrs.field(factory=list)  # (session key, text)
    stop: bool = False


async def _send(client: httpx2.AsyncClient, book: Book, sender: int) -> None:
    """Sends one message after another, each until it is acknowledged."""
    number = 0
    while not book.stop:
        number += 1
        text = f"message {number} of {sender}"
        hook = "callback" if sender % 2 else "plain"
        headers = {"idempotency-key": f"{sender}-{number}"}
        if number % 2:
            headers["prefer"] = "respond-async"
        while True:
            try:
                answer = await client.post(f"/hooks/{hook}", json={"text": text, "from": f"s{sender}"}, headers=headers)
            except httpx2.TransportError:
                answer = None
            if answer is not None and answer.status_code in (200, 202):
                book.runs[answer.json()["id"]] = (hook, text)
                break
            assert answer is None or answer.status_code in (409, 500, 502, 503), answer.text
            await trio.sleep(0.02)


async def _talk(client: httpx2.AsyncClient, book: Book, talker: int) -> None:
    """Sends one turn of a session after another."""
    number = 0
    key = f"talk-{talker}"
    while not book.stop:
        number += 1
        text = f"turn {number} of {talker}"
        call = {"model": "default", "messages": [{"role": "user", "content": text}], "stream": bool(number % 2)}
        try:
            answer = await client.post("/v1/chat/completions", json=call, headers={"x-session-key": key})
        except httpx2.TransportError:
            await trio.sleep(0.02)
            continue
        if answer.status_code == 200 and (not call["stream"] or "data: [DONE]" in answer.text):
            book.turns.append((key, text))


async def _kill_again_and_again(directory: Path, port: int, receiver: int) -> list[float]:
    """Starts and kills the gateway again and again. Returns how long each start took, in seconds."""
    chance = random.Random(SEED)
    took = []
    for _ in range(KILLS):
        began = time.monotonic()
        running = run_gateway(_toml(directory, receiver), directory, command=(*SERVE[:-1], str(port)))
        gateway: Gateway = await trio.to_thread.run_sync(running.__enter__)
        took.append(time.monotonic() - began)
        await trio.sleep(chance.uniform(0.05, 0.6))
        gateway.process.send_signal(signal.SIGKILL)
        await trio.to_thread.run_sync(running.__exit__, None, None, None)
    return took


async def _until_all_have_ended(client: httpx2.AsyncClient, book: Book) -> dict[str, Any]:
    ended: dict[str, Any] = {}
    with trio.fail_after(SETTLES_S):
        for run_id, (hook, _) in book.runs.items():
            while True:
                answer = await client.get(f"/hooks/{hook}/runs/{run_id}")
                assert answer.status_code == 200, f"{run_id} was acknowledged and is lost: {answer.text}"
                run = answer.json()
                if run["state"] not in ("queued", "running") and all(
                    delivery["state"] not in ("pending", "sending") for delivery in run["deliveries"]
                ):
                    ended[run_id] = run
                    break
                await trio.sleep(0.05)
    return ended


async def _texts(client: httpx2.AsyncClient, key: str) -> list[str]:
    texts: list[str] = []
    after = 0
    while True:
        path = f"/v1/sessions/{key}/messages"
        page = (await client.get(path, params={"limit": 100, "after": after})).json()
        texts += [row["message"]["content"] for row in page["data"] if row["message"]["role"] == "user"]
        if not page["has_more"]:
            return texts
        after = page["last_id"]


async def test_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path) -> None:
    """The gateway is killed again and again under concurrent webhooks and session turns. Every acknowledged run
    completes, is in its session once, and is delivered under one id; every acknowledged turn is stored; the database
    is intact."""
    port, book, receiver = _free_port(), Book(), Receiver()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    receiver_port = listeners[0].socket.getsockname()[1]
    async with (
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20.0, trust_env=False) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(receiver.serve, listeners)
        async with trio.open_nursery() as senders:
            for sender in range(SENDERS):
                senders.start_soon(_send, client, book, sender)
            for talker in range(2):
                senders.start_soon(_talk, client, book, talker)
            took = await _kill_again_and_again(tmp_path, port, receiver_port)
            book.stop = True
            senders.cancel_scope.cancel()
        assert len(book.runs) > KILLS, "too few messages were acknowledged"
        with run_gateway(_toml(tmp_path, receiver_port), tmp_path, command=(*SERVE[:-1], str(port))) as gateway:
            ended = await _until_all_have_ended(client, book)
            assert Counter(run["state"] for run in ended.values()) == {"completed": len(ended)}
            for sender in range(SENDERS):
                hook = "callback" if sender % 2 else "plain"
                stored = Counter(await _texts(client, f"hook:{hook}:s{sender}"))
                assert [text for text, times in stored.items() if times > 1] == []
                sent = {text for _, text in book.runs.values() if text.endswith(f"of {sender}")}
                assert sent - set(stored) == set()
            for key in {key for key, _ in book.turns}:
                stored = Counter(await _texts(client, key))
                assert {text for at, text in book.turns if at == key} - set(stored) == set()
            received = {run_id for run_id, (hook, _) in book.runs.items() if hook == "callback"}
            assert received - set(receiver.received) == set()
            assert {run_id: ids for run_id, ids in receiver.received.items() if len(ids) > 1} == {}
            gateway.stop()
        nursery.cancel_scope.cancel()
    database = sqlite3.connect(tmp_path / "trigate.db")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
    print(f"{len(book.runs)} runs, {len(book.turns)} turns; ready after {min(took):.2f}–{max(took):.2f} s")
