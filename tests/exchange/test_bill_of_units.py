"""What images, speech and transcriptions cost, and calls in a service tier of their provider."""

from __future__ import annotations

import json
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import DONE, Head, Provider, Say, Script, answers, content, event

BY_IMAGE = {"m": {"image_usd": "0.04"}}
BY_TOKEN = {"m": {"input_usd": 5, "output_usd": 40, "image_input_usd": 10}}
COUNTS = {"input_tokens": 50, "output_tokens": 200, "input_tokens_details": {"text_tokens": 10, "image_tokens": 40}}
DRAWN = {"m": {**BY_TOKEN["m"], "image_output_usd": 100}}
BOTH = {"m": {"input_usd": 5, "output_usd": 40, "image_usd": "0.01"}}
FORM = {"content-type": "multipart/form-data; boundary=b"}
PICTURE = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nup/m\r\n'
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nPNG\r\n--b--\r\n'
)


def images(number: int, **fields: Any) -> bytes:
    return json.dumps({"created": 1, "data": [{"b64_json": "QUJD" * 1000}] * number, **fields}).encode()


def made(**fields: Any) -> bytes:
    return event({"type": "image_generation.completed", "b64_json": "QUJD", **fields})


def cost_of(served: Served) -> tuple[int | None, int | None, int | None, bool]:
    """Cost and counts of the only exchange, and whether they were estimated."""
    [exchange] = served.settled
    record = exchange.record
    assert record is not None
    return record.cost, record.prompt_tokens, record.completion_tokens, record.counted


async def unknown_of(served: Served) -> Any:
    return (await served.client.ask("GET", "/status")).json["prices"]["unknown"]


@pytest.mark.parametrize(
    ("prices", "answer", "expected", "unknown"),
    [
        (BY_IMAGE, images(2), (80_000, 0, 0, False), []),
        (BY_TOKEN, images(1, usage=COUNTS), (50 + 400 + 8000, 50, 200, False), []),
        (DRAWN, images(1, usage=COUNTS), (50 + 400 + 20_000, 50, 200, False), []),
        (BOTH, images(3, usage=COUNTS), (250 + 8000 + 30_000, 50, 200, False), []),
        ({"m": {"call_usd": "0.07"}}, images(2), (70_000, 0, 0, False), []),
        (BY_TOKEN, images(2), (None, 0, 0, False), ["up/m (images)"]),
        ({}, images(2), (None, 0, 0, False), ["up/m"]),
        ({}, images(2, usage=COUNTS), (None, 50, 200, False), ["up/m"]),
    ],
    ids=[
        "each",
        "tokens",
        "all tokens of the answer",
        "both",
        "call",
        "tokens that nobody reports",
        "no price",
        "counts without a price",
    ],
)
@pytest.mark.parametrize("path", ["generations", "edits", "variations"])
async def test_the_cost_of_images(
    open_app: OpenApp,
    autojump_clock: MockClock,
    path: str,
    prices: Any,
    answer: bytes,
    expected: tuple[Any, ...],
    unknown: list[str],
) -> None:
    """The images of the answer are counted, and its tokens where it reports some; nothing is estimated. An unknown
    price is null and not 0, and ``/status`` has it."""
    async with open_app(make_config(prices=prices), Provider(answers(answer))) as served:
        body: Any = {"model": "up/m", "prompt": "a", "n": 9} if path == "generations" else PICTURE
        headers = {} if path == "generations" else FORM
        call = await served.client.ask("POST", f"/v1/images/{path}", body, headers=headers)
        assert (call.status, call.body) == (200, answer)
        assert cost_of(served) == expected
        assert await unknown_of(served) == unknown
        if path == "generations" and expected[0] is not None:
            assert call.header("x-trigate-cost-usd") == f"0.{expected[0]:06d}"


@pytest.mark.parametrize(
    ("prices", "script", "expected"),
    [
        (BY_IMAGE, (Say(made()), Say(made())), (80_000, 0, 0, False)),
        (BY_TOKEN, (Say(made(usage=COUNTS)), Say(made(usage=COUNTS))), (2 * 8450, 100, 400, False)),
        (
            BY_IMAGE,
            (Say(event({"type": "image_generation.partial_image", "b64_json": "x"})), Say(made())),
            (40_000, 0, 0, False),
        ),
    ],
    ids=["each", "tokens", "a preview"],
)
async def test_the_cost_of_a_stream_of_images(
    open_app: OpenApp, autojump_clock: MockClock, prices: Any, script: Script, expected: tuple[Any, ...]
) -> None:
    """Each final event has an image, with counts of its own; a preview is none."""
    async with open_app(make_config(prices=prices), Provider(script)) as served:
        body = {"model": "up/m", "prompt": "a", "stream": True}
        assert (await served.client.ask("POST", "/v1/images/generations", body)).status == 200
        assert cost_of(served) == expected


