"""Checks of single values, and of values that must go together. Pure functions.

The functions that take ``(value, kind)`` are cattrs hooks: they return the value in its final form, or raise ValueError
with what was expected and what was found. The functions named ``…_problems`` return one line for each problem.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import ipaddress
import re
import string
from collections.abc import Collection, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlsplit

import msgspec

from trigate.config.sections import ModelConfig, UpstreamConfig

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*\Z", re.IGNORECASE)
"""Valid names of upstreams, hooks and channels."""
FILE_ORIGIN = "file://"
"""The origin of a page of an application that embeds a browser; in other browsers, that of a file is ``null``."""
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(
    rf"""(?: \[ (?P<address> [0-9a-f:.]+ ) \] | (?P<name> {_LABEL} (?: \. {_LABEL} )* ) \.? )
         (?: : (?P<port> [0-9]{{0,5}} ) )?""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*", re.ASCII | re.IGNORECASE)
HOOK_VALUES = ("text", "from", "action")
"""The values that a template can use without an expression."""


_ENDPOINT = re.compile(r"/(?:chat(?:/completions)?|completions|responses|embeddings|models|messages)\Z")
_ENV_REFERENCE = re.compile(
    r"(?:env[:.]|os\.environ/|\$env:|\$\{?)([A-Z_][A-Z0-9_]*)\}?|%([A-Z_][A-Z0-9_]*)%", re.IGNORECASE
)
_FILE_REFERENCE = re.compile(r"file:(?://)?(.+)", re.IGNORECASE)
_OTHER_NAMES = {
    **dict.fromkeys(("url", "api_base", "endpoint", "host"), "base_url"),
    **dict.fromkeys(("key", "apikey", "token", "api_key_env"), "api_key"),
    **dict.fromkeys(("type", "provider"), "kind"),
    **dict.fromkeys(("target", "upstreams", "fallbacks"), "targets"),
    **dict.fromkeys(("timeout", "timeout_s", "request_timeout"), "total_timeout_s"),
}


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or nothing.

    >>> did_you_mean("modles", ["models", "server"]), did_you_mean("url", ["base_url"]), did_you_mean("x", ["models"])
    ('; did you mean models?', '; did you mean base_url?', '')
    """
    found = _OTHER_NAMES.get(name.lower().replace("-", "_"), "")
    if found not in known:
        found = next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)), "")
    return f"; did you mean {found}?" if found else ""


def secret_literal(value: str) -> str:
    """Checks a secret that is written in the file itself, which may be a reference in another program's spelling.

    Raises:
        ValueError: It is one. Except for the name in the reference, the message does not repeat the value.
    """
    text = value.strip()
    if (found := _ENV_REFERENCE.fullmatch(text)) is not None:
        raise ValueError(f'is this text, not a variable: write {{env = "{found[1] or found[2]}"}}')
    if (found := _FILE_REFERENCE.fullmatch(text)) is not None:
        raise ValueError(f'is this text, not a file: write {{file = "{found[1]}"}}')
    if re.search(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}", text):
        raise ValueError('variables in a text are not replaced: write {env = "NAME"}, with the whole value in it')
    not_null(value)
    return value


def not_null(value: str) -> None:
    """Raises ValueError for a text that stands for no value: TOML has none."""
    if value.strip().lower() in ("null", "nil", "undefined"):
        raise ValueError(f"{value!r} is a text: leave the setting out instead")


def exactly(kind: type, name: str) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"expected {name}, got {kind_of(value)}")
        if isinstance(value, str):
            not_null(value)
        return value

    return structure


def kind_of(value: Any) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        list: "an array",
        dict: "a table",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def not_negative(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"expected a number, got {kind_of(value)}")
    if not 0 <= value < 1e9:  # also refuses nan
        raise ValueError(f"expected 0 or more, got {value}")
    return float(value)


def share(value: Any, kind: Any) -> float:
    number = not_negative(value, kind)
    if number > 1:
        raise ValueError(f"expected 0 to 1, got {value}")
    return number


def whole(low: int, high: int) -> Any:
    def structure(value: Any, _: Any) -> int:
        if type(value) is not int:
            raise ValueError(f"expected an integer, got {kind_of(value)}")
        if not low <= value <= high:
            raise ValueError(f"expected {low} to {high}, got {value}")
        return value

    return structure


def micro_usd(value: Any, _: Any) -> int:
    """US dollars, as a number or a string, in whole micro-dollars.

    >>> micro_usd(0.1, None), micro_usd("12.345678", None)
    (100000, 12345678)
    """
    return _millionths(value, "US dollars", 10**9)


def factor(value: Any, _: Any) -> int:
    """A factor, as a number or a string, in whole millionths.

    >>> factor(0.5, None), factor("1.75", None)
    (500000, 1750000)
    """
    return _millionths(value, "a factor", 1000)


def _millionths(value: Any, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {what}, got {kind_of(value)}")
    try:
        micro = Decimal(str(value)).scaleb(6)
    except InvalidOperation:
        raise ValueError(f"expected {what}, got {value!r}") from None
    if not micro.is_finite() or not 0 <= micro <= most * 10**6:
        raise ValueError(f"expected {what} from 0 to {most}, got {value}")
    if micro != micro.to_integral_value():
        raise ValueError(f"expected at most six decimal places, got {value}")
    return int(micro)


def instant(value: Any, _: Any) -> float:
    """A date and time of TOML, an ISO 8601 text, or POSIX seconds; without an offset it is in UTC.

    >>> instant("2026-12-31", None) == instant("2026-12-31T01:00:00+01:00", None) == instant(1798675200, None)
    True
    """
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"expected a date and time (2026-12-31T00:00:00Z), got {value!r}") from None
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if type(value) not in (int, float) or not 0 <= value < 10**11:
        raise ValueError(f"expected a date and time (2026-12-31T00:00:00Z), got {kind_of(value)}")
    return float(value)


def url(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a URL, got {kind_of(value)}")
    not_null(value)
    if re.match(r"(?:http\+)?unix:|https?://unix:|/", value, re.IGNORECASE):
        raise ValueError("Unix sockets are not supported: let the server listen on http://127.0.0.1:PORT")
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as error:
        raise ValueError("is not a URL" if "@" in value else f"{value!r} is not a URL: {error}") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("a base URL has no credentials, query or fragment (use api_key and headers)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        meant = ""
        if found := re.match(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*(?::\d+)?(?:/|\Z)", value):
            local = re.match(r"localhost|127\.|[^.]*:", found[0]) is not None
            meant = f": write {'http' if local else 'https'}://{value}"
        raise ValueError(f"{value!r} is not an http:// or https:// URL{meant}")
    if parts.hostname.replace(".", "").isdigit():
        try:
            ipaddress.ip_address(parts.hostname)
        except ValueError:
            raise ValueError(f"{parts.hostname} is not an IPv4 address") from None
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"{value!r} has characters that a URL cannot carry")
    return value.rstrip("/")


def base_url(value: Any, kind: Any) -> str:
    found = url(value, kind)
    if (end := _ENDPOINT.search(found)) is not None:
        raise ValueError(f"ends in an endpoint, which Trigate appends: write {found[: end.start()]}")
    return found


def word(value: Any, _: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(f"expected letters, digits, '.', '_' and '-' only, got {value!r}")
    return value


def guardrail(value: Any, _: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9:/_-]+:(?:[1-9][0-9]{0,7}|DRAFT)", value):
        raise ValueError(f"expected ID:VERSION, such as 'a1b2c3:1' or 'a1b2c3:DRAFT', got {value!r}")
    return value


def host_name(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a host name, got {kind_of(value)}")
    bare = f"[{value}]" if value.count(":") > 1 and not value.startswith("[") else value
    host = host_of(bare)
    if host is None or re.search(r":[0-9]*\Z", bare):
        raise ValueError(f"expected a host name without a port or a path, got {value!r}")
    return host  # lower-case, as Host headers are compared


def origin(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected an origin, got {kind_of(value)}")
    if value not in ("*", FILE_ORIGIN) and host_of_origin(value) is None:
        raise ValueError(f'expected "*" or an origin without a path, as "https://app.example", got {value!r}')
    return value.lower()  # lower-case, as browsers send it


def proxy(value: Any, _: Any) -> str:
    if value == "direct":
        return "direct"
    if not isinstance(value, str):
        raise ValueError(f"expected a URL, got {kind_of(value)}")
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    # it may hold a password, so it is not repeated
    if not usable or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError('expected "direct" or http://HOST:PORT')
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("has characters that a URL cannot carry")
    return value.rstrip("/")


def expression(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a JMESPath, got {kind_of(value)}")
    import jmespath  # only webhooks need it

    try:
        jmespath.compile(value)
    except jmespath.exceptions.JMESPathError as error:
        raise ValueError(f"{value!r} is not a JMESPath: {str(error).splitlines()[0]}") from None
    return value


def parameters(value: Any, _: Any) -> dict[str, Any]:
    return _json_object(
        value, ("model", "messages", "stream", "stream_options", "n"), "is not a parameter: the gateway sets it"
    )


def set_fields(value: Any, _: Any) -> dict[str, Any]:
    return _json_object(value, _OWN_FIELDS, "cannot be set: it is the client's")


def info(value: Any, _: Any) -> dict[str, Any]:
    return _json_object(value, ("id", "object"), "cannot be set: it is the gateway's")


def _json_object(value: Any, reserved: Collection[str], refusal: str) -> dict[str, Any]:
    """Checks a table that becomes a JSON object. ``refusal`` follows the name of a field that must not be in it."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a table, got {kind_of(value)}")
    for name in reserved:
        if name in value:
            raise ValueError(f"{name} {refusal}")
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot be encoded as JSON: {error}") from None
    return value


