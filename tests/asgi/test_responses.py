"""What the gateway keeps of response calls, and ``/v1/responses/{id}``."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.dialects.responses import decoded, response_of
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Break, Pause, Provider, Say, Stall, answers, completion, content, says

KEYS = make_config(keys={"ann": "a-key-of-ann", "bob": "a-key-of-bob"})
ANN = {"authorization": "Bearer a-key-of-ann"}
BOB = {"authorization": "Bearer a-key-of-bob"}


def make(served: Served, *, headers: dict[str, str] | None = None, **fields: Any) -> ClientCall:
    """Starts a call."""
    return served.client.start(
        "POST", "/v1/responses", {"model": "up/m", "input": "Hi", **fields}, headers=headers or {}
    )


async def get(served: Served, path: str, method: str = "GET", *, headers: dict[str, str] | None = None) -> ClientCall:
    """Asks for a path below ``/v1/responses/``."""
    return await served.client.ask(method, f"/v1/responses/{path}", headers=headers or {})


async def wait_ended(served: Served, response_id: str) -> Any:
    """Polls a response in the background until it has ended."""
    while True:
        found = (await get(served, response_id)).json
        if found["status"] not in ("queued", "in_progress"):
            return found
        await trio.sleep(1)


# -- stored -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_kept(open_app: OpenApp, stream: bool) -> None:
    """It can be asked for as it was, until it is deleted."""
    script = says("Hello") if stream else answers(completion("Hello"))
    async with open_app(providers=Provider(script)) as served:
        call = await make(served, stream=stream).wait()
        made = response_of(call.body) if stream else call.json
        found = await get(served, made["id"])
        assert (found.status, found.json) == (200, made)
        deleted = await get(served, made["id"], "DELETE")
        assert deleted.json == {"id": made["id"], "object": "response", "deleted": True}
        assert (await get(served, made["id"])).status == 404
        served.assert_clean()


async def test_a_response_is_not_kept(open_app: OpenApp) -> None:
    """A client that stores nothing here cannot ask for it."""
    async with open_app(KEYS, Provider(answers(completion("Hello")))) as served:
        made = (await make(served, headers=ANN, store=False).wait()).json
        assert made["store"] is False
        assert (await get(served, made["id"], headers=ANN)).status == 404


async def test_a_conversation_goes_on(open_app: OpenApp) -> None:
    """The upstream gets the exact items of all earlier responses; the instructions are only those of the call."""
    provider = Provider(answers(completion("Hello")))
    async with open_app(providers=provider) as served:
        first = (await make(served, instructions="Be brief.").wait()).json
        second = (await make(served, input="And?", previous_response_id=first["id"], stream=False).wait()).json
        assert second["previous_response_id"] == first["id"]
        third = (await make(served, input=[], previous_response_id=second["id"], instructions="Now!").wait()).json
        assert third["previous_response_id"] == second["id"]
        turns = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Hello"},
        ]
        assert provider.calls[1].json["messages"] == turns[:3]
        assert provider.calls[2].json["messages"] == [{"role": "system", "content": "Now!"}, *turns]
        listed = (await get(served, f"{second['id']}/input_items?order=asc")).json
        assert [(item["type"], item["role"]) for item in listed["data"]] == [
            ("message", "user"),
            ("message", "assistant"),
            ("message", "user"),
        ]
        assert listed["has_more"] is False


async def test_a_tool_call_goes_on(open_app: OpenApp) -> None:
    """Its output alone is enough: the call itself is kept."""
    called = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    body = (
        b'{"id":"chatcmpl-1","choices":[{"message":{"tool_calls":[%b]},"finish_reason":"tool_calls"}]}'
        % str(called).replace("'", '"').encode()
    )
    provider = Provider(answers(body), answers(completion("warm")))
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]
    async with open_app(providers=provider) as served:
        first = (await make(served, tools=tools).wait()).json
        result = {"type": "function_call_output", "call_id": "c", "output": "20 °C"}
        second = await make(served, tools=tools, input=[result], previous_response_id=first["id"]).wait()
        assert second.json["output"][0]["content"][0]["text"] == "warm"
        assert [each["role"] for each in provider.calls[1].json["messages"]] == ["user", "assistant", "tool"]


async def test_an_item_that_is_referred_to(open_app: OpenApp) -> None:
    """It is put in its place; one that is not here is a 400."""
    provider = Provider(answers(completion("Hello")))
    async with open_app(providers=provider) as served:
        first = (await make(served).wait()).json
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        again = {"role": "user", "content": "Again"}
        assert (await make(served, input=[reference, again]).wait()).status == 200
        assert provider.calls[1].json["messages"][0] == {"role": "assistant", "content": "Hello"}
        missing = await make(served, input=[{"type": "item_reference", "id": "msg_x_0"}, again]).wait()
        assert (missing.status, missing.error["param"]) == (400, "input[0].id")


async def test_another_key_has_no_access(open_app: OpenApp) -> None:
    """To it, the response does not exist: it can neither read nor continue nor delete it."""
    async with open_app(KEYS, Provider(answers(completion("Hello")))) as served:
        made = (await make(served, headers=ANN).wait()).json
        for method, path in (
            ("GET", made["id"]),
            ("DELETE", made["id"]),
            ("POST", f"{made['id']}/cancel"),
            ("GET", f"{made['id']}/input_items"),
        ):
            assert (await get(served, path, method, headers=BOB)).status == 404
        call = await make(served, headers=BOB, previous_response_id=made["id"]).wait()
        assert (call.status, call.error["code"]) == (400, "previous_response_not_found")
        call = await make(served, headers=BOB, input=[{"type": "item_reference", "id": made["output"][0]["id"]}]).wait()
        assert call.status == 400
        assert (await get(served, made["id"], headers=ANN)).status == 200


async def test_pages_of_items(open_app: OpenApp) -> None:
    """They are as large as asked for, the last item first."""
    async with open_app(providers=Provider(answers(completion("Hello")))) as served:
        items = [{"role": "user", "content": str(number)} for number in range(5)]
        made = (await make(served, input=items).wait()).json
        path = f"{made['id']}/input_items"
        page = (await get(served, f"{path}?limit=2")).json
        assert [item["content"][0]["text"] for item in page["data"]] == ["4", "3"]
        assert (page["has_more"], page["last_id"]) == (True, page["data"][-1]["id"])
        page = (await get(served, f"{path}?limit=3&after={page['last_id']}")).json
        assert [item["content"][0]["text"] for item in page["data"]] == ["2", "1", "0"]
        assert page["has_more"] is False
        for query in ("limit=0", "limit=x", "order=up", "after=nothing"):
            assert (await get(served, f"{path}?{query}")).status == 400


async def test_a_response_can_be_continued_anywhere(open_app: OpenApp) -> None:
    """An upstream that has the API itself gets the items, without the reasoning that is sealed here."""
    config = make_config({"up": {}, "native": {"responses": "native"}})
    native = Provider(answers(b'{"id":"resp_up","object":"response","output":[]}'))
    first = completion("Hello").replace(b'"content"', b'"reasoning_content":"Hm.","content"')
    async with open_app(config, {"up": Provider(answers(first)), "native": native}) as served:
        made = (await make(served, include=["reasoning.encrypted_content"]).wait()).json
        assert made["output"][0]["encrypted_content"]
        call = await make(served, model="native/m", previous_response_id=made["id"], input="And?").wait()
        assert call.json["id"] == "resp_up"
        sent = native.calls[0].json
        assert "previous_response_id" not in sent
        assert [item["type"] for item in sent["input"]] == ["message", "message", "message"]


# -- in the background ------------------------------------------------------------------------------------------------


async def test_a_response_in_the_background(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is queued at once, and can be polled until it is complete."""
    provider = Provider((Pause(20), *answers(completion("Hello"))))
    async with open_app(providers=provider) as served:
        queued = (await make(served, background=True).wait()).json
        assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
        assert (await get(served, queued["id"])).json["status"] == "in_progress"
        ended = await wait_ended(served, queued["id"])
        assert (ended["status"], ended["id"], ended["background"]) == ("completed", queued["id"], True)
        assert ended["output"][0]["content"][0]["text"] == "Hello"
        assert "background" not in provider.calls[0].json
        served.assert_clean()


