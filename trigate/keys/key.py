"""A key of the gateway, as a call needs it: who calls, and what it may do. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from trigate.config.key_sections import GroupConfig, KeySettings

_MAX_ADDRESSES = 64


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
        is_gone: It is no longer a key: what it owns is there, but its calls are refused.
        limits_models: It, or its group, has a list of models.
        addresses: From where it has been used: a bounded set, in the order of the first uses.
    """

    name: str = ""
    id: str = ""
    settings: KeySettings = attrs.field(factory=KeySettings)
    group: GroupConfig | None = None
    is_admin: bool = False
    is_gone: bool = False
    limits_models: bool = attrs.field(init=False)
    addresses: dict[str | None, None] = attrs.field(init=False, factory=dict, repr=False)
    _models: tuple[re.Pattern[str], ...] = attrs.field(init=False, repr=False)

    @limits_models.default
    def _has_models(self) -> bool:
        return self.settings.models is not None or (self.group is not None and self.group.models is not None)

    @_models.default
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        lists = [self.settings.models, self.group.models if self.group is not None else None]
        return tuple(_pattern(patterns) for patterns in lists if patterns is not None)

    def may_use(self, model: str, targets: Iterable[str]) -> bool:
        """Whether it may use a model: its lists have the id of the call, or every target that may serve it.

        Args:
            model: The id in the call; empty = it names none.
            targets: Ids with upstream: ``upstream/model``. They are looked at only if the lists do not have the model.

        >>> key = Key(settings=KeySettings(models=("fast", "openai/*")))
        >>> key.may_use("fast", ["groq/x"]), key.may_use("gpt", ["openai/gpt"]), key.may_use("gpt", ["groq/gpt"])
        (True, True, False)
        """
        others = [allowed for allowed in self._models if not (model and allowed.fullmatch(model))]
        if not others:
            return True
        ids = list(targets)
        return bool(ids) and all(allowed.fullmatch(each) for allowed in others for each in ids)

    def may_call_hook(self, hook: str) -> bool:
        """Whether it may call a webhook.

        >>> Key(settings=KeySettings(hooks=("ci-*",))).may_call_hook("ci-1"), Key().may_call_hook("ci-1")
        (True, True)
        """
        return self.settings.hooks is None or _pattern(self.settings.hooks).fullmatch(hook) is not None

    def note_address(self, address: str | None) -> None:
        """Notes from where it has been used."""
        if len(self.addresses) >= _MAX_ADDRESSES:
            del self.addresses[next(iter(self.addresses))]
        self.addresses[address] = None


def _pattern(patterns: Iterable[str]) -> re.Pattern[str]:
    """Matches each of some texts, in which ``*`` is any text.

    >>> bool(_pattern(["a/*", "b"]).fullmatch("a/b/c")), bool(_pattern(["a.b"]).fullmatch("axb")), _pattern([])
    (True, False, re.compile('(?!)', re.DOTALL))
    """
    each = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    return re.compile("|".join(each) if each else "(?!)", re.DOTALL)


ANYBODY = Key()
"""Who calls a gateway without keys."""
