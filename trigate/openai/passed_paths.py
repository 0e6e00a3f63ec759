"""The paths of OpenAI's API that are passed through to one upstream: files, uploads, batches and so on. Pure.

The gateway does not know what such a request means. It knows what it needs to choose the upstream: whether the request
names a model, and which part of the path is the id of an *object*, which one upstream has given out.

Source: OpenAI's API reference; ``/rerank`` as Cohere, Jina and vLLM have it.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal
from urllib.parse import quote

import attrs

from trigate.openai.endpoints import Endpoint, make_endpoint

Method = Literal["GET", "POST", "DELETE"]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,255}\Z")
_REST = "{rest}"
"""The last segment of a path below which everything is passed through."""
_MAX_SEGMENTS = 12
ADMINISTRATION = (
    *("organization", "organizations", "projects", "fine_tuning", "fine-tunes", "evals", "threads", "assistants"),
)
"""Parts of OpenAI's API that concern an account, or that OpenAI has retired. No gateway can share them out."""


@attrs.frozen(kw_only=True)
class PassedPath:
    """A path that is passed through, for some methods.

    Attributes:
        endpoint: Its path has ``{id}`` in place of an object's id. The ledger, the circuit breakers and ``endpoints``
            of an upstream know it by this path.
        methods: Those that it is served for.
        by_model: The request names a model, in its body or in its query, as calls do.
        makes: A ``POST`` makes an object, whose id is in the answer.
        lists: A ``GET`` lists the objects of this path.
        names_objects: A JSON body may have ids of objects in it.
    """

    endpoint: Endpoint
    methods: tuple[Method, ...]
    by_model: bool = False
    makes: bool = False
    lists: bool = False
    names_objects: bool = True

    @property
    def streams(self) -> bool:
        """Whether its answer may be a stream of events."""
        return self.endpoint.repeats_last_event


@attrs.frozen(kw_only=True)
class Passed:
    """A request that is passed through.

    Attributes:
        found: Its path.
        method: Its method, which need not be one of those that are served.
        object_id: The id of the object in its path; None = there is none.
        path: Where it goes, below the upstream's base URL, percent-encoded.
    """

    found: PassedPath
    method: str
    object_id: str | None
    path: str


def _path(
    path: str,
    *methods: Method,
    ends: tuple[str, ...] = (),
    model_optional: bool = False,
    by_model: bool = False,
    makes: bool = False,
    lists: bool = False,
    names_objects: bool = True,
) -> PassedPath:
    endpoint = make_endpoint(
        path,
        *ends,
        answer="bytes",
        model_optional=model_optional or not by_model,
        repeats_last_event=bool(ends),
        counts_tokens=False,
        makes_images=path.startswith("/images/"),
    )
    return PassedPath(
        endpoint=endpoint, methods=methods, by_model=by_model, makes=makes, lists=lists, names_objects=names_objects
    )


PASSED: tuple[PassedPath, ...] = (
    _path("/audio/transcriptions", "POST", by_model=True, ends=("transcript.text.done",)),
    _path("/audio/translations", "POST", by_model=True, ends=("transcript.text.done",)),
    _path("/images/edits", "POST", by_model=True, model_optional=True, ends=("image_edit.completed",)),
    _path("/images/variations", "POST", by_model=True, model_optional=True),
    _path("/rerank", "POST", by_model=True, names_objects=False),
    _path("/files", "GET", "POST", makes=True, lists=True),
    _path("/files/{id}", "GET", "DELETE"),
    _path("/files/{id}/content", "GET"),
    _path("/uploads", "POST", makes=True),
    _path("/uploads/{id}/parts", "POST"),
    _path("/uploads/{id}/complete", "POST"),
    _path("/uploads/{id}/cancel", "POST"),
    _path("/batches", "GET", "POST", makes=True, lists=True),
    _path("/batches/{id}", "GET"),
    _path("/batches/{id}/cancel", "POST"),
    _path("/vector_stores", "GET", "POST", makes=True, lists=True),
    _path("/vector_stores/{id}", "GET", "POST", "DELETE"),
    _path("/vector_stores/{id}/{rest}", "GET", "POST", "DELETE"),
    _path("/chat/completions", "GET", lists=True),
    _path("/chat/completions/{id}", "GET", "POST", "DELETE"),
    _path("/chat/completions/{id}/messages", "GET"),
    _path("/responses/compact", "POST", by_model=True, model_optional=True),
    _path("/responses/input_tokens", "POST", by_model=True, model_optional=True),
    _path(
        "/responses/{id}",
        "GET",
        "DELETE",
        ends=("response.completed", "response.incomplete", "response.failed"),
    ),
    _path("/responses/{id}/cancel", "POST"),
    _path("/responses/{id}/input_items", "GET"),
    _path("/conversations", "POST", makes=True),
    _path("/conversations/{id}", "GET", "POST", "DELETE"),
    _path("/conversations/{id}/{rest}", "GET", "POST", "DELETE"),
)
"""In the order in which they are compared: a name comes before the id that could be in its place."""

