"""Every operation of the HTTP API: each route with its methods, parameters, bodies and answers.

They are made of the routes themselves: the endpoints of the data plane, the paths that are passed through, the probes,
and the views of the control plane, whose docstrings describe them. So a new route is one of them without a line here.
Where a route has more to say than its code does (the fields of a body, the type of a parameter), a table below has it.

Requests to the data plane are described as far as the gateway checks them; the upstream validates the rest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import attrs
import msgspec

from trigate.asgi import health, status_events
from trigate.asgi.quart_app import ControlPlane
from trigate.asgi.routes.ollama import MANAGED
from trigate.config import json_schema
from trigate.config.key_sections import KeySettings
from trigate.config.values import Action
from trigate.dialects import gemini
from trigate.dialects.endpoints import ENDPOINTS, RESPONSES, find_endpoint
from trigate.openai.endpoints import Endpoint, Format
from trigate.openai.passed_paths import PASSED
from trigate.page.assets import ASSETS
from trigate.status.inflight import MAX_LIMIT
from trigate.status.schema import Status, StreamList
from trigate.store.reports import UsageColumn

_PLACEHOLDER = re.compile(r"<(?:[^<>]*:)?(\w+)>")
"""In a rule of Quart's."""
Json = dict[str, Any]  # Any: JSON of any shape

TEXT: Json = {"type": "string", "minLength": 1}
_ANYTHING: Json = {"type": ["string", "number", "boolean", "array", "object"]}
"""Anything but null."""
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "required": ["role"], "properties": {"role": {"type": "string"}}},
}
_ROLES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string"}},
    },
}
"""Messages in Anthropic's format."""
_CONTENTS: Json = {"type": ["array", "object"], "minItems": 1, "items": {"type": ["object", "string", "null"]}}
_FIELDS: Mapping[str, Json] = {
    "messages": _MESSAGES,
    "contents": _CONTENTS,
    "max_tokens": {"type": "integer", "minimum": 1},
    "requests": {**_CONTENTS, "type": "array"},
}
"""The schemas of those required fields of calls that the gateway looks into."""
_ITEM = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": {"type": "string"}},
}
_INPUT: Json = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ITEM}]}
"""Of a response call: an upstream without that API needs it."""
_LIMITS: Mapping[str, int] = {"status": MAX_LIMIT, "sessions": 100}
"""The largest ``limit`` of the views of a blueprint."""
_BODIES: Mapping[str, Json] = {
    "ollama.show": {"type": "object", "required": ["model"], "properties": {"model": TEXT}},
    "ollama.manage": {"type": "object"},
}
"""The bodies of the control plane's requests by their views; another view that takes one takes any object."""
_OVERLAP: Json = {"type": "object", "properties": {"overlap_s": {"type": "number", "minimum": 0}}}
_WITHOUT_BODY = ("sessions.reset_session",)
ANSWERS: Mapping[str, type[msgspec.Struct]] = {"status.status": Status, "status.list_streams": StreamList}
"""The types of answers, where there is one; another answer is some object."""
_COLUMN = "|".join(get_args(UsageColumn))
_MOMENT: Json = {
    "type": "string",
    "format": "date",
    "description": "A date, or a time of ISO 8601; in UTC, if it has no offset.",
}
_PARAMETERS: Mapping[tuple[str, str], Json] = {
    **{(f"reports.{view}", name): _MOMENT for view in ("get_usage", "list_exchanges") for name in ("from", "to")},
    ("reports.get_usage", "group_by"): {"type": "string", "pattern": f"^(?:{_COLUMN})(?:,(?:{_COLUMN}))*$"},
    ("reports.get_usage", "format"): {"type": "string", "enum": ["json", "csv"]},
    ("reports.list_exchanges", "failed"): {"type": "string", "enum": ["true", "false"]},
    ("sessions.list_messages", "after"): {"type": "integer", "minimum": 0},
    ("sessions.list_messages", "archived"): {"type": "string", "enum": ["true", "false"]},
}
"""The schemas of query parameters by view and name; of another one, it is a text, or the number of a ``limit``."""
_TYPES: Mapping[str, tuple[str, ...]] = {
    "api.docs": ("text/html",),
    "api.llms": ("text/plain",),
    "metrics.scrape": ("text/plain", "application/openmetrics-text"),
    "page.asset": ("text/javascript", "text/css", "image/svg+xml", "text/html"),
    "page.index": ("text/html", "text/plain"),
    "reports.get_usage": ("application/json", "text/csv"),
}
"""The content types of answers that are not only JSON."""
_NAMES: Mapping[Format, str] = {
    "openai": "OpenAI's format",
    "anthropic": "Anthropic's format",
    "gemini": "Gemini's format",
    "ollama": "Ollama's format",
    "bedrock": "Bedrock's format",
}


