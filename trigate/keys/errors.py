"""How the gateway refuses what a key may not do. (An unknown key: `errors.Unauthenticated`.)"""

from __future__ import annotations

from trigate.errors import CallError, Forbidden


class KeyRevoked(CallError, status=401, code="key_revoked"):
    """The key was revoked while the call was in progress, or before its queued run began."""

    openai_type = "authentication_error"

    def __init__(self) -> None:
        super().__init__("The key of this call has been revoked.")


class ModelNotAllowed(Forbidden, code="model_not_allowed"):
    """The key, or its group, has a list of models without this one."""

    def __init__(self, model: str) -> None:
        what = f"the model {model[:200]!r}" if model else "this request, which names no model"
        super().__init__(
            f"This key may not use {what}. GET /v1/models lists the models that it may use.", param="model"
        )


class HookNotAllowed(Forbidden, code="hook_not_allowed"):
    """The key has a list of webhooks without this one."""

    def __init__(self, hook: str) -> None:
        super().__init__(f"This key may not call the webhook {hook[:100]!r}.")


class AdminRequired(Forbidden, code="admin_required"):
    """The request needs the admin's key (``[admin] key``)."""
