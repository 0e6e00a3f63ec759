"""Request bodies: their codings, their deadlines, and the budget that all of them share."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.asgi.test_dispatch import assert_refused
from tests.support.asgi_client import ClientCall, Piece
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Pause, Provider, Stall, answers, completion
from trigate.asgi import data_plane
from trigate.asgi.request_body import BodyBudget, BodyLimits, RequestBody
from trigate.errors import Overloaded

PACKERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "up/m", "messages": [{"role": "user", "content": "Grüße! " * 300}]}).encode()
SECRET = "github-secret-of-24-bytes-or-more"
SIGNED = {"h": {"model": "up/m", "verification": "github", "secrets": [SECRET]}}


def upload(served: Served, raw: list[Piece], path: str = CHAT, method: str = "POST", **headers: str) -> ClientCall:
    """Starts a request whose body comes in pieces, without a declared length."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return served.client.start(method, path, raw=raw, headers={**JSON, **fields})


async def receive_nothing() -> Any:  # Any: hypercorn's union of ASGI messages
    raise AssertionError


def budget_of(served: Served) -> BodyBudget:
    return served.app._bodies


# -- content codings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", "identity", ""])
@pytest.mark.parametrize("step", [1, 50, 10**9])
async def test_a_compressed_body_is_served(open_app: OpenApp, coding: str, step: int) -> None:
    """The upstream gets the same bytes as without the coding."""
    packed = PACKERS.get(coding.lower().removeprefix("x-"), bytes)(BODY)
    async with open_app(providers=Provider(answers(completion("x")))) as served:
        pieces: list[Piece] = [packed[start : start + step] for start in range(0, len(packed), step)]
        call = await upload(served, pieces, content_encoding=coding).wait()
        assert call.status == 200
        assert served.providers["up"].calls[0].body == BODY.replace(b'"up/m"', b'"m"')


@pytest.mark.parametrize("coding", ["zstd", "br", "compress", "gzip, gzip", "identity, gzip", "aes128gcm", "\xff"])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/embeddings", "/v1/models", "/hooks/any"])
async def test_another_coding_is_a_415(open_app: OpenApp, coding: str, path: str) -> None:
    """It names what is served, in the message and in ``Accept-Encoding`` (RFC 9110, section 15.5.16)."""
    async with open_app() as served:
        call = await upload(served, [b"\x28\xb5\x2f\xfd" * 9], path, content_encoding=coding).wait()
        assert_refused(served, call, 415, "unsupported_media_type")
        assert call.header("accept-encoding") == "gzip, deflate"
        assert "gzip, deflate" in call.error["message"]


async def test_a_compressed_body_that_is_none_is_a_400(open_app: OpenApp) -> None:
    """Corrupt, truncated, or not compressed at all; never "not UTF-8"."""
    packed = gzip.compress(BODY)
    for raw in (BODY, packed[:-9], packed[:60] + b"\0\0\0" + packed[63:]):
        async with open_app() as served:
            call = await upload(served, [raw], content_encoding="gzip").wait()
            assert_refused(served, call, 400, "invalid_request")
            assert "cod" in call.error["message"]


async def test_a_compressed_body_is_bounded(open_app: OpenApp) -> None:
    """Its decoded size has the limit of any body, and a bomb is stopped long before that."""
    async with open_app(make_config(limits={"body_bytes": len(BODY) - 1})) as served:
        call = await upload(served, [gzip.compress(BODY)], content_encoding="gzip").wait()
        assert_refused(served, call, 413, "body_too_large")
    async with open_app() as served:
        bomb = gzip.compress(bytes(20_000_000), compresslevel=1)
        call = await upload(served, [bomb[:2000], bomb[2000:]], content_encoding="gzip").wait()
        assert_refused(served, call, 400, "invalid_request")
        assert "200 times" in call.error["message"]
        assert budget_of(served).held_bytes == 0


async def test_a_signed_webhook_must_not_be_compressed(open_app: OpenApp) -> None:
    """It is signed as it came, so what it would decode to is not signed."""
    async with open_app(make_config(hooks=SIGNED)) as served:
        call = await upload(served, [gzip.compress(BODY)], "/hooks/h", content_encoding="gzip").wait()
        assert (call.status, call.header("accept-encoding")) == (415, "identity")


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "seconds"), [(1000, 30), (2000, 60), (1024, 61)])
async def test_a_body_at_a_kibibyte_a_second_may_take_longer(
    open_app: OpenApp, autojump_clock: MockClock, rate: int, seconds: int
) -> None:
    """A slow client with a large body is served; one that is slower gets a 408 after 30 seconds."""
    body = BODY + b" " * (rate * seconds - len(BODY))
    raw = [piece for n in range(seconds) for piece in (body[n * rate : (n + 1) * rate], Pause(1.05))]
    async with open_app(providers=Provider(answers(completion("x")))) as served:
        call = await upload(served, list(raw)).wait()
        assert call.status == (200 if rate > 1075 else 408)
        if call.status == 408:
            assert call.committed_at == pytest.approx(30, abs=1.1)


