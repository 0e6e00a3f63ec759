"""Routing: four rules in order, and never a silent re-route."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.errors import GatewayError, Unavailable, UnknownModel
from trigate.routing.routes import Aliases, Known, Target, closest, default_target, plan, public_ids

UPSTREAMS: Mapping[str, Known] = {
    "openai": Known(models=("gpt-4o", "gpt-4o-mini", "shared"), default_model="gpt-4o-mini"),
    "openrouter": Known(models=("google/gemini-flash", "shared"), default_model="google/gemini-flash"),
    "qwen": Known(models=("qwen-turbo",), default_model="qwen-turbo", unusable="api_key: DASHSCOPE_API_KEY is not set"),
    "local": Known(models=("smol",), default_model="smol", down="connection refused"),
}
ALIASES = Aliases(
    {
        "fast": (Target("qwen", "qwen-turbo"), Target("openai", "gpt-4o-mini"), Target("local", "smol")),
        "off": (Target("qwen", "qwen-turbo"), Target("qwen", "qwen-max")),
        "openai/gpt-4o-mini": (Target("local", "smol"),),
    }
)
NO_ALIASES = Aliases({})


def _plan(model: str, aliases: Aliases = ALIASES) -> list[str]:
    return [str(target) for target in plan(model, aliases=aliases, upstreams=UPSTREAMS)]


def test_an_alias_is_its_targets() -> None:
    """Rule 1: an alias stands for its targets in order. Disabled ones are left out, and those that are down are not."""
    assert _plan("fast") == ["openai/gpt-4o-mini", "local/smol"]


def test_an_alias_takes_precedence() -> None:
    """An alias that reads like ``upstream/model`` is still the alias, since the configuration names it."""
    assert _plan("openai/gpt-4o-mini") == ["local/smol"]
    assert _plan("openai/gpt-4o-mini", NO_ALIASES) == ["openai/gpt-4o-mini"]


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("openai/gpt-4o", Target("openai", "gpt-4o")),
        ("openai/not-listed", Target("openai", "not-listed")),
        ("openrouter/google/gemini-flash", Target("openrouter", "google/gemini-flash")),
        ("openrouter//x/", Target("openrouter", "/x/")),
        ("openai/default", Target("openai", "default")),
        ("local/smol", Target("local", "smol")),
    ],
)
def test_an_upstream_s_name_decides(model: str, target: Target) -> None:
    """Rule 2: ``upstream/model``, split at the first slash, goes to that upstream, whether the model is listed or the
    upstream is down."""
    assert plan(model, aliases=NO_ALIASES, upstreams=UPSTREAMS) == (target,)


def test_a_bare_id_of_one_upstream() -> None:
    """Rule 3: an id that exactly one upstream lists goes there, even with a slash in it."""
    assert _plan("gpt-4o") == ["openai/gpt-4o"]
    assert _plan("google/gemini-flash") == ["openrouter/google/gemini-flash"]
    assert _plan("smol") == ["local/smol"]


def test_a_bare_id_of_several_upstreams() -> None:
    """An id that several upstreams list is refused, and the error suggests the full ids."""
    with pytest.raises(UnknownModel, match="openai/shared, openrouter/shared") as caught:
        _plan("shared")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "model", ["gpt-4p", "nobody/gpt-4o", "openai/", "/gpt-4o", "/", "GPT-4o", "gpt-4o ", "\x00", "x" * 100_000]
)
def test_anything_else_is_unknown(model: str) -> None:
    """Rule 4: no other spelling, case or owner is guessed. The error is 404 ``model_not_found`` with the param
    ``model``."""
    with pytest.raises(UnknownModel) as caught:
        _plan(model)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 1000


def test_the_closest_ids_are_named() -> None:
    """A mistyped id gets suggestions of similar ids in their full form."""
    with pytest.raises(UnknownModel) as caught:
        plan("openai-gpt-4o", aliases=NO_ALIASES, upstreams=UPSTREAMS)
    assert "Closest: openai/gpt-4o, openai/gpt-4o-mini." in caught.value.message
    with pytest.raises(UnknownModel) as caught:
        plan("zzzzzzzz", aliases=NO_ALIASES, upstreams=UPSTREAMS)
    assert "Closest" not in caught.value.message


@pytest.mark.parametrize("model", ["qwen/qwen-turbo", "qwen-turbo", "off"])
def test_a_disabled_upstream_gives_the_reason(model: str) -> None:
    """A disabled upstream is a 503 with the reason, and no other upstream is used instead."""
    with pytest.raises(Unavailable) as caught:
        _plan(model)
    assert caught.value.status == 503
    assert caught.value.message.count("DASHSCOPE_API_KEY is not set") == 1


def test_default_is_the_first_that_can_serve() -> None:
    """``default`` is the first upstream that is usable, believed up and has a model."""
    assert _plan("default") == ["openai/gpt-4o-mini"]
    off = Known(models=("a",), default_model="a", unusable="off")
    down = Known(models=("b",), default_model="b", down="refused")
    empty = Known()
    good = Known(models=("c",), default_model="c")
    assert default_target({"off": off, "down": down, "empty": empty, "good": good, "openai": good}) == Target(
        "good", "c"
    )


def test_a_default_alias_wins() -> None:
    """``[models.default]`` defines ``default`` where it is set."""
    assert _plan("default", Aliases({"default": (Target("local", "smol"),)})) == ["local/smol"]


def test_no_default_says_why() -> None:
    """When no upstream can serve, the error gives each one's reason. It is a 503, since it may pass."""
    upstreams = {"a": Known(unusable="no key"), "b": Known(down="refused"), "c": Known()}
    with pytest.raises(Unavailable) as caught:
        plan("default", aliases=NO_ALIASES, upstreams=upstreams)
    assert caught.value.status == 503
    assert "a: no key; b: refused; c: lists no model" in caught.value.message
    with pytest.raises(Unavailable, match="none is configured"):
        plan("default", aliases=NO_ALIASES, upstreams={})


