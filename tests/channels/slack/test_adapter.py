"""A Slack channel, from the signed event to the message, through a gateway on real sockets; and the adapter alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import httpx2
import pytest
import trio

from tests.channels.services import open_services
from tests.support.gateway import OpenServer, make_config
from tests.support.logs import Logs
from tests.support.processes import run_gateway
from tests.support.provider import (
    Break,
    Pause,
    Provider,
    Say,
    Script,
    Stall,
    answers,
    content,
    open_socket_provider,
    role,
    says,
)
from tests.support.slack_server import BOT, SECRET, TOKEN, EventSender, Workspace, open_slack
from trigate.channels import service
from trigate.channels.adapter import Channel
from trigate.channels.live_message import Display
from trigate.channels.slack import adapter as slack
from trigate.channels.slack import api
from trigate.channels.slack.messages import split, to_text
from trigate.errors import StoreUnavailable
from trigate.gateway.gateway import Gateway
from trigate.runs import outbox
from trigate.workers.membership import Workers

CHAT = {"model": "up/m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


@attrs.frozen
class Office:
    """A workspace, a gateway with the channel ``work``, and its model provider."""

    slack: Workspace
    sender: EventSender
    client: httpx2.AsyncClient
    provider: Provider
    gateway: Gateway

    async def status(self) -> Any:
        """The channel's row in ``/status``."""
        found = (await self.client.get("/status")).json()["channels"]
        return next(each for each in found if each["name"] == "work")

    async def wait_status(self, state: str) -> Any:
        """Waits until the channel has a state."""
        with trio.fail_after(20):
            while (found := await self.status())["status"] != state:  # noqa: ASYNC110 - an HTTP client has no event
                await trio.sleep(0.01)
        return found

    async def say(self, text: str, **event: Any) -> str:
        """A user writes a message; returns its ``ts``."""
        return await self.sender.message(self.slack, text, **event)

    def prompts(self) -> list[str]:
        """The last message of each request to the model."""
        return [call.json["messages"][-1]["content"] for call in self.provider.calls]


@pytest.fixture
def open_office(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[Office]]:
    """``async with open_office(*scripts, edit_interval_s=…) as office``: options are those of the channel.

    The limit of one message a second is lifted, so that tests do not wait for it.
    """
    monkeypatch.setattr(api, "WRITES_PER_S", 1000.0)

    @contextlib.asynccontextmanager
    async def open_configured(
        *scripts: Script, slack: Workspace | None = None, path: str | Path = ":memory:", **options: Any
    ) -> AsyncIterator[Office]:
        workspace = slack or Workspace()
        async with open_slack(workspace) as slack_url, open_socket_provider(*scripts) as (provider, model_url):
            channel = {
                "type": "slack",
                "token": TOKEN,
                "secrets": [SECRET],
                "base_url": slack_url,
                "model": "up/m",
                "edit_interval_s": 0,
                **options,
            }
            config = make_config({"up": {"base_url": model_url}}, channels={"work": channel}, store={"path": str(path)})
            async with open_server(config) as (client, app):
                sender = EventSender(client, "/hooks/work")
                yield Office(workspace, sender, client, provider, app.gateway)

    return open_configured


OpenOffice = Callable[..., AbstractAsyncContextManager[Office]]


async def test_a_direct_message_is_answered(open_office: OpenOffice) -> None:
    """The reply is the model's text, escaped; the model gets the user's text, unescaped."""
    async with open_office(says("1 < 2 ", "& so on"), session="none", system="Be brief.") as office:
        await office.say("Is 1 &lt; 2?", channel="D1", channel_type="im")
        await office.slack.wait_texts("1 &lt; 2 &amp; so on", channel="D1")
        [message] = office.slack.messages
        assert message.thread_ts is None
        [call] = office.provider.calls
        assert call.json["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is 1 < 2?"},
        ]
        fields = next(each.fields for each in office.slack.calls if each.method == "chat.postMessage")
        assert (fields["unfurl_links"], fields["unfurl_media"]) == (False, False)
        found = await office.wait_status("connected")
        assert found["received"] == 1