async def test_images_are_reserved_in_a_budget(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call for more images than a budget pays for is refused before it is made; one for fewer is served."""
    keys = {"ada": {"secret": "a-secret-of-ada", "budget_usd": "0.1"}}
    headers = {"authorization": "Bearer a-secret-of-ada"}
    provider = Provider(answers(images(2)))
    async with open_app(make_config(prices=BY_IMAGE, keys=keys), provider) as served:
        for n, status in ((3, 429), (2, 200)):
            body = {"model": "up/m", "prompt": "a", "n": n}
            assert (await served.client.ask("POST", "/v1/images/generations", body, headers=headers)).status == status
        assert len(provider.calls) == 1


# -- sound ------------------------------------------------------------------------------------------------------------

BY_CHARACTER = {"m": {"characters_usd": 15}}
BY_HOUR = {"m": {"audio_hour_usd": "0.36"}}


@pytest.mark.parametrize(
    ("prices", "cost", "unknown"),
    [
        (BY_CHARACTER, 75, []),
        ({"m": {"input_usd": 1, "output_usd": 10}}, None, ["up/m (characters)"]),
        ({}, None, ["up/m"]),
    ],
)
async def test_the_cost_of_speech(
    open_app: OpenApp, autojump_clock: MockClock, prices: Any, cost: int | None, unknown: list[str]
) -> None:
    """The characters of the text are counted; the size of the sound tells no tokens, and none are estimated."""
    script = (Head(200, "audio/mpeg"), Say(b"ID3" * 10_000))
    async with open_app(make_config(prices=prices), Provider(script)) as served:
        body = {"model": "up/m", "input": "Grüße", "voice": "a"}
        assert (await served.client.ask("POST", "/v1/audio/speech", body)).status == 200
        assert cost_of(served) == (cost, 0, 0, False)
        assert await unknown_of(served) == unknown


async def test_reported_tokens_of_speech(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A stream of speech reports tokens, which then count."""
    done = event({"type": "speech.audio.done", "usage": {"input_tokens": 5, "output_tokens": 100, "total_tokens": 105}})
    script = (Say(event({"type": "speech.audio.delta", "audio": "AA"})), Say(done))
    async with open_app(make_config(prices={"m": {"output_usd": 10}}), Provider(script)) as served:
        body = {"model": "up/m", "input": "a", "voice": "a", "stream_format": "sse", "stream": True}
        assert (await served.client.ask("POST", "/v1/audio/speech", body)).status == 200
        assert cost_of(served) == (1000, 5, 100, False)


@pytest.mark.parametrize(
    ("prices", "answer", "cost", "unknown"),
    [
        (BY_HOUR, {"text": "a", "usage": {"type": "duration", "seconds": 9}}, 900, []),
        (BY_HOUR, {"text": "a", "duration": 8.4704}, 847, []),
        (BY_HOUR, {"text": "a", "duration": "long"}, None, []),
        (BY_HOUR, {"text": "a", "usage": {"input_tokens": 14, "output_tokens": 3}}, None, ["up/m (tokens)"]),
        ({"m": {"input_usd": 6}}, {"text": "a", "usage": {"input_tokens": 14, "output_tokens": 3}}, 84, []),
        ({"m": {"input_usd": 6}}, {"text": "a", "duration": 8}, None, ["up/m (hours)"]),
    ],
)
@pytest.mark.parametrize("path", ["transcriptions", "translations"])
async def test_the_cost_of_a_transcription(
    open_app: OpenApp, autojump_clock: MockClock, path: str, prices: Any, answer: Any, cost: int | None, unknown: Any
) -> None:
    """The length of the sound is taken from the answer, unless that has token counts."""
    async with open_app(make_config(prices=prices), Provider(answers(json.dumps(answer).encode()))) as served:
        call = await served.client.ask("POST", f"/v1/audio/{path}", PICTURE.replace(b"image", b"file"), headers=FORM)
        assert (call.status, call.json) == (200, answer)
        assert cost_of(served)[0] == cost
        assert await unknown_of(served) == unknown


# -- service tiers ----------------------------------------------------------------------------------------------------

RATES = {"input_usd": 1, "output_usd": 10}
TIERS = {"m": {**RATES, "service_tiers": {"flex": 0.5, "Priority": "1.75"}}}
COUNTED = {"prompt_tokens": 100, "completion_tokens": 10}


def answer_in(tier: object) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "choices": [choice], "usage": COUNTED, "service_tier": tier}).encode()


