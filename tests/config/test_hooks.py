"""The store, sessions, hooks and channels in the configuration: invalid settings, and how secrets are kept."""

from __future__ import annotations

import tomllib
from typing import Any, get_args, get_type_hints

import attrs
import pytest

from trigate.config import sections
from trigate.config import structure as configuration
from trigate.config.secrets import Secret
from trigate.config.sections import ChannelConfig, Config, ConfigError, HookConfig, SessionsConfig, StoreConfig

SECRET = "a-secret-of-more-than-24-bytes"
HOOK = f'[hooks.h]\nverification = "github"\nsecrets = ["{SECRET}"]\n'
CALLBACK_SECRET = "whsec_0123456789abcdef0123456789abcdef"
CALLBACK = f'[hooks.h]\ncallback_url = "https://a.example/in"\ncallback_secret = "{CALLBACK_SECRET}"\n'
BOT = '[channels.bot]\ntype = "telegram"\ntoken = "12:abc"\n'
TEAM = f'[channels.team]\ntype = "slack"\ntoken = "xoxb-1"\nsecrets = ["{SECRET}"]\n'


def _structure(text: str, env: dict[str, str] | None = None) -> Config:
    return configuration.structure(tomllib.loads(text), env=env or {}, source="test.toml")


def _problems(text: str, env: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        _structure(text, env)
    return caught.value.problems


def test_without_hooks_any_name_is_accepted() -> None:
    """A missing section differs from an empty one: with the section, names that are not in it are unknown."""
    assert _structure("").hooks is None
    assert _structure("[hooks]").hooks == {}


def test_the_smallest_hook() -> None:
    """An empty table is a hook with the gateway's key and all actions."""
    hooks = _structure("[hooks.h]").hooks
    assert hooks == {"h": HookConfig()}
    assert hooks is not None
    assert hooks["h"].verification == "key"
    assert hooks["h"].actions == get_args(sections.Action)


def test_every_setting_can_be_set() -> None:
    """Each field of a section is a key of its table, under the same name."""
    text = """
        [store]
        path = "/data/t.db"
        run_retention_s = 400000
        session_retention_s = 1
        archive_retention_s = 2
        max_runs = 3
        max_sessions = 4
        object_retention_s = 5
        max_objects = 6
        response_retention_s = 7
        max_responses = 8

        [sessions]
        history_messages = 1
        history_tokens = 2
        wait_s = 3
        idle_reset_s = 4
        active_window_s = 5

        [hooks.h]
        enabled = false
        model = "a/b"
        system = "Be brief."
        parameters = { temperature = 0.5, stop = ["x"], response_format = { type = "json_object" } }
        session = "hook"
        verification = "slack"
        secrets = ["0123456789abcdef01234567"]
        verify_token = "a-token-of-more-than-24-bytes"
        tolerance_s = 60
        expressions = { text = "a.text", from = "a.user", title = "a.title" }
        filter = "a.type == 'x'"
        template = "{title}: {text} {{}}"
        actions = ["chat", "note"]
        reply = "callback"
        callback_url = "https://a.example/in"
        callback_secret = "whsec_0123456789abcdef0123456789abcdef"
        callback_hosts = ["b.example"]
        callback_private = true
        on_disconnect = "finish"
        body_bytes = 10
        rate_per_s = 1.5
        burst = 2
        concurrency = 3
        queue = 4

        [channels.c]
        type = "telegram"
        enabled = false
        token = "1:a"
        model = "a/b"
        system = "Be brief."
        parameters = { max_tokens = 5 }
        session = "sender"
        allow = ["1", "@ada"]
        base_url = "http://127.0.0.1:1"
        mode = "webhook"
        groups = "all"
        secrets = ["0123456789abcdef01234567"]
        edit_interval_s = 2
    """
    config = _structure(text)
    assert config.hooks is not None
    tables: dict[str, Any] = tomllib.loads(text)
    for written, value, default in (
        (tables["store"], config.store, StoreConfig()),
        (tables["sessions"], config.sessions, SessionsConfig()),
        (tables["hooks"]["h"], config.hooks["h"], HookConfig()),
        (tables["channels"]["c"], config.channels["c"], ChannelConfig(type="slack", token=Secret(literal="x"))),
    ):
        names = {field.name for field in attrs.fields(type(value))}
        assert names == set(written) == set(get_type_hints(type(value)))
        assert {name for name in names if getattr(value, name) == getattr(default, name)} == set()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[store]\npath = 1", "store.path: expected a string"),
        ("[store]\nrun_retention_s = 345599", "store.run_retention_s: at least four days (345600)"),
        ("[sessions]\nhistory_messages = 0", "sessions.history_messages: expected 1 to"),
        ("hooks = 1", "hooks: expected a table"),
        ("[hooks]\nh = 1", "hooks.h: expected a table"),
        ("[hooks.'a/b']", "hooks.a/b.name: it has letters, digits"),
        ("[hooks.h]\nmodle = 'x'", "hooks.h: unknown key modle"),
        ("[hooks.h]\nverification = 'none'", "hooks.h.verification: expected 'key' or 'bearer'"),
        ("[hooks.h]\nverification = 'github'", "hooks.h.secrets: required for verification 'github'"),
        (f"[hooks.h]\nsecrets = ['{SECRET}']", "hooks.h.secrets: not used by verification 'key'"),
        (HOOK.replace(SECRET, ""), "hooks.h.secrets.0: the value is empty"),
        (HOOK.replace(SECRET, "x" * 23), "hooks.h.secrets.0: has fewer than 24 bytes"),
        (HOOK.replace(f'"{SECRET}"', '{env = "NOPE"}'), "hooks.h.secrets.0: the environment variable NOPE is not set"),
        (HOOK + f"[keys]\nk = '{SECRET}'", "hooks.h.secrets: one is a key of the gateway"),
        (HOOK + "verify_token = 'short'", "hooks.h.verify_token: has fewer than 24 bytes"),
        (HOOK + f"verify_token = '{SECRET}'", "hooks.h.verify_token: is one of the secrets"),
        ("[hooks.h]\nfilter = 'a['", "hooks.h.filter: 'a[' is not a JMESPath"),
        ("[hooks.h]\nfilter = 1", "hooks.h.filter: expected a JMESPath, got an integer"),
        ("[hooks.h]\nexpressions = {text = '@@'}", "hooks.h.expressions.text: '@@' is not a JMESPath"),
        ("[hooks.h]\nexpressions = {title = 'a'}", "hooks.h.expressions.text: required, if there is no template"),
        ("[hooks.h]\ntemplate = '{text'", "hooks.h.template: expected '}' before end of string"),
        ("[hooks.h]\ntemplate = '{text!r}'", "hooks.h.template: expected plain {name}s"),
        ("[hooks.h]\ntemplate = '{text:>9}'", "hooks.h.template: expected plain {name}s"),
        ("[hooks.h]\ntemplate = '{text.x}'", "hooks.h.template: expected plain {name}s, got {text.x}"),
        ("[hooks.h]\ntemplate = '{}'", "hooks.h.template: expected plain {name}s, got {}"),
        ("[hooks.h]\ntemplate = '{title}'", "hooks.h.template: {title} is none of action, from, text"),
        ("[hooks.h]\nactions = []", "hooks.h.actions: expected at least one"),
        ("[hooks.h]\nactions = ['delete']", "hooks.h.actions.0: expected 'chat' or"),
        ("[hooks.h]\nparameters = {stream = true}", "hooks.h.parameters: stream is not a parameter"),
        ("[hooks.h]\nparameters = {a = 1979-05-27}", None),
        ("[hooks.h]\nreply = 'callback'", "hooks.h.callback_url: required for reply = 'callback'"),
        ("[hooks.h]\ncallback_url = 'https://a.example'", "hooks.h.callback_secret: required for callbacks"),
        ("[hooks.h]\ncallback_hosts = ['a.example']", "hooks.h.callback_secret: required for callbacks"),
        (CALLBACK.replace("https", "ftp"), "hooks.h.callback_url: 'ftp://a.example/in' is not an http"),
        (CALLBACK.replace(CALLBACK_SECRET, "whsec_" + "A" * 28), "hooks.h.callback_secret: has fewer than 24 bytes"),
        (BOT.replace("telegram", "irc"), "channels.bot.type: expected 'telegram' or 'slack'"),
        ("[channels.bot]\ntype = 'telegram'", "channels.bot.token: required, but missing"),
        (BOT + "mode = 'webhook'", "channels.bot.secrets: required, since anybody can call /hooks/bot"),
        (BOT + f"secrets = ['{SECRET}']", "channels.bot.secrets: not used with mode = 'polling'"),
        (TEAM.replace(f'secrets = ["{SECRET}"]', ""), "channels.team.secrets: required"),
        (BOT + "[hooks.bot]", "channels.bot: a hook has that name"),
    ],
)
def test_one_problem(text: str, problem: str | None) -> None:
    """Each fault gives one line that begins with its path. Valid settings give none."""
    if problem is None:
        assert _structure(text).hooks is not None
        return
    [line] = _problems(text)
    assert line.startswith(problem)


