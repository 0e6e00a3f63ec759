"""Where system messages stand in what an upstream gets, end to end, in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.gateway import OpenApp, make_config
from tests.support.provider import Provider, answers, completion

GOOD = answers(completion("yes"))


def of(role: str, content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def text(value: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "text", "text": value}


IN_TAGS = "<system-message>\nRemember\n</system-message>"
HI, REMEMBER, YES, MORE = of("user", "Hi"), of("system", "Remember"), of("assistant", "Yes?"), of("user", "More")
SYSTEM = of("system", "S")
BOTH = of("user", [text("Hi"), text(IN_TAGS)])
CASES: dict[str, tuple[list[Any], dict[str, list[Any]]]] = {
    "none": ([HI], {"anywhere": [HI], "first": [HI], "as-user": [HI]}),
    "one": ([SYSTEM, HI], {"anywhere": [SYSTEM, HI], "first": [SYSTEM, HI], "as-user": [SYSTEM, HI]}),
    "later": (
        [SYSTEM, HI, REMEMBER, YES, MORE],
        {
            "anywhere": [SYSTEM, HI, REMEMBER, YES, MORE],
            "first": [of("system", "S\n\nRemember"), HI, YES, MORE],
            "as-user": [SYSTEM, BOTH, YES, MORE],
        },
    ),
    "only later": (
        [HI, REMEMBER],
        {"anywhere": [HI, REMEMBER], "first": [REMEMBER, HI], "as-user": [BOTH]},
    ),
    "behind an answer": (
        [HI, YES, REMEMBER],
        {"anywhere": [HI, YES, REMEMBER], "first": [REMEMBER, HI, YES], "as-user": [HI, YES, of("user", IN_TAGS)]},
    ),
}
POLICIES = ("anywhere", "first", "as-user")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
async def test_as_it_is(open_app: OpenApp, case: str, policy: str) -> None:
    """A request that is passed through changes only where the upstream says so, and where it has to."""
    messages, expected = CASES[case]
    raw = msgspec.json.encode({"model": "up/m", "messages": messages})
    for own, wanted in (({"system_role": policy}, expected[policy]), ({}, messages)):
        async with open_app(make_config({"up": own}), Provider(GOOD)) as served:
            headers = {"content-type": "application/json"}
            assert (await served.client.ask("POST", "/v1/chat/completions", raw, headers=headers)).status == 200
            [sent] = served.providers["up"].calls
            assert sent.json["messages"] == wanted
            if wanted == messages:
                assert sent.body == raw.replace(b"up/m", b"m"), "byte for byte"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
async def test_translated(open_app: OpenApp, case: str, policy: str) -> None:
    """A translated request has them in the same places; without a setting, where ``as-user`` has them."""
    messages, expected = CASES[case]
    for own, wanted in (({"system_role": policy}, expected[policy]), ({}, expected["as-user"])):
        async with open_app(make_config({"up": own}), Provider(GOOD)) as served:
            body: dict[str, Any] = {"model": "up/m", "max_tokens": 9, "messages": messages}
            if messages[0]["role"] == "system":
                body |= {"system": messages[0]["content"], "messages": messages[1:]}
            assert (await served.client.ask("POST", "/v1/messages", body)).status == 200
            assert served.providers["up"].calls[0].json["messages"] == wanted


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("anywhere", [of("system", "S"), of("system", [text("T"), text("U")]), HI]),
        ("first", [of("system", "S\n\nT\n\nU"), HI]),
        ("as-user", [of("system", "S\n\nT\n\nU"), HI]),
        (None, [of("developer", "S"), of("system", [text("T"), text("U")]), HI]),
    ],
)
async def test_several_at_the_beginning(open_app: OpenApp, policy: str | None, expected: list[Any]) -> None:
    """They become one where the server takes one. ``developer`` becomes ``system``, which every server knows."""
    own = {"system_role": policy} if policy is not None else {}
    messages = [of("developer", "S"), of("system", [text("T"), text("U")]), HI]
    async with open_app(make_config({"up": own}), Provider(GOOD)) as served:
        assert (await served.client.chat(stream=False, messages=messages).wait()).status == 200
        assert served.providers["up"].calls[0].json["messages"] == expected


async def test_openai_knows_developers(open_app: OpenApp) -> None:
    """There the role stays."""
    up = {"system_role": "first", "base_url": "https://api.openai.com/v1"}
    messages = [of("developer", "S"), HI]
    async with open_app(make_config({"up": up}), Provider(GOOD)) as served:
        assert (await served.client.chat(stream=False, messages=messages).wait()).status == 200
        assert served.providers["up"].calls[0].json["messages"] == messages


async def test_the_other_fields_of_messages_stay(open_app: OpenApp) -> None:
    """Pictures, names and numbers of any size are as the client sent them."""
    raw = (
        b'{"model":"up/m","messages":[{"role":"user","name":"u","content":[{"type":"x","n":1.0,"big":'
        b'12345678901234567890}]},{"role":"assistant","content":null,"tool_calls":[]},'
        b'{"role":"tool","tool_call_id":"1","content":"r"},{"role":"system","content":"Remember"}]}'
    )
    async with open_app(make_config({"up": {"system_role": "as-user"}}), Provider(GOOD)) as served:
        headers = {"content-type": "application/json"}
        assert (await served.client.ask("POST", "/v1/chat/completions", raw, headers=headers)).status == 200
        [sent] = served.providers["up"].calls
        before = sent.body[: sent.body.rindex(b",{")]
        assert raw.replace(b"up/m", b"m").startswith(before)
        assert sent.json["messages"][-1] == of("user", IN_TAGS)