@attrs.frozen(kw_only=True)
class Operation:
    """A method of a path.

    Attributes:
        path: With ``{name}`` for each of its parameters.
        group: The heading under which it is shown.
        query: The schemas of its query parameters by their names.
        needs: Those of them that are required.
        body: The content types of its body, each with its schema; empty = it has none.
        answer: The same of its answer with the status 200.
        form: The format of its errors.
        reaches_upstreams: Its errors may be an upstream's.
    """

    method: str
    path: str
    group: str
    summary: str
    description: str = ""
    query: Mapping[str, Json] = attrs.field(factory=dict)
    needs: tuple[str, ...] = ()
    body: Mapping[str, Json] = attrs.field(factory=dict)
    answer: Mapping[str, Json] = attrs.field(factory=dict)
    form: Format = "openai"
    reaches_upstreams: bool = False

    @property
    def id(self) -> str:
        """Its name: unique, and the same in every version."""
        return "_".join([self.method.lower(), *re.findall(r"\w+", self.path)])


# -- the operations ---------------------------------------------------------------------------------------------------


def operations_of(app: ControlPlane) -> list[Operation]:
    """Returns every operation of the gateway; those of the control plane are the views of its application."""

    def views() -> Iterator[tuple[str, str, str, Callable[..., Any]]]:
        for rule in app.url_map.iter_rules():
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                path = _PLACEHOLDER.sub(r"{\1}", rule.rule)
                yield method, path, rule.endpoint, app.view_functions[rule.endpoint]

    return _operations(views(), app.parameters)


def _operations(
    views: Iterable[tuple[str, str, str, Callable[..., Any]]], parameters: Mapping[str, tuple[str, ...]]
) -> list[Operation]:
    """Returns every operation of the gateway.

    Args:
        views: The control plane's: method, path, name (``blueprint.function``) and function.
        parameters: The query parameters that a view knows, by its name.
    """
    found = [_call(path, endpoint) for path, endpoint in ENDPOINTS.items()]
    for method in gemini.METHODS:
        of_method = find_endpoint(f"/v1beta/models/m:{method}", b"alt=sse")
        assert of_method is not None, method
        found.append(_call(f"/v1beta/models/{{model}}:{method}", of_method.endpoint))
    found += _passed()
    found.append(
        Operation(
            method="GET",
            path="/v1/realtime",
            group="Passed through",
            summary="The WebSocket of OpenAI's realtime API",
            description="A WebSocket handshake; for any other request, there is nothing here.",
            query={"model": TEXT},
            reaches_upstreams=True,
        )
    )
    found += _hooks()
    bodies = {**_BODIES, **_settings_of_keys()}
    found += [_view(*view, parameters, bodies) for view in views]
    found += [
        Operation(
            method="GET",
            path=path,
            group="Control plane",
            summary={"/health": "Whether the process runs", "/ready": "Whether it can serve calls"}[path],
            answer={"application/json": {"type": "object", "required": ["status"]}},
        )
        for path in health.PATHS
    ]
    found.append(
        Operation(
            method="GET",
            path=status_events.PATH,
            group="Control plane",
            summary="The state of the gateway and its exchanges in flight, twice a second, as a stream of events",
            answer={"text/event-stream": {}},
        )
    )
    return found


def _call(path: str, endpoint: Endpoint) -> Operation:
    """Describes an endpoint of the data plane."""
    properties: Json = {
        name: {} if name in endpoint.nullable else _FIELDS.get(name, _ANYTHING) for name in endpoint.required
    }
    if endpoint.format == "anthropic":
        properties["messages"] = _ROLES
    required = list(endpoint.required)
    if endpoint is RESPONSES:
        properties["input"], required = _INPUT, ["input"]
    streams = endpoint.format != "gemini" or "stream" in path  # there, the path decides
    if "{model}" not in path:
        model = {"type": ["string", "null"], "minLength": 1} if endpoint.model_optional else TEXT
        properties = {"model": model, **properties}
        required = required if endpoint.model_optional else ["model", *required]
        properties["stream"] = {"type": ["boolean", "null"]}
        if endpoint.format in ("openai", "anthropic"):
            properties["stream_options"] = {"type": ["object", "null"]}
    schema = {"type": "object", "required": required, "properties": properties}
    if endpoint.answer == "bytes":
        answer: Json = {"application/octet-stream": {}, "audio/*": {}}
    else:
        answer = {"application/json": {"type": ["object", "array"] if "stream" in path else "object"}}
    if streams:
        answer[endpoint.stream_type.partition(";")[0]] = {}
    needs = ", ".join(f"`{name}`" for name in required)
    return Operation(
        method="POST",
        path=path,
        group=f"Calls in {_NAMES[endpoint.format]}",
        summary=_words(path),
        description=f"A call in {_NAMES[endpoint.format]}. The gateway requires {needs or 'no field'}; the upstream "
        "validates the rest.",
        body={"application/json": schema},
        answer=answer,
        form=endpoint.format,
        reaches_upstreams=True,
    )


