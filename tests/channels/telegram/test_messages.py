"""Telegram's updates are read, and it is decided which are meant for the bot."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.telegram_server import ME, TelegramServer
from trigate.channels.telegram.messages import MAX_UNITS, Chat, Incoming, Update, User, incoming, split

BOT = msgspec.convert(ME, User)


def take(groups: Literal["mention", "all", "none"] = "mention", /, *text: str, **message: Any) -> Incoming | None:
    """Reads a message from JSON."""
    update = TelegramServer().say(*text, **message)
    return incoming(msgspec.json.decode(msgspec.json.encode(update), type=Update), me=BOT, groups=groups)


def entity(kind: str, offset: int, length: int, **more: Any) -> dict[str, Any]:
    """A ``MessageEntity``."""
    return {"type": kind, "offset": offset, "length": length, **more}


def text_of(message: Incoming | None) -> str | None:
    """The text of a message; None = there is no message."""
    return message.text if message is not None else None


def test_private() -> None:
    """In a private chat, every text is for the bot; its sender and its chat are read."""
    message = take("none", "Hello", chat=5, name="Ann")
    assert message is not None
    assert (message.text, message.action, message.sender, message.username) == ("Hello", "chat", 5, "Ann")
    assert message.chat == Chat(id=5, thread_id=None, message_id=1, is_group=False)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"photo": []}, id="no text"),
        pytest.param({"new_chat_members": []}, id="a service message"),
        pytest.param({"text": "Hi", "from": {"id": 9, "is_bot": True}}, id="another bot"),
        pytest.param({"text": "Hi", "from": ME}, id="itself"),
        pytest.param({"text": "Hi", "from": None}, id="no sender"),
        pytest.param({"text": " "}, id="white space"),
    ],
)
def test_ignored(content: dict[str, Any]) -> None:
    """A message without a text, or from a bot, is ignored."""
    assert take("all", **content) is None


@pytest.mark.parametrize("kind", ["edited_message", "channel_post", "callback_query", "my_chat_member"])
def test_no_message(kind: str) -> None:
    """Edits and all other kinds of updates are ignored."""
    update = msgspec.json.decode(msgspec.json.encode({"update_id": 1, kind: {"id": 7}}), type=Update)
    assert incoming(update, me=BOT, groups="all") is None


def test_caption() -> None:
    """A caption is read as the text, with its mentions."""
    entities = [entity("mention", 0, 12)]
    assert text_of(take(caption="@Trigate_Bot what is this?", caption_entities=entities, chat=-5)) == "what is this?"


@pytest.mark.parametrize(
    ("text", "entities", "found"),
    [
        pytest.param("Hello", (), None, id="to others"),
        pytest.param("@trigate_bot, hello", (entity("mention", 0, 12),), "hello", id="first"),
        pytest.param("😀 hello @trigate_bot!", (entity("mention", 9, 12),), "😀 hello @trigate_bot!", id="UTF-16"),
        pytest.param("@trigate_bots hello", (entity("mention", 0, 13),), None, id="a longer name"),
        pytest.param("@trigate_bot hello", (), None, id="without an entity, as in code"),
        pytest.param("Bot, hello", (entity("text_mention", 0, 3, user=ME),), "hello", id="by its id"),
        pytest.param("Bob, hello", (entity("text_mention", 0, 3, user={"id": 2}),), None, id="by another id"),
    ],
)
def test_mention(text: str, entities: tuple[Any, ...], found: str | None) -> None:
    """In a group, a message that mentions the bot is meant for it."""
    assert text_of(take("mention", text, chat=-5, entities=entities)) == found


def test_reply_in_group() -> None:
    """In a group, a reply to the bot is for the bot; a reply to others is not."""
    assert text_of(take("mention", "Why?", chat=-5, reply_to_message={"message_id": 1, "from": ME})) == "Why?"
    assert take("mention", "Why?", chat=-5, reply_to_message={"message_id": 1, "from": {"id": 3}}) is None


def test_groups() -> None:
    """By configuration, all messages of groups are meant for the bot, or none."""
    mention = (entity("mention", 0, 12),)
    assert text_of(take("all", "Hello", chat=-5)) == "Hello"
    assert take("none", "@trigate_bot hello", chat=-5, entities=mention) is None


@pytest.mark.parametrize(
    ("text", "chat", "action"),
    [
        ("/start", 5, "reset"),
        ("/reset please", 5, "reset"),
        ("/stop", -5, "stop"),
        ("/stop@trigate_bot", -5, "stop"),
        ("/STOP@Trigate_Bot", -5, "stop"),
        ("/stop@other_bot", -5, None),
        ("/stop@other_bot", 5, None),
        ("/help", 5, "chat"),
        ("/help", -5, None),
        ("/help@trigate_bot", -5, "chat"),
    ],
)
def test_commands(text: str, chat: int, action: str | None) -> None:
    """A known command is an action, a command for another bot is ignored, and any other is a text."""
    command = text.split(" ", 1)[0]
    message = take("mention", text, chat=chat, entities=(entity("bot_command", 0, len(command)),))
    assert (message.action if message is not None else None) == action


def test_topics() -> None:
    """A topic of a forum has its own session; a thread of replies in a plain group has not."""
    topic = take("all", "Hello", chat=-5, message_thread_id=8, is_topic_message=True)
    thread = take("all", "Hello", chat=-5, message_thread_id=8)
    assert topic is not None
    assert thread is not None
    assert (topic.session_key("bot", "chat"), thread.session_key("bot", "chat")) == (
        "channel:bot:-5/8",
        "channel:bot:-5",
    )
    assert topic.session_key("bot", "sender") == "channel:bot:-5/8:5"


@pytest.mark.parametrize("offset", [-5, 0, 3, 10**9])
@pytest.mark.parametrize("length", [-1, 0, 1, 10**9])
def test_odd_entities(offset: int, length: int) -> None:
    """Entities outside of the text raise no error."""
    assert text_of(take("all", "😀", chat=-5, entities=(entity("text_mention", offset, length, user=ME),))) in (
        "😀",
        "�",
        None,
    )


def units(text: str) -> int:
    """The length of a text as Telegram counts it."""
    return len(text.encode("utf-16-le")) // 2


@given(st.text(st.sampled_from("ab \n.😀é\u0301"), max_size=300).map(lambda text: text * 60))
def test_split(text: str) -> None:
    """Joined, the pieces are the text without the white space between them; each fits, and none is empty."""
    pieces = split(text)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < units(piece) <= MAX_UNITS for piece in pieces)
    assert all(piece == piece.strip() for piece in pieces)


def test_split_where() -> None:
    """A text is split after a word, and a word that is too long between two characters, never within one."""
    assert [units(piece) for piece in split("word " * 1000)] == [4094, 904]
    assert [units(piece) for piece in split("a" + "😀" * 3000)] == [4095, 1906]


def test_chat_as_json() -> None:
    """The JSON of a chat has the names that are stored with runs, also by earlier versions."""
    chat = Chat(id=-5, thread_id=7, message_id=1, is_group=True)
    stored = {"chat": -5, "thread": 7, "message": 1, "is_group": True}
    assert msgspec.to_builtins(chat) == stored
    assert msgspec.convert({**stored, "target": "-5"}, Chat) == chat
