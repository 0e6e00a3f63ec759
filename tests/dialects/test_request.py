"""Requests in Anthropic's format as bodies for chat completions."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.chat import call, mark_of, translated
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.anthropic.fields import BLOCKS, FIELDS
from trigate.dialects.anthropic.signatures import without_own_reasoning
from trigate.errors import BadRequest, Untranslatable

LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:8000/v1"))
OPENAI = UpstreamConfig(base_url=Url("https://api.openai.com/v1"))
DEEPSEEK = UpstreamConfig(base_url=Url("https://api.deepseek.com/v1"))
OTHER = UpstreamConfig(base_url=Url("https://api.example.com/v1"))

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
PDF = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
    "title": "a.pdf",
}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}


def sent(
    upstream: UpstreamConfig = LOCAL, *, model: str = "m", **fields: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translates a call; returns the body and the names of what was dropped."""
    asked = call(**{"thinking": None, **fields})
    translation = translated(asked)
    body = translation.body(asked, model, upstream)
    return msgspec.json.decode(body), translation.dropped


def messages(*turns: Any, upstream: UpstreamConfig = LOCAL, **fields: Any) -> list[dict[str, Any]]:
    """The messages that are sent; the turns are the user's, the assistant's, the user's, …"""
    roles = ("user", "assistant")
    given = [{"role": roles[at % 2], "content": content} for at, content in enumerate(turns)]
    found: list[dict[str, Any]] = sent(upstream, messages=given, **fields)[0]["messages"]
    return found


def test_a_plain_request() -> None:
    """The fields that both formats have."""
    body, dropped = sent(stream=True, temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["a"], system="S")
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 100,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop": ["a"],
    }
    assert dropped == ()


def test_what_claude_code_sends() -> None:
    """Its billing block is left out, its system message stays where it is, and all that is dropped has a name."""
    body, dropped = sent(
        OTHER,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2;"},
            {"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Two"},
        ],
        messages=[{"role": "user", "content": "Hi"}, {"role": "system", "content": "Remember"}],
        tools=[
            TOOL,
            {**TOOL, "name": "Deferred", "defer_loading": True},
            {"type": "web_search_1", "name": "web_search"},
        ],
        thinking={"type": "adaptive", "display": "omitted"},
        output_config={"effort": "medium"},
        context_management={"edits": []},
        metadata={"user_id": "{}"},
        anything_new={"x": 1},
    )
    assert body["messages"] == [
        {"role": "system", "content": "One\n\nTwo"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "text", "text": "<system-message>\nRemember\n</system-message>"},
            ],
        },
    ]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["f"]
    assert dropped == (
        "anything_new",
        "cache_control",
        "context_management",
        "metadata.user_id",
        "output_config.effort",
        "thinking.display",
        "tools.defer_loading",
        "tools.web_search_1",
        "x-anthropic-billing-header",
    )


def test_names_that_clients_invent() -> None:
    """A name goes into a header only if it looks like one."""
    fields: dict[str, Any] = {"a\r\nb": 1, "x" * 65: 1}
    assert sent(**fields)[1] == ("other",)


def test_results_of_tools() -> None:
    """Results come first, in the order of the calls; errors are marked; pictures go into the user's message."""
    assert messages(
        "Hi",
        [
            {"type": "text", "text": "I call."},
            {"type": "tool_use", "id": "a", "name": "f", "input": {"x": [1.5]}},
            {"type": "tool_use", "id": "b", "name": "g", "input": {}},
        ],
        [
            {"type": "text", "text": "Go on."},
            {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "yes"}, IMAGE]},
        ],
        [{"type": "text", "text": "Done."}],
        "Thanks",
    ) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I call.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":[1.5]}'}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "yes"},
        {"role": "tool", "tool_call_id": "b", "content": "[The tool failed] no"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "From the result of the tool call a:"},
                IMAGE_PART,
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ]


def test_results_in_two_messages() -> None:
    """Two messages of the user's in a row are one turn."""
    calls = [{"type": "tool_use", "id": each, "name": "f", "input": {}} for each in "ab"]
    results = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": each}]} for each in "ab"]
    body, _ = sent(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": calls}, *results])
    assert [message.get("tool_call_id") for message in body["messages"]] == [None, None, "a", "b"]
    assert body["messages"][1]["content"] is None


def test_a_result_without_a_call() -> None:
    """It is a 400 that names the place."""
    with pytest.raises(BadRequest) as caught:
        messages([{"type": "tool_result", "tool_use_id": "a", "content": "x"}])
    assert caught.value.param == "messages[0].content[0]"


def test_documents() -> None:
    """Text becomes text; a PDF goes where it is taken, and is refused elsewhere."""
    text = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}}
    result = {"type": "search_result", "title": "R", "source": "http://r", "content": [{"type": "text", "text": "x"}]}
    parts = messages([text, result])[0]["content"]
    assert [part["text"] for part in parts] == ["T\nabc", "R\nhttp://r\nx"]
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}}
    assert messages([PDF], upstream=OPENAI)[0]["content"] == [file]
    with pytest.raises(Untranslatable, match=r"a\.pdf"):
        messages([PDF])


@pytest.mark.parametrize(
    ("upstream", "field"), [(DEEPSEEK, "reasoning_content"), (LOCAL, "reasoning_content"), (OPENAI, None)]
)
def test_reasoning_of_the_history(upstream: UpstreamConfig, field: str | None) -> None:
    """It goes back to an upstream that takes it, and its signature never does."""
    thinking = {"type": "thinking", "thinking": "hm", "signature": "EqQB"}
    found = messages(
        "Hi",
        [thinking, {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}],
        "b",
        upstream=upstream,
    )
    assert found[1] == {"role": "assistant", "content": "a", **({field: "hm"} if field else {})}