def model_info(value: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a table, got {kind_of(value)}")
    return {model: info(fields, kind) for model, fields in value.items()}


def model_list(value: Any, _: Any) -> Any:
    if value == "discover":
        return value
    if isinstance(value, list) and all(isinstance(id_, str) and id_ for id_ in value):
        return tuple(value)
    raise ValueError('expected "discover" or an array of model ids')


def literal(value: Any, kind: Any) -> Any:
    if value in kind.__args__:
        return value
    hint = did_you_mean(str(value), kind.__args__)
    raise ValueError(f"expected {' or '.join(map(repr, kind.__args__))}, got {value!r}{hint}")


def name_problems(name: str) -> list[str]:
    return [] if NAME.match(name) else ["name: it has letters, digits, '.', '_' and '-' only"]


def template_problems(template: str, expressions: Mapping[str, str]) -> list[str]:
    known = {*HOOK_VALUES, *expressions}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{error} (write a literal brace twice)"]
    problems = []
    for _, value, form, conversion in parts:
        if value is None:
            continue
        if form or conversion or not value.isidentifier():
            problems.append(f"expected plain {{name}}s, got {{{value}}}")
        elif value not in known:
            problems.append(f"{{{value}}} is none of {', '.join(sorted(known))}")
    return problems


_OWN_FIELDS = ("model", "messages", "stream")
"""The fields of a request that no setting changes."""


def edit_problems(upstream: UpstreamConfig) -> list[str]:
    """What does not go together in the settings that change an upstream's requests."""
    renamed = {*upstream.rename, *upstream.rename.values()}
    found = [f"drop: {name} cannot be dropped" for name in _OWN_FIELDS if name in upstream.drop]
    found += [f"rename: {name} cannot be renamed, nor be a new name" for name in _OWN_FIELDS if name in renamed]
    for name in upstream.drop:
        found += [f"drop: {name} is also in {other}" for other in ("set", "rename") if name in getattr(upstream, other)]
    news = list(upstream.rename.values())
    found += [f"rename: several fields become {name}" for name in dict.fromkeys(news) if news.count(name) > 1]
    return found


_REMOTE = ("openai", "anthropic", "azure", "bedrock", "gemini", "vertex", "ollama")
_HAVE_ADDRESS = ("bedrock", "gemini", "vertex")
"""Their base URL has a default."""
_OF_KIND = {
    **dict.fromkeys(("base_url", "api_key", "proxy", "http2"), _REMOTE),
    "api_version": ("azure",),
    **dict.fromkeys(("project", "location"), ("vertex",)),
    **dict.fromkeys(("system_role", "think_tags"), ("openai", "azure", "echo", "local")),
    **dict.fromkeys(("region", "profile", "guardrail"), ("bedrock",)),
    **dict.fromkeys(("gguf", "start", "context_tokens", "parallel", "threads"), ("local",)),
    "words_per_s": ("echo",),
    "responses": ("openai", "azure"),
    "betas": ("anthropic", "bedrock"),
    "count_tokens": ("openai", "anthropic", "gemini", "vertex"),
}


def kind_problems(table: Mapping[str, Any]) -> list[str]:
    """Settings of an upstream that do not match its kind. Takes the raw table, so that a wrong type hides nothing."""
    kind = table.get("kind", "openai")
    if kind not in (*_REMOTE, "echo", "local"):
        return []  # reported by the conversion
    found = []
    if kind in _REMOTE and kind not in _HAVE_ADDRESS and "base_url" not in table:
        found.append(f"base_url: required for kind {kind!r}")
    if kind == "ollama" and re.search(r"/(?:v1|api)/*$", str(table.get("base_url"))):
        found.append("base_url: for kind 'ollama' it ends before /api, and has no /v1: http://127.0.0.1:11434")
    if kind == "bedrock" and "region" not in table:
        found.append("region: required for kind 'bedrock'")
    if "profile" in table and "api_key" in table:
        found.append("profile: not used beside api_key")
    if kind == "vertex" and "project" not in table and "api_key" not in table:
        found.append("project: required for kind 'vertex' without an api_key")
    if str(table.get("api_key")).lower().startswith("bearer "):
        found.append("api_key: the key alone, without 'Bearer', which Trigate adds")
    found += [
        f"{name}: not used by kind {kind!r}" for name, users in _OF_KIND.items() if name in table and kind not in users
    ]
    headers = table.get("headers")
    for header in headers if isinstance(headers, dict) else ():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header):
            found.append(f"headers.{header}: not a header name")
        elif header.lower() in ("host", "content-length", "transfer-encoding", "connection"):
            found.append(f"headers.{header}: the gateway sets this header itself")
    return found


def alias_problems(alias: str, upstreams: Mapping[str, Any]) -> list[str]:
    """What is wrong with the name of an alias that is a pattern."""
    before, star, after = alias.partition("*")
    if "*" in after:
        return [f"models.{alias}: a pattern has one '*', which stands for any text"]
    upstream, slash, _ = before.partition("/")
    if star and slash and upstream in upstreams:
        return [
            f"models.{alias}: matches nothing: an id that begins with {upstream}/ goes to the upstream {upstream!r}"
        ]
    return []


def target_problems(alias: str, targets: list[Any], upstreams: Mapping[str, Any]) -> list[str]:
    found = [] if targets else [f"models.{alias}.targets: expected at least one target"]
    names = ("{model}", "{*}") if "*" in alias else ("{model}",)
    for index, target in enumerate(targets):
        if not isinstance(target, str):
            continue  # reported by the conversion
        upstream, slash, model_id = target.partition("/")
        if not slash or not model_id:
            found.append(f"models.{alias}.targets.{index}: expected 'upstream/model', got {target!r}")
        elif upstream not in upstreams:
            known = f"(there are: {', '.join(sorted(upstreams)) or 'none'}){did_you_mean(upstream, list(upstreams))}"
            found.append(f"models.{alias}.targets.{index}: there is no upstream {upstream!r} {known}")
        found += [
            f"models.{alias}.targets.{index}: {name} stands for nothing here; there is {' and '.join(names)}"
            for name in re.findall(r"\{[^{}]*\}|(?<!\{)\*", model_id)
            if name not in names
        ]
    return found


