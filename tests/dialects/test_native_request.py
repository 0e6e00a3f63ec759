"""Requests for chat completions, translated to Anthropic's format. Each is accepted by `messages_rules`."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.native import NEW, OLD, USER, call, sent, translated
from tests.support.messages_rules import problem_of, signature_of
from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic.upstream_request import JSON_ONLY
from trigate.errors import BadRequest, Untranslatable

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
PNG = "data:image/png;base64," + base64.b64encode(b"picture").decode()
PDF = "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.4").decode()


def tool_call(call_id: str, arguments: str = '{"a":"b"}', name: str = "f") -> dict[str, Any]:
    """A tool call of an assistant's message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: Any = "done") -> dict[str, Any]:
    """The result of one."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def assistant(*calls: dict[str, Any], content: Any = None, **fields: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **fields}


def refusal(model: str = NEW, **fields: Any) -> BadRequest:
    """Returns the error of a request that cannot be sent."""
    with pytest.raises(BadRequest) as caught:
        sent(model, **fields)
    return caught.value


# -- messages ---------------------------------------------------------------------------------------------------------


def test_the_shortest_request() -> None:
    """``max_tokens`` is required there."""
    assert sent() == {
        "model": NEW,
        "max_tokens": 64000,
        "messages": [{"role": "user", "content": "Hello"}],
        "dropped": [],
    }


def test_system_messages() -> None:
    """Those at the beginning become ``system``; a later one stays where it is, as text of the user's."""
    made = sent(
        messages=[
            {"role": "system", "content": "A"},
            {"role": "developer", "content": [{"type": "text", "text": "B"}]},
            USER,
            {"role": "assistant", "content": "x"},
            {"role": "system", "content": "C"},
            {"role": "user", "content": "y"},
        ]
    )
    assert made["system"] == "A\n\nB"
    *_, last = made["messages"]
    assert last["role"] == "user"
    assert [block["text"] for block in last["content"]] == ["<system-message>\nC\n</system-message>", "y"]
    alone = sent(messages=[{"role": "system", "content": "A"}, {"role": "system", "content": "B"}])
    assert alone["messages"] == [{"role": "user", "content": "A\n\nB"}]
    assert "system" not in alone


def test_tool_results_become_one_turn() -> None:
    """They come first in it, in the order of the calls, whatever stands between them."""
    made = sent(
        tools=[TOOL],
        messages=[
            USER,
            assistant(tool_call("a"), tool_call("b", "")),
            result("b", [{"type": "text", "text": "B"}]),
            {"role": "system", "content": "S"},
            {"role": "user", "content": "and"},
            result("a", ""),
        ],
    )
    _, calls, results = made["messages"]
    assert calls == {
        "role": "assistant",
        "content": [
            {"type": "tool_use", "id": "a", "name": "f", "input": {"a": "b"}},
            {"type": "tool_use", "id": "b", "name": "f", "input": {}},
        ],
    }
    assert results["content"][:2] == [
        {"type": "tool_result", "tool_use_id": "a"},
        {"type": "tool_result", "tool_use_id": "b", "content": "B"},
    ]
    assert [block["text"] for block in results["content"][2:]] == ["<system-message>\nS\n</system-message>", "and"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ('{"n": 12345678901234567890, "x": 1.50}', {"n": 12345678901234567890, "x": 1.5}),
        ('{"a', {"INVALID_JSON": '{"a'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
    ],
)
def test_arguments_become_an_object(arguments: str, expected: dict[str, Any]) -> None:
    made = sent(tools=[TOOL], messages=[USER, assistant(tool_call("a", arguments)), result("a")])
    assert made["messages"][1]["content"][0]["input"] == expected


def test_ids_that_are_refused_are_replaced() -> None:
    """In the call and in its result, and in the same way each time."""
    messages = [
        *(USER, assistant(tool_call("functions.f:0")), result("functions.f:0")),
        *(assistant(tool_call("functions.f:0")), result("functions.f:0"), assistant(tool_call("ok")), result("ok")),
    ]
    made = sent(tools=[TOOL], messages=messages)
    ids = [block["id"] for turn in made["messages"][1::2] for block in turn["content"]]
    assert len(set(ids)) == 3
    assert ids[-1] == "ok"
    assert made == sent(tools=[TOOL], messages=messages)


def test_calls_and_results_that_do_not_match() -> None:
    """They are refused here, with their place."""
    assert refusal(messages=[USER, result("a")]).param == "messages[1]"
    assert "'a'" in refusal(messages=[USER, assistant(tool_call("b")), result("a"), result("b")]).message
    assert "no result" in refusal(messages=[USER, assistant(tool_call("b")), USER]).message
    assert "no result" in refusal(messages=[USER, assistant(tool_call("b"))]).message


def test_empty_texts_are_left_out() -> None:
    """The rest is joined to turns that alternate."""
    made = sent(
        messages=[
            {"role": "system", "content": " "},
            {"role": "user", "content": ""},
            USER,
            {"role": "assistant", "content": ""},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [{"type": "text", "text": " \n"}, {"type": "text", "text": "x"}]},
        ]
    )
    assert made["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "x"}]}
    ]
    assert "system" not in made
    assert refusal(messages=[{"role": "user", "content": ""}]).param == "messages"


