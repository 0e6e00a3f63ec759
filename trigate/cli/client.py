"""Requests of `trigate models`, `status` and `chat` to a running gateway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx2

from trigate.cli.status_view import printable


class RequestFailed(Exception):
    """The gateway was not reached, or refused the request, or the server is no gateway. The message is for people."""


def client_settings(url: str, key: str | None, *, read_timeout_s: float = 600.0) -> dict[str, Any]:
    """Returns the arguments of an `httpx2.Client`, or an `httpx2.AsyncClient`, for a gateway.

    Args:
        url: With or without ``/v1``, so that the base URL of the SDKs works too.
        key: None or empty = the gateway needs no key.

    Raises:
        RequestFailed: The URL is invalid, or the key has characters that a header cannot carry.
    """
    key = key and key.strip()  # the gateway strips its keys too
    if key and not (key.isascii() and key.isprintable()):
        # the message does not quote the key
        raise RequestFailed("the key has characters that an HTTP header cannot carry.")
    try:
        if httpx2.URL(url).scheme not in ("http", "https"):
            raise httpx2.InvalidURL("it does not begin with http:// or https://")
    except httpx2.InvalidURL as error:
        raise RequestFailed(f"{url!r} is not a URL: {error}.") from error
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx2.Timeout(read_timeout_s, connect=5.0),
        "trust_env": False,
    }


@contextlib.contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Raises a `RequestFailed` where httpx2 raises an error because it gets no response."""
    try:
        yield
    except httpx2.RequestError as error:
        reason = printable(str(error)) or type(error).__name__
        raise RequestFailed(f"cannot reach {url}: {reason}. Is `trigate serve` running there?") from error


def body_of(response: httpx2.Response, url: str) -> dict[str, Any]:
    """Returns the JSON object of a response.

    Raises:
        RequestFailed: The status is not 200, or the body is not a JSON object.
    """
    if response.status_code != 200:
        raise RequestFailed(message_of(response))
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise not_a_gateway(url)
    return body


def not_a_gateway(url: str, why: str | None = None) -> RequestFailed:
    """Makes the error for a server that does not answer as a gateway does.

    Args:
        why: What is wrong with an answer that resembles that of a gateway; None = it does not resemble one.
    """
    version = f" of this version: {why}" if why is not None else ""
    return RequestFailed(f"what answers at {url} is not a Trigate gateway{version}.")


def message_of(response: httpx2.Response) -> str:
    """Returns the status and the message of an error response, in one line."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:300].strip()
    return f"{response.status_code}: {printable(message)}"


def request(url: str, key: str | None, *paths: str, method: str = "GET", body: Any = None) -> list[dict[str, Any]]:
    """Requests each path in turn, on one connection, and returns the bodies.

    Args:
        body: Sent with each request, as JSON; None = nothing.

    Raises:
        RequestFailed: A request failed; the paths after it are not requested.
    """
    with httpx2.Client(**client_settings(url, key)) as client, translated_errors(url):
        return [body_of(client.request(method, path, json=body), url) for path in paths]