async def test_a_stream_in_the_background(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It outlives its client, who comes back for the rest."""
    script = (Say(content("Hel")), Pause(20), *says("lo")[1:])
    async with open_app(providers=Provider(script)) as served:
        call = make(served, background=True, stream=True)
        await call.wait_for(b"output_text.delta")
        call.disconnect()
        await call.wait()
        begun = decoded(call.body)
        response_id = begun[0]["response"]["id"]
        path = f"{response_id}?stream=true&starting_after={len(begun) - 1}"
        rest = await get(served, path)
        assert response_of(call.body + rest.body)["status"] == "completed"
        assert decoded(call.body + rest.body)[-1]["response"]["background"] is True
        again = await get(served, path)
        assert again.body == rest.body.replace(b": keep-alive\n\n", b""), "from the store"
        whole = await get(served, f"{response_id}?stream=true")
        assert whole.body == call.body + again.body
        served.assert_clean()


async def test_a_background_response_that_fails(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It says so, in its stream as well."""
    async with open_app(providers=Provider((Say(content("a")), Pause(5), Break()))) as served:
        call = await make(served, background=True, stream=True).wait()
        response = response_of(call.body)
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
        found = (await get(served, response["id"])).json
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")


async def test_a_background_response_is_cancelled(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its upstream stream is closed, and it stays cancelled."""
    provider = Provider((Say(content("a")), Stall()))
    async with open_app(providers=provider) as served:
        made = (await make(served, background=True).wait()).json
        await trio.sleep(1)
        cancelled = await get(served, f"{made['id']}/cancel", "POST")
        assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
        assert (await get(served, made["id"])).json["status"] == "cancelled"
        assert (await get(served, f"{made['id']}/cancel", "POST")).json["status"] == "cancelled"
        served.assert_clean()


async def test_a_background_response_is_deleted(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is cancelled first, so that it does not come back."""
    async with open_app(providers=Provider((Say(content("a")), Stall()))) as served:
        made = (await make(served, background=True).wait()).json
        assert (await get(served, made["id"], "DELETE")).json["deleted"] is True
        await trio.sleep(10)
        assert (await get(served, made["id"])).status == 404
        served.assert_clean()


async def test_a_large_conversation_goes_on(open_app: OpenApp) -> None:
    """It is put together in a thread."""
    provider = Provider(answers(completion("Hello")))
    async with open_app(providers=provider) as served:
        first = (await make(served, input="word " * 60_000).wait()).json
        second = await make(served, input="word " * 60_000, previous_response_id=first["id"]).wait()
        assert second.status == 200
        assert len(provider.calls[1].json["messages"]) == 3


async def test_what_cannot_be_done(open_app: OpenApp) -> None:
    """Each is a 400 with its reason."""
    async with open_app(providers=Provider(answers(completion("Hello")))) as served:
        assert (await make(served, background=True, store=False).wait()).error["param"] == "background"
        made = (await make(served).wait()).json
        assert (await get(served, f"{made['id']}/cancel", "POST")).status == 400
        assert (await get(served, f"{made['id']}?stream=true")).status == 400
        assert (await get(served, f"{made['id']}?stream=true&starting_after=x")).status == 400


async def test_a_response_whose_process_has_ended(open_app: OpenApp, tmp_path: Any) -> None:
    """It has failed; nobody waits for it for ever."""
    path = tmp_path / "store.db"
    async with open_app(providers=Provider((Stall(),)), store=path) as served:
        made = (await make(served, background=True).wait()).json
        stored = await served.gateway.store.responses.get("", made["id"])
        assert stored is not None
        assert stored.worker
    async with open_app(providers=Provider(), store=path) as served:
        found = (await get(served, made["id"])).json
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
        await served.gateway.store.responses.put(stored)  # as if it had been killed
        found = (await get(served, made["id"])).json
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")


async def test_tokens_are_estimated(open_app: OpenApp) -> None:
    """Where no upstream can count them."""
    config = make_config({"up": {}, "native": {"responses": "native"}})
    native = Provider(answers(b'{"object":"response.input_tokens","input_tokens":7}'))
    async with open_app(config, {"up": Provider(), "native": native}) as served:
        body = {"model": "up/m", "input": "word " * 100}
        call = await served.client.ask("POST", "/v1/responses/input_tokens", body)
        assert call.json["object"] == "response.input_tokens"
        assert 100 <= call.json["input_tokens"] <= 200
        call = await served.client.ask("POST", "/v1/responses/input_tokens", {**body, "model": "native/m"})
        assert call.json["input_tokens"] == 7
