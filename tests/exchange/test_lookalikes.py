"""Servers that say they have OpenAI's API, and differ: what clients get from them, passed through and translated,
streamed and not, end to end in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from bench import events
from tests.dialects.chat import message_of
from tests.support.gateway import OpenApp, Served
from tests.support.provider import DONE, FINISH, Head, Pause, Provider, Say, Script, chunk, content, event, role
from trigate.openai.accumulator import AnswerAccumulator

THOUGHT, SAID = "Hm.", "Hello"
END = b"data: [DONE]\n\n"
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def counted(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """Makes an event that has the counts so far."""
    return event(events.chunk(delta, finish_reason, model="m") | {"usage": COUNTS})


def reasons(name: str) -> bytes:
    """Makes a stream with reasoning under this name."""
    return role() + chunk({name: "H"}) + chunk({name: "m."}) + content("Hello") + DONE


STREAMS = {
    "no role": content("Hel") + content("lo") + DONE,
    "a role in every event": b"".join([chunk({"role": "assistant", "content": each}) for each in SAID]) + DONE,
    "no [DONE]": role() + content(SAID) + FINISH,
    "comments": b": up\n\n" + role() + b": up\n\n" + content(SAID) + b": up\n\n" + DONE,
    "usage in every event": counted({"role": "assistant"}) + counted({"content": SAID}) + counted({}, "stop") + END,
    "no id": b"".join([event({"choices": [{"delta": {"content": each}}]}) for each in ("Hel", "lo")]) + DONE,
    "all in one event": counted({"role": "assistant", "content": SAID}, "stop") + END,
    "reasoning_content": reasons("reasoning_content"),
    "reasoning": reasons("reasoning"),
}
ERRORS: dict[str, dict[str, Any]] = {
    "an integer": {"error": {"message": "It broke.", "type": "server_error", "code": 500}},
    "no type": {"error": {"message": "It broke.", "code": 500}},
    "a string": {"error": "It broke."},
    "an object of type error": {"object": "error", "message": "It broke.", "type": "InternalError", "code": 500},
}


def stream_of(data: bytes) -> Script:
    """A stream, in pieces that end anywhere."""
    return Head(), *[Say(data[at : at + 100]) for at in range(0, len(data), 100)]


async def ask(served: Served, path: str, *, stream: bool) -> tuple[int, bytes]:
    """Makes a call, which asks for reasoning where it must."""
    body: dict[str, Any] = {"model": "up/m", "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
    if path == "/v1/messages":
        body |= {"max_tokens": 9, "thinking": {"type": "adaptive"}}
    call = await served.client.ask("POST", path, body)
    return call.status, call.body


def found(path: str, body: bytes, *, stream: bool) -> tuple[str, str]:
    """The reasoning and the text of an answer."""
    if path == "/v1/messages":
        message = message_of(body) if stream else msgspec.json.decode(body)
        blocks = {block["type"]: block for block in message["content"]}
        return blocks.get("thinking", {}).get("thinking", ""), blocks["text"]["text"]
    if not stream:
        message = msgspec.json.decode(body)["choices"][0]["message"]
        assert message["role"] == "assistant"
        return message.get("reasoning_content") or message.get("reasoning") or "", message["content"]
    answer = AnswerAccumulator()
    answer.feed(body)
    assert body.endswith(END)
    deltas = [
        msgspec.json.decode(line[6:])["choices"][0]["delta"] for line in body.split(b"\n\n") if b'"delta"' in line
    ]
    return "".join([each.get("reasoning_content") or each.get("reasoning") or "" for each in deltas]), answer.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("quirk", STREAMS)
async def test_streams(open_app: OpenApp, quirk: str, path: str, stream: bool) -> None:
    """The answer is whole. A plain call may be answered with a stream as well."""
    async with open_app(providers=Provider(stream_of(STREAMS[quirk]))) as served:
        status, body = await ask(served, path, stream=stream)
        assert status == 200
        assert found(path, body, stream=stream) == (THOUGHT if "reasoning" in quirk else "", SAID)
        assert [exchange.outcome for exchange in served.settled] == ["complete"]
        served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\ndata: [DONE]\n\n"])
@pytest.mark.parametrize("start", [b"", b"\n\n", b"\xef\xbb\xbf"])
async def test_answers(open_app: OpenApp, start: bytes, end: bytes, path: str, stream: bool) -> None:
    """JSON answers a streamed call as well, with blanks or a byte order mark before it and the end of a stream behind
    it."""
    message = {"role": "assistant", "content": SAID, "reasoning": THOUGHT}
    answer = events.completion(events.choice(message=message, finish_reason="stop"), COUNTS, model="m")
    script = (Head(content_type="application/json"), Say(start + msgspec.json.encode(answer) + end))
    async with open_app(providers=Provider(script)) as served:
        status, body = await ask(served, path, stream=stream)
        assert (status, found(path, body, stream=stream)) == (200, (THOUGHT, SAID))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("shape", ERRORS)
async def test_errors(open_app: OpenApp, shape: str, path: str, autojump_clock: MockClock) -> None:
    """An error with status 200, in any shape, has a message and a type for the client; within a stream, too. A
    code that is a number does no harm."""
    error = event(ERRORS[shape])
    within = (Say(role() + content("Hel")), Pause(1), Say(error))
    for steps, stream in (((Say(msgspec.json.encode(ERRORS[shape])),), False), ((Say(error),), True), (within, True)):
        head = Head(content_type="text/event-stream" if stream else "application/json")
        async with open_app(providers=Provider((head, *steps))) as served:
            status, body = await ask(served, path, stream=stream)
            assert (status == 200) == (steps is within)
            last = (
                [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")][-1] if status == 200 else body
            )
            told = msgspec.json.decode(last)["error"]
            assert "It broke." in told["message"]
            assert isinstance(told["type"], str)
