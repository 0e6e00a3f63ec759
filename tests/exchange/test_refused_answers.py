"""The memory of answers that are refused: it is free when the call has failed, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import gzip
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

import trigate
from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, OpenServer, make_config
from tests.support.provider import (
    Break,
    Head,
    Provider,
    Say,
    Script,
    Stall,
    answers,
    content,
    open_socket_provider,
    role,
)
from trigate.errors import GatewayError
from trigate.openai.answer import decode_answer
from trigate.openai.endpoints import ENDPOINTS
from trigate.tracebacks import drop_frames

BIG = b'{"choices":["' + b"a" * 200_000
BOMB = gzip.compress(bytes(20_000_000), compresslevel=1)
LIMITS = {"response_bytes": 250_000, "event_bytes": 100_000, "decoded_bytes": 150_000, "idle_timeout_s": 0.05}
JSON = Head(200, "application/json")
GZIP = {"content-encoding": "gzip"}

REFUSED: dict[str, tuple[Script, bool]] = {
    "a bomb": ((Head(200, "application/json", GZIP), Say(BOMB)), False),
    "more than may be decoded": ((Head(200, "application/json", GZIP), Say(gzip.compress(BIG))), False),
    "corrupt gzip": ((Head(200, "application/json", GZIP), Say(gzip.compress(BIG)[:-9] + b"\0" * 9)), False),
    "cut": ((JSON, Say(BIG), Break()), False),
    "reset": ((JSON, Say(BIG), Break("rst")), False),
    "stalled": ((JSON, Say(BIG), Stall()), False),
    "too large": ((JSON, Say(BIG), Say(BIG)), False),
    "not JSON": (answers(BIG), False),
    "an error with 200": (answers(b'{"error":{"message":"' + b"a" * 200_000 + b'"}}'), False),
    "not HTTP": ((Head(200, "application/json", {"content-length": "5"}), Say(b"{}{}{}{}"), Say(BIG)), False),
    "500": (answers(b'{"error":{"message":"' + b"a" * 200_000 + b'"}}', status=500), False),
    "400": (answers(b'{"error":{"message":"' + b"a" * 200_000 + b'"}}', status=400), False),
    "500 without end": ((Head(500, "application/json"), Say(BIG), Break()), False),
    "HTML": ((Head(200, "text/html"), Say(BIG)), True),
    "a large event": ((Say(b"data: " + BIG),), True),
    "a large event behind others": ((Say(role() + content("a") + b"data: " + BIG),), True),
    "an event that is no JSON": ((Say(b"data: " + b"a" * 90_000 + b"\n\n"),), True),
    "an error event": ((Say(b'data: {"error":{"message":"' + b"a" * 90_000 + b'"}}\n\n'),), True),
    "a cut stream": ((Say(role() + content("a" * 90_000)), Break()), True),
    "a stalled stream": ((Say(role() + content("a" * 90_000)), Stall()), True),
    "a bomb in a stream": ((Head(headers=GZIP), Say(BOMB)), True),
}


def kept_frames() -> list[str]:
    """The functions of the gateway whose frames an exception keeps."""
    root = str(Path(trigate.__file__).parent)
    return [
        each.tb_frame.f_code.co_qualname
        for each in gc.get_objects()
        if isinstance(each, types.TracebackType) and each.tb_frame.f_code.co_filename.startswith(root)
    ]


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """A block without the garbage collector. Older objects are set aside, so that it is quick to look at the others."""
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, {"x-coalesce": "true"}, {"x-session-key": "s"}], ids=["own", "shared", "turn"])
async def test_a_refused_answer_is_not_kept(open_server: OpenServer, headers: dict[str, str]) -> None:
    """No traceback of any error keeps a frame, and with it the answer: neither in a cycle, nor as the last error of the
    target, nor in the exchange."""
    async with open_socket_provider(*[script for script, _ in REFUSED.values()]) as (_, url):
        config = make_config({"up": {"base_url": url}}, limits=LIMITS)
        async with open_server(config) as (client, _):
            for name, (_, stream) in REFUSED.items():
                with no_collector():
                    body = chat(stream=stream, seed=1)
                    response = await client.post("/v1/chat/completions", json=body, headers=headers)
                    assert response.status_code >= 400 or b'"error"' in response.content, name
                    await wait_all_tasks_blocked(0.01)
                    assert kept_frames() == [], name


@pytest.mark.parametrize("strategy", ["failover", "hedge"])
async def test_failed_attempts_are_not_kept(open_app: OpenApp, autojump_clock: MockClock, strategy: str) -> None:
    """While the call goes on: each attempt's answer is free when the next one begins."""
    models = {"both": {"targets": ["up/m", "other/m"], "strategy": strategy, "hedge_delay_s": 5}}
    providers = {"up": Provider((JSON, Say(BIG), Break())), "other": Provider((Stall(),))}
    config = make_config({"up": {}, "other": {}}, models=models, limits={"idle_timeout_s": 0})
    async with open_app(config, providers) as served:
        with no_collector():
            call = served.client.chat(model="both", stream=False)
            await wait_all_tasks_blocked()
            assert providers["other"].opened == 1
            assert kept_frames() == []
        call.disconnect()
        await call.wait()


@pytest.mark.slow
async def test_a_refused_request_is_not_kept(open_server: OpenServer) -> None:
    """Neither a body that is too large, nor one that is not JSON, nor the crash of a handler."""
    async with open_server(make_config(limits={"body_bytes": 100_000})) as (client, _):
        for body in (b"x" * 90_000, b"x" * 110_000, b'{"model":"no/m","messages":[],"a":"%b"}' % (b"x" * 90_000)):
            with no_collector():
                response = await client.post(
                    "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
                )
                assert response.status_code in (400, 404, 413)
                await wait_all_tasks_blocked(0.01)
                assert kept_frames() == []


def test_the_check_finds_a_kept_frame() -> None:
    """An error that is kept with its traceback is found, and one without it is not."""
    with no_collector():
        try:
            decode_answer(b"x", ENDPOINTS["/v1/chat/completions"], model="m", upstream="up")
        except GatewayError as error:
            kept = error
        assert "decode_answer" in kept_frames()
        drop_frames(kept)
        assert kept_frames() == []
