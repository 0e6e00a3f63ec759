"""The betas of a request: features that a client switches on by the header ``anthropic-beta``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

BETA = "anthropic-beta"


def with_betas(headers: Mapping[str, str], allowed: Collection[str]) -> Mapping[str, str]:
    """Returns the headers with those betas only that an upstream takes: some refuse a request with one that they do not
    know.

    >>> with_betas({"anthropic-beta": "a-1, b-2", "x": "y"}, ("b-2",)), with_betas({"anthropic-beta": "a-1"}, ())
    ({'anthropic-beta': 'b-2', 'x': 'y'}, {})
    """
    if BETA not in headers:
        return headers
    given = [each.strip() for each in headers[BETA].split(",")]
    kept = [beta for beta in given if beta in allowed]
    if kept == given:
        return headers
    rest = {name: value for name, value in headers.items() if name != BETA}
    return {BETA: ",".join(kept), **rest} if kept else rest
