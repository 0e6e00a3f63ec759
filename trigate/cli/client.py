"""A running gateway, as `trigate models`, `status` and `chat` ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx2

from trigate.cli.status_view import printable


class AskFailed(Exception):
    """The gateway was not reached, or refused, or is none; its words are for people."""


def settings(url: str, key: str | None, *, read_timeout_s: float = 600.0) -> dict[str, Any]:
    """What an `httpx2.Client`, or an `httpx2.AsyncClient`, of a gateway is made with.

    Args:
        url: With or without ``/v1``: the base URL of the SDKs will do too.
        key: None, or empty = it wants none.

    Raises:
        AskFailed: The URL is none, or the key cannot stand in a header.
    """
    key = key and key.strip()  # as the gateway takes it
    if key and not (key.isascii() and key.isprintable()):
        raise AskFailed("the key has characters that an HTTP header cannot carry.")  # and is not quoted here
    try:
        if httpx2.URL(url).scheme not in ("http", "https"):
            raise httpx2.InvalidURL("it does not begin with http:// or https://")
    except httpx2.InvalidURL as error:
        raise AskFailed(f"{url!r} is not a URL: {error}.") from error
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx2.Timeout(read_timeout_s, connect=5.0),
        "trust_env": False,
    }


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Makes an `AskFailed` of what httpx2 raises where no answer comes."""
    try:
        yield
    except httpx2.RequestError as error:
        words = printable(str(error)) or type(error).__name__
        raise AskFailed(f"cannot reach {url}: {words}. Is `trigate serve` running there?") from error


def body_of(response: httpx2.Response, url: str) -> dict[str, Any]:
    """The object that a gateway answers with.

    Raises:
        AskFailed: It refused, or it is no gateway.
    """
    if response.status_code != 200:
        raise AskFailed(message_of(response))
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise no_gateway(url)
    return body


def no_gateway(url: str, why: str | None = None) -> AskFailed:
    """Something answers, but not as a gateway does, or not as one of this version does."""
    version = f" of this version: {why}" if why is not None else ""
    return AskFailed(f"what answers at {url} is not a Trigate gateway{version}.")


def message_of(response: httpx2.Response) -> str:
    """The status and the words of a refusal."""
    try:
        words = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = response.text[:300].strip()
    return f"{response.status_code}: {printable(words)}"


def ask(url: str, key: str | None, *paths: str, method: str = "GET") -> list[dict[str, Any]]:
    """Asks each path in turn, on one connection; gives what the gateway said.

    Raises:
        AskFailed: To one of them, it did not say anything of use.
    """
    with httpx2.Client(**settings(url, key)) as client, translated(url):
        return [body_of(client.request(method, path), url) for path in paths]
