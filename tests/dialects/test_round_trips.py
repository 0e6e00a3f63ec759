"""What is encoded in a format and decoded again is the same, as far as the format can say it."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects import gemini
from tests.dialects.native import call
from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic import MessagesClient, MessagesUpstream
from trigate.dialects.endpoints import CHAT, GENERATE, MESSAGES, OLLAMA_CHAT, STREAM_GENERATE
from trigate.dialects.formats import Asked
from trigate.dialects.gemini import GeminiClient, GeminiUpstream
from trigate.dialects.ollama import CLIENTS, OllamaUpstream
from trigate.dialects.openai_chat import ChatClient, ChatUpstream
from trigate.dialects.vocabulary import (
    Answer,
    AnswerPart,
    ArgumentsDelta,
    Event,
    File,
    Finish,
    FinishReason,
    Image,
    Message,
    Part,
    PartStop,
    Payload,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Request,
    Start,
    Text,
    TextDelta,
    TextStart,
    TokenCounts,
    Tool,
    ToolCall,
    ToolCallStart,
    ToolChoice,
    ToolResult,
)
from trigate.openai.request import InPath, decode_call

MODEL = "claude-opus-4-6"  # it takes everything but a prefill
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).map(lambda text: f"{text}.")
NAMES = st.sampled_from(["f", "g", "get-it"])
ARGUMENTS = st.dictionaries(WORDS, st.integers() | WORDS, max_size=2).map(
    lambda value: msgspec.json.encode(value).decode()
)
COUNTS = st.builds(
    TokenCounts,
    input=st.integers(0, 99),
    cache_read=st.integers(0, 99),
    cache_write=st.integers(0, 99),
    output=st.integers(0, 99),
    reasoning=st.none() | st.integers(0, 9),
)
REASONS: st.SearchStrategy[FinishReason] = st.sampled_from(["stop", "length", "refusal"])
IMAGES = st.sampled_from([Image("data:image/png;base64,AAAA"), Image("https://x.invalid/a.png")])
PDF = st.just(File("a.pdf", "data:application/pdf;base64,AAAA"))
PICTURE = Image("data:image/png;base64,iVBORw0KGgo=")
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}


@st.composite
def conversations(draw: st.DrawFn, *, media: st.SearchStrategy[Part], has_errors: bool) -> tuple[Message, ...]:
    """Conversations in turns: what `Message` merges is merged, and each call has its result."""
    messages = [Message("system", (Text(draw(WORDS)),))] if draw(st.booleans()) else []
    results: tuple[ToolResult, ...] = ()
    for turn in range(draw(st.integers(1, 3))):
        texts = tuple(draw(st.lists(WORDS.map(Text) | media, min_size=0 if results else 1, max_size=2)))
        messages.append(Message("user", results + texts))
        calls = tuple(ToolCall(f"c{turn}-{at}", draw(NAMES), draw(ARGUMENTS)) for at in range(draw(st.integers(0, 2))))
        said = (Text(draw(WORDS)),) if not calls or draw(st.booleans()) else ()
        messages.append(Message("assistant", said + calls))
        results = tuple(
            ToolResult(each.id, (Text(draw(WORDS)),), is_error=has_errors and draw(st.booleans())) for each in calls
        )
    return (*messages, Message("user", (*results, Text(draw(WORDS)))))


@st.composite
def requests(draw: st.DrawFn, *, has_errors: bool = True, media: Any = IMAGES | PDF) -> Request:
    """Requests of what all formats can say."""
    tools = (
        Tool("f", "d", SCHEMA),
        Tool("g", None, {"type": "object", "properties": {}}),
        Tool("get-it", None, SCHEMA),
    )
    return Request(
        messages=draw(conversations(media=media, has_errors=has_errors)),
        max_tokens=draw(st.integers(1, 999)),
        stream=draw(st.booleans()),
        temperature=draw(st.none() | st.floats(0, 1)),
        stop=tuple(draw(st.lists(WORDS, max_size=2))),
        tools=tools,
        tool_choice=draw(
            st.none() | st.sampled_from([ToolChoice("auto"), ToolChoice("required"), ToolChoice("tool", "f")])
        ),
        schema=draw(st.none() | st.just(SCHEMA)),
    )


def plain_part(part: Any) -> Any:
    """A part of a message or of an answer without what only one provider or the gateway itself knows it by."""
    if isinstance(part, ToolResult):
        return msgspec.structs.replace(part, path="")
    return msgspec.structs.replace(part, payloads={}) if isinstance(part, ToolCall | Reasoning) else part


def same(request: Request) -> Request:
    """The request without what says where its parts came from, or how its client is answered."""
    messages = []
    for message in request.messages:
        messages.append(Message(message.role, tuple(map(plain_part, message.parts))))
    return msgspec.structs.replace(
        request, messages=tuple(messages), wants_reasoning=False, schema_name=None, schema_strict=None
    )


@given(requests())
def test_requests_in_anthropic_s_format(request: Request) -> None:
    body, dropped = MessagesUpstream().encode_request(request, model=MODEL, upstream=UpstreamConfig(kind="anthropic"))
    decoded, _ = MessagesClient().decode_request(decode_call(MESSAGES, body))
    assert dropped == ()
    assert same(decoded) == same(request)


@given(requests(has_errors=False, media=IMAGES))
def test_requests_for_chat_completions(request: Request) -> None:
    upstream = UpstreamConfig(base_url="https://api.openai.com/v1")  # type: ignore[arg-type]
    body, dropped = ChatUpstream().encode_request(request, model="gpt-5", upstream=upstream)
    decoded, _ = ChatClient().decode_request(decode_call(CHAT, body))
    assert dropped == ()
    assert same(decoded) == same(request)


@given(requests(media=st.just(PICTURE) | st.just(File("document", "data:application/pdf;base64,AAAA"))))
def test_requests_in_gemini_s_format(request: Request) -> None:
    body, dropped = GeminiUpstream().encode_request(
        request, model="gemini-3-pro", upstream=UpstreamConfig(kind="gemini")
    )
    endpoint = STREAM_GENERATE if request.stream else GENERATE
    asked = decode_call(endpoint, body, InPath("up/m", stream=request.stream))
    assert dropped == ()
    assert same(GeminiClient().decode_request(asked)[0]) == same(request)


@given(requests(has_errors=False, media=st.just(PICTURE)))
def test_requests_in_ollama_s_format(request: Request) -> None:
    """A message has one text and then its pictures, results are messages of their own, and there is no choice of a
    tool."""
    messages = []
    for message in request.messages:
        texts = [part.text for part in message.parts if isinstance(part, Text)]
        others = [part for part in message.parts if not isinstance(part, Text)]
        results = [part for part in others if isinstance(part, ToolResult)]
        joined = (Text("\n\n".join(texts)),) if texts else ()
        if results:
            messages.append(Message("user", tuple(results)))
        if joined or others[len(results) :]:
            messages.append(Message(message.role, (*joined, *others[len(results) :])))
    request = msgspec.structs.replace(request, messages=tuple(messages), tool_choice=None)
    body, dropped = OllamaUpstream().encode_request(request, model="m", upstream=UpstreamConfig(kind="ollama"))
    decoded, _ = CLIENTS["/api/chat"].decode_request(decode_call(OLLAMA_CHAT, body))
    assert dropped == ()
    assert same(decoded) == same(request)


PARTS: st.SearchStrategy[AnswerPart] = st.one_of(
    WORDS.map(Text), WORDS.map(Reasoning), st.builds(ToolCall, st.uuids().map(str), NAMES, ARGUMENTS)
)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """Answers whose parts are in the order that chat completions have: reasoning, a text, calls."""
    reasoning = tuple(draw(st.lists(WORDS.map(Reasoning), max_size=1)))
    texts = tuple(draw(st.lists(WORDS.map(Text), max_size=1)))
    calls = tuple(draw(st.lists(st.builds(ToolCall, st.uuids().map(str), NAMES, ARGUMENTS), max_size=2)))
    reason = "tool_calls" if calls else draw(REASONS)
    return Answer(draw(WORDS), reasoning + texts + calls, Finish(reason, None, draw(COUNTS)))


def events_of(answer: Answer) -> list[Event]:
    """The events of an answer."""
    events: list[Event] = [Start(answer.id)]
    for part in answer.parts:
        match part:
            case Text(text):
                events += (TextStart(), TextDelta(text), PartStop())
            case Reasoning(text, payloads):
                payload = [Payload(form, value) for form, value in payloads.items()]
                events += (ReasoningStart(), ReasoningDelta(text), *payload, PartStop())
            case ToolCall(call_id, name, arguments):
                events += (ToolCallStart(call_id, name), ArgumentsDelta(arguments), PartStop())
    return [*events, answer.finish]


def decoded_events(upstream: ChatUpstream | MessagesUpstream, stream: bytes) -> list[Event]:
    """What an upstream's format reads in a stream."""
    parts = upstream.stream_parts(upstream="up", max_event_bytes=1 << 20)
    events: list[Event] = []
    for event in parts.splitter.feed(stream):
        data = event.partition(b"data: ")[2].strip()
        assert parts.tracker.observe(event, data)
        events += parts.decoder.feed_end() if parts.tracker.complete else parts.decoder.feed(data)
    return events