def test_pictures_and_files() -> None:
    made = sent(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
                    {"type": "image_url", "image_url": {"url": "https://x.invalid/a.jpg"}},
                    {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
                    {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,aGk="}},
                ],
            },
        ]
    )
    assert made["messages"][0]["content"] == [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": PNG.partition(",")[2]},
        },
        {"type": "image", "source": {"type": "url", "url": "https://x.invalid/a.jpg"}},
        {
            "type": "document",
            "title": "a.pdf",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PDF.partition(",")[2]},
        },
        {
            "type": "document",
            "title": "a.txt",
            "source": {"type": "text", "media_type": "text/plain", "data": "hi"},
        },
    ]
    picture = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PNG}}]
    shown = sent(tools=[TOOL], messages=[USER, assistant(tool_call("a")), result("a", picture)])
    assert [block["type"] for block in shown["messages"][2]["content"][0]["content"]] == ["text", "image"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "data:application/zip;base64,AA=="}},
        {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AA=="}},
        {"type": "video_url", "video_url": {"url": "https://x.invalid"}},
    ],
)
def test_parts_that_are_refused(part: dict[str, Any]) -> None:
    assert isinstance(refusal(messages=[{"role": "user", "content": [part]}]), Untranslatable)


def test_reasoning_goes_back_with_its_signature_only() -> None:
    """Text that Anthropic has not signed is left out; with the signature, its own block comes back as it was."""
    details = [
        {"type": "reasoning.text", "text": "hm", "signature": signature_of("hm"), "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "encrypted:1", "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "AAAA", "format": "google-gemini-v1"},
        {"type": "reasoning.text", "text": "x", "signature": "trigate.r1.00", "format": "anthropic-claude-v1"},
        "nonsense",
    ]
    turn = assistant(content="x", reasoning_content="hm", reasoning_details=details)
    assert sent(messages=[USER, turn, USER])["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": signature_of("hm")},
        {"type": "redacted_thinking", "data": "encrypted:1"},
        {"type": "text", "text": "x"},
    ]
    plain = assistant(content="x", reasoning_content="hm", reasoning="hm")
    assert sent(messages=[USER, plain, USER])["messages"][1]["content"] == "x"
    alone = assistant(content="", reasoning_details=details)
    assert len(sent(messages=[USER, alone, USER])["messages"]) == 1


def test_refusals_are_text() -> None:
    turn = assistant(content=[{"type": "refusal", "refusal": "I"}], refusal="will not")
    assert [block["text"] for block in sent(messages=[USER, turn, USER])["messages"][1]["content"]] == ["I", "will not"]