async def test_a_mention_is_answered_in_its_thread(open_office: OpenOffice) -> None:
    """A mention is answered once, though it comes as two events. Other messages are not, nor those of no person."""
    async with open_office(says("Hello!"), session="none") as office:
        await office.say("good morning, all")
        ts = await office.say(f"<@{BOT}> good morning", kind="app_mention")
        await office.say(f"<@{BOT}> good morning", ts=ts)
        for event in (
            {"user": BOT},
            {"bot_id": "B2"},
            {"subtype": "message_changed"},
            {"subtype": "channel_join"},
            {"subtype": "message_deleted"},
        ):
            await office.say(f"<@{BOT}> hi", **event)
        other = await office.say(f"<@{BOT}> hi", thread_ts="1500000000.000000")
        await office.slack.wait_texts("Hello!", "Hello!")
        assert sorted(office.prompts()) == ["good morning", "hi"]
        assert sorted(str(each.thread_ts) for each in office.slack.messages) == ["1500000000.000000", ts]
        assert other != ts
        assert (await office.status())["received"] == 2


async def test_repeated_event_is_one_message(open_office: OpenOffice, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a message cannot be stored, Slack gets a 503 and repeats it; a stored message is not stored twice."""
    async with open_office(says("Hello!"), session="none") as office:
        accept = office.gateway.runs.accept
        refusals = [StoreUnavailable("The disk is full.")]

        async def refuse_once(*arguments: Any, **options: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return await accept(*arguments, **options)

        monkeypatch.setattr(office.gateway.runs, "accept", refuse_once)
        event = {"type": "message", "channel": "D1", "channel_type": "im", "user": "U1", "text": "hi", "ts": "1.0"}
        assert [each.status for each in await office.sender.event(event)] == [503, 200]
        assert [each.status for each in await office.sender.event(event)] == [200]
        await office.slack.wait_texts("Hello!", channel="D1")
        assert len(office.provider.calls) == 1


async def test_allow_and_groups(open_office: OpenOffice) -> None:
    """Only allowed users are answered; with ``groups = "none"``, only in direct messages."""
    async with open_office(says("Hello!"), session="none", groups="none", allow=["U7"]) as office:
        await office.say(f"<@{BOT}> a", user="U7")
        await office.say("b", channel="D1", channel_type="im", user="U8")
        await office.say("c", channel="D1", channel_type="im", user="U7")
        await office.slack.wait_texts("Hello!", channel="D1")
        assert office.prompts() == ["c"]
    async with open_office(says("Hello!"), session="none", groups="all") as office:
        await office.say("d", channel="G1", channel_type="mpim")
        await office.slack.wait_texts("Hello!", channel="G1")


async def test_signature(open_office: OpenOffice) -> None:
    """A request that is not signed with the secret is rejected; the request URL is verified as Slack does it."""
    async with open_office(session="none") as office:
        stranger = EventSender(office.client, "/hooks/work", secret="x" * 32)
        challenge = b'{"token":"x","challenge":"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmd","type":"url_verification"}'
        assert (await stranger.post(challenge)).status == 401
        answer = await office.sender.post(challenge)
        assert (answer.status, answer.body) == (200, b"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmd")
        assert (await office.client.post("/hooks/work", json={"text": "hi", "from": "me"})).status_code == 401


async def test_reply_grows(open_office: OpenOffice) -> None:
    """A reply is written at its first text, edited as it grows, and complete in the end, in one message."""
    script = (Say(role()), Say(content("Hel")), Pause(0.1), Say(content("lo ")), *says("there")[1:])
    async with open_office(script, session="none", edit_interval_s=0.02) as office:
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hel", channel="D1")
        await office.slack.wait_texts("Hello there", channel="D1")
        [message] = office.slack.messages
        assert message.texts[0] == "Hel"
        assert office.slack.called("chat.postMessage") == ["ok"]


async def test_acknowledged_before_the_model_answers(open_office: OpenOffice) -> None:
    """An event is acknowledged while the model has not answered."""
    async with open_office((Stall(),), session="none") as office:
        event = {"type": "message", "channel": "D1", "channel_type": "im", "user": "U1", "text": "hi", "ts": "1.0"}
        assert [each.status for each in await office.sender.event(event)] == [200]
        await office.provider.wait_until(lambda provider: provider.opened == 1)


async def test_long_reply_is_split(open_office: OpenOffice) -> None:
    """A long reply is split into messages that Slack does not truncate, in order, in one thread."""
    text = " ".join(f"word{number}<" for number in range(1500))
    async with open_office(says(text), session="none") as office:
        ts = await office.say(f"<@{BOT}> hi")
        await office.slack.wait_until(lambda each: text.endswith(to_text(each.texts()[-1])) if each.texts() else False)
        assert to_text(" ".join(office.slack.texts())) == text
        assert len(office.slack.messages) > 2
        assert all(len(each.text.encode()) <= 4000 for each in office.slack.messages)
        assert {each.thread_ts for each in office.slack.messages} == {ts}


async def test_attempt_is_bounded(open_office: OpenOffice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages that an attempt has no time for become another delivery, and none is written twice."""
    text = " ".join(f"word{number}" for number in range(1000))
    async with open_office(says(text), session="none") as office:
        monkeypatch.setattr(api, "WRITES_PER_S", 20.0)
        monkeypatch.setattr(slack, "ATTEMPT_S", 0.0)
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_until(lambda each: len(each.messages) == len(split(text)))
        assert " ".join(office.slack.texts("D1")) == text
        [run] = _runs_delivered(office)
        assert len(await office.gateway.store.deliveries.of_run(run)) == len(split(text))


@pytest.mark.slow
async def test_throttled_edit(open_office: OpenOffice) -> None:
    """After a 429, edits are dropped during the pause that Slack asks for; the final text is not."""
    script = (Say(role()), Say(content("a")), Pause(0.1), Say(content("b")), Pause(0.05), *says("c")[1:])
    async with open_office(script, session="none", edit_interval_s=0.01) as office:
        office.slack.throttle("chat.update", 1)
        began = trio.current_time()
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_texts("abc", channel="D1")
        assert office.slack.called("chat.update") == ["ratelimited", "ok"]
        assert trio.current_time() - began > 0.9
        assert office.slack.messages[0].texts == ["a", "abc"]


async def test_revoked_token(open_office: OpenOffice, monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    """A revoked token disconnects only the channel. The status has Slack's error without the token. Once the token is
    accepted again, the channel is connected, and the reply is delivered."""
    monkeypatch.setattr(service, "MAX_PAUSE_S", 0.05)
    monkeypatch.setattr(outbox, "SCHEDULE_S", (0.05,) * 9)
    async with open_office(says("Hello!"), session="none") as office:
        await office.wait_status("connected")
        office.slack.token_error = "token_revoked"
        await office.say("hi", channel="D1", channel_type="im")
        found = await office.wait_status("disconnected")
        assert "token_revoked" in found["last_error"]
        assert (await office.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert TOKEN not in (await office.client.get("/status")).text
        office.slack.token_error = None
        await office.wait_status("connected")
        await office.slack.wait_texts("Hello!", channel="D1")
    assert logs.named("channel_disconnected")
    assert TOKEN not in repr(logs.entries)


async def test_message_may_have_arrived(open_office: OpenOffice) -> None:
    """If the response to a new message is lost, it is not sent again, and its delivery is unknown."""
    async with open_office(says("Hello!"), session="none") as office:
        office.slack.lose_answer("chat.postMessage")
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hello!", channel="D1")
        await _wait_delivered(office, "unknown")
        assert office.slack.called("chat.postMessage") == ["ok"]


async def test_message_was_deleted(open_office: OpenOffice) -> None:
    """If a user deletes the message while it grows, the reply is written anew."""
    script = (Say(role()), Say(content("Hel")), Pause(0.1), *says("lo")[1:])
    async with open_office(script, session="none", edit_interval_s=5.0) as office:
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hel", channel="D1")
        office.slack.delete(office.slack.messages[0])
        await office.slack.wait_texts("Hello", channel="D1")
        assert office.slack.called("chat.update") == ["message_not_found"]


async def test_rejected_message_fails(open_office: OpenOffice) -> None:
    """An archived conversation fails the delivery, and is no error of the channel."""
    async with open_office(says("Hello!"), session="none") as office:
        office.slack.archived.add("D1")
        await office.say("hi", channel="D1", channel_type="im")
        [delivery] = await _wait_delivered(office, "failed")
        assert delivery.last_error == "Slack declined: is_archived"
        assert (await office.status())["status"] == "connected"


async def test_failure_is_one_line(open_office: OpenOffice) -> None:
    """One line says that there is no answer, and of which kind the error is, or that the answer is incomplete."""
    refused = answers(b'{"error":{"message":"the secret words of a provider"}}', status=400)
    broken = (Say(role()), Say(content("Hel")), Pause(0.1), Break())
    async with open_office(refused, broken, session="none", edit_interval_s=0.02) as office:
        await office.say("hi", channel="D1", channel_type="im")
        await office.slack.wait_until(lambda each: len(each.messages) == 1)
        assert office.slack.texts("D1")[0].startswith("No answer: the model does not take this message. (run_")
        await office.say("hi", channel="C1", channel_type="im")
        await office.slack.wait_until(lambda each: len(each.texts("C1")) == 2)
        assert office.slack.texts("C1")[0] == "Hel"
        assert office.slack.texts("C1")[1].startswith("The answer above is incomplete: the model could not be reached.")


# -- sessions ---------------------------------------------------------------------------------------------------------


async def test_thread_is_a_conversation(open_office: OpenOffice) -> None:
    """A thread is remembered, and messages in it need no mention; in other threads they do."""
    async with open_office(says("Hello!")) as office:
        ts = await office.say(f"<@{BOT}> I am Ada.")
        await office.slack.wait_texts("Hello!")
        await office.say("Who am I?", thread_ts=ts, user="U2")
        await office.say("Who am I?", thread_ts="1500000000.000000")
        await office.slack.wait_texts("Hello!", "Hello!")
        assert [call.json["messages"] for call in office.provider.calls] == [
            [{"role": "user", "content": "I am Ada."}],
            [
                {"role": "user", "content": "I am Ada."},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Who am I?"},
            ],
        ]
        assert {each.thread_ts for each in office.slack.messages} == {ts}


async def test_memory_of_a_sender(open_office: OpenOffice) -> None:
    """With ``session = "sender"``, each user has a separate memory, and resets only this one."""
    async with open_office(says("Hello!"), session="sender", groups="all") as office:
        thread = {"thread_ts": "1500000000.000000"}
        await office.say("I am Ada.", **thread, user="U1")
        await office.slack.wait_texts("Hello!")
        await office.say("I am Bob.", **thread, user="U2")
        await office.slack.wait_texts("Hello!", "Hello!")
        await office.say("reset", **thread, user="U1")
        await office.slack.wait_texts("Hello!", "Hello!", "This conversation begins anew.")
        await office.say("Who am I?", **thread, user="U1")
        await office.slack.wait_texts("Hello!", "Hello!", "This conversation begins anew.", "Hello!")
        await office.say("Who am I?", **thread, user="U2")
        await office.provider.wait_until(lambda provider: provider.opened == 4)
        assert [len(call.json["messages"]) for call in office.provider.calls] == [1, 1, 1, 3]


async def test_stop(open_office: OpenOffice) -> None:
    """The text so far stays, and the provider's stream is closed."""
    async with open_office((Say(role()), Say(content("Hel")), Stall()), edit_interval_s=0.02) as office:
        await office.say("Count to a million.", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hel", channel="D1")
        await office.say("stop", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hel", "Stopped.", channel="D1")
        await office.provider.wait_until(lambda provider: provider.open_now == 0)
        await office.say("stop", channel="D1", channel_type="im")
        await office.slack.wait_texts("Hel", "Stopped.", "There was nothing to stop.", channel="D1")


# -- crashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
async def test_crash(tmp_path: Path, begun: bool) -> None:
    """An acknowledged message is answered once by the next process, in the message that had shown the answer."""
    workspace = Workspace()
    slow = (Say(role()), Say(content("Hel")), *(Pause(0.05), Say(content("."))) * 400, Stall())
    first = slow if begun else (Stall(),)
    async with open_slack(workspace) as slack_url, open_socket_provider(first) as (provider, model_url):
        config = f"""
[upstreams.up]
base_url = "{model_url}"
models = ["m"]
[store]
path = "{tmp_path / "store.db"}"
[channels.work]
type = "slack"
token = "{TOKEN}"
secrets = ["{SECRET}"]
base_url = "{slack_url}"
edit_interval_s = 0.01
"""
        with run_gateway(config, tmp_path) as gateway:
            async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False) as client:
                event = {"type": "message", "channel": "D1", "channel_type": "im", "user": "U1", "text": "hi"}
                event["ts"] = workspace.new_ts()
                sender = EventSender(client, "/hooks/work")
                assert [each.status for each in await sender.event(event)] == [200]
                if begun:  # it was edited, so the id of the message is stored
                    await workspace.wait_until(lambda each: any(len(one.texts) > 1 for one in each.messages))
                else:
                    await provider.wait_until(lambda each: each.opened == 1)
            gateway.process.kill()
            gateway.process.wait()
        provider.play(says("Hel", "lo ", "there"))
        with run_gateway(config, tmp_path) as gateway:
            await workspace.wait_texts("Hello there", channel="D1")
            async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False) as client:
                # The acknowledgement may not have reached Slack, which repeats the event.
                assert [each.status for each in await EventSender(client, "/hooks/work").event(event)] == [200]
                with trio.fail_after(20):
                    while (await client.get("/status")).json()["channels"][0]["replied"] != 1:  # noqa: ASYNC110
                        await trio.sleep(0.01)
        assert workspace.texts("D1") == ["Hello there"]
        assert workspace.called("chat.postMessage") == ["ok"]


# -- without a gateway ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
async def test_growing_texts_stay_within_the_limits(workers: int, autojump_clock: object) -> None:
    """Three growing texts share the edits that Slack allows, in one worker or in several, and each is complete in the
    end: no call is rejected."""
    workspace = Workspace(burst=6)
    config = make_config(channels={"work": {"type": "slack", "token": TOKEN, "secrets": [SECRET]}}).channels["work"]
    counted = cast("Workers", SimpleNamespace(count=workers))  # the API reads only the number of workers
    text = " ".join(f"word{number}" for number in range(500))

    async def record(message_id: str) -> None:
        await trio.lowlevel.checkpoint()

    async def grow(channel: str, web_api: api.WebApi) -> None:
        screen = slack.live_screen(web_api, api.Conversation(channel=channel), record)
        display = Display(screen, split=split, interval_s=1.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(display.run)
            for end in range(0, len(text), 10):
                display.show(text[:end])
                await trio.sleep(0.1)
            display.show(text)
            await trio.sleep(30)
            await display.end()

    async with open_services() as opened, trio.open_nursery() as nursery:
        services = attrs.evolve(opened, workers=counted)
        apis = [
            api.WebApi(Channel("work", config, services, workspace.transport(), base_url="https://slack.example/api"))
            for _ in range(workers)
        ]
        for number, conversation in enumerate(("C1", "C2", "D1")):
            nursery.start_soon(grow, conversation, apis[number % workers])
    assert {each.result for each in workspace.calls} == {"ok"}
    assert len(workspace.called("chat.update")) > 30
    for conversation in ("C1", "C2", "D1"):
        assert " ".join(workspace.texts(conversation)) == text


def _runs_delivered(office: Office) -> list[str]:
    """The ids of the runs, from the requests to the model."""
    return [str(call.headers["x-request-id"]) for call in office.provider.calls]


async def _wait_delivered(office: Office, state: str) -> list[Any]:
    """Waits until all deliveries of a run have a state; returns them."""
    with trio.fail_after(20):
        while True:
            for run in _runs_delivered(office):
                found = await office.gateway.store.deliveries.of_run(run)
                if found and {each.state for each in found} == {state}:
                    return list(found)
            await trio.sleep(0.01)
