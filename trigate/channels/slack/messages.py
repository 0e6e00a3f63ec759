"""What Slack sends as an event and what it takes as text, as far as a channel acts on it. Pure.

Rules that are not obvious, and where they stand in Slack's documentation:

* A message that mentions the app comes as two events, ``app_mention`` and ``message``, in any order, each with an
  ``event_id`` of its own. They have the same ``channel`` and ``ts``, and these are what identifies a message
  ("message event"). The key of a message is made of them, and so also recognises an event that Slack sends again.
* An event names one installation that it is for in ``authorizations``; with ``is_bot``, its ``user_id`` is the bot's
  own ("The Events API", and the changelog of 2020-09-15).
* Of the subtypes of ``message``, most are no message of a person (edits, deletions, joins, bots). Three are:
  ``file_share``, ``thread_broadcast``, ``me_message`` ("message event", its list of subtypes).
* In text, ``&``, ``<`` and ``>`` are control characters, and escaped where they stand for themselves; no other
  character is. What is between ``<`` and ``>`` is a link or a mention ("Formatting message text").
* ``chat.postMessage`` asks for 4,000 characters and truncates above 40,000. ``chat.update`` refuses what is longer than
  4,000 (``msg_too_long``, its reference); what it counts has been seen to be bytes of UTF-8. So a message has 4,000
  bytes, escaped.
"""

from __future__ import annotations

import re
from typing import Literal

import attrs
import msgspec

from trigate.channels import message_split

MESSAGE_BYTES = 4000
"""The most that one message may have and still be edited."""

_OF_PEOPLE = (None, "file_share", "thread_broadcast", "me_message")
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
        channel: The conversation's id.
        ts: The message's, unique in the conversation.
        thread_ts: That of the message at the head of the thread that it is in; None = it is in none.
        text: As it was written: without escapes, links as text, and without mentions of the bot.
        is_direct: Nobody else reads the conversation.
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
        """What identifies the message, in whichever event it comes."""
        return f"{self.channel}:{self.ts}"

    @property
    def reply_thread(self) -> str | None:
        """The thread that a reply goes to; None = none. In a direct message it does only where it is in one."""
        return self.thread_ts if self.is_direct else self.thread_ts or self.ts

    @property
    def action(self) -> Literal["chat", "reset", "stop"]:
        """What it asks for: a word that stands alone is a command."""
        word = self.text.lower()
        return next((command for command in _COMMANDS if word == command), "chat")


def read(body: bytes, *, bot: str | None) -> Incoming | None:
    """Reads a request of the Events API; None = there is nothing to answer.

    Args:
        body: Of a request whose signature holds.
        bot: The bot's user id, where it is known; else what the event says is taken.
    """
    try:
        envelope = _envelope.decode(body)
    except (ValueError, RecursionError):
        return None
    event = envelope.event
    if envelope.type != "event_callback" or event is None or event.type not in ("message", "app_mention"):
        return None
    own = {one.user_id for one in envelope.authorizations or () if one.is_bot} | {bot}
    if event.subtype not in _OF_PEOPLE or event.bot_id or not event.user or event.user in own:
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
    """The session that a message belongs to: of its thread, where replies are in one, else of the conversation.

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
    """Reads Slack's markup as plain text.

    Args:
        text: As it is in an event.
        leave_out: Users whose mentions are left out.

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
    for character, escaped in reversed(_ESCAPED.items()):  # the ampersand last: it is what the others are made of
        found = found.replace(escaped, character)
    return found.strip()


def escape(text: str) -> str:
    """Makes a plain text that Slack shows as it is: nobody is called by it, and nothing is a link but a bare URL.

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