async def test_the_rate_can_be_switched_off(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """``body_bytes_per_s = 0``: no body may take longer than ``body_timeout_s``."""
    async with open_app(make_config(limits={"body_bytes_per_s": 0, "body_timeout_s": 5})) as served:
        call = await upload(served, [b" " * 100_000, Pause(1)] * 10).wait()
        assert_refused(served, call, 408, "body_timeout")
        assert call.committed_at == pytest.approx(5)


async def test_a_body_that_still_arrives_is_refused_when_the_drain_cuts(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """Its client gets a status at once. The server would close the connection without one a second later."""
    async with open_app() as served:
        call = upload(served, [b"x", Pause(20), b"x"])
        await trio.sleep(3)
        served.gateway.drain.begin()
        await trio.sleep(3)
        assert not call.ended
        served.gateway.drain.cut()
        await call.wait_committed()
        assert call.committed_at == pytest.approx(6)
        await call.wait()
        assert_refused(served, call, 503, "draining")


# -- before the sender is known ---------------------------------------------------------------------------------------


async def test_an_unverified_body_has_64_kib_and_5_s(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A webhook that is signed over its body has read it before anything of its sender is known."""
    async with open_app(make_config(hooks=SIGNED)) as served:
        assert (await upload(served, [b"x" * 65_536], "/hooks/h").wait()).status == 401
        assert (await upload(served, [b"x" * 65_537], "/hooks/h").wait()).status == 413
        begun = trio.current_time()
        call = await upload(served, [b" " * 9000, Pause(1)] * 9, "/hooks/h").wait()
        assert (call.status, call.error["code"]) == (408, "body_timeout")
        assert call.committed_at - begun == pytest.approx(5)
        assert "unverified_body_timeout_s" in call.error["message"]


async def test_a_hook_may_set_a_larger_limit(open_app: OpenApp) -> None:
    """Its own ``body_bytes`` applies, signed or not; a hook with a key has 1 MiB."""
    hooks: dict[str, Any] = {"h": {**SIGNED["h"], "body_bytes": 100_000}, "keyed": {"model": "up/m"}}
    async with open_app(make_config(hooks=hooks)) as served:
        assert (await upload(served, [b"x" * 100_000], "/hooks/h").wait()).status == 401
        assert (await upload(served, [b"x" * 100_001], "/hooks/h").wait()).status == 413
        assert (await upload(served, [b"x" * 2**20], "/hooks/keyed").wait()).status == 400
        assert (await upload(served, [b"x" * (2**20 + 1)], "/hooks/keyed").wait()).status == 413


async def test_strangers_share_a_quarter_of_the_budget(open_app: OpenApp) -> None:
    """Bodies of unknown senders cannot keep out those of known ones."""
    async with open_app(make_config(hooks=SIGNED, limits={"arriving_bytes": 100_000})) as served:
        first = upload(served, [b"x" * 20_000, Stall()], "/hooks/h")
        await wait_all_tasks_blocked()
        second = await upload(served, [b"x" * 20_000], "/hooks/h").wait()
        assert (second.status, second.error["code"]) == (503, "overloaded")
        assert "a quarter" in second.error["message"]
        assert (await upload(served, [b"x" * 60_000]).wait()).status == 400  # there is room: only its JSON is wrong
        first.disconnect()
        await first.wait()
        assert budget_of(served).unverified_bytes == 0


# -- the budget -------------------------------------------------------------------------------------------------------


async def test_bodies_that_arrive_have_a_budget(open_app: OpenApp) -> None:
    """Beyond it they get a 503 that says when to retry. A body that is the only one is let in whatever its size."""
    async with open_app(make_config(limits={"arriving_bytes": 50_000})) as served:
        first = upload(served, [b"x" * 80_000, Stall()])
        await wait_all_tasks_blocked()
        second = await upload(served, [b"x" * 1000]).wait()
        assert_refused(served, second, 503, "overloaded")
        assert "limits.arriving_bytes" in second.error["message"]
        assert second.header("retry-after") == "1"
        first.disconnect()
        await first.wait()
        assert budget_of(served).arriving_bytes == budget_of(served).held_bytes == 0
        assert (await upload(served, [b"x" * 1000]).wait()).status == 400


async def test_the_bodies_of_calls_in_flight_count(open_app: OpenApp) -> None:
    """Until their answers are out; then there is room again."""
    settings = make_config(limits={"bodies_bytes": 2 * len(BODY) + 999})
    async with open_app(settings, Provider((Stall(),))) as served:
        running = [upload(served, [BODY]) for _ in range(2)]
        await wait_all_tasks_blocked()
        assert budget_of(served).held_bytes == 2 * len(BODY)
        assert budget_of(served).arriving_bytes == 0
        third = await upload(served, [BODY]).wait()
        assert (third.status, third.error["code"]) == (503, "overloaded")
        assert "limits.bodies_bytes" in third.error["message"]
        running[0].disconnect()
        await running[0].wait()
        upload(served, [BODY])
        await wait_all_tasks_blocked()
        assert budget_of(served).held_bytes == 2 * len(BODY)


async def test_a_body_that_waits_to_be_decoded_still_arrives(open_app: OpenApp) -> None:
    """Large bodies are decoded one by one, so those that wait must not pile up outside of the budget."""
    async with open_app() as served:
        await data_plane._DECODING.acquire()
        call = upload(served, [b'{"a":"', b"x" * 2_000_000, b'"}'])
        await wait_all_tasks_blocked()
        assert budget_of(served).arriving_bytes > 2_000_000
        data_plane._DECODING.release()
        assert (await call.wait()).status == 400
        assert budget_of(served).held_bytes == budget_of(served).arriving_bytes == 0


async def test_a_body_of_many_small_pieces_takes_its_size() -> None:
    """A list of its pieces would take fifty times as much."""
    pieces = 2000

    async def receive() -> Any:
        nonlocal pieces
        pieces -= 1
        return {"type": "http.request", "body": b"%d" % (pieces % 10), "more_body": pieces > 0}

    body = RequestBody(receive, BodyBudget())
    limits = make_config().limits
    tracemalloc.start()
    try:
        data = await body.read(BodyLimits.of(limits, max_bytes=2000), limits)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data is not None
    assert len(data) == 2000
    assert data.startswith(b"9876543210")
    assert peak_bytes < 30_000


def test_pieces_that_are_kept_count_for_what_they_take() -> None:
    """Each has a price of its own: Python adds to each."""
    budget, limits = BodyBudget(), make_config(limits={"arriving_bytes": 50_000}).limits
    first, second = (RequestBody(receive_nothing, budget) for _ in range(2))
    first.hold(1, limits)
    for _ in range(700):
        second.hold(1, limits)
    with pytest.raises(Overloaded):
        second.hold(5000, limits)


async def test_a_refused_body_is_dropped_at_once(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its memory is free while the rest of it is still being discarded."""
    async with open_app(make_config(limits={"body_bytes": 1000})) as served:
        call = upload(served, [b"x" * 600, b"x" * 600, Pause(1), b"x" * 600])
        await call.wait_committed()
        assert not call.ended
        assert budget_of(served).held_bytes == budget_of(served).arriving_bytes == 0
        assert (await call.wait()).status == 413


# -- the control plane ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/status", "/status/streams/x", "/v1/sessions/x", "/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_large_body_for_the_control_plane_is_a_413(open_app: OpenApp, path: str, method: str) -> None:
    """Declared or in chunks. (Quart bounds only a declared length, and would keep the rest in memory.)"""
    async with open_app() as served:
        for call in (
            upload(served, [b"x" * 65_536] * 17, path, method),
            served.client.start(method, path, b"", headers={"content-length": str(2**20 + 1)}, raw=[]),
        ):
            assert (await call.wait()).status == 413
            assert (call.error["code"], call.header("connection")) == ("body_too_large", "close")
        assert budget_of(served).held_bytes == 0


async def test_a_body_for_the_control_plane_has_a_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A body that does not end is a 408, as everywhere."""
    async with open_app() as served:
        call = await upload(served, [b"x", Stall()], "/v1/models", "GET").wait()
        assert (call.status, call.error["code"]) == (408, "body_timeout")


# -- large JSON -------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class LongestStep(trio.abc.Instrument):
    """Measures the longest time that the event loop works without a break, in seconds of its own CPU time."""

    longest_s: float = 0.0
    _began: float = attrs.field(factory=time.thread_time)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest_s = max(self.longest_s, time.thread_time() - self._began)


HELLO = b'{"role":"user","content":"Hi"}'
LARGE = {
    "a million messages": (b",".join([HELLO] * 900_000), 400),
    "twenty thousand messages": (b",".join([HELLO] * 20_000), 200),
    "a picture": (b'{"role":"user","content":"' + b"A" * 30_000_000 + b'"}', 200),
    "escapes": (b'{"role":"user","content":"' + b"abc\\n" * 3_000_000 + b'"}', 200),
    "text that is not ASCII": (b'{"role":"user","content":"' + "\U0001f600a".encode() * 5_000_000 + b'"}', 200),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
async def test_large_json_does_not_stall_the_others(open_app: OpenApp, name: str) -> None:
    """It is examined and decoded in a thread, and what it may consist of is bounded. The event loop only copies it:
    once, and then for the upstream."""
    messages, status = LARGE[name]
    body = b'{"model":"up/m","messages":[' + messages + b"]}"
    pieces: list[Piece] = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]
    async with open_app(providers=Provider(answers(completion("x")))) as served:
        step = LongestStep()
        trio.lowlevel.add_instrument(step)
        try:
            call = await upload(served, pieces).wait()
        finally:
            trio.lowlevel.remove_instrument(step)
        assert call.status == status, call.body
        assert step.longest_s < 0.1
        if status == 200:
            assert json.loads(served.providers["up"].calls[0].body)["messages"] == json.loads(body)["messages"]
