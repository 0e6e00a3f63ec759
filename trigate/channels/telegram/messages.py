"""The types and rules of Telegram's messages, as far as a channel uses them. Pure.

Offsets, lengths and limits of texts are in UTF-16 code units, as everywhere in Telegram.

Source: Telegram Bot API, "Getting updates", "Update", "Message", "MessageEntity", "ResponseParameters" and
"sendMessage"; "Bot features", about commands and the privacy mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
import msgspec

from trigate.channels import message_split
from trigate.config.sections import Action

MAX_UNITS = 4096
"""The maximum length of a message, in UTF-16 code units."""

_COMMANDS: dict[str, Action] = {"start": "reset", "reset": "reset", "stop": "stop"}


class User(msgspec.Struct, kw_only=True):
    """``User``."""

    id: int
    is_bot: bool = False
    username: str | None = None


class _MessageChat(msgspec.Struct, kw_only=True):
    id: int
    type: str


class _Entity(msgspec.Struct, kw_only=True):
    type: str
    offset: int
    length: int
    user: User | None = None


class _RepliedTo(msgspec.Struct, kw_only=True):
    sender: User | None = msgspec.field(default=None, name="from")


class _Message(msgspec.Struct, kw_only=True):
    message_id: int
    chat: _MessageChat
    sender: User | None = msgspec.field(default=None, name="from")
    text: str | None = None
    caption: str | None = None
    entities: list[_Entity] = []
    caption_entities: list[_Entity] = []
    reply_to_message: _RepliedTo | None = None
    message_thread_id: int | None = None
    is_topic_message: bool = False


class Update(msgspec.Struct, kw_only=True):
    """``Update``. Only messages are used: no edits, no channel posts, no buttons."""

    update_id: int
    message: _Message | None = None


class WebhookInfo(msgspec.Struct, kw_only=True):
    """``WebhookInfo``."""

    url: str = ""
    last_error_date: int = 0
    last_error_message: str = ""


class _Parameters(msgspec.Struct, kw_only=True):
    retry_after: float | None = None
    migrate_to_chat_id: int | None = None


class Envelope(msgspec.Struct, kw_only=True):
    """The response of every method."""

    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    error_code: int = 0
    description: str = ""
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """The chat that a message came from, and that the reply goes to. As JSON (with the short names) it is stored with
    the run.

    Attributes:
        thread_id: The topic of a forum; None = the chat has no topics.
        message_id: The message that is answered.
        is_group: The chat has other members.
    """

    id: int = msgspec.field(name="chat")
    thread_id: int | None = msgspec.field(name="thread")
    message_id: int = msgspec.field(name="message")
    is_group: bool


@attrs.frozen(kw_only=True)
class Incoming:
    """A message that the bot has to act on."""

    update_id: int
    chat: Chat
    sender: int
    username: str | None
    action: Action
    text: str = attrs.field(repr=False)

    def session_key(self, channel: str, scope: Literal["sender", "chat", "none"]) -> str | None:
        """The key of the session that the message belongs to; None = it is not remembered.

        >>> chat = Chat(id=-5, thread_id=7, message_id=1, is_group=True)
        >>> message = Incoming(update_id=1, chat=chat, sender=9, username=None, action="chat", text="Hello")
        >>> [message.session_key("bot", scope) for scope in ("chat", "sender", "none")]
        ['channel:bot:-5/7', 'channel:bot:-5/7:9', None]
        """
        if scope == "none":
            return None
        thread = f"/{self.chat.thread_id}" if self.chat.thread_id is not None else ""
        sender = f":{self.sender}" if scope == "sender" else ""
        return f"channel:{channel}:{self.chat.id}{thread}{sender}"

    def is_allowed(self, allow: Iterable[str]) -> bool:
        """Whether its sender is among these ids and user names. An empty list allows every sender.

        >>> chat = Chat(id=1, thread_id=None, message_id=1, is_group=False)
        >>> message = Incoming(update_id=1, chat=chat, sender=9, username="Ann", action="chat", text="Hello")
        >>> [message.is_allowed(allow) for allow in ((), ("9",), ("@ann",), ("ANN",), ("99", "an"))]
        [True, True, True, True, False]
        """
        names = {name.removeprefix("@").lower() for name in allow}
        return not names or str(self.sender) in names or (self.username or "").lower() in names - {""}


def incoming(update: Update, *, me: User, groups: Literal["mention", "all", "none"]) -> Incoming | None:
    """Reads what an update asks the bot for; None = nothing: it is from a bot, it has no text, or it is not meant for
    the bot.

    Args:
        me: The bot.
        groups: Which messages in groups are meant for the bot: those that mention it, all, or none.
    """
    message = update.message
    if message is None or message.sender is None or message.sender.is_bot or message.sender.id == me.id:
        return None
    if message.text is not None:
        text, entities = message.text, message.entities
    else:
        text, entities = message.caption or "", message.caption_entities
    is_group = message.chat.type != "private"
    if is_group and groups == "none":
        return None
    name = (me.username or "").lower()
    is_meant = message.reply_to_message is not None and _is(message.reply_to_message.sender, me)
    action: Action = "chat"
    units = text.encode("utf-16-le")
    mention_units: tuple[int, int] | None = None
    for entity in entities:
        marked = _slice(units, entity).lower()
        if entity.type == "bot_command" and entity.offset == 0:
            command, at, bot = marked.removeprefix("/").partition("@")
            if at and bot != name:
                return None  # another bot's
            if command in _COMMANDS:
                action = _COMMANDS[command]
            is_meant = is_meant or bool(at) or command in _COMMANDS
        elif (entity.type == "mention" and marked == f"@{name}") or (
            entity.type == "text_mention" and _is(entity.user, me)
        ):
            is_meant = True
            if entity.offset == 0:
                mention_units = (entity.offset, entity.length)
    if is_group and groups == "mention" and not is_meant:
        return None
    if mention_units is not None:  # "@bot, hello": the mention addresses the bot, and is not part of the prompt
        text = units[2 * mention_units[1] :].decode("utf-16-le", "replace").lstrip(" ,:")
    if action == "chat" and not text.strip():
        return None
    return Incoming(
        update_id=update.update_id,
        chat=Chat(
            id=message.chat.id,
            thread_id=message.message_thread_id if message.is_topic_message else None,
            message_id=message.message_id,
            is_group=is_group,
        ),
        sender=message.sender.id,
        username=message.sender.username,
        action=action,
        text=text.strip() if action == "chat" else "",
    )


def _is(user: User | None, me: User) -> bool:
    return user is not None and user.id == me.id


def _slice(units: bytes, entity: _Entity) -> str:
    start = 2 * max(entity.offset, 0)
    return units[start : start + 2 * max(entity.length, 0)].decode("utf-16-le", "replace")


def units_of(character: str) -> int:
    """The number of UTF-16 code units of a character.

    >>> [units_of(character) for character in "a😀"]
    [1, 2]
    """
    return 1 if character < "\U00010000" else 2


def split(text: str) -> list[str]:
    """Splits a text into messages."""
    return message_split.split(text, limit=MAX_UNITS, size=units_of)
