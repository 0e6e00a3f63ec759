"""Slack's events are read, and texts are written as Slack shows them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trigate.channels.slack.messages import MESSAGE_BYTES, Incoming, escape, read, session_key, split, to_text


def _read(*, bot: str | None = "UBOT", authorizations: Any = None, **event: Any) -> Incoming | None:
    fields = {"type": "message", "channel": "C1", "channel_type": "channel", "user": "U1", "text": "hi", "ts": "1.0"}
    envelope = {"type": "event_callback", "event_id": "Ev1", "event": {**fields, **event}}
    if authorizations is not None:
        envelope["authorizations"] = authorizations
    return read(msgspec.json.encode(envelope), bot=bot)


def test_message_of_a_person() -> None:
    """It is read with its conversation, its thread and its text."""
    message = _read(text="Is 1 &lt; 2?", thread_ts="0.5", ts="1.0")
    assert message == Incoming(
        channel="C1", ts="1.0", thread_ts="0.5", user="U1", text="Is 1 < 2?", is_direct=False, is_mention=False
    )
    assert "1 < 2" not in repr(message)


def test_both_events_of_a_mention_are_one_message() -> None:
    """They have the same key, each is recognised as a mention, and the mention is not part of the text."""
    first = _read(type="app_mention", channel_type=None, text="<@UBOT> hi")
    second = _read(text="<@UBOT> hi")
    assert first == second
    assert first is not None
    assert (first.is_mention, first.text, first.key) == (True, "hi", "C1:1.0")


def test_event_names_the_bot() -> None:
    """While the bot's id is not known yet, it is taken from the event."""
    own = [{"team_id": "T1", "user_id": "UBOT", "is_bot": True}]
    found = _read(text="hey <@UBOT|bot>, hi", bot=None, authorizations=own)
    assert found is not None
    assert (found.is_mention, found.text) == (True, "hey , hi")
    assert _read(user="UBOT", bot=None, authorizations=own) is None
    person = _read(text="<@U9> hi", bot=None, authorizations=[{"user_id": "U9", "is_bot": False}])
    assert person is not None
    assert (person.is_mention, person.text) == (False, "@U9 hi")


@pytest.mark.parametrize(
    "event",
    [
        {"user": "UBOT"},
        {"bot_id": "B1"},
        {"user": None},
        {"subtype": "message_changed"},
        {"subtype": "message_deleted"},
        {"subtype": "channel_join"},
        {"subtype": "bot_message"},
        {"type": "reaction_added"},
        {"text": ""},
        {"text": None},
        {"text": "<@UBOT>"},
        {"channel": ""},
        {"text": 7},
    ],
)
def test_not_a_message_of_a_person(event: dict[str, Any]) -> None:
    """Edits, deletions, joins, bots, the bot itself, and empty messages are ignored."""
    assert _read(**event) is None


def test_not_an_event() -> None:
    """A body that is no event is ignored."""
    for body in (b"", b"{", b"[]", b'{"type":"app_rate_limited"}', b'{"type":"event_callback"}', b"[" * 100_000):
        assert read(body, bot=None) is None


@pytest.mark.parametrize("subtype", ["file_share", "thread_broadcast", "me_message"])
def test_subtypes_that_are_messages(subtype: str) -> None:
    """A message with a file, one that is also shown outside its thread, and ``/me`` are messages of a person."""
    assert _read(subtype=subtype) is not None


@pytest.mark.parametrize(
    ("text", "action"),
    [("stop", "stop"), (" Reset ", "reset"), ("<@UBOT> stop", "stop"), ("stop it", "chat"), ("reset!", "chat")],
)
def test_commands(text: str, action: str) -> None:
    """A command is a message without other text."""
    message = _read(text=text)
    assert message is not None
    assert message.action == action


def test_replies_and_sessions() -> None:
    """In channels a reply, and with it the session, is in a thread; in direct messages only if the message is."""
    in_channel = _read()
    in_thread = _read(thread_ts="0.5")
    direct = _read(channel="D1", channel_type="im")
    direct_thread = _read(channel="D1", channel_type="im", thread_ts="0.5")
    group = _read(channel="G1", channel_type="mpim")
    assert in_channel is not None
    assert in_thread is not None
    assert direct is not None
    assert direct_thread is not None
    assert group is not None
    assert in_channel.reply_thread == "1.0"
    assert in_thread.reply_thread == "0.5"
    assert direct.reply_thread is None
    assert direct_thread.reply_thread == "0.5"
    assert group.reply_thread == "1.0"
    assert session_key("w", in_thread, "chat") == "channel:w:C1:0.5"
    assert session_key("w", in_thread, "sender") == "channel:w:C1:0.5:U1"
    assert session_key("w", direct, "chat") == "channel:w:D1"
    assert session_key("w", direct, "none") is None


def test_text_round_trip() -> None:
    """An escaped text is read back unchanged; a lone ``<`` is not markup."""
    for text in ("a & b", "<@U1>", "<!channel>", "&lt;", "x < y > z", "<https://a.example|b>"):
        assert to_text(escape(text)) == text
    assert to_text("<mailto:a@b.example|a@b.example> <https://c.example>") == "a@b.example https://c.example"
    assert to_text("<!subteam^S1|@people> <!date^1^{date}|today> <@U2|ada>") == "@people today @ada"
    assert to_text("a <b c") == "a <b c"


def test_messages_can_be_edited() -> None:
    """Each message that a text is split into has, escaped, at most the size that can be edited."""
    for text in ("x" * 9000, "&" * 2000, "ü< " * 3000, "😀" * 1500):
        messages = split(text)
        assert all(len(escape(message).encode()) <= MESSAGE_BYTES for message in messages)
        assert "".join(messages).replace(" ", "") == text.replace(" ", "")
