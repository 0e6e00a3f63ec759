"""The list of models in Anthropic's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def encode_model(model: str, created_at: str) -> dict[str, Any]:  # Any: JSON of any shape
    """Returns one model.

    Args:
        created_at: When it was added, as RFC 3339 has it.
    """
    return {
        "type": "model",
        "id": model,
        "display_name": model,
        "created_at": created_at,
        "lifecycle": "active",
        "max_input_tokens": None,
        "max_tokens": None,
    }


def encode_model_list(
    models: Iterable[str], created_at: str, *, limit: int, after: str | None = None, before: str | None = None
) -> dict[str, Any]:  # Any: JSON of any shape
    """Returns a page of models.

    Args:
        limit: The most models of the page.
        after, before: The page begins behind this model, or ends before it. An unknown one gives an empty page.

    >>> page = encode_model_list(["a", "b", "c"], "2026-01-01T00:00:00Z", limit=1, after="a")
    >>> [model["id"] for model in page["data"]], page["has_more"], page["first_id"]
    (['b'], True, 'b')
    """
    ids = list(models)
    if after is not None:
        ids = ids[ids.index(after) + 1 :] if after in ids else []
    if before is not None:
        ids = ids[: ids.index(before)] if before in ids else []
        page = ids[-limit:]
    else:
        page = ids[:limit]
    return {
        "data": [encode_model(model, created_at) for model in page],
        "has_more": len(page) < len(ids),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }
