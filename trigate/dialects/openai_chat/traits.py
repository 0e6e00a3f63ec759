"""What a server of chat completions is known to take beyond the common part of the format.

A field that a server does not know is an error at some and ignored at others, so only those are sent that its provider
documents, or that any server on this machine ignores if it does not know them.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal
from urllib.parse import urlsplit

import attrs

from trigate.openai.history_fields import HISTORY_FIELDS, history_fields_of

SystemRole = Literal["anywhere", "first", "as-user"]
"""Where a server takes system messages (`system_role`)."""

_OPENAI = ("api.openai.com", "openai.azure.com")
_DEEPSEEK = ("deepseek.com",)
_FILES = (*_OPENAI, "openrouter.ai")
_EFFORT = ("openrouter.ai",)
_REASONING_MODEL = re.compile(r"(?:.*/)?(?:o[1-9]|gpt-[5-9](?![.0-9]*-chat)|gpt-oss|grok-3-mini|gemini-(?:2\.5|[3-9]))")
_NO_EFFORT: tuple[tuple[Literal["none", "minimal"], re.Pattern[str]], ...] = (
    ("none", re.compile(r"(?:.*/)?(?:gpt-(?:5\.[1-9]|[6-9])(?!.*-(?:pro|codex|chat))|gemini-2\.5-flash)")),
    ("minimal", re.compile(r"(?:.*/)?gpt-5(?:-mini|-nano)?(?:-20\d\d.*)?\Z")),
)
"""The word by which a model is told not to reason, or hardly. Other models that reason know none."""


@attrs.frozen(kw_only=True)
class Traits:
    """What one server takes.

    Attributes:
        max_tokens_field: How it calls the most tokens of an answer.
        reasoning_field: The field of an assistant's message in which it takes back reasoning; None = in none.
        needs_reasoning: It refuses a tool call without that field, which may be empty.
        takes_top_k: It knows ``top_k``.
        takes_files: It takes ``file`` parts with a PDF.
        takes_user: It knows ``safety_identifier``.
        takes_effort: It knows ``reasoning_effort``, at every model.
        has_all_efforts: It knows more of them than low, medium and high.
        system_role: Where it takes system messages.
        takes_include_usage: It knows ``stream_options``.
    """

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reasoning_field: str | None = None
    needs_reasoning: bool = False
    takes_top_k: bool = False
    takes_files: bool = False
    takes_user: bool = False
    takes_effort: bool = False
    has_all_efforts: bool = False
    system_role: SystemRole = "as-user"
    takes_include_usage: bool = True

    def takes_effort_at(self, model: str) -> bool:
        """Whether ``reasoning_effort`` can be sent for a model; one that does not reason refuses it.

        >>> [Traits().takes_effort_at(model) for model in ("gpt-4o", "gpt-5.2", "openai/o3", "gpt-5-chat-latest")]
        [False, True, True, False]
        """
        return self.takes_effort or _REASONING_MODEL.match(model) is not None

    def effort_for_none(self, model: str) -> str | None:
        """The word by which a model is told not to reason; None = it is not known to have one.

        >>> [Traits().effort_for_none(model) for model in ("gpt-5.2", "openai/gpt-5-mini", "gpt-5-codex", "o3")]
        ['none', 'minimal', None, None]
        >>> Traits(takes_effort=True, has_all_efforts=True).effort_for_none("anthropic/claude-opus-4.5")
        'none'
        """
        if self.takes_effort and self.has_all_efforts:
            return "none"
        return next((word for word, models in _NO_EFFORT if models.match(model)), None)


def takes_developer(base_url: str | None) -> bool:
    """Whether the server at a base URL knows the role ``developer``: OpenAI's own does."""
    return base_url is not None and _is_of(urlsplit(base_url).hostname or "", _OPENAI)


def traits_of(
    base_url: str | None,
    *,
    history_fields: tuple[str, ...] | None = None,
    system_role: SystemRole | None = None,
    takes_include_usage: bool = True,
) -> Traits:
    """Returns what the server at a base URL takes; None = one that this gateway runs itself.

    Args:
        history_fields: The fields of answers that it takes back, if they are configured.
        system_role: Where it takes system messages, if that is configured.
        takes_include_usage: Whether it knows ``stream_options``.

    >>> traits_of("https://api.openai.com/v1").max_tokens_field, traits_of("https://api.deepseek.com").reasoning_field
    ('max_completion_tokens', 'reasoning_content')
    >>> traits_of("http://127.0.0.1:8000/v1").takes_top_k, traits_of("https://api.mistral.ai/v1").takes_top_k
    (True, False)
    """
    host = (urlsplit(base_url).hostname or "") if base_url else ""
    fields = history_fields_of(base_url) if history_fields is None else history_fields
    if fields == HISTORY_FIELDS and not _is_this_machine(host):
        fields = ()  # an unknown provider may refuse what it does not know
    is_openai = _is_of(host, _OPENAI)
    is_local = _is_this_machine(host)
    return Traits(
        max_tokens_field="max_completion_tokens" if is_openai else "max_tokens",
        reasoning_field=next((name for name in ("reasoning_content", "reasoning") if name in fields), None),
        needs_reasoning=_is_of(host, _DEEPSEEK),
        takes_top_k=is_local or _is_of(host, ("openrouter.ai",)),
        takes_files=_is_of(host, _FILES),
        takes_user=is_openai,
        takes_effort=is_local or _is_of(host, _EFFORT),
        has_all_efforts=is_openai or _is_of(host, _EFFORT),
        system_role=system_role or "as-user",
        takes_include_usage=takes_include_usage,
    )


def _is_of(host: str, names: tuple[str, ...]) -> bool:
    return any(host == name or host.endswith(f".{name}") for name in names)


def _is_this_machine(host: str) -> bool:
    """Whether a host is this machine or one of its private network, as far as its name tells.

    >>> [_is_this_machine(host) for host in ("", "localhost", "::1", "10.1.2.3", "vllm", "api.example.com")]
    [True, True, True, True, True, False]
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(".localhost")
    return address.is_loopback or address.is_private