def test_the_beginning_of_an_answer() -> None:
    """Older models continue it, newer ones refuse it."""
    messages = [USER, assistant(content="The answer is ")]
    assert sent(OLD, messages=messages)["messages"][-1] == {"role": "assistant", "content": "The answer is"}
    assert isinstance(refusal(messages=messages), Untranslatable)
    assert sent(OLD, messages=messages, reasoning_effort="high")["dropped"] == ["reasoning_effort"]


def test_legacy_functions() -> None:
    """They are tools; results belong to the call before them that has the name."""
    made = sent(
        functions=[FUNCTION],
        function_call={"name": "f"},
        messages=[
            USER,
            assistant(function_call={"name": "f", "arguments": "{}"}),
            {"role": "function", "name": "f", "content": "1"},
            assistant(function_call={"name": "f", "arguments": "{}"}),
            {"role": "function", "name": "f", "content": "2"},
        ],
    )
    assert made["tool_choice"] == {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    results = [turn["content"][0] for turn in made["messages"][2::2]]
    assert [block["content"] for block in results] == ["1", "2"]
    assert refusal(messages=[USER, {"role": "function", "name": "f", "content": "1"}]).param == "messages[1]"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[0]"),
    ],
)
def test_malformed_messages(message: dict[str, Any], param: str) -> None:
    assert refusal(messages=[message]).param == param


# -- fields -----------------------------------------------------------------------------------------------------------


def test_max_tokens() -> None:
    """The request's, else the model's, as it is known, else the one of its generation."""
    assert sent(max_tokens=5)["max_tokens"] == 5
    assert sent(max_tokens=5, max_completion_tokens=6)["max_tokens"] == 6
    assert sent(limit=1000)["max_tokens"] == 1000
    assert sent(limit=1000, max_tokens=2000)["max_tokens"] == 1000
    models = ("claude-opus-4-20250514", "claude-3-5-haiku-20241022", "claude-3-haiku-20240307", "glm-5")
    assert [sent(model)["max_tokens"] for model in models] == [32000, 8192, 4096, 8192]
    assert refusal(max_tokens=0).param == "max_tokens"