REALTIME = make_endpoint("/realtime", answer="bytes", model_optional=True, counts_tokens=False)
"""The WebSocket. It is none of `PASSED`, as its handshake is no request for an answer."""


def find_passed(method: str, path: str) -> Passed | None:
    """Finds the path of a request among those that are passed through; None = it is none of them, or a call.

    Slashes too many, ``/v1`` twice and a missing ``/v1`` do not matter, as for calls (`asgi.paths`).

    Args:
        path: Decoded from its percent encoding.

    >>> found = find_passed("GET", "/v1/files/file-1/content")
    >>> found.path, found.found.endpoint.path, found.object_id
    ('/files/file-1/content', '/files/{id}/content', 'file-1')
    >>> find_passed("GET", "/v1/models"), find_passed("POST", "/v1/chat/completions")
    (None, None)
    """
    segments = _segments(path)
    if not segments or len(segments) > _MAX_SEGMENTS:
        return None
    for each in _BY_NAME.get(segments[0], ()):
        object_id = _match(each, segments)
        if object_id is not None:
            if each.endpoint.path == "/chat/completions" and method not in each.methods:
                return None
            went = "/" + "/".join([quote(segment, safe="~:") for segment in segments])
            return Passed(found=each, method=method, object_id=object_id or None, path=went)
    return None


def is_realtime(path: str) -> bool:
    """Whether a path is that of `REALTIME`.

    >>> is_realtime("/v1/realtime"), is_realtime("/v1/responses")
    (True, False)
    """
    return _segments(path) == ["realtime"]


def is_administration(path: str) -> bool:
    """Whether a path belongs to `ADMINISTRATION`.

    >>> is_administration("/v1/organization/users"), is_administration("/v1/files")
    (True, False)
    """
    return next(iter(_segments(path)), "") in ADMINISTRATION


def _segments(path: str) -> list[str]:
    """The parts of a path behind its ``v1``.

    >>> _segments("//v1/v1/files/"), _segments("/openai/v1/files")
    (['files'], ['files'])
    """
    segments = [segment for segment in path.split("/") if segment]
    if segments[:2] == ["openai", "v1"]:
        del segments[0]
    return list(itertools.dropwhile(lambda segment: segment == "v1", segments))


_BY_NAME: dict[str, list[PassedPath]] = {}
for _each in PASSED:
    _BY_NAME.setdefault(_each.endpoint.path.split("/")[1], []).append(_each)


def _match(path: PassedPath, segments: list[str]) -> str | None:
    """Returns the object's id in a path, or an empty text if it has none; None = the path is another one."""
    pattern = path.endpoint.path[1:].split("/")
    found = ""
    if pattern[-1] == _REST:
        pattern.pop()
        if len(segments) <= len(pattern) or not all(_ID.match(segment) for segment in segments[len(pattern) :]):
            return None
    elif len(segments) != len(pattern):
        return None
    for part, segment in zip(pattern, segments, strict=False):
        if part == "{id}" and _ID.match(segment):
            found = segment
        elif part != segment:
            return None
    return found


def objects_in(value: Any) -> tuple[str, ...]:  # Any: JSON of any shape
    """Returns the texts in a JSON value that may be ids of objects.

    A provider's ids have no common form. A text that looks like an id and is none does no harm: only an id that is
    known to be another key's, or at another upstream, matters.

    >>> objects_in({"input_file_id": "file-a", "n": ["vs_b", {"x": "file-a"}, 7], "t": "the file-c"})
    ('file-a', 'vs_b')
    """
    found: dict[str, None] = {}
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left += reversed(each.values())
        elif isinstance(each, list):
            left += reversed(each)
        elif isinstance(each, str) and _ID.match(each):
            found[each] = None
    return tuple(found)
