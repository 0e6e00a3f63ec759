"""The description of the HTTP API, in OpenAPI 3.1: the operations of `operations`, and their errors.

The errors are the classes of `trigate.errors`: those whose blame is a provider's only where an upstream is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trigate import errors
from trigate.asgi import health
from trigate.asgi.operations import ANSWERS, SEGMENTS, TEXT, Json, Operation, described
from trigate.openai.endpoints import Format
from trigate.version import __version__

_STATUSES: Mapping[str, tuple[str, ...]] = {
    "upstream_rejected": ("4XX",),
    "upstream_throttled": ("429",),
    "upstream_unsupported": ("405", "501"),
    "upstream_unavailable": ("502", "503"),
    "upstream_error": ("502", "4XX", "5XX"),
}
"""The statuses of the errors whose class has no status of its own."""
_EXAMPLES: Mapping[str, Any] = {  # Any: JSON
    "model": "default",
    "messages": [{"role": "user", "content": "Hello!"}],
    "contents": [{"role": "user", "parts": [{"text": "Hello!"}]}],
    "content": {"parts": [{"text": "Hello!"}]},
    "requests": [{"content": {"parts": [{"text": "Hello!"}]}}],
    "max_tokens": 100,
    "from": "user-id",
    "text": "Hello!",
}
"""Examples of fields; that of another one is a text."""


def document(found: Iterable[Operation]) -> Json:
    """Returns the description of these operations."""
    _, schemas = msgspec.json.schema_components(ANSWERS.values(), ref_template="#/components/schemas/{name}")
    paths: dict[str, Json] = {}
    for operation in found:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trigate",
            "version": __version__,
            "summary": "An OpenAI-compatible gateway to language models.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{name: []} for name in _SCHEMES],
        "paths": paths,
        "components": {
            "securitySchemes": _SCHEMES,
            "schemas": {**schemas, **_ERRORS},
            "responses": {name: response for form in _FORMS for name, response in _error_responses(form).items()},
        },
    }


def _operation(operation: Operation) -> Json:
    names = re.findall(r"\{(\w+)\}", operation.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": SEGMENTS.get(name, TEXT)} for name in names]
    for name, schema in operation.query.items():
        parameters.append({"name": name, "in": "query", "required": name in operation.needs, "schema": schema})
    result: Json = {
        "operationId": operation.id,
        "tags": [operation.group],
        "summary": operation.summary,
        "responses": {**_answers(operation), **_refused(operation)},
    }
    if operation.description:
        result["description"] = operation.description
    if parameters:
        result["parameters"] = parameters
    if operation.body:
        content = {kind: _media(kind, schema) for kind, schema in operation.body.items()}
        result["requestBody"] = {"required": True, "content": content}
    if operation.path in (*health.OPEN, "/"):
        result["security"] = []
    elif operation.path == "/hooks/{name}":  # its settings decide
        result["security"] = [*({name: []} for name in _SCHEMES), {}]
    return result


def _media(kind: str, schema: Json) -> Json:
    names = schema.get("required") or list(schema.get("properties", ()))[:1]
    if kind != "application/json" or not names:
        return {"schema": schema}
    return {"schema": schema, "example": {name: _EXAMPLES.get(name, "Hello!") for name in names}}


def _answers(operation: Operation) -> Json:
    if operation.path == "/v1/realtime":
        return {"101": {"description": "The WebSocket is open."}}
    content = {kind: {"schema": schema} for kind, schema in operation.answer.items()}
    if operation.path == "/ready":
        return {status: {"description": text, "content": content} for status, text in _READY.items()}
    answers: Json = {"200": {"description": "The answer.", "content": content}}
    if operation.path == "/hooks/{name}" and operation.method == "POST":
        answers["202"] = {"description": "The answer comes as a callback.", "content": {"application/json": {}}}
        answers["204"] = {"description": "The hook's filter leaves the message out."}
    elif operation.group == "Passed through":
        answers["2XX"] = answers.pop("200")
    return answers


_READY = {"200": "It is ready.", "503": "It is not, for the reasons in the body."}


def _refused(operation: Operation) -> Json:
    """The responses of an operation that are errors."""
    answered = _answers(operation)
    return {
        status: {"$ref": f"#/components/responses/{operation.form}_{status}"}
        for status, classes in error_classes().items()
        if status not in answered and (operation.reaches_upstreams or any(cls.blame != "provider" for cls in classes))
    }


def error_classes() -> dict[str, list[type[errors.GatewayError]]]:
    """Returns the classes of errors by their statuses, in the order of the statuses; ``4XX`` = any of them."""
    found: dict[str, list[type[errors.GatewayError]]] = {}
    left = list(errors.GatewayError.__subclasses__())
    while left:
        cls = left.pop(0)
        left += cls.__subclasses__()
        if "code" not in vars(cls) or not cls.__module__.startswith("trigate."):
            continue
        own = getattr(cls, "status", None)
        for status in (str(own),) if isinstance(own, int) else _STATUSES[cls.code]:
            found.setdefault(status, []).append(cls)
    found.setdefault("414", []).append(errors.BadRequest)  # a request line that is too long
    return {status: found[status] for status in sorted(found)}


def meaning(cls: type[errors.GatewayError]) -> str:
    """The first sentence of the docstring of an error's class."""
    return described(cls)[0]


def _error_responses(form: Format) -> Json:
    return {
        f"{form}_{status}": {
            "description": " ".join(f"`{cls.code}`: {meaning(cls)}" for cls in classes),
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/Error_{form}"}}},
            "x-codes": [cls.code for cls in classes],
        }
        for status, classes in error_classes().items()
    }


_FORMS: tuple[Format, ...] = ("openai", "anthropic", "gemini", "ollama")
_SCHEMES: Mapping[str, Json] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of the gateway, if it has keys. As x-api-key, api-key or x-goog-api-key it is as good.",
    }
}
_ERRORS: Mapping[str, Json] = {
    "Error_openai": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": ["object", "string"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": ["string", "null"]},
                    "param": {},
                    "code": {"description": "One of x-codes of the response, or a provider's own."},
                    "attempts": {"type": "array", "description": "The attempts that were made, in order."},
                },
            }
        },
    },
    "Error_anthropic": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {"type": "object", "required": ["type", "message"]},
            "request_id": {"type": ["string", "null"]},
        },
    },
    "Error_gemini": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["code", "message", "status"]}},
    },
    "Error_ollama": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}