def test_tools() -> None:
    made = sent(tools=[TOOL, {"type": "function", "function": {"name": "g"}}], parallel_tool_calls=False)
    assert made["tools"] == [
        {"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]},
        {"name": "g", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert made["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    for choice, expected in (
        ("auto", {"type": "auto"}),
        ("required", {"type": "any"}),
        ("none", {"type": "none"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
    ):
        assert sent(tools=[TOOL], tool_choice=choice)["tool_choice"] == expected
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}
    both = [TOOL, {"type": "function", "function": {"name": "g"}}]
    made = sent(tools=both, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert ([tool["name"] for tool in made["tools"]], made["tool_choice"]) == (["g"], {"type": "any"})
    assert "tool_choice" not in sent(tool_choice="none")


def test_a_conversation_with_calls_has_tools() -> None:
    """What was called is declared, and may not be called: the request offers no tools."""
    made = sent(messages=[USER, assistant(tool_call("a")), result("a")])
    assert made["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]
    assert made["tool_choice"] == {"type": "none"}


def test_strict_tools() -> None:
    """Their schema is narrowed to what is enforced; a model that enforces none gets the plain one."""
    strict = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
    [tool] = sent(tools=[strict])["tools"]
    assert tool["strict"] is True
    assert tool["input_schema"]["additionalProperties"] is False
    made = sent("claude-sonnet-4-20250514", tools=[strict])
    assert made["dropped"] == ["tools.function.strict"]
    assert made["tools"][0]["input_schema"] == SCHEMA


def test_structured_output() -> None:
    """A keyword that is not enforced goes into the description."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    assert sent(response_format=form)["output_config"] == {
        "format": {
            "type": "json_schema",
            "schema": {
                "type": "object",
                "properties": {"n": {"type": "integer", "description": '{"minimum":1}'}},
                "required": ["n"],
                "additionalProperties": False,
            },
        }
    }
    assert refusal("claude-sonnet-4-20250514", response_format=form).param == "response_format"
    open_schema = {"type": "object", "additionalProperties": {"type": "string"}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": open_schema}}
    assert refusal(response_format=form).param == "response_format"
    made = sent(response_format={"type": "json_object"}, messages=[{"role": "system", "content": "S"}, USER])
    assert (made["system"], made["dropped"]) == (f"S\n\n{JSON_ONLY}", ["response_format"])
    assert "output_config" not in sent(response_format={"type": "text"})


@pytest.mark.parametrize(
    ("model", "effort", "thinking", "sent_effort"),
    [
        (NEW, "minimal", {"type": "adaptive", "display": "summarized"}, "low"),
        (NEW, "max", {"type": "adaptive", "display": "summarized"}, "max"),
        (NEW, "none", {"type": "disabled"}, None),
        ("claude-opus-4-6", "xhigh", {"type": "adaptive", "display": "summarized"}, "high"),
        ("claude-opus-4-6", "none", None, None),
        ("claude-fable-5-1", "none", None, "low"),
        ("claude-sonnet-5-5", "none", {"type": "between_tools"}, None),
        (OLD, "high", {"type": "enabled", "budget_tokens": 16384}, None),
        ("glm-5", "low", {"type": "enabled", "budget_tokens": 2048}, None),
        ("glm-5", "none", {"type": "disabled"}, None),
        ("claude-3-haiku-20240307", "high", None, None),
    ],
)
def test_effort(model: str, effort: str, thinking: Any, sent_effort: Any) -> None:
    made = sent(model, reasoning_effort=effort)
    assert made.get("thinking") == thinking
    assert made.get("output_config", {}).get("effort") == sent_effort
    assert ("reasoning_effort" in made["dropped"]) == (model == "claude-3-haiku-20240307")


def test_a_budget_that_cannot_be_used() -> None:
    """It is below ``max_tokens``; and a call that such thinking is refused for does not think."""
    budget = sent(OLD, reasoning_effort="high", max_tokens=4096)["thinking"]["budget_tokens"]
    assert budget == 4096 - 1024
    lost = [USER, assistant(tool_call("a")), result("a")]
    signed = {"type": "reasoning.text", "text": "hm", "signature": signature_of("hm"), "format": "anthropic-claude-v1"}
    kept = [USER, assistant(tool_call("a"), reasoning_details=[signed]), result("a")]
    for fields in (
        {"max_tokens": 100},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "messages": lost},
    ):
        made = sent(OLD, reasoning_effort="high", **fields)
        assert "thinking" not in made
        assert made["dropped"] == ["reasoning_effort"]
    assert "thinking" in sent(OLD, reasoning_effort="high", tools=[TOOL], messages=kept)
    assert "thinking" in sent(NEW, reasoning_effort="high", tools=[TOOL], messages=lost)


def test_sampling() -> None:
    """It is dropped where it would be refused."""
    asked: dict[str, Any] = {"temperature": 1.5, "top_p": 0.5, "top_k": 3}
    old = sent("claude-3-haiku-20240307", **asked)
    assert [old[name] for name in asked] == [1, 0.5, 3]
    assert sent(OLD, **asked)["dropped"] == ["top_p"]
    assert sent(OLD, **asked, reasoning_effort="low")["dropped"] == ["temperature", "top_k", "top_p"]
    assert sent(NEW, **asked)["dropped"] == ["temperature", "top_k", "top_p"]


def test_other_fields() -> None:
    made = sent(
        stop=["a", ""],
        user="me@example.com",
        safety_identifier="s",
        seed=3,
        frequency_penalty=0.5,
        presence_penalty=0,
        store=False,
        metadata={"a": "b"},
        brand_new=1,
        logprobs=False,
        n=1,
        prompt_cache_key="k",
        service_tier=None,
        stream=True,
    )
    assert made["stop_sequences"] == ["a"]
    assert len(made["metadata"]["user_id"]) == 64
    assert made["cache_control"] == {"type": "ephemeral"}
    assert made["stream"] is True
    assert made["dropped"] == ["brand_new", "frequency_penalty", "metadata", "seed"]
    assert sent(stop="x")["stop_sequences"] == ["x"]
    marked = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    assert "cache_control" in sent(messages=[{"role": "user", "content": [marked]}])
    assert sent(messages=[{**USER, "name": "me"}])["dropped"] == ["messages.name"]


@pytest.mark.parametrize(
    ("fields", "is_untranslatable"),
    [
        ({"n": 2}, True),
        ({"logprobs": True}, True),
        ({"top_logprobs": 3}, True),
        ({"logit_bias": {"5": 1}}, True),
        ({"audio": {"voice": "v", "format": "wav"}}, True),
        ({"web_search_options": {"a": 1}}, True),
        ({"web_search_options": {}}, True),
        ({"modalities": ["text", "audio"]}, True),
        ({"stop": " "}, True),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, True),
        ({"stop": 5}, False),
        ({"seed": 1.5}, False),
        ({"temperature": "hot"}, False),
        ({"reasoning_effort": "huge"}, False),
        ({"user": 5}, False),
        ({"parallel_tool_calls": "no"}, False),
        ({"tools": {}}, False),
        ({"tools": [{"type": "function"}]}, False),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, False),
        ({"tool_choice": "required"}, False),
        ({"response_format": {"type": "xml"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, False),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], is_untranslatable: bool) -> None:
    """The error names the field; what another upstream may take is untranslatable."""
    error = refusal(**fields)
    assert isinstance(error, Untranslatable) == is_untranslatable
    assert error.param is not None
    assert error.param.partition("[")[0].partition(".")[0] in fields


@pytest.mark.parametrize("schema", [{"anyOf": [{"type": "object"}]}, {"type": "array"}])
def test_schemas_of_tools_that_are_refused(schema: dict[str, Any]) -> None:
    error = refusal(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert isinstance(error, Untranslatable)
    assert error.param == "tools[0]"


def test_headers() -> None:
    """What is OpenAI's own stays here."""
    headers = {"openai-organization": "o", "anthropic-beta": "b", "x-request-id": "r"}
    assert translated(call()).headers(headers) == {"anthropic-beta": "b", "x-request-id": "r"}


# -- any conversation -------------------------------------------------------------------------------------------------

_TEXTS = st.sampled_from(["", " ", "a", "b\n"])


@st.composite
def _conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["system", "user", "assistant", "tools"]))
        if kind == "tools":
            ids = draw(st.lists(st.sampled_from(["a", "b", "c.1", "ü"]), min_size=1, max_size=3, unique=True))
            messages.append(assistant(*(tool_call(each, draw(_TEXTS)) for each in ids), content=draw(_TEXTS)))
            results = [result(each, draw(_TEXTS)) for each in draw(st.permutations(ids))]
            if draw(st.booleans()):
                results.insert(draw(st.integers(0, len(results))), {"role": "system", "content": f"S{number}"})
            messages += results
        else:
            messages.append({"role": kind, "content": draw(_TEXTS)})
    return [*messages, USER]


@given(_conversations(), st.sampled_from([NEW, OLD, "claude-3-haiku-20240307", "glm-5"]), st.booleans())
def test_anthropic_accepts_any_conversation(messages: list[dict[str, Any]], model: str, thinks: bool) -> None:
    """Whatever the order of roles, texts and tool calls is."""
    fields = {"reasoning_effort": "high"} if thinks else {}
    asked = call(messages=messages, **fields)
    assert problem_of(translated(asked).body(asked, model, UpstreamConfig(kind="anthropic"))) is None
