"""Streams in Anthropic's format over real sockets, where the socket relay moves them."""

from __future__ import annotations

import select
from typing import Any

import pytest

from tests.dialects.chat import message_of
from tests.exchange.test_messages import NATIVE_REST, NATIVE_START, NATIVE_STOP, body_of
from tests.support.gateway import OpenServer, make_config
from tests.support.provider import DONE, Pause, Say, Script, content, open_socket_provider
from trigate.exchange.socket_relay import RelayedStream
from trigate.openai.sse import comment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(select, "epoll"), reason="the relay needs epoll"),
]

PAUSE = Pause(0.2)
NATIVE: Script = (Say(NATIVE_START), *(step for event in NATIVE_REST for step in (Say(event), PAUSE)), Say(NATIVE_STOP))
TRANSLATED: Script = (Say(content("a")), PAUSE, Say(content("b")), PAUSE, Say(DONE))


@pytest.mark.parametrize(("kind", "script"), [("anthropic", NATIVE), ("openai", TRANSLATED)])
async def test_the_relay_moves_it(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch, kind: str, script: Script
) -> None:
    """Translated or not, the relay moves the stream once it has begun, and breaks a silence with pings."""
    relayed = []
    carry = RelayedStream.run

    async def counted(self: RelayedStream, owner: Any) -> None:
        relayed.append(self)
        await carry(self, owner)

    monkeypatch.setattr(RelayedStream, "run", counted)
    async with open_socket_provider(script) as (_, url):
        config = make_config({"up": {"kind": kind, "base_url": url, "models": ["m"]}}, limits={"keep_alive_s": 0.1})
        async with open_server(config) as (client, app):
            response = await client.post("/v1/messages", json=body_of())
            assert len(relayed) == 1
            own_ping = b'event: ping\ndata: {"type":"ping"}\n\n'
            assert response.content.count(own_ping) >= 2
            if kind == "anthropic":
                whole = b"".join((NATIVE_START, *NATIVE_REST, NATIVE_STOP))
                public = whole.replace(b"c-2026", b"up/m")
                assert response.content.replace(own_ping, b"") == public.replace(own_ping, b"")
            else:
                # on a busy machine a comment breaks the silence before the first event
                events = response.content.replace(comment("keep-alive", "block"), b"")
                assert message_of(events)["content"] == [{"type": "text", "text": "ab"}]
            assert app.gateway.live.totals.complete == 1
