"""Where the system messages of a chat request stand, for a server that does not take them everywhere.

The templates of many models take one system message, at the beginning, and servers answer 400 to any other one. Agents
send more: Claude Code one behind the user's first message. A server's policy (``upstreams.NAME.system_role``) says what
becomes of those that are not at the beginning:

* ``anywhere``: they stay where they are;
* ``first``: they are added to the first one. This changes the beginning of the conversation, and so loses the
  provider's cache with each of them;
* ``as-user``: they become a text of the user's, in tags that say what it is.

`request` does this for requests that are translated. `with_system_role` does it for one that is passed through, of
which every other message stays as it is, byte for byte.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.openai_chat.traits import SystemRole
from trigate.dialects.vocabulary import as_user_text
from trigate.openai.raw_json import decode_any, join_fields, split_fields

_BLANK = "\n\n"


class _Role(msgspec.Struct):
    role: str


_roles = msgspec.json.Decoder(list[_Role])
_raws = msgspec.json.Decoder(list[msgspec.Raw])


def with_system_role(raw: bytes, policy: SystemRole, *, takes_developer: bool) -> list[bytes] | None:
    """Puts the system messages of a request into the place that a server takes them in.

    Args:
        raw: The value of ``messages``: objects that have a ``role``.
        takes_developer: Whether the server knows the role ``developer``; if not, it becomes ``system``.

    Returns:
        The messages; None = they can stay as they are.
    """
    roles = [message.role for message in _roles.decode(raw)]
    if "system" not in roles and "developer" not in roles:
        return None
    placed: list[bytes] = []
    has_first = roles[0] in ("system", "developer")
    is_first = True  # nothing but system messages has come
    is_changed = False
    for message, role in zip(map(bytes, _raws.decode(raw)), roles, strict=True):
        if role not in ("system", "developer"):
            is_first = False
            placed.append(message)
        elif policy == "anywhere" or (is_first and not placed):
            named = message if takes_developer or role == "system" else _with(message, role="system")
            is_changed = is_changed or named is not message
            placed.append(named)
        else:
            is_changed = True
            text = _text(message)
            if has_first and (is_first or policy == "first"):
                placed[0] = _with(placed[0], content=_joined(_text(placed[0]), text))
            elif policy == "first":
                placed.insert(0, msgspec.json.encode({"role": "system", "content": text}))
                has_first = True
            else:
                _add_for_user(placed, text)
    return placed if is_changed else None


def _add_for_user(placed: list[bytes], text: str) -> None:
    """Adds a system message to the user's message before it, or as one of the user's."""
    told = as_user_text(text)
    last = decode_any(placed[-1]) if placed else None
    if not isinstance(last, dict) or last.get("role") != "user":
        placed.append(msgspec.json.encode({"role": "user", "content": told}))
        return
    content = last.get("content")
    parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    placed[-1] = _with(placed[-1], content=[*parts, {"type": "text", "text": told}])


def _text(message: bytes) -> str:
    content = decode_any(bytes(split_fields(message).get("content", b'""')))
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return _BLANK.join([str(part["text"]) for part in parts if isinstance(part, dict) and part.get("text")])


def _joined(first: str, second: str) -> str:
    return _BLANK.join([text for text in (first, second) if text])


def _with(message: bytes, **fields: Any) -> bytes:  # Any: JSON of any shape
    """The message with other values for some of its fields; every other one stays as it is."""
    new = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return join_fields({**split_fields(message), **new})