def test_tools() -> None:
    """Names, descriptions, schemas and ``strict`` are kept, and every choice has its word."""
    body, _ = sent(tools=[{**TOOL, "type": "custom", "strict": True}])
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert body["tools"] == [{"type": "function", "function": function}]
    for kind, expected in (("auto", "auto"), ("any", "required"), ("none", "none")):
        assert sent(tools=[TOOL], tool_choice={"type": kind})[0]["tool_choice"] == expected
    body, _ = sent(tools=[TOOL], tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True})
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("thinking", "config", "model", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 2000}, None, "gpt-5.2", "low"),
        ({"type": "enabled", "budget_tokens": 8000}, None, "gpt-5.2", "medium"),
        ({"type": "adaptive"}, None, "gpt-5.2", "high"),
        ({"type": "adaptive"}, {"effort": "max"}, "gpt-5.2", "max"),
        ({"type": "adaptive"}, {"effort": "low"}, "gpt-4o", None),
        ({"type": "disabled"}, {"effort": "low"}, "gpt-5.2", "none"),
        ({"type": "disabled"}, None, "gpt-5-mini", "minimal"),
        ({"type": "disabled"}, None, "gpt-5.2-codex", None),
        ({"type": "disabled"}, None, "gpt-4o", None),
    ],
)
def test_effort(thinking: Any, config: Any, model: str, expected: str | None) -> None:
    """How much to think has one scale, which goes to the models that know it."""
    body, dropped = sent(OPENAI, model=model, thinking=thinking, output_config=config)
    assert body.get("reasoning_effort") == expected
    assert bool(dropped) == (expected is None)


def test_the_names_at_openai() -> None:
    """OpenAI has names of its own, and learns no user's id."""
    body, dropped = sent(OPENAI, metadata={"user_id": "ada@example.com"}, top_k=3)
    assert body["max_completion_tokens"] == 100
    assert "max_tokens" not in body
    assert len(body["safety_identifier"]) == 64
    assert dropped == ("top_k",)


def test_structured_output() -> None:
    """A JSON schema is one in both formats."""
    body, _ = sent(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, fate in FIELDS.items() if fate != "translated"])
def test_fates_of_fields(name: str) -> None:
    """A field that is not translated is refused by its name, or dropped under it; null is nothing."""
    nothing: dict[str, Any] = {name: None}
    something: dict[str, Any] = {name: {"x": 1}}
    assert sent(**nothing)[1] == ()
    if FIELDS[name] == "dropped":
        assert sent(**something)[1] == (name,)
        return
    with pytest.raises(Untranslatable) as caught:
        sent(**something)
    assert caught.value.param == name


@pytest.mark.parametrize("kind", [*BLOCKS, "server_tool_use", "container_upload", "new_block"])
def test_fates_of_blocks(kind: str) -> None:
    """A block that is not in the table is refused; an empty one of a known type names what it lacks."""
    turns = ["Hi", [{"type": "text", "text": "a"}, {"type": kind}], "b"]
    if BLOCKS.get(kind) == "dropped":
        assert messages(*turns)[1]["content"] == "a"
        return
    with pytest.raises(BadRequest) as caught:
        messages(*turns)
    assert isinstance(caught.value, Untranslatable) == (kind not in BLOCKS)
    assert "messages[1].content[1]" in (caught.value.param or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"system": 7}, "system"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": 1}, "thinking"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"metadata": {"user_id": 1}}, "metadata.user_id"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "x"}]}]},
            "messages[0].content[0].input",
        ),
    ],
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    """What is malformed or cannot be expressed is a 400 that names the place."""
    with pytest.raises(BadRequest) as caught:
        sent(**fields)
    assert caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["user", "a", "text", "base64", *BLOCKS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "source", "content", "tool_use_id", "id", "name", "input", "data", "thinking", "title"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(name=st.sampled_from(list(FIELDS)), value=JSON, content=JSON)
def test_fuzzed_requests(name: str, value: Any, content: Any) -> None:
    """Any values give a body or a 400."""
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    if name not in ("model", "messages", "stream", "max_tokens"):
        fields[name] = value
    with contextlib.suppress(BadRequest):
        sent(**fields)


# -- reasoning of the gateway's own -----------------------------------------------------------------------------------


def test_own_reasoning_never_reaches_anthropic() -> None:
    """Only the blocks with a mark of the gateway's are removed; every other byte of the messages stays."""
    signed = b'{"role": "assistant",  "content": [{"type":"thinking","thinking":"a","signature":"EqQB"}]}'
    own = msgspec.json.encode(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": mark_of("hm")},
                {"type": "text", "text": "a"},
            ],
        }
    )
    only = msgspec.json.encode(
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": mark_of("hm")}]}
    )
    body = b'{"model":"m","messages":[%b,%b,%b],"x":1.0}' % (signed, own, only)
    kept = b'{"role":"assistant","content":[{"type":"text","text":"a"}]}'
    assert without_own_reasoning(body) == b'{"model":"m","messages":[%b,%b],"x":1.0}' % (signed, kept)
    untouched = b'{ "model":"m","messages": [%b] }' % signed
    assert without_own_reasoning(untouched) == untouched
