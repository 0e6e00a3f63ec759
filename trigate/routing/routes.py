"""Finds the targets that serve a model id. Pure: the state of the upstreams is an argument.

The rules, in this order; a call is never rerouted silently:

1. an alias (``[models.NAME]``, ``default``) stands for its targets;
2. ``upstream/model``, split at the first slash, goes to that upstream, even if its list does not have the model (lists
   are incomplete, and the upstream's own 404 is clearer);
3. an id that a pattern matches (``[models."claude-*"]``) goes to the targets of the longest such pattern;
4. a bare id that exactly one upstream lists goes there; if several list it, the client must choose;
5. anything else is a 404 that names the closest ids.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

import attrs

from trigate.errors import GatewayError, Unavailable, UnknownModel


class Target(NamedTuple):
    """An upstream, and a model id as that upstream knows it. A tuple, as it is looked up several times per call."""

    upstream: str
    model: str

    def __str__(self) -> str:
        return f"{self.upstream}/{self.model}" if self.model else self.upstream

    @classmethod
    def parse(cls, text: str) -> Target:
        """Splits ``upstream/model`` at the first slash.

        >>> Target.parse("openrouter/google/gemini-flash")
        Target(upstream='openrouter', model='google/gemini-flash')
        """
        upstream, _, model = text.partition("/")
        return cls(upstream, model)


@attrs.frozen(kw_only=True)
class Known:
    """What routing needs to know about an upstream.

    Attributes:
        models: The ids that the upstream lists, in its order.
        default_model: The model that ``default`` means here: the configured one, or one of its list; None = none.
        unusable: Why the upstream cannot serve at all (its secret is missing, …); None = it can.
        down: Why the upstream probably cannot serve now; a call that names it is still tried.
        stands_in: It is only a stand-in for a model (the echo), and ``default`` only if there is no other upstream.
        passes: It takes requests that are passed through (`openai.passed_paths`): it has OpenAI's API.
        endpoints: The paths below ``/v1`` that it serves; None = all.
        lacks_endpoints: Of OpenAI's API, it serves only chat completions and responses. One that serves more comes
            before it as ``default``.
    """

    models: tuple[str, ...] = ()
    default_model: str | None = None
    unusable: str | None = None
    down: str | None = None
    stands_in: bool = False
    lacks_endpoints: bool = False
    passes: bool = True
    endpoints: tuple[str, ...] | None = None

    def serves(self, path: str) -> bool:
        """Whether its configuration allows a path below ``/v1``, or one above it.

        >>> known = Known(endpoints=("/files", "v1/chat/completions/"))
        >>> [known.serves(path) for path in ("/files/{id}", "/chat/completions", "/filesystem", "/batches")]
        [True, True, False, False]
        """
        if self.endpoints is None:
            return True
        allowed = [each.strip("/").removeprefix("v1/") for each in self.endpoints]
        return any(f"{path}/".startswith(f"/{each}/") for each in allowed)


class Alias(NamedTuple):
    """An alias, for one id that it stands for.

    Attributes:
        name: That of its ``[models.NAME]``: the id, or a pattern that matches it.
        targets: All its targets.
    """

    name: str
    targets: tuple[Target, ...]


class Aliases:
    """The configured aliases: exact ids, and patterns, which have one ``*`` for any text of at least one character.

    The model of a target may contain ``{model}``, which is the id that was asked for, and, under a pattern, ``{*}``,
    which is the text that its ``*`` stands for.

    >>> longer = {"claude-3-*": (Target("c", "m"),)}
    >>> aliases = Aliases({"claude-*": (Target("a", "{model}"), Target("b", "x/{*}")), **longer})
    >>> [str(target) for target in aliases.find("claude-9", ()).targets], aliases.find("claude-3-x", ()).name
    (['a/claude-9', 'b/x/9'], 'claude-3-*')
    >>> aliases.find("claude-", ()), aliases.find("a/claude-9", ("a",))
    (None, None)

    Attributes:
        exact: The targets of the exact ids.
        patterns: For each pattern, the longest one first: its name, what is before and after the ``*``, its targets.
    """

    def __init__(self, configured: Mapping[str, tuple[Target, ...]]) -> None:
        self.exact = {name: _filled(of, name, "") for name, of in configured.items() if "*" not in name}
        self.patterns: list[tuple[str, str, str, tuple[Target, ...]]] = []
        for name, targets in sorted(configured.items(), key=lambda item: -len(item[0])):
            before, star, after = name.partition("*")
            if star:
                self.patterns.append((name, before, after, targets))

    def find(self, model: str, upstreams: Container[str]) -> Alias | None:
        """Finds the alias that stands for an id; None = there is none, or the id is ``upstream/model``.

        Args:
            upstreams: The names of all upstreams.
        """
        if model in self.exact:
            return Alias(model, self.exact[model])
        if not self.patterns or model == "default":
            return None
        target = Target.parse(model)
        if target.model and target.upstream in upstreams:
            return None
        for name, before, after, targets in self.patterns:
            if len(model) >= len(name) and model.startswith(before) and model.endswith(after):
                return Alias(name, _filled(targets, model, model[len(before) : len(model) - len(after)]))
        return None


def _filled(targets: tuple[Target, ...], model: str, part: str) -> tuple[Target, ...]:
    """Puts the id and the text of the ``*`` into the targets; neither of them is searched for a name."""
    return tuple(
        Target(upstream, part.join([text.replace("{model}", model) for text in template.split("{*}")]))
        for upstream, template in targets
    )


def plan(model: str, *, aliases: Aliases, upstreams: Mapping[str, Known]) -> tuple[Target, ...]:
    """Returns the targets for a model id, in the order in which to try them; at least one.

    Raises:
        UnknownModel: The id is not known, or ambiguous.
        Unavailable: Its upstreams are disabled; the message says why.
    """
    alias = aliases.find(model, upstreams)
    if alias is not None:
        return _usable(model, alias.targets, upstreams)
    if model == "default":
        return (default_target(upstreams),)
    target = Target.parse(model)
    if target.model and target.upstream in upstreams:
        return _usable(model, (target,), upstreams)
    owners = [name for name, known in upstreams.items() if model in known.models]
    owners = [name for name in owners if upstreams[name].unusable is None] or owners
    if len(owners) == 1:
        return _usable(model, (Target(owners[0], model),), upstreams)
    if owners:
        choices = ", ".join(f"{name}/{model}" for name in owners)
        raise UnknownModel(model, reason=f"Several upstreams have it; choose one: {choices}.")
    raise UnknownModel(model, closest=closest(model, public_ids(aliases=aliases, upstreams=upstreams)))


def _usable(model: str, targets: tuple[Target, ...], upstreams: Mapping[str, Known]) -> tuple[Target, ...]:
    usable = tuple(target for target in targets if upstreams[target.upstream].unusable is None)
    if not usable:
        reasons = "; ".join(
            f"{name}: {upstreams[name].unusable}" for name in dict.fromkeys(t.upstream for t in targets)
        )
        raise Unavailable(f"The model {model!r} is configured, but its upstreams are disabled ({reasons}).", status=503)
    return usable


def default_target(upstreams: Mapping[str, Known]) -> Target:
    """Returns the meaning of ``default`` if it is no alias: the first upstream that can serve, with its default model.

    If all are probably down, the first one is tried nevertheless: that is how its recovery is noticed.

    Raises:
        Unavailable: No enabled upstream has a model.
    """
    candidates = [
        ((known.stands_in, known.lacks_endpoints, known.down is not None), Target(name, known.default_model))
        for name, known in upstreams.items()
        if known.unusable is None and known.default_model is not None
    ]
    if candidates:
        return min(candidates, key=lambda candidate: candidate[0])[1]
    reasons = [f"{name}: {known.unusable or known.down or 'lists no model'}" for name, known in upstreams.items()]
    raise Unavailable(f"No upstream can serve now ({'; '.join(reasons) or 'none is configured'}).", status=503)


def public_ids(*, aliases: Aliases, upstreams: Mapping[str, Known]) -> dict[str, str]:
    """Every id that ``GET /v1/models`` lists, with its owner: ``default`` and aliases first, then by upstream, then the
    bare ids of models that one upstream alone has. A pattern is no model, so it is not listed."""
    ids = {}
    if "default" not in aliases.exact:
        try:
            ids["default"] = default_target(upstreams).upstream
        except GatewayError:
            ids["default"] = "trigate"
    for name, targets in aliases.exact.items():
        if (owner := _owner(targets, upstreams)) is not None:
            ids[name] = owner
    for name, known in upstreams.items():
        if known.unusable is None:
            for model in known.models:
                ids.setdefault(f"{name}/{model}", name)
    owners: dict[str, str | None] = {}
    for name, known in upstreams.items():
        if known.unusable is None:
            for model in set(known.models):
                owners[model] = None if model in owners else name
    for name, known in upstreams.items():
        for model in known.models:
            if owners.get(model) == name and _is_bare(model, aliases, upstreams):
                alias = aliases.find(model, upstreams)  # a pattern
                owner = name if alias is None else _owner(alias.targets, upstreams)
                if owner is not None:
                    ids.setdefault(model, owner)
    return ids


def _owner(targets: tuple[Target, ...], upstreams: Mapping[str, Known]) -> str | None:
    """The upstream of the first usable target."""
    return next((target.upstream for target in targets if upstreams[target.upstream].unusable is None), None)


def _is_bare(model: str, aliases: Aliases, upstreams: Container[str]) -> bool:
    """Whether an id means the model of that name, or a pattern, and not an alias or ``upstream/model``."""
    target = Target.parse(model)
    named = target.model and target.upstream in upstreams
    return model not in ("", "default") and model not in aliases.exact and not named


def closest(model: str, ids: Iterable[str]) -> tuple[str, ...]:
    """Up to three ids that are most similar to a mistyped one, as a whole or in their last part.

    >>> closest("gpt-4p", ["openai/gpt-4o", "qwen/qwen-turbo"])
    ('openai/gpt-4o',)
    """
    by_text: dict[str, str] = {}
    for id_ in ids:
        by_text.setdefault(id_.lower(), id_)
        by_text.setdefault(id_.rpartition("/")[2].lower(), id_)
    found = difflib.get_close_matches(model[:100].lower(), by_text, n=6, cutoff=0.6)
    return tuple(dict.fromkeys(by_text[text] for text in found))[:3]
