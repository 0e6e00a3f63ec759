"""The models that an upstream lists: decodes ``GET /models``, and polls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import trio

from trigate.errors import GatewayError, ProtocolViolation, Rejected, UpstreamTimeout
from trigate.logs import log
from trigate.openai.raw_json import decode_any
from trigate.upstream.upstream import Upstream

MAX_MODEL_LIST_BYTES = 16 * 1024 * 1024

REFRESH_S = 60.0
"""How often an upstream is asked for its models."""

RETRY_S = 5.0
"""Half the pause after a failure at the start. The pause doubles with each further failure, up to `REFRESH_S`."""

_TIMEOUT_S = 10.0

_PATHS = {"anthropic": "/models?limit=1000", "gemini": "/models?pageSize=1000", "ollama": "/api/tags"}
"""By the kind of the upstream. Anthropic and Google give a page; this is the longest one."""
_MAX_PAGES = 20


_MAX_ID_CHARS = 4096
_PASSED_FIELDS = (
    *("created", "owned_by", "name", "display_name", "description", "type"),
    *("context_length", "context_window", "max_context_length", "max_model_len"),
    *("max_tokens", "max_output_tokens", "max_completion_tokens", "meta", "pricing", "architecture", "capabilities"),
    *("features", "modalities", "input_modalities", "output_modalities", "supported_parameters"),
    *("supported_features", "top_provider"),
)

_GOOGLE_FIELDS = {
    "displayName": "display_name",
    "description": "description",
    "inputTokenLimit": "context_length",
    "outputTokenLimit": "max_output_tokens",
}
_GOOGLE_METHODS = {"generateContent", "embedContent"}

ModelFields = Mapping[str, Any]
"""What an upstream says about one of its models (Any: JSON)."""


def decode_model_list(body: bytes) -> dict[str, ModelFields]:
    """Returns the ids in an answer to ``GET /models``, in their order, each with the fields that clients look for.

    The list is in ``data``, in ``models`` with names for ids (Ollama), or the body itself (Together). Rows without an
    ``id`` are skipped. Google's ids begin with ``models/``, which calls do not need.

    >>> decode_model_list(b'[{"id": "models/m", "context_length": 8192, "x": 1}, {"id": 5}, null]')
    {'m': {'context_length': 8192}}

    Raises:
        ValueError: The body is not a model list.
    """
    rows = decode_any(body)
    if isinstance(rows, dict) and "data" in rows:
        rows = rows["data"] or []
    elif isinstance(rows, dict) and isinstance(rows.get("models"), list):
        rows = [{**row, "id": row.get("model")} for row in rows["models"] if isinstance(row, dict)]
    if not isinstance(rows, list):
        raise ValueError("it is neither an array nor an object with data")
    found: dict[str, ModelFields] = {}
    for row in rows:
        id_ = row.get("id") if isinstance(row, dict) else None
        if isinstance(id_, str) and 0 < len(id_) <= _MAX_ID_CHARS and id_.isprintable():
            passed = {name: row[name] for name in _PASSED_FIELDS if row.get(name) is not None}
            found.setdefault(id_.removeprefix("models/") or id_, passed)
    return found


def decode_google_list(body: bytes) -> tuple[dict[str, ModelFields], str | None]:
    """Returns a page of Google's list, under the names of the fields that clients look for; and the token of the next
    page, if there is one. Models that serve neither texts nor embeddings are skipped.

    >>> decode_google_list(b'{"models": [{"name": "models/m", "inputTokenLimit": 9}], "nextPageToken": "t"}')
    ({'m': {'context_length': 9}}, 't')

    Raises:
        ValueError: The body is not a model list.
    """
    value = decode_any(body)
    if not isinstance(value, dict) or "error" in value or not isinstance(value.get("models", []), list):
        raise ValueError("it is no object with models")
    found: dict[str, ModelFields] = {}
    for row in value.get("models", []):
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_ID_CHARS or not name.isprintable():
            continue
        methods = row.get("supportedGenerationMethods")
        if isinstance(methods, list) and not _GOOGLE_METHODS.intersection(map(str, methods)):
            continue
        passed = {own: row[given] for given, own in _GOOGLE_FIELDS.items() if row.get(given) is not None}
        found.setdefault(name.removeprefix("models/") or name, passed)
    token = value.get("nextPageToken")
    return found, token if isinstance(token, str) and token else None


class ModelPoll:
    """Keeps the list of models of an upstream up to date, and with it the upstream's state.

    While the upstream does not answer, its last list stays in use. An upstream that answers, but has no list, or none
    for this key, is not down: whether it serves calls, only calls can tell.

    Args:
        on_change: Called after each list that was received. Synchronous.

    Attributes:
        tried: Set after the first request to the upstream, whether it succeeded or not.
    """

    def __init__(self, upstream: Upstream, on_change: Callable[[], None]) -> None:
        self._upstream = upstream
        self._on_change = on_change
        self.tried = trio.Event()
        self._warned: str | None = None
        upstream.polled = True

    def __repr__(self) -> str:
        return f"<ModelPoll of {self._upstream.name}>"

    async def run(self) -> None:
        """Asks the upstream again and again, until it is cancelled."""
        upstream = self._upstream
        pause_s = RETRY_S
        while True:
            try:
                await self._ask()
                upstream.note_up()
                self._warned = None
                pause_s = REFRESH_S
            except GatewayError as error:
                if isinstance(error, Rejected | ProtocolViolation):
                    upstream.note_unlisted(error)
                elif error.blame != "gateway":
                    upstream.note_down(error)
                has_no_list = isinstance(error, Rejected) and error.status in (404, 405, 501)
                if not has_no_list and self._warned != error.message:
                    log.warning("models_not_listed", upstream=upstream.name, error=error.message)
                    self._warned = error.message
                pause_s = min(pause_s * 2, REFRESH_S)
            except Exception:  # a defect in the poll of one upstream must not stop the others
                log.exception("models_refresh_crashed", upstream=upstream.name)
                pause_s = REFRESH_S
            self.tried.set()
            await trio.sleep(pause_s)

    async def _ask(self) -> None:
        upstream = self._upstream
        with trio.move_on_after(_TIMEOUT_S):
            path = first = _PATHS.get(upstream.config.kind, "/models")
            found: dict[str, ModelFields] = {}
            for _ in range(_MAX_PAGES):
                page, token = self._decode(await self._read(path))
                found |= page
                if token is None:
                    break
                path = f"{first}&pageToken={quote(token, safe='')}"
            upstream.model_fields = found
            upstream.models = tuple(found)
            self._on_change()
            return
        raise UpstreamTimeout(
            f"GET /models of {upstream.name} was not answered within {_TIMEOUT_S:g} s.", phase="response_head"
        )

    async def _read(self, path: str) -> bytes:
        async with self._upstream.open("GET", path) as reply:
            if reply.status != 200:
                raise await self._upstream.error_of(reply)
            return await reply.read(MAX_MODEL_LIST_BYTES)

    def _decode(self, body: bytes) -> tuple[dict[str, ModelFields], str | None]:
        """Returns a page of the list, and the token of the next one; None = it is the last one.

        Raises:
            ProtocolViolation: It is no list.
        """
        try:
            if self._upstream.config.kind == "gemini":
                return decode_google_list(body)
            return decode_model_list(body), None
        except ValueError as error:
            raise ProtocolViolation(f"GET /models of {self._upstream.name} gave no model list: {error}.") from None
