"""Response calls as the request that a provider of chat completions gets."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import pytest

from tests.dialects.responses import MARKS, call, translated
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.marks import Marks
from trigate.dialects.openai_responses.sealed import seal
from trigate.dialects.vocabulary import Reasoning, as_user_text
from trigate.errors import BadRequest, PreviousResponseNotFound, Untranslatable

LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:9/v1"))
OPENAI = UpstreamConfig(base_url=Url("https://api.openai.com/v1"))
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def encode(upstream: UpstreamConfig = LOCAL, **fields: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Encodes a call; returns the body that the upstream gets, and what was dropped."""
    asked = call(**fields)
    translation = translated(asked)
    body = msgspec.json.decode(translation.body(asked, "m", upstream))
    return body, translation.dropped


def messages(*items: Any, **fields: Any) -> Any:
    """The messages that the upstream gets for an input."""
    return encode(input=list(items), **fields)[0]["messages"]


def said(role: str, text: str) -> dict[str, Any]:
    """Makes a message item."""
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def called(call_id: str, name: str = "weather", **fields: Any) -> dict[str, Any]:
    """Makes a function_call item."""
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}", **fields}


def output(call_id: str, value: Any = "warm") -> dict[str, Any]:
    """Makes a function_call_output item."""
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def chat_call(call_id: str, name: str = "weather", arguments: str = "{}") -> dict[str, Any]:
    """A tool call of chat completions."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_text() -> None:
    """It is the message of the user, behind the instructions."""
    body, dropped = encode(input="Hello", instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=1)
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 1,
    }
    assert dropped == ()


def test_messages() -> None:
    """A developer is the system; messages of the user in a row are one; an item without a type is a message."""
    found = messages(
        said("developer", "a"), said("developer", "b"), said("user", "c"), {"role": "user", "content": "d"}
    )
    assert found == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]


def test_a_turn_with_tools() -> None:
    """Reasoning, text and calls of one turn are one message, and the outputs follow it in the order of the calls."""
    found = messages(
        said("user", "Hi"),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        said("assistant", "Let me see."),
        called("a"),
        called("b"),
        output("b", "cold"),
        output("a"),
        said("user", "Thanks"),
    )
    assert found[1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [chat_call("a"), chat_call("b")],
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "tool_call_id": "a", "content": "warm"},
        {"role": "tool", "tool_call_id": "b", "content": "cold"},
        {"role": "user", "content": "Thanks"},
    ]


def test_outputs_follow_their_calls() -> None:
    """Also where something is between them, and where a model gives the same id in each turn."""
    found = messages(
        called("a"), said("developer", "note"), output("a", "1"), said("user", "again"), called("a"), output("a", "2")
    )
    assert [(each["role"], each["content"]) for each in found] == [
        ("assistant", None),
        ("tool", "1"),
        ("user", as_user_text("note")),
        ("user", "again"),
        ("assistant", None),
        ("tool", "2"),
    ]


@pytest.mark.parametrize(
    ("items", "param", "words"),
    [
        ([said("user", "a"), output("x")], "input[1]", "No tool call found"),
        ([called("x")], "input[0]", "No tool output found"),
        ([], "input", "at least one item"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0].id", "not found"),
        ([{"type": "message", "role": "tool", "content": "a"}], "input[0].role", "must be"),
        ([{"type": "message", "role": "user", "content": 1}], "input[0].content", "must be"),
        (["a"], "input[0]", "must be an object"),
        ([{"type": "reasoning", "summary": 1}], "input[0].summary", "must be a list"),
    ],
)
def test_malformed_input(items: Any, param: str, words: str) -> None:
    """It is refused with the place of the fault."""
    with pytest.raises(BadRequest, match=words) as caught:
        encode(input=items)
    assert caught.value.param == param
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(
            ({"tools": [{"type": kind}]}, "tools[0]")
            for kind in (
                *("web_search", "file_search", "computer", "code_interpreter", "image_generation", "mcp"),
                "local_shell",
            )
        ),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input[0].content[0]"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "nope"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": {}}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_expressed(fields: dict[str, Any], param: str | None) -> None:
    """It is refused, so that another target may serve the call; a tool that runs at OpenAI is named."""
    with pytest.raises(Untranslatable) as caught:
        encode(**fields)
    assert caught.value.retryable
    if param is not None:
        assert caught.value.param == param
    if "tools" in fields and "tool_choice" not in fields:
        assert fields["tools"][0]["type"] in caught.value.message


def test_an_unknown_previous_response() -> None:
    """It has the code of OpenAI."""
    with pytest.raises(PreviousResponseNotFound) as caught:
        encode(previous_response_id="resp_9")
    assert (caught.value.status, caught.value.code) == (400, "previous_response_not_found")


def test_tools() -> None:
    """A custom tool is a function with a text; a namespace is in the names of its tools."""
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    body, dropped = encode(
        tools=[
            {**WEATHER, "description": "d", "strict": True},
            {"type": "custom", "name": "apply_patch", "description": "Edits.", "format": grammar},
            {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "spawn"}]},
            {"type": "web_search", "external_web_access": True},
        ],
        tool_choice="auto",
        parallel_tool_calls=True,
    )
    weather, patch, spawn = [each["function"] for each in body["tools"]]
    assert weather == {"name": "weather", "parameters": {"type": "object"}, "description": "d", "strict": True}
    assert (patch["name"], patch["parameters"]["required"]) == ("apply_patch", ["input"])
    assert patch["description"].endswith("grammar (lark):\nstart: /x/")
    assert spawn == {"name": "agents__spawn", "parameters": {"type": "object", "properties": {}}}
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("auto", True)
    assert dropped == ("tools.web_search",)


@pytest.mark.parametrize(
    ("choice", "sent", "names"),
    [
        ({"type": "function", "name": "spawn"}, {"type": "function", "function": {"name": "agents__spawn"}}, 3),
        ({"type": "custom", "name": "patch"}, {"type": "function", "function": {"name": "patch"}}, 3),
        ("none", "none", 3),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            "required",
            1,
        ),
    ],
)
def test_tool_choice(choice: Any, sent: Any, names: int) -> None:
    """The upstream gets the name of the function; of allowed tools it gets only those."""
    tools = [
        WEATHER,
        {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "spawn"}]},
    ]
    body, _ = encode(tools=tools, tool_choice=choice)
    assert body["tool_choice"] == sent
    assert len(body["tools"]) == names


def test_two_tools_of_one_name() -> None:
    """They could not be told apart."""
    with pytest.raises(BadRequest, match="two tools have the name"):
        encode(tools=[WEATHER, WEATHER])


def test_custom_calls_come_back() -> None:
    """A call of a custom tool, or of one in a namespace, goes to the upstream as it was made."""
    found = messages(
        {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": "x\n"},
        called("b", "spawn", namespace="agents"),
        {"type": "custom_tool_call_output", "call_id": "a", "output": "done"},
        output("b", [{"type": "input_text", "text": "1"}, {"type": "input_image", "image_url": "data:image/png,"}]),
    )
    assert found[0]["tool_calls"] == [chat_call("a", "patch", '{"input":"x\\n"}'), chat_call("b", "agents__spawn")]
    assert [each["content"] for each in found[1:3]] == ["done", "1"]
    assert found[3]["content"][-1] == {"type": "image_url", "image_url": {"url": "data:image/png,"}}


def test_own_reasoning_goes_back() -> None:
    """What the gateway has sealed is opened; what another program has sealed is dropped."""

    def sealed(text: str, marks: Marks) -> dict[str, Any]:
        reasoning = Reasoning(text, {"trigate": marks.mark_of(text)})
        return {"type": "reasoning", "summary": [], "encrypted_content": seal(reasoning)}

    own, foreign = sealed("Hm.", MARKS), sealed("Evil", Marks(b"k" * 32))
    body, dropped = encode(input=[said("user", "a"), own, foreign, said("assistant", "b"), said("user", "c")])
    assert body["messages"][1] == {"role": "assistant", "content": "b", "reasoning_content": "Hm."}
    assert dropped == ("reasoning.encrypted_content",)


def test_media() -> None:
    """Images keep their detail; files are documents."""
    image = {"type": "input_image", "image_url": "https://a.example/x.png", "detail": "low"}
    file = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}
    body, _ = encode(OPENAI, input=[{"role": "user", "content": [image, file]}])
    assert body["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "https://a.example/x.png", "detail": "low"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}},
    ]


def test_the_form_of_the_answer() -> None:
    """A schema keeps its name and whether it is strict."""
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": False}
    body, _ = encode(text={"format": form})
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": {"type": "object"}, "strict": False},
    }
    assert encode(text={"format": {"type": "json_object"}})[0]["response_format"] == {"type": "json_object"}
    assert "response_format" not in encode(text={"format": {"type": "text"}})[0]


def test_what_is_dropped() -> None:
    """Advisory fields are named."""
    body, dropped = encode(
        OPENAI,
        reasoning={"effort": "high", "summary": "auto", "new": 1},
        text={"verbosity": "low"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        truncation="auto",
        prompt_cache_key="k",
        client_metadata={},
        service_tier="flex",
        top_logprobs=2,
        stream_options={"include_obfuscation": True},
        safety_identifier="u",
        metadata={"a": "b"},
        store=False,
        brand_new=1,
    )
    assert dropped == tuple(
        sorted(
            (
                *("reasoning.new", "text.verbosity", "include.message.output_text.logprobs", "truncation"),
                *("client_metadata", "service_tier", "top_logprobs"),
                *("stream_options.include_obfuscation", "brand_new", "reasoning.effort"),
            )
        )
    )
    assert len(body["safety_identifier"]) == 64


def test_effort_goes_to_a_model_that_takes_it() -> None:
    """It is ``reasoning_effort``."""
    asked = call(reasoning={"effort": "low"})
    body = msgspec.json.decode(translated(asked).body(asked, "gpt-5", OPENAI))
    assert body["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"instructions": 1}, "instructions"),
        ({"input": None}, "input"),
    ],
)
def test_malformed_fields(fields: dict[str, Any], param: str) -> None:
    """The message names the field."""
    with pytest.raises(BadRequest) as caught:
        encode(**fields)
    assert caught.value.param == param


def test_a_call_without_identity() -> None:
    """Its response has the provider's id."""
    asked = attrs.evolve(call(stream=False), identity=None)
    body = b'{"id":"chatcmpl-7","choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    data, _ = translated(asked).answer(asked, body, upstream="up")
    response = msgspec.json.decode(data)
    assert (response["id"], response["output"][0]["id"]) == ("resp_7", "msg_7_0")
