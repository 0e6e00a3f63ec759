"""The fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.scripted_upstream import open_upstream


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """The base URL of a provider for the gateways of one module."""
    with open_upstream() as url:
        yield url