def test_default_is_tried_where_all_are_down() -> None:
    """Only a call shows that an upstream is up again, so the first one gets it. An upstream that is not down goes
    first."""
    down = {"a": Known(default_model="m", down="refused"), "b": Known(default_model="n", down="refused")}
    assert plan("default", aliases=NO_ALIASES, upstreams=down) == (Target("a", "m"),)
    assert plan("default", aliases=NO_ALIASES, upstreams={**down, "c": Known(default_model="o")}) == (Target("c", "o"),)


def test_the_echo_is_used_only_without_other_upstreams() -> None:
    """`default` never falls back to the echo because a real upstream is down: its answer would look like a model's."""
    echo = Known(default_model="echo", stands_in=True)
    down = Known(default_model="m", down="refused")
    assert plan("default", aliases=NO_ALIASES, upstreams={"t": echo, "a": down}) == (Target("a", "m"),)
    assert plan("default", aliases=NO_ALIASES, upstreams={"t": echo, "a": Known(unusable="no key")}) == (
        Target("t", "echo"),
    )


def test_public_ids() -> None:
    """``default`` and the aliases come first, then every model with its upstream's name, then the models that one
    upstream alone has by their bare ids. Disabled models are not listed."""
    assert list(public_ids(aliases=ALIASES, upstreams=UPSTREAMS).items()) == [
        ("default", "openai"),
        ("fast", "openai"),
        ("openai/gpt-4o-mini", "local"),
        ("openai/gpt-4o", "openai"),
        ("openai/shared", "openai"),
        ("openrouter/google/gemini-flash", "openrouter"),
        ("openrouter/shared", "openrouter"),
        ("local/smol", "local"),
        ("gpt-4o", "openai"),
        ("gpt-4o-mini", "openai"),
        ("google/gemini-flash", "openrouter"),
        ("smol", "local"),
    ]


def test_a_bare_id_that_means_something_else_is_not_listed() -> None:
    """Not as the model of that name: an alias, ``default``, and an id that names an upstream keep their meaning."""
    upstreams = {
        "a": Known(models=("default", "fast", "b/x", "a")),
        "b": Known(models=("y",)),
        "c": Known(models=("y",), unusable="no key"),
    }
    ids = public_ids(aliases=Aliases({"fast": (Target("b", "y"),)}), upstreams=upstreams)
    assert ids.keys() - {f"{name}/{model}" for name, known in upstreams.items() for model in known.models} == {
        *("default", "fast", "a", "y")
    }


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "m"]), st.lists(st.sampled_from(["m", "b/m", "a", "default", "x/y"]), max_size=4)
    ),
    st.booleans(),
)
def test_what_is_listed_and_what_can_be_called_agree(models: dict[str, list[str]], unusable: bool) -> None:
    """An id that a call accepts because an upstream lists it is listed, with the same owner; and no other one is."""
    upstreams = {
        name: Known(models=tuple(listed), unusable="no key" if unusable and name == "b" else None)
        for name, listed in models.items()
    }
    ids = public_ids(aliases=NO_ALIASES, upstreams=upstreams)
    for model in ["m", "b/m", "a", "x/y", *(f"{name}/{model}" for name in upstreams for model in models[name])]:
        try:
            [target] = plan(model, aliases=NO_ALIASES, upstreams=upstreams)
        except GatewayError:
            assert model not in ids
        else:
            lists_it = target.model in upstreams[target.upstream].models
            assert ids.get(model) == (target.upstream if lists_it else None)


