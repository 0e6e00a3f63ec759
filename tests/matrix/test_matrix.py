"""What every client reads of every upstream's answer, and what every upstream reads of every client's request.

Every scene can be expressed in every cell: none is refused, and what a format has no place for is in `asked` and in
``can_say``. ``docs/reference/formats.md`` says the same.
"""

from __future__ import annotations

import attrs
import pytest

from tests.matrix.clients import CLIENTS, Client
from tests.matrix.providers import FAILS, TOO_LONG, UPSTREAMS, Upstream
from tests.matrix.scenes import SCENES, Ask, Call, Part, Reply, Result, Scene
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider

CELLS = [
    (scene, stream)
    for scene in SCENES
    for how, stream in (("stream", True), ("plain", False))
    if scene.only in ("", how)
]


@pytest.mark.slow
@pytest.mark.parametrize("upstream", UPSTREAMS, ids=lambda upstream: upstream.name)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
async def test_formats(client: Client, upstream: Upstream, open_app: OpenApp, subtests: pytest.Subtests) -> None:
    """In every scene, the upstream reads what was asked, and the client what was answered."""
    config = make_config({"up": upstream.settings})
    async with open_app(config, Provider()) as served:
        for scene, stream in CELLS:
            with subtests.test(scene=scene.name, stream=stream):
                await _play(client, upstream, scene, stream, served)


async def _play(client: Client, upstream: Upstream, scene: Scene, stream: bool, served: Served) -> None:
    provider = served.providers["up"]
    provider.calls.clear()
    error = TOO_LONG if scene.name == "too long" else FAILS
    if scene.status != 200:
        provider.play(upstream.write_error(scene.status, error))
    else:
        provider.play(upstream.write_stream(scene.reply) if stream else upstream.write(scene.reply))
    model = f"up/{upstream.model}"
    body = client.write(scene.ask, model, stream=stream)
    call = await served.client.start("POST", client.path(model, stream=stream), body).wait()
    assert provider.calls, call.body
    [sent] = provider.calls
    assert renamed(upstream.read(sent)) == renamed(asked(client, upstream, scene.ask))
    if scene.status != 200:
        # a request that is too long is always said in the words that the client's agents know
        assert call.status == scene.status or (client.name == "messages" and call.status == 529)
        message = client.read_error(call.json)
        assert error in message if scene.name != "too long" else "200000" in message, message
        return
    assert call.status == 200, call.body
    read = client.read_stream(call.body) if stream else client.read(call.json)
    expected = client.can_say(upstream.can_say(scene.reply))
    if scene.reply.fails:
        assert read.fails == "error"
    elif upstream.has_ids:
        assert read == expected
    else:
        if client.name == upstream.name:  # as they came: without ids
            expected = without_ids(expected)
        assert numbered(read) == numbered(expected)
    served.assert_clean()


def asked(client: Client, upstream: Upstream, ask: Ask) -> Ask:
    """What of a request arrives: only some formats say that a tool failed, or have stop sequences."""
    if client.name in ("chat", "responses", "ollama"):
        turns = []
        for turn in ask.turns:
            parts = tuple(
                attrs.evolve(part, is_error=False) if isinstance(part, Result) else part for part in turn.parts
            )
            turns.append(attrs.evolve(turn, parts=parts))
        ask = attrs.evolve(ask, turns=tuple(turns))
    return attrs.evolve(ask, stop=()) if client.name == "responses" else ask


def renamed(ask: Ask) -> Ask:
    """The request with numbers for the ids of its calls, in the order of the calls: some formats have no ids."""
    ids: dict[str, str] = {}
    turns = []
    for turn in ask.turns:
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, Call):
                ids[part.id] = f"{len(ids) + 1}"
                parts.append(attrs.evolve(part, id=ids[part.id]))
            elif isinstance(part, Result):
                parts.append(attrs.evolve(part, call_id=ids[part.call_id]))
            else:
                parts.append(part)
        turns.append(attrs.evolve(turn, parts=tuple(parts)))
    return attrs.evolve(ask, turns=tuple(turns))


def without_ids(reply: Reply) -> Reply:
    """The answer with calls that have no ids."""
    parts = tuple(attrs.evolve(part, id="") if isinstance(part, Call) else part for part in reply.parts)
    return attrs.evolve(reply, parts=parts)


def numbered(reply: Reply) -> Reply:
    """The answer with numbers for the ids of its calls, which must differ; an absent id stays absent."""
    ids = [part.id for part in reply.parts if isinstance(part, Call) and part.id]
    assert len(set(ids)) == len(ids)
    parts = tuple(
        attrs.evolve(part, id=str(ids.index(part.id) + 1)) if isinstance(part, Call) and part.id else part
        for part in reply.parts
    )
    return attrs.evolve(reply, parts=parts)


@pytest.mark.parametrize("upstream", UPSTREAMS, ids=lambda upstream: upstream.name)
async def test_half_a_character_in_a_name(upstream: Upstream, open_app: OpenApp) -> None:
    """It is the provider's failure, in every format: no client could read it."""
    scene = next(each for each in SCENES if each.name == "tools")
    reply = attrs.evolve(scene.reply, parts=(Call("call_1", "f\ud800", {"x": 1}),))
    async with open_app(make_config({"up": upstream.settings}), Provider(())) as served:
        for client in CLIENTS:
            for stream in (True, False):
                served.providers["up"].play(upstream.write_stream(reply) if stream else upstream.write(reply))
                model = f"up/{upstream.model}"
                body = client.write(scene.ask, model, stream=stream)
                call = await served.client.start("POST", client.path(model, stream=stream), body).wait()
                assert call.status in (200, 502), call.body
                assert b"internal_error" not in call.body
                assert b"The gateway failed" not in call.body
        served.assert_clean()
