"""Routing: four rules in their order, and never a silent re-route."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.errors import GatewayError, Unavailable, UnknownModel
from trigate.routing.routes import Known, Target, closest, default_target, plan, public_ids

UPSTREAMS: Mapping[str, Known] = {
    "openai": Known(models=("gpt-4o", "gpt-4o-mini", "shared"), default_model="gpt-4o-mini"),
    "openrouter": Known(models=("google/gemini-flash", "shared"), default_model="google/gemini-flash"),
    "qwen": Known(models=("qwen-turbo",), default_model="qwen-turbo", unusable="api_key: DASHSCOPE_API_KEY is not set"),
    "local": Known(models=("smol",), default_model="smol", down="connection refused"),
}
ALIASES: Mapping[str, tuple[Target, ...]] = {
    "fast": (Target("qwen", "qwen-turbo"), Target("openai", "gpt-4o-mini"), Target("local", "smol")),
    "off": (Target("qwen", "qwen-turbo"), Target("qwen", "qwen-max")),
    "openai/gpt-4o-mini": (Target("local", "smol"),),
}


def _plan(model: str, aliases: Mapping[str, tuple[Target, ...]] = ALIASES) -> list[str]:
    return [str(target) for target in plan(model, aliases=aliases, upstreams=UPSTREAMS)]


def test_an_alias_is_its_targets() -> None:
    """Rule 1: an alias is its targets in their order; those that are switched off are left out, those down are not."""
    assert _plan("fast") == ["openai/gpt-4o-mini", "local/smol"]


def test_an_alias_goes_before_everything() -> None:
    """An alias that reads like ``upstream/model`` is still the alias: whoever configured it meant it."""
    assert _plan("openai/gpt-4o-mini") == ["local/smol"]
    assert _plan("openai/gpt-4o-mini", {}) == ["openai/gpt-4o-mini"]


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
    """Rule 2: ``upstream/model``, split at the first slash, goes there, listed or not, down or not."""
    assert plan(model, aliases={}, upstreams=UPSTREAMS) == (target,)


def test_a_bare_id_of_one_upstream() -> None:
    """Rule 3: an id that exactly one upstream lists goes there, also one with a slash in it."""
    assert _plan("gpt-4o") == ["openai/gpt-4o"]
    assert _plan("google/gemini-flash") == ["openrouter/google/gemini-flash"]
    assert _plan("smol") == ["local/smol"]


def test_a_bare_id_of_several_upstreams() -> None:
    """An id that several upstreams list is nobody's: the client is told what it can say instead."""
    with pytest.raises(UnknownModel, match="openai/shared, openrouter/shared") as caught:
        _plan("shared")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "model", ["gpt-4p", "nobody/gpt-4o", "openai/", "/gpt-4o", "/", "GPT-4o", "gpt-4o ", "\x00", "x" * 100_000]
)
def test_anything_else_is_unknown(model: str) -> None:
    """Rule 4: no other spelling, case or owner is guessed at; 404 ``model_not_found``, the param is the model."""
    with pytest.raises(UnknownModel) as caught:
        _plan(model)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 1000


def test_the_closest_ids_are_named() -> None:
    """A mistyped id gets the ids that look like it, as they can be asked for."""
    with pytest.raises(UnknownModel) as caught:
        plan("openai-gpt-4o", aliases={}, upstreams=UPSTREAMS)
    assert "Closest: openai/gpt-4o, openai/gpt-4o-mini." in caught.value.message
    with pytest.raises(UnknownModel) as caught:
        plan("zzzzzzzz", aliases={}, upstreams=UPSTREAMS)
    assert "Closest" not in caught.value.message


@pytest.mark.parametrize("model", ["qwen/qwen-turbo", "qwen-turbo", "off"])
def test_a_model_that_is_switched_off_says_why(model: str) -> None:
    """An upstream that cannot be used is 503 with the reason, once, and nobody else is asked instead."""
    with pytest.raises(Unavailable) as caught:
        _plan(model)
    assert caught.value.status == 503
    assert caught.value.message.count("DASHSCOPE_API_KEY is not set") == 1


def test_default_is_the_first_that_can_serve() -> None:
    """``default`` is the first upstream, in order, that is usable, believed up and has a model."""
    assert _plan("default") == ["openai/gpt-4o-mini"]
    off = Known(models=("a",), default_model="a", unusable="off")
    down = Known(models=("b",), default_model="b", down="refused")
    empty = Known()
    good = Known(models=("c",), default_model="c")
    assert default_target({"off": off, "down": down, "empty": empty, "good": good, "openai": good}) == Target(
        "good", "c"
    )


