"""A key of the gateway, as a call needs it: who calls, and what it may do. Pure."""

from __future__ import annotations

import attrs

from trigate.config.key_sections import GroupConfig, KeySettings


@attrs.frozen(kw_only=True, eq=False)
class Key:
    """A key of the gateway. It does not change: a change of its settings makes another one.

    Attributes:
        name: Unique among all keys; the owner of what is made with it. Empty = the gateway has no keys, and anybody
            may call.
        id: ``key_…`` of a key that was made at run time; empty = it is in the configuration.
        settings: What it may do.
        group: The settings of ``settings.group``; None = it has no group.
        is_admin: It administers keys, and sees what all keys have made.
    """

    name: str = ""
    id: str = ""
    settings: KeySettings = attrs.field(factory=KeySettings)
    group: GroupConfig | None = None
    is_admin: bool = False


ANYBODY = Key()
"""Who calls a gateway without keys."""