def test_default_is_always_listed() -> None:
    """``default`` is listed even when no upstream can serve it. Then the gateway is its owner."""
    assert public_ids(aliases=NO_ALIASES, upstreams={}) == {"default": "trigate"}
    assert (
        public_ids(aliases=Aliases({"default": (Target("local", "smol"),)}), upstreams=UPSTREAMS)["default"] == "local"
    )


@pytest.mark.parametrize("model", public_ids(aliases=ALIASES, upstreams=UPSTREAMS))
def test_every_listed_id_can_be_called(model: str) -> None:
    """Every listed id has a route."""
    assert _plan(model)


@settings(deadline=None, max_examples=60)
@given(
    st.text(max_size=20) | st.lists(st.sampled_from(["openai", "qwen", "/", "gpt-4o", "smol", "default"])).map("".join)
)
def test_never_a_silent_re_route(model: str) -> None:
    """An upstream is only chosen if the id names it, or if it alone lists the id."""
    try:
        [target] = plan(model, aliases=NO_ALIASES, upstreams=UPSTREAMS)
    except GatewayError:
        return
    named = model == str(target)
    alone = [name for name, known in UPSTREAMS.items() if model in known.models] == [target.upstream]
    assert named or (alone and target.model == model) or model == "default"


def test_closest() -> None:
    """At most three ids are suggested, each once, by the whole id or the part after the last slash, in any case."""
    ids = ["openai/gpt-4o", "openai/gpt-4o-mini", "qwen/qwen-turbo", "a/gpt-4.1", "b/gpt-4.1", "default"]
    assert closest("defualt", ids) == ("default",)
    assert closest("QWEN-TURB", ids) == ("qwen/qwen-turbo",)
    assert closest("qwen/qwen-trubo", ids)[0] == "qwen/qwen-turbo"
    assert 1 < len(closest("gpt-4", ids)) <= 3
    assert len(set(closest("gpt-4", ids))) == len(closest("gpt-4", ids))
    assert closest("", ids) == ()


PATTERNS = Aliases(
    {
        "exact-one": (Target("local", "smol"),),
        "exact-*": (Target("openai", "{model}"), Target("openrouter", "x/{*}-{model}")),
        "*": (Target("local", "any"),),
        "gpt-*-mini": (Target("local", "{*}"),),
    }
)


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("exact-one", ["local/smol"]),
        ("exact-two", ["openai/exact-two", "openrouter/x/two-exact-two"]),
        ("exact-a/b", ["openai/exact-a/b", "openrouter/x/a/b-exact-a/b"]),
        ("exact-{*}{model}", ["openai/exact-{*}{model}", "openrouter/x/{*}{model}-exact-{*}{model}"]),
        ("exact-", ["local/any"]),
        ("gpt-4o-mini", ["local/4o"]),
        ("gpt-mini", ["local/any"]),
        ("gpt-4o", ["local/any"]),
        ("shared", ["local/any"]),
        ("openai/exact-two", ["openai/exact-two"]),
        ("default", ["openai/gpt-4o-mini"]),
    ],
)
def test_a_pattern(model: str, targets: list[str]) -> None:
    """An exact alias and ``upstream/model`` come first, then the longest pattern, then an upstream's list. The ``*``
    stands for at least one character; what it stands for is put into the targets as it is."""
    assert _plan(model, PATTERNS) == targets


def test_a_pattern_is_not_listed() -> None:
    """The bare ids that it matches are, with the owner that calls go to."""
    ids = public_ids(aliases=PATTERNS, upstreams=UPSTREAMS)
    assert not any("*" in model for model in ids)
    assert (ids["exact-one"], ids["gpt-4o"], ids["openai/gpt-4o"]) == ("local", "local", "openai")
