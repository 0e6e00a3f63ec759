"""What a provider says is wrong, in whichever shape it says it. Pure.

Providers agree on no shape for an error, and some report one with status 200. Three questions are answered here, for an
error response, a JSON answer and an event alike: is this value an error (`is_error`), which sentence in it says why
(`find_message`), and which status does it stand for (`reported`).

Source: the error objects of OpenAI, Anthropic, Google (also as an array of one), FastAPI (``detail``), RFC 9457
(``title``, ``detail``), Cloudflare (``errors``), MiniMax (``base_resp``), Zhipu and DashScope (``code`` with ``msg`` or
``message``), Baidu (``error_msg``), vLLM (``object: error``), Volcengine and Tencent (``Error`` in an envelope).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from trigate.errors import GatewayError, Rejected, Reported
from trigate.openai.raw_json import decode_any

_ENVELOPES = ("error", "errors", "base_resp", "responsemetadata", "response", "fault")
_SENTENCES = (
    *("message", "msg", "error_msg", "errmsg", "error_message", "status_msg", "detail", "details", "error_description"),
    *("faultstring", "description", "reason", "title", "info"),
)
_CODES = ("code", "status_code", "error_code", "status", "http_code")
_MAX_DEPTH = 6
_MAX_ITEMS = 8
_MAX_TEXT_CHARS = 500
_PAGE = re.compile(rb"<[a-z!?]", re.I)
_HEADLINE = re.compile(r"<(title|h1|h2|p|message)\b[^>]*>(.*?)</\1>", re.I | re.S)
_TAG = re.compile(r"<[^>]*>")

# What the words of an error stand for, in this order.
_MEANINGS: tuple[tuple[int, re.Pattern[str]], ...] = tuple(
    (status, re.compile(words))
    for status, words in (
        (402, r"balance|arrear|insufficient.?credit|payment|billing"),
        (429, r"rate.?limit|too.?many.?requests|throttl|quota|concurren|resource.?exhausted"),
        (401, r"api.?key|unauthori[sz]ed|authenticat|credential"),
        (403, r"forbidden|permission|access.?denied"),
        (404, r"not.?found|does not exist|no such|unknown.?model"),
        (503, r"overload|unavailable|busy|capacity"),
        (400, r"bad.?request|invalid|malformed|missing|unsupported|too.?long|context.?length|sensitive|inspection"),
    )
)


def find_message(value: object, depth: int = 0) -> str | None:
    """Finds the sentence in a decoded error body of any shape; None if there is none.

    >>> find_message([{"error": {"code": 400, "message": "no such field"}}]), find_message({"error": "busy"})
    ('no such field', 'busy')
    >>> find_message({"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]})
    'body.messages: Field required'
    >>> find_message({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}), find_message({"a": 1})
    ('insufficient balance', None)
    """
    if isinstance(value, str):
        return _inner_message(value, depth) or value.strip() or None
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, list):
        found = [find_message(item, depth + 1) for item in value[:_MAX_ITEMS]]
        return "; ".join([message for message in found if message]) or None
    if not isinstance(value, dict):
        return None
    lower = {name.lower(): inner for name, inner in value.items() if isinstance(name, str)}
    word = None
    for name in (*_ENVELOPES, *_SENTENCES):
        message = find_message(lower[name], depth + 1) if name in lower else None
        if message and name in _ENVELOPES and isinstance(lower[name], str) and " " not in message:
            word = word or message  # a code rather than a sentence, which may follow beside it
        elif message:
            loc = lower.get("loc")  # FastAPI: where in the request
            where = ".".join(map(str, loc)) if name == "msg" and isinstance(loc, list) else ""
            return f"{where}: {message}" if where else message
    return word


def _inner_message(text: str, depth: int) -> str | None:
    """The sentence of an error object that a relay has put into a text."""
    if depth > _MAX_DEPTH or not text.lstrip().startswith(("{", "[{")):
        return None
    inner = decode_any(text.encode(errors="replace"))
    return find_message(inner, depth + 1) if isinstance(inner, dict | list) else None


def error_object(error: GatewayError) -> Mapping[str, object]:
    """Returns the provider's error object that an error has kept; empty if there is none."""
    if isinstance(error, Reported):
        return error.payload
    value = decode_any(error.body) if isinstance(error, Rejected) and error.body is not None else None
    inner = value.get("error") if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def message_in(body: bytes) -> str | None:
    """Finds the sentence in an error body: JSON of any shape, a page, or plain text; None if there is none.

    >>> message_in(b"model is loading"), message_in(b"<html><title>502 Bad Gateway</title>"), message_in(b'{"a": 1}')
    ('model is loading', '502 Bad Gateway', None)
    """
    body = body.removeprefix(b"\xef\xbb\xbf").strip()
    value = decode_any(body)
    if value is not None:
        return find_message(value)
    if body[:1] in (b"{", b"[", b'"', b""):
        return None  # JSON that was cut
    try:
        text = body[: 64 * 1024].decode()
    except UnicodeDecodeError:
        return None
    if _PAGE.match(body):
        found = _HEADLINE.search(text)
        text = html.unescape(_TAG.sub(" ", found[2] if found else text))
    text = " ".join(text.replace("<", " ").split())
    return text[:_MAX_TEXT_CHARS] if text.isprintable() else None


def is_error(value: Mapping[str, Any]) -> bool:  # Any: JSON of any shape
    """Whether an object that has no part of an answer reports an error, in one of the known shapes.

    >>> is_error({"code": "1302", "msg": "slow down"}), is_error({"object": "error", "message": "no"})
    (True, True)
    >>> is_error({"base_resp": {"status_code": 0}}), is_error({"code": 0, "msg": "ok"}), is_error({"type": "ping"})
    (False, False, False)
    """
    if value.get("error") or value.get("errors") or value.get("type") == "error" or value.get("object") == "error":
        return True
    inner = value.get("base_resp")
    if isinstance(inner, dict):
        return not _means_success(inner.get("status_code"))
    if value.get("success") is False or value.keys() == {"detail"}:
        return True
    code = next((value[name] for name in ("code", "status_code", "error_code") if name in value), None)
    says = any(isinstance(value.get(name), str) for name in ("message", "msg", "error_msg", "error_message"))
    return says and not _means_success(code)


def _means_success(code: object) -> bool:
    return code in (None, "", 0, 200, "0", "200", "ok", "OK", "success", "Success")


def reported(upstream: str, value: object) -> Reported:
    """Returns the error that a provider has reported with status 200, or as an event.

    The client gets the fields of the provider's error object, and the status that its codes and words stand for.

    Args:
        value: The decoded answer or event.
    """
    fields = _encodable(_fields(value))
    message = find_message(fields.get("message")) or find_message(_encodable({"error": value}))
    message = message or f"The upstream {upstream} reported an error."
    return Reported(message, error={**fields, "message": message}, status=_status(fields, message))


def _fields(value: object) -> dict[str, Any]:  # Any: JSON of any shape
    if isinstance(value, list):
        return _fields(value[0]) if value else {}
    if not isinstance(value, dict):
        return {}
    for name in ("error", "errors"):
        inner = value.get(name)
        if isinstance(inner, dict) and inner:
            return _fields(inner) if isinstance(inner.get("error"), dict) else _without_label(inner)
        if isinstance(inner, list) and inner:
            return _fields(inner)
    holder = value["base_resp"] if isinstance(value.get("base_resp"), dict) else value
    code = next((holder[name] for name in _CODES if holder.get(name) is not None), None)
    fields = {} if code is None else {"code": code}
    return fields | _without_label({name: value[name] for name in ("type", "message", "param") if name in value})


def _without_label(fields: dict[str, Any]) -> dict[str, Any]:  # Any: JSON of any shape
    """The fields without ``type: error``, which is no type of an error."""
    return {name: value for name, value in fields.items() if (name, value) != ("type", "error")}


def _encodable(value: dict[str, Any]) -> dict[str, Any]:  # Any: JSON of any shape
    """The value with a question mark for each lone surrogate, which JSON can express and UTF-8 cannot; empty for one
    that cannot be encoded again."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return {}
    return found


def _status(fields: Mapping[str, Any], message: str) -> int:
    """The status that an error stands for; 502 if it does not say."""
    for name in _CODES:
        code = fields.get(name)
        number = int(code) if isinstance(code, str) and code.isdecimal() and len(code) == 3 else code
        if type(number) is int and 400 <= number < 600:
            return number if number < 500 else 503 if number in (503, 529) else 502
    words = " ".join(str(fields.get(name, "")) for name in ("code", "type", "status")) + " " + message
    return next((status for status, meaning in _MEANINGS if meaning.search(words.lower())), 502)
