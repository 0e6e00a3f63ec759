"""The types and rules of Slack's events and texts, as far as a channel uses them. Pure.

Rules that are not obvious, and their source in Slack's documentation:

* A message that mentions the app comes as two events, ``app_mention`` and ``message``, in any order, each with an
  ``event_id`` of its own. They have the same ``channel`` and ``ts``, which identify a message ("message event").
  Therefore the key of a message is made of these two, and also recognises an event that Slack sends again.
* An event names one installation that it is for in ``authorizations``; with ``is_bot``, its ``user_id`` is the bot's
  own ("The Events API", and the changelog of 2020-09-15).
* Most subtypes of ``message`` are not messages of a person (edits, deletions, joins, bots). Three are: ``file_share``,
  ``thread_broadcast``, ``me_message`` ("message event", its list of subtypes).
* In text, ``&``, ``<`` and ``>`` are control characters, and are escaped where they stand for themselves; no other
  character is. The text between ``<`` and ``>`` is a link or a mention ("Formatting message text").
* ``chat.postMessage`` asks for 4,000 characters and truncates above 40,000. ``chat.update`` rejects a text longer than
  4,000 (``msg_too_long``, its reference), which was observed to be counted in bytes of UTF-8. Therefore a message has
  at most 4,000 bytes, escaped.
"""

from __future__ import annotations

import re
from typing import Literal

import attrs
import msgspec

from trigate.channels import message_split
from trigate.openai.raw_json import with_whole_characters

MESSAGE_BYTES = 4000
"""The maximum size of a message that can still be edited, escaped."""

_SUBTYPES_OF_PEOPLE = (None, "file_share", "thread_broadcast", "me_message")
_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"<([@#!]?)([^<>|]*)(?:\|([^<>]*))?>")
_COMMANDS: tuple[Literal["reset", "stop"], ...] = ("reset", "stop")


class _Event(msgspec.Struct):
    type: str = ""
    subtype: str | None = None
    channel: str = ""
    channel_type: str | None = None
    user: str | None = None
    bot_id: str | None = None
    text: str | None = None
    ts: str = ""
    thread_ts: str | None = None


class _Authorization(msgspec.Struct):
    user_id: str | None = None
    is_bot: bool = False


class _Envelope(msgspec.Struct):
    type: str = ""
    event: _Event | None = None
    authorizations: list[_Authorization] | None = None


_envelope = msgspec.json.Decoder(_Envelope)


@attrs.frozen(kw_only=True)
class Incoming:
    """A message of a person.

    Attributes:
        channel: The id of the conversation.
        ts: The timestamp of the message, unique in the conversation.
        thread_ts: The timestamp of the first message of its thread; None = it is not in a thread.
        text: Without escapes, with links as text, and without mentions of the bot.
        is_direct: The conversation has no other members.
        is_mention: It mentions the bot.
    """

    channel: str
    ts: str
    thread_ts: str | None
    user: str
    text: str = attrs.field(repr=False)
    is_direct: bool
    is_mention: bool

    @property
    def key(self) -> str:
        """Identifies the message; the same in every event that it comes in."""
        return f"{self.channel}:{self.ts}"

    @property
    def reply_thread(self) -> str | None:
        """The thread that a reply goes to; None = no thread. In a direct conversation, a reply starts no thread."""
        return self.thread_ts if self.is_direct else self.thread_ts or self.ts

    @property
    def action(self) -> Literal["chat", "reset", "stop"]:
        """The action that the message asks for: a command is the whole text."""
        word = self.text.lower()
        return next((command for command in _COMMANDS if word == command), "chat")


def read(body: bytes, *, bot: str | None) -> Incoming | None:
    """Reads a request of the Events API; None = there is nothing to answer.

    Args:
        body: Of a request whose signature was verified.
        bot: The bot's user id; None = not known yet, so only the event names it.
    """
    try:
        envelope = _envelope.decode(with_whole_characters(body))
    except (ValueError, RecursionError):
        return None
    event = envelope.event
    if envelope.type != "event_callback" or event is None or event.type not in ("message", "app_mention"):
        return None
    own = {each.user_id for each in envelope.authorizations or () if each.is_bot} | {bot}
    if event.subtype not in _SUBTYPES_OF_PEOPLE or event.bot_id or not event.user or event.user in own:
        return None
    raw = event.text or ""
    mentioned = [user for user in own if user and re.search(rf"<@{re.escape(user)}[|>]", raw)]
    text = to_text(raw, leave_out=tuple(mentioned))
    if not (event.channel and event.ts and text):
        return None
    return Incoming(
        channel=event.channel,
        ts=event.ts,
        thread_ts=event.thread_ts,
        user=event.user,
        text=text,
        is_direct=event.channel_type == "im" or event.channel.startswith("D"),
        is_mention=event.type == "app_mention" or bool(mentioned),
    )


def session_key(name: str, message: Incoming, scope: Literal["sender", "chat", "none"]) -> str | None:
    """The key of the session that a message belongs to: that of its thread if replies go to one, else that of the
    conversation. None = it is not remembered.

    >>> message = Incoming(channel="C1", ts="2.0", thread_ts=None, user="U1", text="", is_direct=False, is_mention=True)
    >>> session_key("work", message, "chat")
    'channel:work:C1:2.0'
    >>> session_key("work", attrs.evolve(message, is_direct=True), "sender")
    'channel:work:C1:U1'
    """
    if scope == "none":
        return None
    parts = ["channel", name, message.channel]
    if message.reply_thread is not None:
        parts.append(message.reply_thread)
    if scope == "sender":
        parts.append(message.user)
    return ":".join(parts)


def to_text(text: str, *, leave_out: tuple[str, ...] = ()) -> str:
    """Converts Slack's markup to plain text.

    Args:
        text: The text of an event.
        leave_out: Users whose mentions are removed.

    >>> to_text("<@U1> is 1 &lt; 2 in <#C7|general>? See <https://a.example/?b&amp;c|here> <!here>", leave_out=("U1",))
    'is 1 < 2 in #general? See here (https://a.example/?b&c) @here'
    >>> to_text("&amp;lt;")
    '&lt;'
    """

    def plain(found: re.Match[str]) -> str:
        kind, target, label = found.groups()
        if kind == "@":
            return "" if target in leave_out else f"@{label or target}"
        if kind == "#":
            return f"#{label or target}"
        if kind == "!":  # <!here>, <!subteam^S1|@people>, <!date^…|in words>
            return label or f"@{target}"
        if not label or label == target.removeprefix("mailto:").removeprefix("tel:"):
            return label or target
        return f"{label} ({target})"

    found = _MARKUP.sub(plain, text)
    for character, escaped in reversed(_ESCAPED.items()):  # the ampersand last: the other escapes begin with it
        found = found.replace(escaped, character)
    return found.strip()


def escape(text: str) -> str:
    """Escapes a plain text, so that Slack shows it as it is: it mentions no user, and only a bare URL is a link.

    >>> escape("if a < b && c: <!channel>")
    'if a &lt; b &amp;&amp; c: &lt;!channel&gt;'
    """
    for character, escaped in _ESCAPED.items():
        text = text.replace(character, escaped)
    return text


def split(text: str) -> list[str]:
    """Splits a plain text into messages that can be edited once they are escaped."""
    return message_split.split(text, limit=MESSAGE_BYTES, size=_size_bytes)


def _size_bytes(character: str) -> int:
    return len(_ESCAPED.get(character, character).encode())