@given(answers())
def test_answers_as_chat_completions(answer: Answer) -> None:
    """Plain, and as a stream."""
    asked = call(stream=True, stream_options={"include_usage": True})
    client, upstream = ChatClient(), ChatUpstream()
    made = Asked(asked, client.decode_request(asked)[0])
    assert upstream.decode_answer(client.encode_answer(answer, made), upstream="up")[0] == answer
    encoder = client.event_encoder(made)
    assert decoded_events(upstream, b"".join(map(encoder.encode, events_of(answer)))) == events_of(answer)


@given(st.lists(PARTS, max_size=4), COUNTS, WORDS)
def test_answers_in_anthropic_s_format(parts: list[AnswerPart], counts: TokenCounts, name: str) -> None:
    """Plain, and as a stream; thinking comes back with the mark that stands for a signature."""
    reason: FinishReason = "tool_calls" if any(isinstance(part, ToolCall) for part in parts) else "stop"
    answer = Answer(name, tuple(parts), Finish(reason, None, counts))
    body = {
        "model": "m",
        "max_tokens": 9,
        "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": "a"}],
    }
    asked = decode_call(MESSAGES, msgspec.json.encode(body))
    client, upstream = MessagesClient(), MessagesUpstream()
    made = Asked(asked, client.decode_request(asked)[0])
    plain = upstream.decode_answer(client.encode_answer(answer, made), upstream="up")[0]
    unmarked = [
        msgspec.structs.replace(part, payloads={}) if isinstance(part, Reasoning) else part for part in plain.parts
    ]
    assert msgspec.structs.replace(plain, parts=tuple(unmarked)) == answer
    encoder = client.event_encoder(made)
    assert decoded_events(upstream, b"".join(map(encoder.encode, events_of(answer)))) == events_of(plain)