def test_secrets_are_resolved() -> None:
    """This covers the secrets of hooks and channels, wherever they are stored."""
    env = {"ONE": SECRET, "TWO": f"{SECRET}-2", "TOKEN": "12:abc"}
    text = '[hooks.h]\nverification = "bearer"\nsecrets = [{env = "ONE"}, {env = "TWO"}]\n'
    text += BOT.replace('"12:abc"', '{env = "TOKEN"}')
    config = _structure(text, env)
    assert config.hooks is not None
    assert [secret.literal for secret in config.hooks["h"].secrets] == [SECRET, f"{SECRET}-2"]
    assert config.channels["bot"].token.literal == "12:abc"
    assert config.disabled == {}


def test_a_channel_without_its_token_is_off() -> None:
    """Like an upstream without its key, the channel is disabled and the others start. A hook without its secret would
    be open, so it is refused."""
    config = _structure(BOT.replace('"12:abc"', '{env = "NOPE"}') + TEAM)
    assert config.disabled == {"channels.bot": "token: the environment variable NOPE is not set"}
    assert _structure(BOT + "enabled = false").disabled == {"channels.bot": "switched off in the configuration"}


def test_no_repr_and_no_problem_shows_a_secret() -> None:
    """The log of a configuration contains no secret."""
    shown = repr(_structure(HOOK + BOT + TEAM + CALLBACK.replace("hooks.h", "hooks.i")))
    assert SECRET not in shown
    assert CALLBACK_SECRET not in shown
    assert "12:abc" not in shown
    assert "xoxb-1" not in shown
    problems = _problems(HOOK + f"[keys]\nk = '{SECRET}'\n" + CALLBACK.replace("hooks.h", "hooks.i") + "nope = 1")
    assert SECRET not in "\n".join(problems)


@pytest.mark.parametrize(
    ("verification", "secret", "problem"),
    [
        ("github", "x" * 23, "has fewer than 24 bytes"),
        ("slack", "hunter2", "has fewer than 24 bytes"),
        ("standard-webhooks", "whsec_" + "A" * 28, "has fewer than 24 bytes"),  # 21, decoded
        ("standard-webhooks", "a-secret-of-more-than-24-bytes", "is not base64"),
        ("bearer", "a secret of more than 24 bytes", "has characters that a header cannot carry"),
    ],
)
def test_secrets_that_verify_nothing(verification: str, secret: str, problem: str) -> None:
    """A hook does not start with a secret that can be guessed or that its scheme cannot use."""
    text = f'[hooks.h]\nverification = "{verification}"\nsecrets = [{{ env = "A" }}]\n'
    assert _problems(text, {"A": secret}) == (f"hooks.h.secrets.0: {problem}",)
