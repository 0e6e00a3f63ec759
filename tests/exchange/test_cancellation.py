"""The sweep: a client that disconnects at the n-th scheduling step of its request, for every n.

Afterwards, whatever the moment was, nothing is open upstream, no slot is taken, no exchange is live, each exchange was
settled exactly once, no error was logged, and the gateway serves the next request.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import chat
from tests.support.bomb import Bomb, armed
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Say,
    Script,
    SlowConnect,
    answers,
    completion,
    content,
    event,
    role,
    says,
)
from trigate.server.connection import serve_connection


@attrs.frozen(kw_only=True)
class Scene:
    """A request and the scripts of its upstreams.

    Attributes:
        outcomes: The outcomes that are allowed, whenever the client disconnects.
    """

    a: Script
    b: Script = ()
    stream: bool = True
    path: str = "/v1/chat/completions"
    outcomes: tuple[str, ...] = ("cancelled", "complete")

    @property
    def body(self) -> dict[str, Any]:
        """The request."""
        body = chat(stream=self.stream, model="both" if self.b else "a/m")
        if "messages" in self.path:
            return {**body, "max_tokens": 9}
        return body if "chat" in self.path else {"model": body["model"], "input": "x"}

    @property
    def data(self) -> bytes:
        """The request's body: a form on a path that takes uploads."""
        return UPLOAD if self.path == "/v1/files" else msgspec.json.encode(self.body)

    @property
    def kind(self) -> str:
        """Its content type."""
        return "multipart/form-data; boundary=b" if self.path == "/v1/files" else "application/json"

    @property
    def end(self) -> bytes:
        """How a complete stream ends."""
        return b'data: {"type":"message_stop"}\n\n' if "messages" in self.path else DONE


UPLOAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n'
SCENES = {
    "stream": Scene(a=(SlowConnect(1), Head(), Pause(1), *says("a", "b"))),
    "stream with keep-alives": Scene(a=(Pause(20), Say(role()), Pause(20), Say(content("a")), Pause(20), Say(DONE))),
    "JSON": Scene(
        a=(SlowConnect(1), Head(200, "application/json"), Pause(1), Say(completion("x")), Pause(1)), stream=False
    ),
    "audio": Scene(a=(Head(200, "audio/mpeg"), Say(b"a"), Pause(1), Say(b"b")), stream=False, path="/v1/audio/speech"),
    "stream, second target": Scene(
        a=(Pause(1), *answers(b'{"error":{"message":"down"}}', status=500)), b=(Pause(1), *says("x"))
    ),
    "JSON, second target": Scene(a=(Say(b"x"), Break()), b=(Pause(1), *answers(completion("x"))), stream=False),
    "first token too late, second target": Scene(a=(Head(), Pause(100)), b=says("x")),
    "refused": Scene(
        a=(Pause(1), *answers(b'{"error":{"message":"no"}}', status=400)), outcomes=("cancelled", "upstream_rejected")
    ),
    "truncated": Scene(a=(Say(content("a")), Pause(1), Break()), outcomes=("cancelled", "upstream_truncated")),
    "error event": Scene(
        a=(Say(content("a")), Pause(1), Say(event({"error": {"message": "m"}}))),
        outcomes=("cancelled", "upstream_error"),
    ),
    "idle too long": Scene(a=(Say(content("a")), Pause(100)), outcomes=("cancelled", "upstream_timeout")),
    "translated stream": Scene(a=(SlowConnect(1), Head(), Pause(20), *says("a", "b")), path="/v1/messages"),
    "translated stream, truncated at the second target": Scene(
        a=(Say(role()), Break()),
        b=(Say(content("a")), Pause(20), Break()),
        path="/v1/messages",
        outcomes=("cancelled", "upstream_truncated"),
    ),
    "upload": Scene(
        a=(Pause(1), Head(200, "application/json"), Pause(1), Say(b'{"id":"file-1"}'), Pause(1)),
        stream=False,
        path="/v1/files",
    ),
    "never ends after DONE": Scene(a=(*says("a"), Pause(100))),
}


@pytest.fixture(autouse=True)
def steady_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Trio's task order the same in each run, so that "the n-th step" names one moment and a failure can be
    reproduced."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(2))


Trial = Callable[[Served, Scene, int], Any]


async def _asgi_trial(served: Served, scene: Scene, steps: int, how: str) -> bool:
    call = served.client.start("POST", scene.path, scene.data, headers={"content-type": scene.kind})
    bomb = Bomb(steps, call.disconnect if how == "disconnect" else call.scope.cancel)
    with armed(bomb):
        await call.wait()
    return bomb.fired


async def _server_trial(served: Served, scene: Scene, steps: int) -> bool:
    near, far = trio.testing.memory_stream_pair()
    body = scene.data
    head = f"POST {scene.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {scene.kind}\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def leave() -> None:
        near.send_stream.close()
        near.receive_stream.close()

    bomb = Bomb(steps, leave)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_one, served, far)
        with armed(bomb), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await near.send_all(request)
            received = b""
            while not is_whole(received):
                data = await near.receive_some()
                if not data:
                    break
                received += data
        await near.aclose()
    return bomb.fired


