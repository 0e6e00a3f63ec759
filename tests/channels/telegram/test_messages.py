"""What Telegram says, and what of it is meant for a bot."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.telegram_server import ME, TelegramServer
from trigate.channels.telegram.messages import MAX_UNITS, Incoming, Update, User, incoming, split

BOT = msgspec.convert(ME, User)


def take(groups: Literal["mention", "all", "none"] = "mention", /, *text: str, **message: Any) -> Incoming | None:
    """What a message asks for, as it comes out of JSON."""
    update = TelegramServer().say(*text, **message)
    return incoming(msgspec.json.decode(msgspec.json.encode(update), type=Update), me=BOT, groups=groups)


def entity(kind: str, offset: int, length: int, **more: Any) -> dict[str, Any]:
    """A ``MessageEntity``."""
    return {"type": kind, "offset": offset, "length": length, **more}


def text_of(message: Incoming | None) -> str | None:
    """Its text; None = there is no message."""
    return message.text if message is not None else None


def test_private() -> None:
    """In a private chat, every text is for the bot, and it is known who wrote it where."""
    message = take("none", "Hello", chat=5, name="Ann")
    assert message is not None
    assert (message.text, message.action, message.sender, message.username) == ("Hello", "chat", 5, "Ann")
    assert (message.place.chat, message.place.thread, message.place.is_group) == (5, None, False)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"photo": []}, id="no text"),
        pytest.param({"new_chat_members": []}, id="a service message"),
        pytest.param({"text": "Hi", "from": {"id": 9, "is_bot": True}}, id="another bot"),
        pytest.param({"text": "Hi", "from": ME}, id="itself"),
        pytest.param({"text": "Hi", "from": None}, id="nobody"),
        pytest.param({"text": " "}, id="white space"),
    ],
)
def test_ignored(content: dict[str, Any]) -> None:
    """What has no text, or is from a bot, asks for nothing."""
    assert take("all", **content) is None


@pytest.mark.parametrize("kind", ["edited_message", "channel_post", "callback_query", "my_chat_member"])
def test_no_message(kind: str) -> None:
    """An edit of a message is no further message; nor is anything else."""
    update = msgspec.json.decode(msgspec.json.encode({"update_id": 1, kind: {"id": 7}}), type=Update)
    assert incoming(update, me=BOT, groups="all") is None


def test_caption() -> None:
    """A caption is a text, and its mentions count."""
    entities = [entity("mention", 0, 12)]
    assert text_of(take(caption="@Trigate_Bot what is that?", caption_entities=entities, chat=-5)) == "what is that?"


@pytest.mark.parametrize(
    ("text", "entities", "found"),
    [
        pytest.param("Hello", (), None, id="to others"),
        pytest.param("@trigate_bot, hello", (entity("mention", 0, 12),), "hello", id="first"),
        pytest.param("😀 hello @trigate_bot!", (entity("mention", 9, 12),), "😀 hello @trigate_bot!", id="UTF-16"),
        pytest.param("@trigate_bots hello", (entity("mention", 0, 13),), None, id="a longer name"),
        pytest.param("@trigate_bot hello", (), None, id="in code, say"),
        pytest.param("Bot, hello", (entity("text_mention", 0, 3, user=ME),), "hello", id="by its id"),
        pytest.param("Bob, hello", (entity("text_mention", 0, 3, user={"id": 2}),), None, id="by another id"),
    ],
)
def test_mention(text: str, entities: tuple[Any, ...], found: str | None) -> None:
    """In a group, the bot heeds who calls it by its name."""
    assert text_of(take("mention", text, chat=-5, entities=entities)) == found


def test_reply_in_group() -> None:
    """In a group, a reply to the bot is for the bot; a reply to others is not."""
    assert text_of(take("mention", "Why?", chat=-5, reply_to_message={"message_id": 1, "from": ME})) == "Why?"
    assert take("mention", "Why?", chat=-5, reply_to_message={"message_id": 1, "from": {"id": 3}}) is None


def test_groups() -> None:
    """Groups are heeded as a whole, or not at all, where the configuration says so."""
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
    """The commands that are known are actions; one for another bot is nothing; others are texts."""
    command = text.split(" ", 1)[0]
    message = take("mention", text, chat=chat, entities=(entity("bot_command", 0, len(command)),))
    assert (message.action if message is not None else None) == action


def test_topics() -> None:
    """A topic of a forum is a place of its own; a thread of replies in a plain group is not."""
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
    """Entities that lie outside of the text do no harm."""
    assert text_of(take("all", "😀", chat=-5, entities=(entity("text_mention", offset, length, user=ME),))) in (
        "😀",
        "�",
        None,
    )


def units(text: str) -> int:
    """How long Telegram says it is."""
    return len(text.encode("utf-16-le")) // 2


@given(st.text(st.sampled_from("ab \n.😀é\u0301"), max_size=300).map(lambda text: text * 60))
def test_split(text: str) -> None:
    """The pieces are the text, but for the white space between them; each fits; none is empty."""
    pieces = split(text)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < units(piece) <= MAX_UNITS for piece in pieces)
    assert all(piece == piece.strip() for piece in pieces)


def test_split_where() -> None:
    """A text is split behind a word; a word that is too long, between characters that are two code units."""
    assert [units(piece) for piece in split("word " * 1000)] == [4094, 904]
    assert [units(piece) for piece in split("a" + "😀" * 3000)] == [4095, 1906]
