"""The description of the API for people (`render`) and for language models (`as_markdown`). Pure.

The page is one file without a script. Its policy allows nothing but its own style, which is allowed by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trigate.asgi.openapi import error_classes, meaning
from trigate.asgi.operations import Json

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5d9e0, #3a3f47); --quiet: light-dark(#555b66, #a9b0bb);
  --code: light-dark(#f1f3f6, #22262c); --link: light-dark(#0b57c4, #8ab8ff); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1rem 6rem; font: 16px/1.5 system-ui, sans-serif; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; background: var(--code); border-radius: .25rem; }
code { padding: .1em .3em; overflow-wrap: anywhere; }
pre { padding: .75rem; overflow-x: auto; }
section { border-top: 1px solid var(--line); padding: .5rem 0; }
h3 { margin: .5rem 0; font-size: 1rem; overflow-wrap: anywhere; }
h3 b { display: inline-block; min-width: 4.5rem; }
nav ul { columns: 20rem; padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
.quiet { color: var(--quiet); }
.wide { overflow-x: auto; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; }
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The value of ``content-security-policy``."""


def render(document: Json) -> bytes:
    """Renders a document of `openapi.document` as HTML."""
    body = "".join(_body(document))
    title = html.escape(document["info"]["title"])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}: API</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    ).encode()


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _groups(document: Json) -> dict[str, list[tuple[str, str, Json]]]:
    groups: dict[str, list[tuple[str, str, Json]]] = {}
    for method, path, operation in _operations(document):
        groups.setdefault(operation["tags"][0], []).append((method, path, operation))
    return groups


def _body(document: Json) -> Iterator[str]:
    info, groups = document["info"], _groups(document)
    yield '<a class="skip" href="#content">Skip to the content</a>\n<header>\n'
    yield f"<h1>{html.escape(info['title'])}: API</h1>\n<p>{html.escape(info['summary'])} "
    yield f'Version {html.escape(info["version"])}. For programs: <a href="/openapi.json">OpenAPI 3.1</a>.</p>\n'
    yield "<p>Where the gateway has keys, requests carry one: <code>Authorization: Bearer KEY</code>, or "
    yield "<code>x-api-key</code>, <code>api-key</code>, <code>x-goog-api-key</code>.</p>\n</header>\n"
    yield '<nav aria-label="Operations">\n'
    for group, operations in groups.items():
        yield f"<details><summary>{html.escape(group)} ({len(operations)})</summary>\n<ul>\n"
        for method, path, operation in operations:
            yield f'<li><a href="#{operation["operationId"]}">{method} {html.escape(path)}</a></li>\n'
        yield "</ul></details>\n"
    yield '<p><a href="#errors">Errors</a></p>\n</nav>\n<main id="content">\n'
    for group, operations in groups.items():
        yield f"<h2>{html.escape(group)}</h2>\n"
        for each in operations:
            yield from _section(*each)
    yield from _errors()
    yield "</main>\n"


def _section(method: str, path: str, operation: Json) -> Iterator[str]:
    yield f'<section id="{operation["operationId"]}">\n<h3><b>{method}</b> <code>{html.escape(path)}</code></h3>\n'
    yield f"<p>{_prose(operation['summary'])} {_prose(operation.get('description', ''))}</p>\n"
    rows = [(each["name"], each["in"], each["schema"], each.get("required", False)) for each in _parameters(operation)]
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        schema = media["schema"]
        names = schema.get("properties", {})
        rows += [(name, "body", names[name], name in schema.get("required", ())) for name in names]
        yield f'<p class="quiet">Body: <code>{html.escape(kind)}</code></p>\n'
    if rows:
        yield '<div class="wide"><table>\n<tr><th scope="col">name</th><th scope="col">in</th>'
        yield '<th scope="col">type</th></tr>\n'
        for name, where, schema, required in rows:
            kind = _kind(schema) + (", required" if required else "")
            yield f"<tr><td><code>{html.escape(name)}</code></td><td>{where}</td><td>{html.escape(kind)}</td></tr>\n"
        yield "</table></div>\n"
    answers = {code: media for code, media in operation["responses"].items() if "$ref" not in media}
    for status, answer in answers.items():
        kinds = ", ".join(f"<code>{html.escape(kind)}</code>" for kind in answer.get("content", {}))
        yield f"<p>{status}: {html.escape(answer['description'])} <span class=quiet>{kinds}</span></p>\n"
    refused = ", ".join(code for code in operation["responses"] if code not in answers)
    yield f'<p class="quiet">Errors: {refused}</p>\n'
    yield f"<pre>{html.escape(curl(method, path, operation))}</pre>\n</section>\n"


def _parameters(operation: Json) -> list[Json]:
    return list(operation.get("parameters", ()))


def _kind(schema: Mapping[str, Any]) -> str:  # Any: JSON
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    if "maximum" in schema:
        return f"{kind} from {schema.get('minimum', 0)} to {schema['maximum']}"
    return kind


def _errors() -> Iterator[str]:
    yield '<h2 id="errors">Errors</h2>\n<p>An error has a <code>code</code>, where its format has room for one.</p>\n'
    yield '<div class="wide"><table>\n<tr><th scope="col">status</th><th scope="col">code</th>'
    yield '<th scope="col">meaning</th></tr>\n'
    for status, classes in error_classes().items():
        for cls in classes:
            yield f"<tr><td>{status}</td><td><code>{cls.code}</code></td><td>{_prose(meaning(cls))}</td></tr>\n"
    yield "</table></div>\n"


def _prose(text: str) -> str:
    """Text with backticks, as HTML.

    >>> _prose("Sets `a<b`.")
    'Sets <code>a&lt;b</code>.'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def curl(method: str, path: str, operation: Json) -> str:
    """Returns a command that makes a request.

    >>> curl("GET", "/status", {"responses": {}})
    'curl http://127.0.0.1:18888/status'
    """
    # each {name} is to be replaced by people, and curl would take it for a list
    url = "http://127.0.0.1:18888" + re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), path)
    parts = ["curl", *(["-X", method] if method not in ("GET", "POST") else []), url]
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        body = content["application/json"].get("example", {})
        parts += ["-H", "'Content-Type: application/json'", "-d", f"'{json.dumps(body)}'"]
    elif content:
        parts += ["-F", "file=@FILE"]
    elif method == "POST":
        parts += ["-X", "POST"]
    return " ".join(parts)


def as_markdown(document: Json) -> bytes:
    """Renders a document of `openapi.document` as a list of its operations, in the form of llmstxt.org."""
    info = document["info"]
    lines = [f"# {info['title']}", "", f"> {info['summary']} Version {info['version']}.", ""]
    lines += [
        "The base URL for OpenAI's SDKs is `/v1` at this address. Where the gateway has keys, send one:",
        "`Authorization: Bearer KEY`. [OpenAPI 3.1](/openapi.json) has every detail, [the page](/docs) is for people.",
    ]
    for group, operations in _groups(document).items():
        lines += ["", f"## {group}", ""]
        for method, path, operation in operations:
            lines.append(f"- [{method} {path}](/docs#{operation['operationId']}): {operation['summary']}")
    return ("\n".join(lines) + "\n").encode()