def strategy_problems(model: ModelConfig) -> list[str]:
    """The settings of a model that do not match its strategy or its targets."""
    problems = []
    if model.affinity != "none" and model.strategy == "hedge":
        problems.append("affinity: not used by strategy 'hedge', which asks two targets")
    if model.weights and model.strategy != "balance":
        problems.append(f"weights: not used by strategy {model.strategy!r}")
    if model.weights and (len(model.weights) != len(model.targets) or not all(model.weights)):
        problems.append("weights: expected one number above 0 for each target")
    return problems


@functools.lru_cache(maxsize=256)
def host_of(text: str) -> str | None:
    """Returns the host of ``host`` or ``host:port``, in lower case; None if the text is not exactly that.

    Stricter than RFC 3986: a name is of letters, digits, ``-`` and ``_``, and nothing is percent-encoded. What other
    parsers take for another host must not pass.

    >>> host_of("App.example:8080"), host_of("[::1]:80"), host_of("localhost."), host_of("127.0.0.1")
    ('app.example', '::1', 'localhost', '127.0.0.1')
    >>> host_of("127.0.0.1%2eevil.example"), host_of("a@b"), host_of("a:99999"), host_of("a..b"), host_of("[::1%25a]")
    (None, None, None, None, None)
    """
    found = _HOST.fullmatch(text)
    if found is None or int(found["port"] or 0) > 65535:
        return None
    if found["name"] is not None:
        name = found["name"].lower()
        return name if len(name) <= 253 else None
    try:
        return str(ipaddress.IPv6Address(found["address"]))
    except ValueError:
        return None


@functools.lru_cache(maxsize=256)
def host_of_origin(text: str) -> str | None:
    """Returns the host of a serialized origin (RFC 6454, 6.1); None if the text is not exactly one, or is ``null``.

    >>> host_of_origin("https://app.example:8443"), host_of_origin("app://obsidian.md")
    ('app.example', 'obsidian.md')
    >>> [host_of_origin(text) for text in ("null", "http://evil.example\\\\@localhost", "http://a/", "//a")]
    [None, None, None, None]
    """
    scheme, separator, rest = text.partition("://")
    return host_of(rest) if separator and _SCHEME.fullmatch(scheme) else None


@functools.lru_cache(maxsize=256)
def is_loopback(host: str | None) -> bool:
    """Whether a name or address is a loopback one. None and "" are: a peer without an address is a Unix socket.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::ffff:127.0.0.1"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    if not host or host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