def counted(answer: Answer) -> Answer:
    """The answer with the counts that Gemini's format and Ollama's have: without what was written to a cache, and with
    no more reasoning than output."""
    usage = answer.finish.usage
    assert usage is not None
    usage = TokenCounts(
        input=usage.input + usage.cache_write,
        cache_read=usage.cache_read,
        output=usage.output,
        reasoning=min(usage.reasoning or 0, usage.output) or None,
    )
    return msgspec.structs.replace(answer, finish=msgspec.structs.replace(answer.finish, usage=usage))


def unmarked(answer: Answer) -> Answer:
    return msgspec.structs.replace(answer, parts=tuple(map(plain_part, answer.parts)))


@given(answers().map(counted))
def test_answers_in_gemini_s_format(answer: Answer) -> None:
    """Plain, and as a stream."""
    asked, client, upstream = gemini.call(), GeminiClient(), GeminiUpstream()
    made = Asked(asked, client.decode_request(asked)[0])
    assert unmarked(upstream.decode_answer(client.encode_answer(answer, made), upstream="up")[0]) == answer
    encoder = client.event_encoder(made)
    parts = upstream.stream_parts(upstream="up", max_event_bytes=1 << 20)
    events: list[Event] = []
    for event in parts.splitter.feed(b"".join(map(encoder.encode, events_of(answer)))):
        data = event.partition(b"data: ")[2].strip()
        assert parts.tracker.observe(event, data)
        events += parts.decoder.feed(data)
    assert parts.tracker.all_finished
    events += parts.decoder.feed_end()
    nothing = ArgumentsDelta("{}")  # an upstream's call without arguments has none
    assert [each for each in events if not isinstance(each, Payload)] == [
        each for each in events_of(answer) if each != nothing
    ]