async def serve_one(served: Served, stream: trio.abc.Stream) -> None:
    """Serves one connection as the server does, on a memory stream."""
    app: Any = served.app
    await serve_connection(app, stream, client=("127.0.0.1", 5), server=("127.0.0.1", 18888))


def is_whole(received: bytes) -> bool:
    """Whether an HTTP/1.1 response has its end."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    [length] = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    return len(body) >= int(length)


async def sweep(open_app: OpenApp, scene: Scene, trial: Trial) -> int:
    """Runs trials with n = 1, 2, … until the client stays to the end, and returns the number of trials.

    Raises:
        AssertionError: A trial left something behind.
    """
    config = make_config(
        {
            "a": {"max_connections": 1, "max_exchanges": 9, "budget_usd": 10**6},
            "b": {"max_connections": 1, "tpm": 10**9},
        },
        models={"both": {"targets": ["a/m", "b/m"]}},
        prices={"m": {"input_usd": 1, "output_usd": 10}},
        limits={"first_token_timeout_s": 50, "idle_timeout_s": 50},
        allowance={"rpm": 10**6, "tpm": 10**9, "max_exchanges": 9, "budget_usd": 10**6},
    )
    providers = {"a": Provider(), "b": Provider()}
    async with open_app(config, providers) as served:
        steps = 0
        while True:
            steps += 1
            providers["a"].play(scene.a)
            providers["b"].play(scene.b)
            settled, asked = len(served.settled), sum(provider.opened for provider in providers.values())
            fired = await trial(served, scene, steps)
            await trio.sleep(1)
            await wait_all_tasks_blocked()
            moment = f"at step {steps}"
            served.assert_clean()
            new = served.settled[settled:]
            assert len(new) <= 1, moment
            assert len(new) == 1 or sum(provider.opened for provider in providers.values()) == asked, moment
            assert all(exchange.outcome in scene.outcomes for exchange in new), (moment, new)
            totals = served.gateway.live.totals
            assert totals.exchanges == totals.complete + totals.cancelled + totals.failed == len(served.settled), moment
            if not fired:
                assert [exchange.outcome for exchange in new] == [scene.outcomes[-1]]
                break
        providers["a"].play(says("alive"))
        call = await served.client.chat(model="a/m").wait()
        assert call.body.endswith(DONE)
        outcomes = {exchange.outcome for exchange in served.settled}
        assert outcomes == {*scene.outcomes, "complete"}, "the sweep reached every outcome"
        return steps


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("scene", SCENES)
async def test_a_disconnect_at_any_step(open_app: OpenApp, autojump_clock: MockClock, scene: str, how: str) -> None:
    """The end arrives as ``http.disconnect``, or as the server's cancellation of the request's task."""

    async def trial(served: Served, scene: Scene, steps: int) -> bool:
        return await _asgi_trial(served, scene, steps, how)

    outcome = "cancelled" if how == "disconnect" else "draining"  # the server ended it, not the client
    expected = attrs.evolve(SCENES[scene], outcomes=(outcome, *SCENES[scene].outcomes[1:]))
    assert await sweep(open_app, expected, trial) > 15


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
async def test_a_connection_that_breaks_at_any_step(open_app: OpenApp, autojump_clock: MockClock, scene: str) -> None:
    """With the server's own protocol code, the connection task ends too and raises nothing."""
    assert await sweep(open_app, SCENES[scene], _server_trial) > 20


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
async def test_a_drain_at_any_step(open_app: OpenApp, autojump_clock: MockClock, scene: str) -> None:
    """``cut`` at every step: the client always gets a proper end, and the upstream is closed."""

    async def trial(served: Served, scene: Scene, steps: int) -> bool:
        call = served.client.start("POST", scene.path, scene.data, headers={"content-type": scene.kind})
        bomb = Bomb(steps, served.gateway.drain.cut)
        with armed(bomb):
            await call.wait()
        assert call.status
        if scene.stream:
            assert call.ended
            assert call.body.endswith(scene.end) != (b'"error"' in call.body)
        return bomb.fired

    expected = attrs.evolve(SCENES[scene], outcomes=("draining", *SCENES[scene].outcomes[1:]))
    assert await sweep(open_app, expected, trial) > 15


async def _leaky_acquire_slot(self: Any, owner: str) -> None:
    self._slots.acquire_nowait(owner)
    await trio.lowlevel.checkpoint()  # the gap: a cancellation here leaks the slot


async def test_the_sweep_finds_a_leak(
    open_app: OpenApp, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that leaks when the client disconnects at one particular step is found, so the sweep can fail."""
    monkeypatch.setattr("trigate.upstream.upstream.Upstream._acquire_slot", _leaky_acquire_slot)

    async def trial(served: Served, scene: Scene, steps: int) -> bool:
        return await _asgi_trial(served, scene, steps, "cancel")

    with pytest.RaisesGroup(AssertionError, flatten_subgroups=True):
        await sweep(open_app, SCENES["stream"], trial)