def test_a_default_alias_wins() -> None:
    """``[models.default]`` is what default means where it is set."""
    assert _plan("default", {"default": (Target("local", "smol"),)}) == ["local/smol"]


def test_no_default_says_why() -> None:
    """Where nobody can serve, each upstream's reason is named: 503, since it may pass."""
    upstreams = {"a": Known(unusable="no key"), "b": Known(down="refused"), "c": Known()}
    with pytest.raises(Unavailable) as caught:
        plan("default", aliases={}, upstreams=upstreams)
    assert caught.value.status == 503
    assert "a: no key; b: refused; c: lists no model" in caught.value.message
    with pytest.raises(Unavailable, match="none is configured"):
        plan("default", aliases={}, upstreams={})


def test_default_is_tried_where_all_are_down() -> None:
    """Only a call shows that an upstream is up again, so the first one gets it; one that is not down goes first."""
    down = {"a": Known(default_model="m", down="refused"), "b": Known(default_model="n", down="refused")}
    assert plan("default", aliases={}, upstreams=down) == (Target("a", "m"),)
    assert plan("default", aliases={}, upstreams={**down, "c": Known(default_model="o")}) == (Target("c", "o"),)


def test_the_echo_stands_in_only_where_there_is_nothing_else() -> None:
    """`default` never falls back to the echo because a real upstream is down: its answer would look like one."""
    echo = Known(default_model="echo", stands_in=True)
    down = Known(default_model="m", down="refused")
    assert plan("default", aliases={}, upstreams={"t": echo, "a": down}) == (Target("a", "m"),)
    assert plan("default", aliases={}, upstreams={"t": echo, "a": Known(unusable="no key")}) == (Target("t", "echo"),)


def test_public_ids() -> None:
    """``default`` and the aliases come first, then every model under its upstream; what is off is not listed."""
    assert list(public_ids(aliases=ALIASES, upstreams=UPSTREAMS).items()) == [
        ("default", "openai"),
        ("fast", "openai"),
        ("openai/gpt-4o-mini", "local"),
        ("openai/gpt-4o", "openai"),
        ("openai/shared", "openai"),
        ("openrouter/google/gemini-flash", "openrouter"),
        ("openrouter/shared", "openrouter"),
        ("local/smol", "local"),
    ]


def test_default_is_always_listed() -> None:
    """``default`` is an id even while nobody can serve it; then the gateway owns it."""
    assert public_ids(aliases={}, upstreams={}) == {"default": "trigate"}
    assert public_ids(aliases={"default": (Target("local", "smol"),)}, upstreams=UPSTREAMS)["default"] == "local"


@pytest.mark.parametrize("model", public_ids(aliases=ALIASES, upstreams=UPSTREAMS))
def test_what_is_listed_can_be_asked_for(model: str) -> None:
    """Every listed id leads somewhere."""
    assert _plan(model)


@settings(deadline=None, max_examples=60)
@given(
    st.text(max_size=20) | st.lists(st.sampled_from(["openai", "qwen", "/", "gpt-4o", "smol", "default"])).map("".join)
)
def test_never_a_silent_re_route(model: str) -> None:
    """Whatever is asked for, an upstream is only chosen if the id names it, or if it alone lists the id."""
    try:
        [target] = plan(model, aliases={}, upstreams=UPSTREAMS)
    except GatewayError:
        return
    named = model == str(target)
    alone = [name for name, known in UPSTREAMS.items() if model in known.models] == [target.upstream]
    assert named or (alone and target.model == model) or model == "default"


def test_closest() -> None:
    """At most three ids, by the whole or by the part after the last slash, whatever the case, each once."""
    ids = ["openai/gpt-4o", "openai/gpt-4o-mini", "qwen/qwen-turbo", "a/gpt-4.1", "b/gpt-4.1", "default"]
    assert closest("defualt", ids) == ("default",)
    assert closest("QWEN-TURB", ids) == ("qwen/qwen-turbo",)
    assert closest("qwen/qwen-trubo", ids)[0] == "qwen/qwen-turbo"
    assert 1 < len(closest("gpt-4", ids)) <= 3
    assert len(set(closest("gpt-4", ids))) == len(closest("gpt-4", ids))
    assert closest("", ids) == ()