def stream_in(tier: object) -> Script:
    counts = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": COUNTED, "service_tier": tier}
    return (Say(content("a")), Say(event(counts)), Say(DONE))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tier", "prices", "cost", "unknown"),
    [
        ("flex", TIERS, 100, []),
        ("FLEX", TIERS, 100, []),
        ("priority", TIERS, 350, []),
        ("default", TIERS, 200, []),
        (None, TIERS, 200, []),
        (5, TIERS, 200, []),
        ("scale", TIERS, None, ["up/m (scale)"]),
        ("flex", {"m": RATES}, None, ["up/m (flex)"]),
        ("x" * 100, {"m": RATES}, None, [f"up/m ({'x' * 32})"]),
    ],
)
async def test_the_tier_in_which_a_call_was_served(
    open_app: OpenApp,
    autojump_clock: MockClock,
    stream: bool,
    tier: object,
    prices: Any,
    cost: int | None,
    unknown: Any,
) -> None:
    """Its price is that of the tier that the answer names. If none is known, the cost is unknown, and ``/status`` says
    for which tier."""
    script = stream_in(tier) if stream else answers(answer_in(tier))
    async with open_app(make_config(prices=prices), Provider(script)) as served:
        assert (await served.client.chat(stream=stream).wait()).status == 200
        assert cost_of(served)[0] == cost
        assert await unknown_of(served) == unknown


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "cost"),
    [
        ({"service_tier": "batch"}, 50),
        ({"service_tier": "standard", "speed": "fast"}, 600),
        ({"service_tier": "standard"}, 100),
    ],
)
async def test_the_tier_of_a_message(
    open_app: OpenApp, autojump_clock: MockClock, stream: bool, said: dict[str, str], cost: int
) -> None:
    """Anthropic has it among the counts; in a stream only in the first event."""
    prices = {"m": {"input_usd": 1, "service_tiers": {"batch": 0.5, "fast": 6}}}
    message: dict[str, Any] = {
        "id": "a",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": None,
        "content": [],
    }
    usage = {"input_tokens": 100, "output_tokens": 0, **said}
    if stream:
        steps = (
            {"type": "message_start", "message": {**message, "usage": usage}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
            {"type": "message_stop"},
        )
        script: Script = tuple(Say(b"event: %b\n" % str(step["type"]).encode() + event(step)) for step in steps)
    else:
        whole = {**message, "stop_reason": "end_turn", "content": [{"type": "text", "text": "a"}], "usage": usage}
        script = answers(json.dumps(whole).encode())
    config = make_config({"up": {"kind": "anthropic", "base_url": "http://up.invalid", "models": ["m"]}}, prices=prices)
    for path in ("/v1/messages", "/v1/chat/completions"):
        async with open_app(config, Provider(script)) as served:
            body = {"model": "up/m", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}], "stream": stream}
            assert (await served.client.ask("POST", path, body)).status == 200
            assert cost_of(served)[0] == cost


async def test_the_tier_of_a_response(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is in the response inside the last event."""
    response = {"id": "r", "object": "response", "status": "completed", "output": [], "service_tier": "flex"}
    usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
    script = (
        Say(event({"type": "response.created", "response": {**response, "status": "in_progress"}})),
        Say(event({"type": "response.completed", "response": {**response, "usage": usage}})),
    )
    async with open_app(make_config({"up": {"responses": "native"}}, prices=TIERS), Provider(script)) as served:
        call = await served.client.ask("POST", "/v1/responses", {"model": "up/m", "input": "a", "stream": True})
        assert call.status == 200
        assert cost_of(served)[0] == 100


async def test_a_dearer_tier_is_reserved(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that asks for a tier reserves what it costs there, if that is more."""
    keys = {"ada": {"secret": "a-secret-of-ada", "budget_usd": "0.015"}}
    headers = {"authorization": "Bearer a-secret-of-ada"}
    provider = Provider(answers(answer_in("default")))
    async with open_app(make_config(prices=TIERS, keys=keys), provider) as served:
        for tier, status in (("priority", 429), ("flex", 200)):
            body = chat(stream=False, service_tier=tier, max_tokens=1000)
            call = await served.client.start("POST", "/v1/chat/completions", body, headers=headers).wait()
            assert call.status == status, call.body