def _words(path: str) -> str:
    """A path as words.

    >>> _words("/v1/chat/completions"), _words("/v1beta/models/{model}:countTokens")
    ('Chat completions', 'Count tokens')
    """
    name = path.rpartition(":")[2].removeprefix("/v1/").removeprefix("/api/")
    text = re.sub(r"(?<=[a-z])([A-Z])", lambda found: " " + found[1].lower(), re.sub(r"[/_]", " ", name))
    return text[:1].upper() + text[1:]


def _passed() -> Iterator[Operation]:
    for each in PASSED:
        path = f"/v1{each.endpoint.path}"
        takes_form = each.endpoint.path.startswith(("/audio", "/images", "/files", "/uploads"))
        for method in each.methods:
            body: Json = {}
            if method == "POST":
                body = {"multipart/form-data" if takes_form else "application/json": {"type": "object"}}
            yield Operation(
                method=method,
                path=path,
                group="Passed through",
                summary=f"{method.capitalize()} {re.sub(r'[{}]', '', each.endpoint.path[1:]).replace('/', ' ')}",
                description="Goes to one upstream as it is: that of the object in its path, that of its model, or the "
                "one that the header x-trigate-upstream names. So does its answer, with the upstream's own status.",
                body=body,
                answer={"*/*": {}},
                reaches_upstreams=True,
            )


def _hooks() -> Iterator[Operation]:
    schema = {
        "type": "object",
        "required": ["text", "from"],
        "properties": {
            "text": TEXT,
            "from": {"type": "string", "minLength": 1, "maxLength": 256},
            "action": {"enum": list(Action.__args__)},  # type: ignore[attr-defined]
        },
    }
    yield Operation(
        method="POST",
        path="/hooks/{name}",
        group="Webhooks",
        summary="A message to a language model",
        description="The hook's settings say how a request is authenticated, and which JSON it has; without "
        "settings it is this one. The answer comes at once, as a stream, or with 202 and a signed callback, which a "
        "field `callback_url` asks for.",
        body={"application/json": schema},
        answer={"application/json": {"type": "object"}, "text/event-stream": {}},
        reaches_upstreams=True,
    )
    yield Operation(
        method="GET",
        path="/hooks/{name}",
        group="Webhooks",
        summary="The challenge of a platform that verifies the URL",
        description="For a hook with a `verify_token`; other hooks answer 405.",
        needs=("hub.mode",),
        query={"hub.mode": {"enum": ["subscribe"]}, "hub.challenge": {"type": "string"}, "hub.verify_token": TEXT},
        answer={"text/plain": {"type": "string"}},
    )


def _settings_of_keys() -> dict[str, Json]:
    """The bodies that make and change a key have the settings of ``[keys.NAME]``."""
    settings = json_schema.table(KeySettings)
    names = {"name": TEXT}
    made = {**settings, "required": ["name"], "properties": {**names, **settings["properties"]}}
    return {"keys.create_key": made, "keys.update_key": settings, "keys.rotate_key": _OVERLAP}


def _view(
    method: str,
    path: str,
    name: str,
    function: Callable[..., Any],
    parameters: Mapping[str, tuple[str, ...]],
    bodies: Mapping[str, Json],
) -> Operation:
    """Describes a view of the control plane by its docstring."""
    summary, description = described(function)
    blueprint = name.partition(".")[0]
    takes_body = method in ("POST", "PUT", "PATCH") and name not in _WITHOUT_BODY
    kind = ANSWERS.get(name)
    types = _TYPES.get(name, ("application/json",))
    answer: Json = {each: {"type": "object" if each == "application/json" else "string"} for each in types}
    return Operation(
        method=method,
        path=path,
        group="Models" if blueprint in ("models", "ollama") else "Control plane",
        summary=summary or name,
        description=description,
        query={each: _parameter(name, each) for each in parameters.get(name, ())},
        body={"application/json": bodies.get(name, {"type": "object"})} if takes_body else {},
        answer=answer if kind is None else {"application/json": {"$ref": f"#/components/schemas/{kind.__name__}"}},
        form="gemini" if gemini.is_own(path) else "ollama" if blueprint == "ollama" else "openai",
    )


def _parameter(view: str, name: str) -> Json:
    if name == "limit":
        return {"type": "integer", "minimum": 1, "maximum": _LIMITS.get(view.partition(".")[0], MAX_LIMIT)}
    return _PARAMETERS.get((view, name), TEXT)


def described(function: Callable[..., Any]) -> tuple[str, str]:
    """Returns the first sentence of a docstring, and the rest of it without its sections, as plain text."""
    text = re.split(r"\n\n\w+:\n", inspect.getdoc(function) or "")[0]
    plain = re.sub(r"`+([^`]+)`+", r"`\1`", " ".join(text.split()))
    first, dot, rest = plain.partition(". ")
    return first + dot.strip(), rest


SEGMENTS: Mapping[str, Json] = {
    "file": {"enum": list(ASSETS)},
    "what": {"enum": list(MANAGED)},
    "model": {**TEXT, "examples": ["default"]},
}
"""The schemas of parameters in paths by their names; another one is a text."""
